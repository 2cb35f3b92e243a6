from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from families import build

from billhook.anatomy import discover
from billhook.data import Windows
from billhook.heal import closed_form
from billhook.heal.refit.on_disk import on_disk
from billhook.plan.address import Address
from billhook.plan.errors import InputError


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_same_values_and_a_tensor_like_any_other(dtype: torch.dtype, tmp_path: Path) -> None:
    tensor = torch.randn(6, 5, dtype=dtype).T
    kept = on_disk(tensor)
    assert torch.equal(kept, tensor) and kept.dtype == dtype
    kept.mul_(2)
    assert torch.equal(kept, tensor * 2)
    assert torch.equal(on_disk(torch.zeros(0, 3)), torch.zeros(0, 3))


def test_new_weights_are_no_memory_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is what a file holds: nothing of the healing but the result is alive, and that is mapped."""
    kept: list[torch.Tensor] = []
    monkeypatch.setattr("billhook.heal.refit.walk.on_disk", lambda tensor: kept.append(on_disk(tensor)) or kept[-1])
    model = build("llama")
    ids = torch.randint(0, 90, (8, 12), generator=torch.Generator().manual_seed(0))
    healing = closed_form(model, discover(model), [Address("decoder", 1)], Windows.of(ids, "test"))
    mapped = {tensor.data_ptr() for tensor in kept}
    assert healing.tensors and all(tensor.data_ptr() in mapped for tensor in healing.tensors.values())


def test_where_nothing_can_be_written_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    with pytest.raises(InputError, match="new weights cannot be kept in"):
        on_disk(torch.ones(3))
