"""Acts that combine blocks instead of dropping them: exact where the definition is, the same model live and on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, build
from transformers import PreTrainedModel

from billhook.anatomy import Anatomy, discover
from billhook.data import Windows
from billhook.export.huggingface import save
from billhook.heal import Healing, average, fuse, healed, refill, restore, scale_updates
from billhook.heal.combining.spans import Spans
from billhook.measure.batches import batches_of
from billhook.plan.address import Address
from billhook.plan.errors import InputError
from billhook.plan.plan import Plan
from billhook.surgery import apply, simulate
from billhook.surgery.reopen import load

SHORTENED = [name for name in FAMILIES if name != "gemma4"]
DECODERS = [name for name in SHORTENED if list(FAMILIES[name].stacks) == ["decoder"]]
ACTS: dict[str, Callable[[Any, Anatomy, Any, Any], Healing]] = {
    "average": lambda model, anatomy, drops, source: average(model, anatomy, drops),
    "fuse": lambda model, anatomy, drops, source: fuse(model, anatomy, drops, source, passes=1, rank=2, reach=1),
}


def windows(rows: int = 16, length: int = 12) -> Windows:
    return Windows.of(torch.randint(3, 90, (rows, length), generator=torch.Generator().manual_seed(5)), "test")


def middle(name: str) -> list[Address]:
    """Blocks 1 and 2 of the stack that may be shortened."""
    stack = "decoder" if "decoder" in FAMILIES[name].stacks else next(iter(FAMILIES[name].stacks))
    return [Address(stack, 1), Address(stack, 2)]


def inputs_of(name: str, model: PreTrainedModel) -> list[Any]:
    return [FAMILIES[name].inputs(model, 4, None)]


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_simulated_applied_and_reloaded_agree(name: str, act: str, tmp_path: Path) -> None:
    model = build(name)
    anatomy = discover(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    plan = Plan.of(middle(name))
    healing = ACTS[act](model, anatomy, plan, inputs_of(name, model))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    inputs = FAMILIES[name].inputs(model, 3, "left")
    with simulate(model, anatomy, plan):
        cut = model(**inputs).logits
    with healed(model, healing):
        with simulate(model, anatomy, plan):
            expected = model(**inputs).logits
        applied = apply(model, anatomy, plan)
    assert torch.equal(applied(**inputs).logits, expected)
    assert bool(healing.tensors) == (not torch.equal(cut, expected))
    save(applied, anatomy, plan, tmp_path / "out", None, None)
    again = load(tmp_path / "out").model
    torch.testing.assert_close(again(**inputs).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", SHORTENED)
def test_fused_groups_come_nearer(name: str) -> None:
    model = build(name)
    anatomy = discover(model)
    seen = 2 * inputs_of(name, model)  # noise has nothing in common with other noise: what is held back was seen
    fused = fuse(model, anatomy, middle(name), seen, passes=4, rank=4, reach=1)
    assert fused.taken == len(fused.refits) > 0
    assert all(refit.after < refit.before for refit in fused.refits)


def test_the_average_is_that_of_all_that_go_into_a_block() -> None:
    """Of five blocks 1, 2 and 4 go: 1 into 0, 2 and 4 into 3."""
    model = build("gpt2")
    anatomy = discover(model)
    found = average(model, anatomy, [Address("decoder", i) for i in (1, 2, 4)])
    blocks = [dict(model.transformer.h[i].named_parameters()) for i in range(5)]
    for name in blocks[0]:
        near = found.tensors[f"transformer.h.0.{name}"], found.tensors[f"transformer.h.3.{name}"]
        torch.testing.assert_close(near[0], (blocks[0][name] + blocks[1][name]) / 2)
        torch.testing.assert_close(near[1], (blocks[2][name] + blocks[3][name] + blocks[4][name]) / 3)
    assert len(found.tensors) == 2 * len(blocks[0])


def test_a_mixture_is_not_averaged_with_a_dense_block() -> None:
    """Blocks 1 and 3 are dense, the others are mixtures."""
    model = build("qwen3_moe")
    anatomy = discover(model)
    found = average(model, anatomy, [Address("decoder", 1)])
    assert all(name.startswith("model.layers.3.") for name in found.tensors)
    with pytest.raises(InputError, match=r"no block that stays is built like decoder\.1"):
        average(model, anatomy, [Address("decoder", 1), Address("decoder", 3)])


def test_refill_takes_the_weighted_mean_of_both_sides() -> None:
    model = build("llama")
    anatomy = discover(model)
    found = refill(model, anatomy, Address("decoder", 2), (3.0, 1.0))
    before, behind = (dict(model.model.layers[i].named_parameters()) for i in (1, 3))
    for name in before:
        expected = 0.75 * before[name] + 0.25 * behind[name]
        torch.testing.assert_close(found.tensors[f"model.layers.2.{name}"], expected)
    for odd in (Address("decoder", 0), Address("decoder", 4), Address("decoder", 2, "mlp")):
        with pytest.raises(InputError, match="cannot be refilled"):
            refill(model, anatomy, odd)
    with pytest.raises(InputError, match="must not be negative"):
        refill(model, anatomy, Address("decoder", 2), (0.0, 0.0))


@torch.no_grad()
def test_fusing_begins_at_the_plain_cut_and_keeps_it_where_nothing_is_learned() -> None:
    model = build("llama")
    anatomy = discover(model)
    found = fuse(model, anatomy, [Address("decoder", 2)], windows(), passes=0)
    assert not found.tensors and found.refits
    assert all(refit.after == refit.before and not refit.taken for refit in found.refits)


def test_two_gaps_whose_groups_overlap() -> None:
    model = build("llama")
    anatomy = discover(model)
    drops = [Address("decoder", 1), Address("decoder", 3)]
    found = fuse(model, anatomy, drops, windows(), passes=4, reach=2, rank=4)
    owners = {name.split(".")[2] for name in found.tensors}
    assert owners <= {"0", "2", "4"} and "2" in owners
    again = fuse(build("llama"), anatomy, drops, windows(), passes=4, reach=2, rank=4)
    assert found.refits == again.refits and found.work == again.work
    assert all(torch.equal(tensor, again.tensors[name]) for name, tensor in found.tensors.items())


def test_a_dropped_end_aims_at_what_lies_behind_it() -> None:
    model = build("llama")
    anatomy = discover(model)
    found = fuse(model, anatomy, [Address("decoder", 4)], windows(), passes=4, reach=2, rank=4)
    assert found.taken and {name.split(".")[2] for name in found.tensors} == {"2", "3"}
    assert all(refit.after < refit.before for refit in found.refits)


@pytest.mark.parametrize("name", ["llama", "t5", "gpt_neox", "falcon"])
@torch.no_grad()
def test_spans_are_the_models_own_forward(name: str) -> None:
    """Block by block, in one go, and around a hole."""
    model = build(name)
    anatomy = discover(model)
    stack = anatomy.stack("decoder")
    spans = Spans(model, stack, list(batches_of([FAMILIES[name].inputs(model, 2, None)], model)))
    start = spans.enter(0)
    count = len(stack.blocks)
    whole = spans.run(0, range(count), start)
    step = start
    for block in range(count):
        step = spans.run(0, [block], step)
    assert torch.equal(step, whole)
    kept = [i for i in range(count) if i not in (1, 2)]
    hole = spans.run(0, kept, start)
    seen = []
    with simulate(model, anatomy, [Address("decoder", 1), Address("decoder", 2)]):
        hook = model.get_submodule(stack.path)[-1].register_forward_hook(lambda m, args, out: seen.append(out))
        model(**FAMILIES[name].inputs(model, 2, None))
        hook.remove()
    expected = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    torch.testing.assert_close(hole, expected, atol=1e-5, rtol=1e-5)


def test_restoring_blocks_and_scaling_updates() -> None:
    """Depth 0 takes the base's weights with alpha 0, the last block keeps its own; half way is half way."""
    base, tuned = build("llama"), build("llama")
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(1.0)
    anatomy = discover(tuned)
    found = restore(tuned, anatomy, base, [Address("decoder", 1), Address("decoder", 2)])
    inside = [n for n, _ in base.named_parameters() if n.startswith(("model.layers.1.", "model.layers.2."))]
    assert sorted(found.tensors) == sorted(inside)
    assert all(torch.equal(found.tensors[n], base.get_parameter(n)) for n in inside)
    scaled = scale_updates(tuned, anatomy, base).tensors
    assert set(scaled) == {name for name, _ in tuned.named_parameters()}
    for name, share in (
        ("model.layers.0.mlp.up_proj.weight", 0.0),
        ("model.layers.2.mlp.up_proj.weight", 0.5),
        ("model.layers.4.mlp.up_proj.weight", 1.0),
        ("model.embed_tokens.weight", 0.0),
        ("model.norm.weight", 1.0),
    ):
        torch.testing.assert_close(scaled[name], base.get_parameter(name) + share, atol=1e-5, rtol=1e-5)
    old = tuned.lm_head.weight
    with healed(tuned, Healing(scaled, (), {}, 0, 0)):
        assert tuned.lm_head.weight is tuned.model.embed_tokens.weight is not old, "they are tied"
    assert tuned.lm_head.weight is tuned.model.embed_tokens.weight is old
    same = scale_updates(tuned, anatomy, base, alpha=1.0, beta=0.0).tensors
    assert all(torch.allclose(same[name], parameter, atol=1e-6) for name, parameter in tuned.named_parameters())


def test_positions_are_embeddings_whatever_they_are_called() -> None:
    base, tuned = build("gpt2"), build("gpt2")
    torch.nn.init.ones_(tuned.transformer.wpe.weight)
    scaled = scale_updates(tuned, discover(tuned), base).tensors
    torch.testing.assert_close(scaled["transformer.wpe.weight"], base.transformer.wpe.weight)


def test_what_is_refused() -> None:
    model = build("llama")
    anatomy = discover(model)
    for act in ("average", "fuse"):
        with pytest.raises(InputError, match=r"takes whole blocks; the plan drops decoder\.1\.mlp"):
            ACTS[act](model, anatomy, [Address("decoder", 1, "mlp")], windows())
    with pytest.raises(InputError, match="at least two windows"):
        fuse(model, anatomy, [Address("decoder", 1)], windows(1))
    for act in ACTS:
        with pytest.raises(InputError, match="one stack at a time"):
            ACTS[act](model, anatomy, [], windows())
    with pytest.raises(InputError, match="another architecture: parameter"):
        restore(model, anatomy, build("gpt2"), [])
    with pytest.raises(InputError, match=r"decoder\.9 cannot be restored"):
        restore(model, anatomy, build("llama"), [Address("decoder", 9)])
