"""Scales of what a narrowing leaves: right where they can be, never worse, the same however it is carried out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, build
from heal.refit.test_narrower import narrowed, windows
from torch import Tensor

from billhook.anatomy import discover
from billhook.data import Windows
from billhook.export.huggingface import save
from billhook.heal import Healing, healed, mask_tuning
from billhook.heal.refit.mask_tuning import _Tuning
from billhook.plan.address import Address
from billhook.plan.errors import InputError
from billhook.plan.plan import Keep, Plan
from billhook.surgery import apply, simulate
from billhook.surgery.reopen import load

#: Fused reads, Conv1D, a parallel block, norms behind the writes, experts beside attention.
ALL = ["llama", "gpt2", "falcon", "gemma2", "qwen3_moe"]


@pytest.mark.parametrize("name", ALL)
def test_the_kept_columns_are_scaled_and_all_agree(name: str, tmp_path: Path) -> None:
    model = build(name)
    anatomy = discover(model)
    gone = [] if anatomy.stacks[0].blocks[2].parallel else [Address("decoder", 2, "mlp")]
    plan = Plan.of([*gone, "decoder.1"], "remote", narrowed(anatomy, [*gone, Address("decoder", 1)]))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = mask_tuning(model, anatomy, plan, windows())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items()), "the model stays"
    assert found.refits and found.cut is not None and found.healed is not None
    assert all(refit.after <= refit.before for refit in found.refits)
    assert found.refused != (found.healed < found.cut) and (not found.refused or not found.tensors)
    for weight, new in found.tensors.items():
        assert ratios_are_of_units(before[weight], new), weight
    inputs = FAMILIES[name].inputs(model, 3, "left")
    with torch.no_grad(), healed(model, found):
        with simulate(model, anatomy, plan):
            expected = model(**inputs).logits
        small = apply(model, anatomy, plan)
        save(small, anatomy, plan, tmp_path)
        torch.testing.assert_close(small(**inputs).logits, expected)
        torch.testing.assert_close(load(tmp_path).model(**inputs).logits, expected)


def ratios_are_of_units(old: Tensor, new: Tensor) -> bool:
    """Each input's entries are all multiplied with one number."""
    ratio = new / old
    return any(torch.allclose(ratio, ratio.mean(axis, keepdim=True), rtol=1e-3, atol=1e-3) for axis in (0, 1))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_what_a_twin_wrote_is_taken_over(name: str) -> None:
    """Two neurons that always fire alike, written alike: without the second the first has to write twice as much."""
    model = build(name)
    anatomy = discover(model)
    unit = Address("decoder", 1, "mlp")
    (inner,) = anatomy.inner[unit]
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for piece in inner.slices:
            tensor = weights[piece.parameter].movedim(piece.axis, 0)
            tensor[piece.start + 1] = tensor[piece.start]
    keep = Keep(unit=unit, inner="neuron", indices=tuple(i for i in range(inner.count) if i != 1))
    found = mask_tuning(model, anatomy, Plan.of([], keeps=[keep]), windows())
    (piece,) = (piece for piece in inner.slices if piece.writes)
    old, new = weights[piece.parameter].movedim(piece.axis, 0), found.tensors[piece.parameter].movedim(piece.axis, 0)
    torch.testing.assert_close(new[0], 2 * old[0], rtol=0.02, atol=0.02)
    torch.testing.assert_close(new[2:], old[2:], rtol=0.1, atol=0.05)
    assert found.healed is not None and found.cut is not None and found.healed < 0.01 * found.cut


def test_refusals() -> None:
    model = build("llama")
    anatomy = discover(model)
    with pytest.raises(InputError, match="narrows nothing"):
        mask_tuning(model, anatomy, Plan.of(["decoder.1"]), windows())
    with pytest.raises(InputError, match="two windows"):
        mask_tuning(model, anatomy, Plan.of([], keeps=narrowed(anatomy)), windows(1))


def test_no_fit_sees_what_is_held_back(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Tensor, Tensor]] = []
    monkeypatch.setattr(_Tuning, "_solved", lambda self, part, table, held, tokens: seen.append((table, held)))
    model = build("llama")
    anatomy = discover(model)
    ids = windows(16).ids
    for text in (ids, torch.cat([ids[:14], windows(2, seed=9).ids])):
        mask_tuning(model, anatomy, Plan.of([], keeps=narrowed(anatomy)), Windows.of(text, "test"))
    for (table, held), (again, other) in zip(seen[: len(seen) // 2], seen[len(seen) // 2 :], strict=True):
        torch.testing.assert_close(again, table)
        assert not torch.allclose(other, held)


def test_the_reported_error_is_that_behind_what_is_healed_so_far() -> None:
    """On what is held back, relative to the stream token by token."""
    model = build("llama")
    anatomy = discover(model)
    one, two = (
        Keep(unit=Address("decoder", block, "mlp"), inner="neuron", indices=tuple(range(0, 48, 2))) for block in (1, 2)
    )
    found = mask_tuning(model, anatomy, Plan.of([], keeps=[one, two]), windows(64))
    first, second = (f"model.layers.{block}.mlp.down_proj.weight" for block in (1, 2))
    assert [refit.weight for refit in found.refits] == [first, second] and first in found.tensors

    def stream(block: int, keeps: list[Keep], *names: str) -> Tensor:
        seen: list[Any] = []
        handle = model.get_submodule(f"model.layers.{block}").register_forward_hook(lambda *at: seen.append(at[-1]))
        healing = Healing({name: found.tensors[name] for name in names if name in found.tensors}, (), {}, 0, 0)
        with torch.no_grad(), healed(model, healing), simulate(model, anatomy, Plan.of([], keeps=keeps)):
            model(windows(64).ids[56:])
        handle.remove()
        out: Tensor = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
        return out

    for refit, whole, cut, now in (
        (found.refits[0], stream(1, []), stream(1, [one]), stream(1, [one], first)),
        (found.refits[1], stream(2, [one], first), stream(2, [one, two], first), stream(2, [one, two], first, second)),
    ):
        errors = [((s - whole).square().sum(-1) / whole.square().sum(-1)).mean().item() for s in (cut, now)]
        assert [refit.before, refit.after] == pytest.approx(errors, rel=1e-3)
