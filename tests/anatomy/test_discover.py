"""Discovery over every family: the right stacks, every parameter accounted for once, true names and true numbers."""

from __future__ import annotations

import inspect
from collections import Counter
from typing import Any

import pytest
import torch
from families import FAMILIES, build, params, plain, unsupported

from billhook.anatomy import Anatomy, Block, discover
from billhook.data.decoding import cache_name
from billhook.plan.errors import InputError
from billhook.plan.outline import SublayerOutline

ENCODER_DECODERS = [name for name in params if set(FAMILIES[name].stacks) == {"encoder", "decoder"}]
CACHED = [name for name in params if FAMILIES[name].generates]
#: The norms of these stand on the stream between the sublayers: what a block adds is not the sum of what they write.
POST_NORM = {"opt_post_norm", "bloom_post_norm", "bert", "bert_classifier", "roberta", "bart"}
WITHOUT_FINAL_NORM = {"opt_post_norm", "bert", "bert_classifier", "roberta", "bart"}


def blocks(anatomy: Anatomy) -> list[Block]:
    return [block for stack in anatomy.stacks for block in stack.blocks]


def inside(name: str, prefix: str) -> bool:
    return name.startswith(f"{prefix}.")


@pytest.mark.parametrize("name", params)
def test_stacks_are_found_with_their_sublayers(name: str) -> None:
    anatomy = discover(build(name))
    assert {stack.name: len(stack.blocks) for stack in anatomy.stacks} == FAMILIES[name].stacks
    for stack in anatomy.stacks:
        crossed = name in ENCODER_DECODERS and stack.name == "decoder"
        expected = ["attention", "cross_attention", "mlp"] if crossed else ["attention", "mlp"]
        assert stack.causal == (stack.name == "decoder")
        assert (stack.final_norm is None) == (name in WITHOUT_FINAL_NORM)
        for index, block in enumerate(stack.blocks):
            assert str(block.address) == f"{stack.name}.{index}"
            assert [sublayer.kind for sublayer in block.sublayers] == expected
            assert list(anatomy.outline.stack(stack.name).blocks[index].sublayers) == expected


@pytest.mark.parametrize("name", params)
def test_every_parameter_of_a_block_is_accounted_for_once(name: str) -> None:
    model = build(name)
    anatomy = discover(model)
    sizes = {key: value.numel() for key, value in model.named_parameters()}
    for block in blocks(anatomy):
        outline = anatomy.outline.stack(block.address.stack).blocks[block.address.block]
        own = [key for key in sizes if inside(key, block.path)]
        owners = Counter(key for s in block.sublayers for cut in s.cuts for key in own if inside(key, cut.path))
        assert set(owners.values()) <= {1}, "two sublayers claim a parameter"
        stays = [key for key in own if any(inside(key, norm) for norm in block.norms)]
        assert sorted([*owners, *stays]) == sorted(own)
        assert outline.rest_params == sum(sizes[key] for key in stays)
        assert outline.params == sum(sizes[key] for key in own)
        for sublayer in block.sublayers:
            cut = [key for key in own if any(inside(key, c.path) for c in sublayer.cuts)]
            assert outline.sublayers[sublayer.kind].params == sum(sizes[key] for key in cut) > 0
            assert all(any(inside(key, c.path) for c in sublayer.cuts) for key in (*sublayer.reads, *sublayer.writes))
    assert anatomy.outline.block_params + anatomy.outline.other_params == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", params)
def test_reads_and_writes_touch_the_stream(name: str) -> None:
    model = build(name)
    anatomy = discover(model)
    for stack in anatomy.stacks:
        hidden = anatomy.outline.stack(stack.name).hidden_size
        for sublayer in (s for block in stack.blocks for s in block.sublayers):
            assert sublayer.reads and sublayer.writes and not set(sublayer.reads) & set(sublayer.writes)
            for key in (*sublayer.reads, *sublayer.writes):
                weight = model.get_parameter(key)
                owner = model.get_submodule(key.rpartition(".")[0])
                outputs, inputs = (1, 0) if type(owner).__name__ == "Conv1D" else (-2, -1)
                assert weight.shape[outputs if key in sublayer.writes else inputs] == hidden, key
            for path in (*sublayer.norms, sublayer.output, sublayer.module):
                model.get_submodule(path)


@pytest.mark.parametrize("name", [name for name in params if name not in POST_NORM])
@torch.inference_mode()
def test_what_the_sublayers_write_is_what_the_block_adds(name: str) -> None:
    model = build(name)
    anatomy = discover(model)
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def first(value: Any) -> Any:
        return value[0].clone() if isinstance(value, tuple) else value.clone() if value is not None else None

    def watch(path: str) -> None:
        def hook(module: torch.nn.Module, args: tuple, kwargs: dict, output: object) -> None:
            names = list(inspect.signature(module.forward).parameters)
            given = dict(zip(names, args, strict=False)) | kwargs
            stream = given.get("residual", given.get("hidden_states"))
            seen[path] = (first(stream), first(output))

        model.get_submodule(path).register_forward_hook(hook, with_kwargs=True)

    for block in blocks(anatomy):
        for path in (block.path, *(s.output for s in block.sublayers)):
            watch(path)
    model(**FAMILIES[name].inputs(model, 2, None))
    scale = getattr(model.config, "residual_multiplier", 1.0)
    for block in blocks(anatomy):
        before, after = seen[block.path]
        added = torch.zeros_like(before)
        for s in block.sublayers:
            stream, output = seen[s.output]
            added += (output - stream if s.adds_residual else output).view(before.shape)  # OPT flattens its MLP
        if not any("per_layer" in norm for norm in block.norms):  # a further gated write of the block itself
            torch.testing.assert_close(before + scale * added, after, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", CACHED)
@torch.inference_mode()
def test_cache_width_and_window_are_those_of_the_live_cache(name: str) -> None:
    model = build(name)
    inputs = FAMILIES[name].inputs(model, 2, None)
    cache = getattr(model(**inputs, use_cache=True), cache_name(model))
    own = getattr(cache, "self_attention_cache", cache)
    length = own.get_seq_length()
    for index, block in enumerate(discover(model).outline.stack("decoder").blocks):
        check_cache(block.sublayers["attention"], own, index, length)
        if "cross_attention" in block.sublayers:
            cross = cache.cross_attention_cache
            check_cache(block.sublayers["cross_attention"], cross, index, cross.get_seq_length())


def check_cache(outline: SublayerOutline, cache: Any, index: int, length: int) -> None:
    layer = cache.layers[index] if index < len(cache.layers) else None
    if getattr(layer, "keys", None) is None:
        assert outline.cache_width == 0
        return
    kept = length if outline.window is None else min(length, outline.window - 1)
    values = layer.keys.numel() + layer.values.numel()
    assert values == 2 * kept * outline.cache_width
    assert (outline.window is not None) == bool(getattr(layer, "is_sliding", False))


#: heads, key-value heads, head width of the first attention; neurons, experts, active experts of the last MLP.
NUMBERS = {
    "llama": ((6, 3, 10), (48, 0, 0)),
    "qwen3": ((4, 2, 10), (48, 0, 0)),
    "phi3": ((4, 2, 8), (48, 0, 0)),
    "gpt2": ((4, 4, 8), (128, 0, 0)),
    "falcon": ((4, 1, 8), (128, 0, 0)),
    "mixtral": ((4, 2, 8), (48, 4, 2)),
    "qwen3_moe": ((4, 2, 10), (20, 6, 2)),
    "olmoe": ((4, 2, 8), (20, 8, 3)),
    "t5": ((3, 3, 7), (48, 0, 0)),
    "vit": ((2, 2, 16), (48, 0, 0)),
    "bert": ((4, 4, 8), (48, 0, 0)),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_inner_sizes(name: str) -> None:
    outline = discover(build(name)).outline
    attention = outline.stacks[-1].blocks[0].sublayers["attention"]
    mlp = outline.stacks[-1].blocks[-1].sublayers["mlp"]
    found = (attention.heads, attention.kv_heads, attention.head_dim), (mlp.neurons, mlp.experts, mlp.active_experts)
    assert found == NUMBERS[name]


def test_active_parameters_of_experts() -> None:
    model = build("deepseek_v3")
    sparse = discover(model).outline.stack("decoder").blocks[1].sublayers["mlp"]
    routed = sum(p.numel() for p in model.model.layers[1].mlp.experts.parameters())
    assert sparse.params - sparse.active_params == routed * 6 // 8  # 2 of 8 experts work, router and shared one always


@pytest.mark.parametrize("name", params)
def test_counters_are_the_config_values_that_count_the_blocks(name: str) -> None:
    model = build(name)
    for stack in discover(model).stacks:
        assert stack.counters
        for counter in stack.counters:
            config = model
            for part in counter.owner.split("."):
                config = getattr(config, part)
            assert getattr(config, counter.key) == len(stack.blocks)
        assert stack.counters[0].owner.split(".")[0] == "config", "the first counter is the one that is saved"


def test_discovery_needs_no_weights_and_changes_nothing() -> None:
    with torch.device("meta"):
        ghost = type(build("llama"))(build("llama").config)
    assert discover(ghost).outline == discover(build("llama")).outline


def test_unsupported_models_are_refused_with_what_was_found_and_what_not() -> None:
    with pytest.raises(InputError, match=r"mamba.*no list of blocks with an attention.*backbone\.layers"):
        discover(unsupported())
    with pytest.raises(InputError, match=r"Sequential.*not a transformers model"):
        discover(plain())


def test_a_block_with_an_unknown_part_is_refused_by_name() -> None:
    model = build("llama")
    model.model.layers[2].memory = torch.nn.Linear(36, 36)
    with pytest.raises(InputError, match=r"found decoder.*not found.*decoder\.2.*memory"):
        discover(model)


def test_a_stack_that_is_not_there_is_named() -> None:
    with pytest.raises(InputError, match="this vit model has no decoder; it has"):
        discover(build("vit")).stack("decoder")
