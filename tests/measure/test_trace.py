"""The statistics of one pass, against what they are by definition."""

from __future__ import annotations

from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import pytest
import torch
from families import FAMILIES, build
from torch.nn.functional import cosine_similarity
from torch.overrides import TorchFunctionMode

from billhook.anatomy import discover
from billhook.anatomy.stubs import STUBS
from billhook.data import Windows
from billhook.measure.batches import real_tokens
from billhook.measure.replay import Replay
from billhook.measure.trace import trace
from billhook.plan.address import Address
from billhook.plan.errors import InputError

SUPPORTED = list(FAMILIES)
EVERYTHING = ("block", "sublayer", "angular")
IDS = torch.randint(3, 90, (4, 10), generator=torch.Generator().manual_seed(3))


def figures(result, names=("cosine", "update", "update_share")) -> dict:
    return {(name, unit): value for name in names for unit, value in result.means(name).items()}


def assert_same(one, other, tolerance: float = 1e-6) -> None:
    assert figures(one) == pytest.approx(figures(other), abs=tolerance)
    assert one.angles.keys() == other.angles.keys()
    for stack in one.angles:
        for a, b in zip(one.angular(stack), other.angular(stack), strict=True):
            assert a == pytest.approx(b, abs=tolerance)


def keeper(seen: dict, name: str):
    """A hook that keeps the first output of a module (later ones are of the pass with other sublayers silenced)."""

    def hook(module, args, output) -> None:
        seen.setdefault(name, output[0] if isinstance(output, tuple) else output)

    return hook


@pytest.mark.parametrize("name", SUPPORTED)
def test_every_family(name: str) -> None:
    """Block figures follow their definition on the streams of a replay; every unit of every stack is seen."""
    model = build(name)
    anatomy = discover(model)
    inputs = FAMILIES[name].inputs(model, 2, "right" if FAMILIES[name].pads else None)
    result = trace(model, anatomy, [inputs], EVERYTHING)
    blocks = {address for address, _ in anatomy.outline.blocks()}
    assert set(result.means("cosine")) == blocks | {address for address, _ in anatomy.outline.sublayers()}
    for stack in anatomy.stacks:
        replay = Replay(model, anatomy, [inputs], stack.name)
        streams = [stream[replay.real[0]] for stream in replay._streams[0]]
        for index, (x, y) in enumerate(pairwise(streams)):
            address = Address(stack.name, index)
            assert result.means("cosine")[address] == pytest.approx(cosine_similarity(x, y, -1).mean().item(), abs=1e-5)
            update = ((y - x).norm(dim=-1) / x.norm(dim=-1)).mean().item()
            assert result.means("update")[address] == pytest.approx(update, rel=1e-4)
            share = ((y - x).norm(dim=-1) / y.norm(dim=-1)).mean().item()
            assert result.means("update_share")[address] == pytest.approx(share, rel=1e-4)
        pairs = [(i, n) for n in range(1, len(streams)) for i in range(len(streams) - n)]
        for i, n in pairs:
            cosine = cosine_similarity(streams[i].double(), streams[i + n].double(), -1)
            distance = (cosine.clamp(-1, 1).arccos() / torch.pi).mean().item()
            assert result.angular(stack.name)[n - 1][i] == pytest.approx(distance, abs=1e-6)


def test_sublayers_of_a_sequential_block() -> None:
    """x, then x + attention, then x + attention + mlp, written out."""
    model = build("llama")
    seen = {}
    layer = model.model.layers[2]
    layer.register_forward_hook(lambda m, args, output: seen.update(x=args[0], y=output))
    layer.self_attn.register_forward_hook(keeper(seen, "attention"))
    result = trace(model, discover(model), Windows.of(IDS, "test"), ["sublayer"])
    middle = seen["x"] + seen["attention"]
    cosine = cosine_similarity(seen["x"], middle, -1).mean().item()
    assert result.means("cosine")[Address("decoder", 2, "attention")] == pytest.approx(cosine, abs=1e-6)
    cosine = cosine_similarity(middle, seen["y"], -1).mean().item()
    assert result.means("cosine")[Address("decoder", 2, "mlp")] == pytest.approx(cosine, abs=1e-6)
    for kind, stream in (("attention", seen["x"]), ("mlp", middle)):
        written = seen["attention"] if kind == "attention" else seen["y"] - middle
        cosine = cosine_similarity(stream, written, -1).mean().item()
        assert result.means("alignment")[Address("decoder", 2, kind)] == pytest.approx(cosine, abs=1e-5)


def test_sublayers_of_a_parallel_block() -> None:
    """Both read and add to the stream as it comes in."""
    model = build("gpt_neox")
    seen = {}
    layer = model.gpt_neox.layers[2]
    layer.register_forward_hook(lambda m, args, output: seen.update(x=args[0]))
    layer.attention.register_forward_hook(keeper(seen, "attention"))
    layer.mlp.register_forward_hook(keeper(seen, "mlp"))
    result = trace(model, discover(model), Windows.of(IDS, "test"), ["sublayer"])
    for kind in ("attention", "mlp"):
        cosine = cosine_similarity(seen["x"], seen["x"] + seen[kind], -1).mean().item()
        assert result.means("cosine")[Address("decoder", 2, kind)] == pytest.approx(cosine, abs=1e-6)


def test_a_unit_that_writes_nothing() -> None:
    model = build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.zero_()
    result = trace(model, discover(model), Windows.of(IDS, "test"), ["sublayer"])
    unit = Address("decoder", 1, "mlp")
    assert result.means("update")[unit] == 0
    assert result.means("cosine")[unit] == pytest.approx(1, abs=1e-6)


def test_batches_add_up() -> None:
    """The figures of two batches are the means over both, also of unequal size; order does not matter."""
    model = build("llama")
    anatomy = discover(model)
    whole = trace(model, anatomy, Windows.of(IDS, "test"), EVERYTHING)
    parts = [trace(model, anatomy, Windows.of(ids, "test"), EVERYTHING) for ids in (IDS[:1], IDS[1:])]
    assert_same(whole, parts[0] + parts[1])
    assert_same(parts[1] + parts[0], parts[0] + parts[1], 1e-12)
    assert (parts[0] + parts[1]).work == whole.work
    dicts = [{"input_ids": IDS[3:]}, {"input_ids": IDS[:3]}]
    assert_same(whole, trace(model, anatomy, dicts, EVERYTHING))
    unit = Address("decoder", 1)
    expected = sum(p.means("cosine")[unit] * n for p, n in zip(parts, (1, 3), strict=True)) / 4
    assert whole.means("cosine")[unit] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bloom", "gemma3", "falcon_alibi", "t5", "bert"])
def test_padding_does_not_count(name: str, side: str) -> None:
    if side == "left" and name == "bert":
        pytest.skip("absolute positions counted from the left by design")
    model = build(name)
    anatomy = discover(model)
    inputs = FAMILIES[name].inputs(model, 3, side)
    padded = trace(model, anatomy, [inputs], EVERYTHING)
    rows = []
    for row in range(3):
        real = inputs["attention_mask"][row].bool()
        alone = {key: value[row : row + 1] for key, value in inputs.items() if key != "attention_mask"}
        rows.append(alone | {"input_ids": inputs["input_ids"][row : row + 1, real]})
    assert_same(padded, trace(model, anatomy, rows, EVERYTHING), 2e-5)


def test_bfloat16_streams_are_summed_in_float64() -> None:
    """Many tokens do not drown the last ones, and the order of batches does not matter."""
    model = build("llama").bfloat16()
    anatomy = discover(model)
    batches = [{"input_ids": ids} for ids in IDS.repeat(6, 1).split([5, 1, 8, 2, 8])]
    forth, back = (trace(model, anatomy, order, EVERYTHING) for order in (batches, batches[::-1]))
    assert_same(forth, back, 1e-12)
    streams = []
    hook = model.model.layers[2].register_forward_hook(lambda _m, args, output: streams.append((args[0], output)))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    hook.remove()
    x, y = (torch.cat([pair[i].flatten(0, 1) for pair in streams]).double() for i in (0, 1))
    unit = Address("decoder", 2)
    assert forth.means("cosine")[unit] == pytest.approx(cosine_similarity(x, y, -1).mean().item(), abs=1e-6)
    assert forth.means("update")[unit] == pytest.approx(((y - x).norm(dim=-1) / x.norm(dim=-1)).mean().item(), rel=1e-6)


class Largest(TorchFunctionMode):
    """Values in the largest tensor that any torch function gives."""

    values = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.values = max(self.values, result.numel())
        return result


def test_memory_is_linear_in_tokens() -> None:
    """In particular no token is compared with any other."""
    model = build("llama")
    anatomy = discover(model)
    sizes = []
    for rows in (4, 16):
        with Largest() as largest:
            trace(model, anatomy, [{"input_ids": IDS.repeat(rows // 4, 1)}], EVERYTHING)
        sizes.append(largest.values)
    assert 0 < sizes[1] <= 4 * sizes[0]


def test_only_what_is_asked_for() -> None:
    model = build("llama")
    anatomy = discover(model)
    blocks = trace(model, anatomy, Windows.of(IDS, "test"), ["block"])
    assert not blocks.angles
    assert all(unit.sublayer is None for unit in blocks.means("cosine"))
    assert blocks.work == 5 * 40
    with pytest.raises(InputError, match="no angular distances of decoder"):
        blocks.angular("decoder")
    assert trace(model, anatomy, Windows.of(IDS, "test"), ["sublayer"]).work == 2 * 5 * 40
    with pytest.raises(InputError, match="no statistic 'rank'"):
        trace(model, anatomy, Windows.of(IDS, "test"), ["rank"])


def test_the_head_is_not_run() -> None:
    model = build("llama")
    model.lm_head.register_forward_hook(lambda *_: pytest.fail("the head was run"))
    trace(model, discover(model), Windows.of(IDS, "test"), ["block"])


def test_a_stack_that_is_not_reached_is_unknown() -> None:
    """Text alone through a model of text and images: its image blocks have no figures, which is not a low figure."""
    model = build("gemma3_image")
    result = trace(model, discover(model), Windows.of(IDS, "test"), EVERYTHING)
    assert {unit.stack for unit in result.means("cosine")} == {"decoder"}
    assert set(result.angles) == {"decoder"}


@pytest.mark.parametrize(("layer", "message"), [(0, r"out of decoder\.0"), (3, r"out of decoder\.3")])
def test_nan_weights_are_named(layer: int, message: str) -> None:
    model = build("llama")
    with torch.no_grad():
        model.model.layers[layer].mlp.up_proj.weight[1, 1] = float("nan")
    with pytest.raises(InputError, match=message):
        trace(model, discover(model), Windows.of(IDS, "test"), ["block"])


def test_nan_inputs_are_named() -> None:
    model = build("vit")
    inputs = FAMILIES["vit"].inputs(model, 2, None)
    inputs["pixel_values"][0, 0, 0, 0] = float("nan")
    with pytest.raises(InputError, match=r"into encoder\.0"):
        trace(model, discover(model), [inputs], ["block"])


def test_a_mask_that_does_not_fit() -> None:
    stream = torch.zeros(4, 10, 8)
    assert real_tokens({"attention_mask": torch.ones(4, 3)}, "vision", stream).all(), "a mask of the text"
    with pytest.raises(InputError, match=r"attention_mask has shape \(4, 3\); the stream of text needs \(4, 10\)"):
        real_tokens({"attention_mask": torch.ones(4, 3)}, "text", stream)


def test_nothing_reached() -> None:
    model = build("llama")
    with pytest.raises(InputError, match="reaches no block"):
        trace(model, discover(model), [], ["block"])


@pytest.mark.parametrize("broken", [False, True])
def test_model_is_left_as_it_was(broken: bool) -> None:
    """Also by an exception in the middle of a block."""
    model = build("llama").train()
    if broken:
        with torch.no_grad():
            model.model.layers[3].mlp.up_proj.weight[1, 1] = float("nan")
    with pytest.raises(InputError) if broken else nullcontext():
        trace(model, discover(model), Windows.of(IDS, "test"), EVERYTHING)
    assert all(m.training for m in model.modules())
    assert not any(m._forward_hooks for m in model.modules())
    assert not any("forward" in m.__dict__ for m in model.modules())
    assert not any(isinstance(m, tuple(STUBS.values())) for m in model.modules())
