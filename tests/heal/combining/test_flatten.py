"""Blocks flattened into one: exact where nothing is cut, the same live and on disk, refused where it cannot be."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from families import FAMILIES, NO_END, VOCABULARY, build, randomise
from torch import Tensor, nn
from transformers import PreTrainedModel

from billhook.anatomy import Anatomy, Block, Sublayer, discover
from billhook.anatomy.undo import Undo
from billhook.export.huggingface import save
from billhook.heal import flatten, healed
from billhook.heal.combining.flatten import grouped
from billhook.heal.combining.side_by_side import pairs, side_by_side, units_in
from billhook.heal.combining.spans import Spans
from billhook.heal.healing import put
from billhook.measure.batches import batches_of
from billhook.measure.patch import overridden, silencers
from billhook.plan.address import Address
from billhook.plan.errors import InputError
from billhook.plan.plan import Plan
from billhook.surgery import apply, simulate
from billhook.surgery.narrow import resize
from billhook.surgery.reopen import load

FITTING = {
    **dict.fromkeys(("llama", "llama_bias", "mistral", "qwen2", "phi3", "granite", "cohere", "smollm3"), "decoder"),
    **dict.fromkeys(("gpt2", "gpt_neox", "gpt_neox_sequential", "opt", "falcon_new"), "decoder"),
    "vit": "encoder",
    "clip": "text",
    "gemma3_image": "vision",
}
NORMS = "is not written to the stream as it is, or has no single norm before it"
REFUSED = {
    "qwen3": "all units of each read its own self_attn.q_norm.weight",
    "gemma2": NORMS,
    "gemma3": NORMS,
    "olmo2": NORMS,
    "opt_post_norm": NORMS,
    "bert": NORMS,
    "bart": NORMS,
    "dinov2": NORMS,
    "stablelm": "has a bias, and model.layers.1.mlp.gate_proj.weight has none to take it up",
    "falcon": "has a bias, and transformer.h.1.self_attention.query_key_value.weight has none to take it up",
    "stablelm_parallel": "decoder.1.attention has no units that can move",
    "whisper": "has a bias, and model.decoder.layers.1.self_attn.k_proj.weight has none to take it up",
    "bloom": "every block's heads read one tensor of position biases",
    "falcon_alibi": "every block's heads read one tensor of position biases",
    "t5": "every block's heads read one tensor of position biases",
    "mixtral": "its units share a router",
    "olmoe": "its units share a router",
    "qwen3_moe": "is not like the block that it would join: they have other parameters",
    "deepseek_v3": "its units share a router",
}


def stack_of(name: str) -> str:
    return FITTING.get(name) or next(s for s in ("decoder", "encoder") if s in FAMILIES[name].stacks)


def seen(name: str, model: PreTrainedModel) -> list[dict[str, Tensor]]:
    return [FAMILIES[name].inputs(model, rows, None) for rows in (4, 3)]


def pair_of(model: PreTrainedModel, anatomy: Anatomy, stack: str) -> tuple[int, int]:
    """Two blocks of the middle that can become one."""
    first = pairs(model, anatomy, anatomy.stack(stack))[1]
    return first, first + 1


def out(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return model(**inputs, return_dict=False)[0]


def gemma() -> PreTrainedModel:
    """The one family with norms that add 1 to their weight, and nothing else in the way."""
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "head_dim": 10}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCABULARY}
    model = tf.GemmaForCausalLM(tf.GemmaConfig(**sizes, **heads, **NO_END)).eval()
    randomise(model)
    return model


def built(name: str) -> PreTrainedModel:
    return gemma() if name == "gemma" else build(name)


def written(spans: Spans, model: nn.Module, block: Block, sublayer: Sublayer, stream: Tensor) -> Tensor:
    """What a sublayer of the dense model adds to a stream."""
    with overridden(silencers(model, [s for s in block.sublayers if s is not sublayer])):
        return spans.run(0, [block.address.block], stream) - stream


@pytest.mark.parametrize("name", [*FITTING, "gemma"])
@torch.no_grad()
def test_with_all_units_it_is_both_blocks_on_one_stream(name: str) -> None:
    """x + A1 + A2, then the MLPs of both on that; all on x in parallel blocks."""
    model = built(name)
    anatomy = discover(model)
    stack = anatomy.stack(FITTING.get(name, "decoder"))
    family = FAMILIES["llama" if name == "gemma" else name]
    spans = Spans(model, stack, list(batches_of([family.inputs(model, 3, None)], model)))
    pair = pair_of(model, anatomy, stack.name)
    blocks, into = [stack.blocks[i] for i in pair], stack.blocks[pair[1]]
    expected = start = spans.run(0, range(pair[0]), spans.enter(0))
    spans.run(0, pair, start)
    for number in range(2):
        given = start if into.parallel else expected
        expected = expected + sum(written(spans, model, b, b.sublayers[number], given) for b in blocks)
    wide = []
    for sublayer in into.sublayers:
        inner = units_in(anatomy, sublayer)
        every = range(2 * inner.count)
        wide.append((inner, side_by_side(model, anatomy, into, blocks, sublayer.kind, every)))
    undo = Undo()
    try:
        for inner, tensors in wide:
            for key, tensor in tensors.items():
                put(model, key, tensor, undo)
            resize(model, inner.attributes, 2 * inner.count, undo.set)
        found = spans.run(0, pair[1:], start)
    finally:
        undo.restore()
    assert not torch.allclose(expected, start, atol=0.1)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", [*FITTING, "gemma"])
@torch.no_grad()
def test_beside_a_block_that_writes_nothing_a_block_stays_as_it_is(name: str) -> None:
    """Whichever of the two it is."""
    family, stack = FAMILIES["llama" if name == "gemma" else name], FITTING.get(name, "decoder")
    for silent in (0, 1):
        model = built(name)
        anatomy = discover(model)
        pair = pair_of(model, anatomy, stack)
        for sublayer in anatomy.stack(stack).blocks[pair[silent]].sublayers:
            for write in sublayer.writes:
                for parameter in model.get_submodule(write.removesuffix(".weight")).parameters():
                    parameter.zero_()
        inputs = family.inputs(model, 3, None)
        expected = out(model, inputs)
        plan = Plan.of([Address(stack, pair[0])])
        found = flatten(model, anatomy, plan, [family.inputs(model, rows, None) for rows in (4, 3)])
        assert not found.taken and all(refit.before == refit.after == 0 for refit in found.refits)
        whole = all(graft.neurons + graft.groups > 0 for graft in found.grafts)
        assert whole == (silent == 1)
        with healed(model, found), simulate(model, anatomy, plan):
            torch.testing.assert_close(out(model, inputs), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", FITTING)
@torch.no_grad()
def test_simulated_applied_and_reloaded_agree(name: str, tmp_path: Path) -> None:
    model = build(name)
    anatomy = discover(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    pair = pair_of(model, anatomy, FITTING[name])
    plan = Plan.of([Address(FITTING[name], pair[0])])
    found = flatten(model, anatomy, plan, seen(name, model))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    path = anatomy.stack(FITTING[name]).path
    assert found.tensors and all(key.startswith(f"{path}.{pair[1]}.") for key in found.tensors)
    assert all(tensor.shape == before[key].shape for key, tensor in found.tensors.items())
    inputs = FAMILIES[name].inputs(model, 3, "left" if FAMILIES[name].pads else None)
    with healed(model, found), simulate(model, anatomy, plan):
        expected = out(model, inputs)
    with healed(model, found):
        applied = apply(model, anatomy, plan)
    with simulate(model, anatomy, plan):
        assert not torch.allclose(out(model, inputs), expected, atol=1e-3)
    torch.testing.assert_close(out(applied, inputs), expected, atol=1e-5, rtol=1e-5)
    save(applied, anatomy, plan, tmp_path / "out", None, None)
    again = load(tmp_path / "out").model
    torch.testing.assert_close(out(again, inputs), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_flattened_is_refused_and_says_why(name: str) -> None:
    model = build(name)
    anatomy = discover(model)
    with pytest.raises(InputError, match=REFUSED[name]):
        flatten(model, anatomy, Plan.of([Address(stack_of(name), 1)]), seen(name, model))
    with pytest.raises(InputError):
        pairs(model, anatomy, anatomy.stack(stack_of(name)))


def test_what_goes_where() -> None:
    """Into the block behind, where that has the same masks and positions; else, and at the end, into the one before."""
    model = build("llama")
    stack = (anatomy := discover(model)).stack("decoder")
    assert grouped(model, anatomy, stack, [1, 3]) == {2: [1, 2], 4: [3, 4]}
    assert grouped(model, anatomy, stack, [0, 1, 4]) == {2: [0, 1, 2], 3: [3, 4]}
    assert pairs(model, anatomy, stack) == [0, 1, 2, 3]
    model.model.layers[2].self_attn.scaling *= 2  # known to the module alone
    assert pairs(model, anatomy, stack) == [0, 3]
    model = build("llama")
    stack = (anatomy := discover(model)).stack("decoder")
    model.config.layer_types = ["full_attention", *4 * ["sliding_attention"]]  # known to the config alone
    assert pairs(model, anatomy, stack) == [1, 2, 3]
    model = build("qwen2")  # full attention up to block 1, sliding from block 2 on
    stack = (anatomy := discover(model)).stack("decoder")
    assert grouped(model, anatomy, stack, [1]) == {0: [0, 1]}
    assert pairs(model, anatomy, stack) == [0, 2, 3]
    with pytest.raises(InputError, match=r"decoder\.0 is not like the block that it would join: .* differ"):
        grouped(model, anatomy, stack, [0, 1])
    model = build("smollm3")  # block 2 has no rotary positions
    stack = (anatomy := discover(model)).stack("decoder")
    assert pairs(model, anatomy, stack) == [0, 3]


@torch.no_grad()
def test_units_are_measured_on_the_model_as_flattened_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    """0 and 1, then 2 and 3: each attention on the stream before both, each MLP on that with the new attention."""
    model = build("llama")
    anatomy = discover(model)
    measured = []

    def watched(model: Any, spans: Any, parts: Any, given: list[Tensor], held: Any) -> Any:
        measured.append((given[0], own(model, spans, parts, given, held)))
        return measured[-1][1]

    home = sys.modules["billhook.heal.combining.flatten"]  # the package has the function under this name
    own = home._moments
    monkeypatch.setattr(home, "_moments", watched)
    inputs = FAMILIES["llama"].inputs(model, 4, None)
    found = flatten(model, anatomy, Plan.of(["decoder.0", "decoder.2"]), [inputs])
    stack = anatomy.stack("decoder")
    spans = Spans(model, stack, list(batches_of([inputs], model)))
    stream = spans.enter(0)
    spans.run(0, range(5), stream)
    for number, (given, (fit, back)) in enumerate(measured):
        into = 2 * (number // 2) + 1
        with healed(model, found):
            if number % 2 == 0:
                expected, after = stream, spans.run(0, [into], stream)
            else:
                with overridden(silencers(model, stack.blocks[into].sublayers[1:])):
                    expected, stream = spans.run(0, [into], stream), after
        torch.testing.assert_close(given, expected, atol=1e-5, rtol=1e-5)
        if number % 2:
            layers = model.model.layers[into - 1 : into + 1]
            reads = [(layer.mlp, layer.post_attention_layernorm(given)) for layer in layers]
            h = torch.cat([mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x) for mlp, x in reads], -1)
            h = (h / given.norm(dim=-1, keepdim=True)).flatten(0, 1)
            torch.testing.assert_close((fit.inputs + back.inputs)[:-1, :-1], h.T @ h, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_three_blocks_become_one() -> None:
    model = build("llama")
    anatomy = discover(model)
    plan = Plan.of([Address("decoder", 1), Address("decoder", 2)])
    found = flatten(model, anatomy, plan, seen("llama", model))
    assert {name.split(".")[2] for name in found.tensors} == {"3"}
    assert {(graft.source, graft.into) for graft in found.grafts} == {
        (f"decoder.{block}.{part}", f"decoder.3.{part}") for block in (1, 2) for part in ("attention", "mlp")
    }
    own = {"groups": 3, "neurons": 48}
    taken = {kind: sum(getattr(graft, kind) for graft in found.grafts) for kind in own}
    assert all(0 < taken[kind] <= own[kind] for kind in own)


def test_damaged_weights_are_named() -> None:
    model = build("llama")
    model.model.layers[1].self_attn.v_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(InputError, match=r"go into model\.layers\.2\.self_attn\.o_proj\.weight"):
        flatten(model, discover(model), Plan.of([Address("decoder", 1)]), seen("llama", model))
