"""Inner units of every family: what belongs to one, what has none, and why."""

from __future__ import annotations

from collections import defaultdict

import pytest
import torch
from families import build, params

from billhook.anatomy import Inner, Slice, discover
from billhook.anatomy.width import inner_units
from billhook.plan.address import Address

ATTENTION, MLP = Address("decoder", 1, "attention"), Address("decoder", 1, "mlp")


def inner(name: str, address: Address) -> Inner:
    (found,) = discover(build(name)).inner[address]
    return found


def entries(found: Inner, unit: int, block: str) -> dict[str, tuple[int, list[range]]]:
    """What one unit holds: tensor within the block -> axis and runs of entries."""
    held: dict[str, tuple[int, list[range]]] = {}
    for piece in found.slices:
        start = piece.start + unit * piece.width
        runs = held.setdefault(piece.parameter.removeprefix(block), (piece.axis, []))[1]
        runs.append(range(start, start + piece.width))
    return held


@pytest.mark.parametrize("name", params)
def test_the_units_share_out_every_tensor_that_they_hold(name: str) -> None:
    """Each entry along the axis belongs to exactly one unit; every sublayer has units or a reason why not; the outline
    adds up."""
    model = build(name)
    anatomy = discover(model)
    tensors = model.state_dict()
    assert anatomy.inner.keys() | anatomy.rigid.keys() == {a for a, _ in anatomy.outline.sublayers()}
    assert not anatomy.inner.keys() & anatomy.rigid.keys()
    for address, units in anatomy.inner.items():
        sublayer = anatomy.outline.stack(address.stack).blocks[address.block].sublayers[str(address.sublayer)]
        for found in units:
            owned = defaultdict(list)
            for piece in found.slices:
                end = piece.start + found.count * piece.width
                owned[piece.parameter, piece.axis] += range(piece.start, end)
            for (parameter, axis), held in owned.items():
                assert sorted(held) == list(range(tensors[parameter].shape[axis]))
            assert len({parameter for parameter, _ in owned}) == len(owned), "a tensor is cut along one axis only"
            assert {piece.parameter for piece in found.slices if piece.writes} <= set(anatomy.sublayer(address).writes)
            assert any(piece.writes for piece in found.slices)
            assert sublayer.inner[found.kind].count == found.count
            assert sublayer.narrowed(found.kind, found.count) == sublayer
            assert sublayer.narrowed(found.kind, 0).params >= 0
    with torch.device("meta"):
        assert inner_units(build(name).to("meta"), anatomy) == anatomy.inner


def test_a_group_has_its_query_heads_its_key_and_value_and_its_part_of_the_output() -> None:
    block = "model.layers.1."
    assert entries(inner("llama", ATTENTION), 2, block) == {
        "self_attn.q_proj.weight": (0, [range(40, 60)]),
        "self_attn.k_proj.weight": (0, [range(20, 30)]),
        "self_attn.v_proj.weight": (0, [range(20, 30)]),
        "self_attn.o_proj.weight": (1, [range(40, 60)]),
    }


def test_fused_projections_stacked_and_interleaved() -> None:
    stacked = entries(inner("phi3", ATTENTION), 1, "model.layers.1.self_attn.")
    assert stacked["qkv_proj.weight"] == (0, [range(16, 32), range(40, 48), range(56, 64)])
    columns = entries(inner("gpt2", ATTENTION), 3, "transformer.h.1.attn.")
    assert columns["c_attn.weight"] == (1, [range(24, 32), range(56, 64), range(88, 96)])
    assert columns["c_proj.weight"] == (0, [range(24, 32)])
    assert columns.keys() == {"c_attn.weight", "c_attn.bias", "c_proj.weight"}  # not the bias that is written
    interleaved = entries(inner("falcon_new", ATTENTION), 1, "transformer.h.1.self_attention.")
    assert interleaved["query_key_value.weight"] == (0, [range(32, 64)])  # two query heads, a key and a value
    halves = entries(inner("phi3", MLP), 5, "model.layers.1.mlp.")
    assert halves == {"gate_up_proj.weight": (0, [range(5, 6), range(53, 54)]), "down_proj.weight": (1, [range(5, 6)])}


def test_norms_of_queries_and_keys() -> None:
    block = "model.layers.1.self_attn."
    shared = entries(inner("qwen3", ATTENTION), 1, block)
    assert not [name for name in shared if "norm" in name]
    whole = entries(inner("olmo2", ATTENTION), 1, block)
    assert (whole["q_norm.weight"], whole["k_norm.weight"]) == ((0, [range(16, 32)]), (0, [range(8, 16)]))
    own = entries(inner("cohere", ATTENTION), 1, block)
    assert (own["q_norm.weight"], own["k_norm.weight"]) == ((0, [range(2, 4)]), (0, [range(1, 2)]))


def test_latent_attention_has_heads_and_a_cache_of_its_own() -> None:
    found = inner("deepseek_v3", ATTENTION)
    assert entries(found, 1, "model.layers.1.self_attn.") == {
        "q_b_proj.weight": (0, [range(16, 32)]),
        "kv_b_proj.weight": (0, [range(19, 38)]),
        "o_proj.weight": (1, [range(9, 18)]),
    }
    outline = discover(build("deepseek_v3")).outline.stack("decoder").blocks[1].sublayers["attention"]
    assert outline.inner["group"].cache_width == 0 and outline.narrowed("group", 1).cache_width == outline.cache_width


def test_an_expert_has_its_row_of_the_router_and_its_bias() -> None:
    found = inner("deepseek_v3", MLP)
    held = {name: axis for name, (axis, _) in entries(found, 0, "model.layers.1.mlp.").items()}
    assert held == dict.fromkeys(
        ("experts.gate_up_proj", "experts.down_proj", "gate.weight", "gate.e_score_correction_bias"), 0
    )
    assert (found.least, found.parts) == (8, 4)  # two of each of four groups: none can go
    assert inner("mixtral", MLP).least == 2


def test_two_slices_of_one_kind_differ_in_their_start_only() -> None:
    up = [piece for piece in inner("modernbert", Address("encoder", 1, "mlp")).slices if not piece.writes]
    assert up == [Slice(up[0].parameter, 0, 1, 0), Slice(up[0].parameter, 0, 1, 48)]


@pytest.mark.parametrize(
    ("name", "unit", "reason"),
    [
        ("t5", "encoder.1.attention", "one tensor of position biases"),
        ("t5", "decoder.1.cross_attention", "one tensor of position biases"),
        ("bloom", "decoder.0.attention", "one tensor of position biases"),
        ("falcon_alibi", "decoder.0.attention", "one tensor of position biases"),
        ("stablelm_parallel", "decoder.0.attention", "q_layernorm.norms.0.weight is no part of it that is known"),
        ("gemma4", "decoder.2.attention", "later blocks read its keys and values"),
        ("gemma4", "decoder.5.attention", "no keys of its own"),
    ],
)
def test_what_has_no_inner_units_says_why(name: str, unit: str, reason: str) -> None:
    anatomy = discover(build(name))
    address = Address.parse(unit)
    assert reason in anatomy.rigid[address]
    assert anatomy.outline.stack(address.stack).blocks[address.block].sublayers[str(address.sublayer)].rigid


def test_a_tensor_that_nobody_knows_makes_a_sublayer_rigid() -> None:
    model = build("llama")
    for path in ("model.layers.1.self_attn", "model.layers.2.mlp"):
        model.get_submodule(path).register_parameter("gain", torch.nn.Parameter(torch.ones(3)))
    anatomy = discover(model)
    assert "gain is no part of it that is known" in anatomy.rigid[ATTENTION]
    assert "gain is no part of it that is known" in anatomy.rigid[Address("decoder", 2, "mlp")]
    assert all(not unit.keys for units in anatomy.inner.values() for unit in units), (
        "no value says the size of them all"
    )
