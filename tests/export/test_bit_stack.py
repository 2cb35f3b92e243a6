"""A stack of blocks: exact where the definition is, nearer with every byte, an ordinary checkpoint in the end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, build

from billhook.anatomy import discover
from billhook.export.bit_stack import _ranked, blocks_of, loaded, stack, unstack
from billhook.plan.errors import InputError
from billhook.plan.plan import Plan
from billhook.surgery import apply
from billhook.surgery.reopen import load

NAMES = [name for name, family in FAMILIES.items() if family.generates]


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def batch(name: str, model: Any) -> list[dict[str, torch.Tensor]]:
    return [FAMILIES[name].inputs(model, 2, None)]


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (7, 9)])
def test_a_block_is_signs_and_a_magnitude_and_takes_away_what_it_says(shape: tuple[int, int]) -> None:
    weight = drawn(*shape)
    left = weight.clone()
    for block, gain in blocks_of(weight, rank=3, levels=4):
        assert torch.equal(block.signs, left >= 0) and block.left.shape == (shape[0], 3)
        u, s, v = torch.linalg.svd(left.abs(), full_matrices=False)
        torch.testing.assert_close(block.matrix().abs(), (u[:, :3] * s[:3] @ v[:3]).abs(), atol=5e-3, rtol=5e-3)
        after = left - block.matrix()
        assert gain == pytest.approx((left.square().sum() - after.square().sum()).item(), rel=1e-4)
        again = loaded(block.dumps(), *shape, 3)
        assert torch.equal(again.matrix(), block.matrix())
        assert len(block.dumps()) == -(-shape[0] * shape[1] // 8) + 6 * sum(shape)
        left = after
    assert left.norm() < 0.4 * weight.norm()


def test_blocks_stand_in_the_order_of_what_they_gain_for_a_byte_and_never_before_their_first() -> None:
    order = [content for _, content in _ranked({"a": [(0.5, b"A"), (0.1, b"B")], "b": [(0.6, b"CC"), (0.5, b"DD")]})]
    assert order == [b"A", b"CC", b"DD", b"B"]
    order = [content for _, content in _ranked({"a": [(0.1, b"A"), (0.9, b"B")], "b": [(0.2, b"C")]})]
    assert order == [b"C", b"A", b"B"]


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_more_bytes_are_nearer_and_plain_transformers_loads_it(name: str, tmp_path: Path) -> None:
    model = build(name)
    anatomy = discover(model)
    stack(model, anatomy, batch(name, model), tmp_path / "stack", levels=6)
    whole = sum(path.stat().st_size for path in (tmp_path / "stack").iterdir())
    rest = (tmp_path / "stack" / "rest.safetensors").stat().st_size
    x = FAMILIES[name].inputs(model, 3, None)
    dense = model(**x).logits
    off = []
    for number, size in enumerate((rest + (whole - rest) // 3, whole)):
        out = tmp_path / str(number)
        read = unstack(tmp_path / "stack", out, size=size)
        assert rest < read <= size
        again = load(out).model
        assert type(again) is type(model) and again.dtype == model.dtype
        off.append((again(**x).logits - dense).square().mean() / dense.square().mean())
    assert off[1] < 0.5 * off[0], off
    stock, info = type(model).from_pretrained(tmp_path / "1", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    torch.testing.assert_close(stock.eval()(**x).logits, again(**x).logits, atol=1e-5, rtol=1e-5)


def test_a_file_that_is_cut_off_is_a_smaller_model(tmp_path: Path) -> None:
    model = build("llama")
    folder = stack(model, discover(model), batch("llama", model), tmp_path / "stack", levels=2)
    blocks = folder / "blocks.bin"
    content = blocks.read_bytes()
    size = (folder / "rest.safetensors").stat().st_size + len(content) // 2
    unstack(folder, tmp_path / "asked", size=size)
    blocks.write_bytes(content[: len(content) // 2])
    unstack(folder, tmp_path / "left", size=10**9)
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("asked", "left"))
    assert one == other
    assert not (tmp_path / "left" / "stack.json").exists()


def test_what_is_refused(tmp_path: Path) -> None:
    model = build("llama")
    anatomy = discover(model)
    folder = stack(model, anatomy, batch("llama", model), tmp_path / "stack", levels=1)
    with pytest.raises(InputError, match=r"^1,000 bytes are too few"):
        unstack(folder, tmp_path / "out", size=1000)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no stack"):
        unstack(tmp_path / "empty", tmp_path / "out", size=10**9)
    index = json.loads((folder / "stack.json").read_text())
    path = index["linears"][0]
    odd_shape = {**index, "shapes": {**index["shapes"], path: [3, 5]}}
    odd_order = {**index, "blocks": [[99, 8]]}
    for damaged in ([], odd_shape, odd_order, {**index, "dtype": "load"}):
        (folder / "stack.json").write_text(json.dumps(damaged))
        with pytest.raises(InputError, match="holds no stack"):
            unstack(folder, tmp_path / "out", size=10**9)
    (folder / "stack.json").write_text(json.dumps(index))
    for name in ("rest.safetensors", "blocks.bin"):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:100]) if name.startswith("rest") else (folder / name).unlink()
        with pytest.raises(InputError, match="holds no stack"):
            unstack(folder, tmp_path / "out", size=10**9)
        (folder / name).write_bytes(content)
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="already exists"):
        stack(model, anatomy, batch("llama", model), folder)
    cut = apply(model, anatomy, Plan.of(["decoder.1.mlp"]))
    from billhook.surgery.form import form_after, write_form
    from billhook.surgery.live import drops_of, orders_of

    drops = drops_of(Plan.of(["decoder.1.mlp"]), anatomy)
    form = form_after(cut.config, drops, (), orders_of(Plan.of(["decoder.1.mlp"]), anatomy), anatomy)
    write_form(cut.config, anatomy, form)
    with pytest.raises(InputError, match="cannot be stacked"):
        stack(cut, discover(cut), batch("llama", model), tmp_path / "out")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(InputError, match="NaN"):
        stack(model, anatomy, batch("llama", model), tmp_path / "out")
    assert not (tmp_path / "out").exists()
