"""Maps of low rank across gaps: every family, saved and reopened; what they are for; what they refuse."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, build
from heal.refit.test_closed_form import DECODERS, NORMED, WALKED, inputs_of, windows
from surgery.live import assert_cache_is_exact, snapshot, stock_load

from billhook.anatomy import discover
from billhook.anatomy.bridge import BRIDGE
from billhook.export.huggingface import save
from billhook.heal import UNTOUCHED, Healing, bridge, closed_form, healed
from billhook.heal.healing import carried_out
from billhook.heal.held import parted
from billhook.heal.refit.bridge import SHARE, before_gaps, fitted
from billhook.heal.refit.peers import ALONE
from billhook.heal.refit.places import places
from billhook.heal.refit.ridge import Moments
from billhook.measure.cost import CostModel, path_costs
from billhook.measure.replay import Replay
from billhook.measure.trace import trace
from billhook.plan.address import Address
from billhook.plan.errors import InputError
from billhook.plan.plan import HiddenChannels, Plan
from billhook.recipes.heal import applied, differing
from billhook.recipes.opened import Opened
from billhook.runtime.attached import Attached
from billhook.runtime.counts import Counts
from billhook.surgery import simulate
from billhook.surgery.checkpoint import apply_to_checkpoint
from billhook.surgery.ranks import note_bridges
from billhook.surgery.reopen import load

PLAN = Plan.of(["decoder.1", "decoder.3"], target="remote")


@pytest.fixture(autouse=True)
def no_gradients() -> Any:
    with torch.no_grad():
        yield


def bed(name: str) -> Opened:
    model: Any = build(name)
    loaded: Any = type("Loaded", (), {"model": model, "source": name})
    return Opened(loaded, discover(model), torch.float32)


def whole_blocks(name: str) -> Plan:
    blocks = FAMILIES[name].stacks["decoder"]
    return Plan.of(["decoder.1", *(["decoder.3"] if blocks > 4 else [])], target="remote")


def made_up(open_: Opened, rank: int = 3) -> Healing:
    """A bridge behind the first block, and other weights beside it."""
    stack = open_.anatomy.stack("decoder")
    width = open_.anatomy.outline.stack("decoder").hidden_size
    generator = torch.Generator().manual_seed(1)
    first, second = (f"{stack.blocks[0].path}.{BRIDGE}.{part}.weight" for part in ("reduce", "expand"))
    write = stack.blocks[2].sublayers[-1].writes[0]
    tensors = {
        first: torch.randn(rank, width, generator=generator) / width**0.5,
        second: torch.randn(width, rank, generator=generator) / 4,
        write: 0.9 * open_.model.get_parameter(write).detach(),
    }
    return Healing(tensors, (), {}, 0, 0)


@pytest.mark.parametrize("name", DECODERS)
def test_simulated_applied_and_reloaded_agree(name: str, tmp_path: Path) -> None:
    """With and without Billhook and a cache; the dense model is left as it was."""
    open_ = bed(name)
    model, anatomy, healing = open_.model, open_.anatomy, made_up(bed(name))
    before, inputs = snapshot(model), FAMILIES[name].inputs(model, 3, "left")
    with healed(model, healing), simulate(model, anatomy, PLAN):
        expected = model(**inputs).logits
    assert snapshot(model) == before
    small = applied(open_, PLAN, healing)
    torch.testing.assert_close(small(**inputs).logits, expected)
    assert not torch.allclose(applied(open_, PLAN, UNTOUCHED)(**inputs).logits, expected, atol=1e-2)
    save(small, anatomy, PLAN, tmp_path)
    listed = json.loads((tmp_path / "config.json").read_text())["linear_ranks"]["decoder"]
    assert listed == {"0": {BRIDGE: 3}}
    ours = load(tmp_path).model
    for loaded in (ours, stock_load(tmp_path)):
        torch.testing.assert_close(loaded(**inputs).logits, expected, atol=1e-5, rtol=1e-4)
        assert_cache_is_exact(name, loaded)
    costs, beside = CostModel(anatomy.outline).of(PLAN.drops), path_costs(anatomy.outline, healing.beside)
    assert CostModel(discover(ours).outline).dense == pytest.approx({k: v + beside.get(k, 0) for k, v in costs.items()})
    again = differing(ours, open_, PLAN, tmp_path)
    assert again.tensors.keys() == healing.tensors.keys() and again.bridges == healing.bridges
    torch.testing.assert_close(applied(open_, PLAN, again)(**inputs).logits, expected)


@pytest.mark.parametrize("name", DECODERS)
def test_the_stream_comes_out_on_the_far_side(name: str) -> None:
    """What is kept lowers the held-back error, and what is on record is what the model does."""
    model = build(name)
    anatomy = discover(model)
    healing = bridge(model, anatomy, PLAN, windows(32))
    refits = {refit.weight: refit for refit in healing.refits if f".{BRIDGE}." in refit.weight}
    assert len(refits) == 2 and all(refit.after <= refit.before for refit in refits.values())
    if not healing.refused:
        assert healing.bridges.keys() == {w.partition(f".{BRIDGE}")[0] for w, refit in refits.items() if refit.taken}
        width = anatomy.outline.stacks[0].hidden_size
        assert set(healing.bridges.values()) <= {max(1, width // SHARE)}
        assert healing.beside == sum(2 * rank * width for rank in healing.bridges.values())


@pytest.mark.parametrize("name", sorted(NORMED & set(DECODERS)))
def test_where_nothing_is_folded_it_brings_more_than_all_the_rest(name: str) -> None:
    """On random models whose writes stand behind norms."""
    model = build(name)
    anatomy = discover(model)
    rest, whole = (heal(model, anatomy, PLAN, windows(32)) for heal in (closed_form, bridge))
    assert whole.cut is not None and whole.healed is not None
    assert whole.healed < (whole.cut if rest.healed is None or rest.refused else rest.healed)


def test_it_stands_where_whole_blocks_are_gone_and_something_is_left_before_them() -> None:
    model = build("llama")
    stack = discover(model).stacks[0]
    run = places(stack)

    def at(*units: str) -> list[str]:
        found = before_gaps(stack, run, frozenset(map(Address.parse, units)))
        return sorted(str(place.sublayers[-1].address) for place in found)

    last = len(stack.blocks) - 1
    assert at("decoder.0") == [] and at("decoder.1.mlp") == []
    assert at("decoder.1", "decoder.2") == ["decoder.0.mlp"]
    assert at("decoder.1", "decoder.0.mlp") == ["decoder.0.attention"]
    assert at(f"decoder.{last}") == [f"decoder.{last - 1}.mlp"]


def test_of_rank_enough_it_is_the_map_itself() -> None:
    """What is lacking follows from the stream by a map of the rank that it has: found; noise: left alone."""
    generator = torch.Generator().manual_seed(0)
    width = 4 * SHARE
    true = torch.randn(width, 4, generator=generator) @ torch.randn(4, width, generator=generator) / width
    fit, held = Moments(), Moments()
    blind, blind_held = Moments(), Moments()
    for here, there, rows in ((fit, blind, 800), (held, blind_held, 200)):
        h = torch.randn(rows, width, generator=generator)
        here.add(h, h @ true.T, torch.ones(rows))
        there.add(h, torch.randn(rows, width, generator=generator), torch.ones(rows))
    factors, refit = fitted("x", fit, held, ALONE)
    assert factors is not None and refit.taken and refit.after < 1e-6 * refit.before
    a, b = factors
    assert a.shape == (4, width) and b.shape == (width, 4)
    torch.testing.assert_close(b @ a, true, atol=1e-4, rtol=1e-3)
    nothing, refit = fitted("x", blind, blind_held, ALONE)
    assert nothing is None and not refit.taken and refit.after == refit.before


@pytest.mark.parametrize("name", [name for name in WALKED if name not in DECODERS])
def test_other_stacks_have_them_too(name: str) -> None:
    model = build(name)
    anatomy = discover(model)
    stack = anatomy.stacks[-1]
    healing = bridge(model, anatomy, Plan.of([f"{stack.name}.1"]), inputs_of(name, model))
    tried = [refit for refit in healing.refits if f".{BRIDGE}." in refit.weight]
    assert [refit.weight for refit in tried] == [f"{stack.blocks[0].path}.{BRIDGE}.reduce.weight"]
    assert healing.refused or bool(healing.bridges) == tried[0].taken


@pytest.mark.parametrize("name", ["gemma2", "gpt2", "bloom_post_norm"])
def test_in_bfloat16_they_are_that_too(name: str, tmp_path: Path) -> None:
    open_ = bed(name)
    model, anatomy = open_.model.bfloat16(), open_.anatomy
    found = bridge(model, anatomy, PLAN, windows(32))
    assert {tensor.dtype for tensor in found.tensors.values()} <= {torch.bfloat16}
    small = carried_out(model, anatomy, PLAN, made_up(open_))
    assert small.get_submodule(anatomy.stack("decoder").blocks[0].path).bridge.reduce.weight.dtype == torch.float32
    healing = replace(made_up(open_), tensors={k: v.bfloat16() for k, v in made_up(open_).tensors.items()})
    small = applied(open_, PLAN, healing)
    save(small, anatomy, PLAN, tmp_path)
    block = load(tmp_path).model.get_submodule(anatomy.stack("decoder").blocks[0].path)
    assert block.bridge.reduce.weight.dtype == torch.bfloat16
    for loaded in (small, load(tmp_path).model, stock_load(tmp_path)):
        with torch.no_grad():
            assert loaded(**FAMILIES[name].inputs(model, 2, None)).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["olmo2", "bloom_post_norm"])
def test_the_verdict_is_of_the_model_with_its_bridge(name: str) -> None:
    """Also behind the last block that is left, after which nothing reads the stream but the head."""
    model, text = build(name), windows(32)
    anatomy = discover(model)
    plan = Plan.of([Address("decoder", len(anatomy.stacks[0].blocks) - 1)])
    healing = bridge(model, anatomy, plan, text)
    assert healing.bridges.keys() == {anatomy.stacks[0].blocks[-2].path}
    held = parted(text)[1]
    dense, now = (m(held).logits.log_softmax(-1) for m in (model, carried_out(model, anatomy, plan, healing)))
    assert healing.healed == pytest.approx(float((dense.exp() * (dense - now)).sum(-1).mean()), rel=1e-3)


def test_what_is_seen_of_the_stream_is_behind_the_bridge() -> None:
    """Also by who looked before there was one."""
    open_ = bed("llama")
    model, healing = open_.model, made_up(open_)
    inputs = FAMILIES["llama"].inputs(model, 2, None)
    model(**inputs, output_hidden_states=True)
    small = applied(open_, PLAN, healing)
    with healed(model, healing):
        seen = model(**inputs, output_hidden_states=True).hidden_states[1]
    torch.testing.assert_close(seen, small(**inputs, output_hidden_states=True).hidden_states[1])


@pytest.mark.parametrize("rank", [0, -1, 37, 10**30, float("inf"), "wide", None, [3]])
def test_a_damaged_config_is_one_line(rank: Any, tmp_path: Path) -> None:
    open_ = bed("llama")
    save(applied(open_, PLAN, made_up(open_)), open_.anatomy, PLAN, tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    for block in ("0", "99"):
        content["linear_ranks"] = {"decoder": {block: {BRIDGE: 3 if block == "99" else rank}}}
        (tmp_path / "config.json").write_text(json.dumps(content))
        with pytest.raises(InputError, match=r"config\.json") as error:
            load(tmp_path)
        assert "\n" not in str(error.value)


def test_bridges_stand_beside_other_ranks() -> None:
    model = build("llama")
    anatomy = discover(model)
    model.config.linear_ranks = {"decoder": {"0": {"mlp.up_proj": 5}, "2": {"mlp.up_proj": 7}}}
    note_bridges(model.config, anatomy, {"model.layers.0": 4})
    assert model.config.linear_ranks == {"decoder": {"0": {"mlp.up_proj": 5, BRIDGE: 4}, "2": {"mlp.up_proj": 7}}}


def test_what_would_step_around_them_refuses(tmp_path: Path) -> None:
    open_ = bed("llama")
    (tmp_path / "one").mkdir()
    save(applied(open_, PLAN, made_up(open_)), open_.anatomy, PLAN, tmp_path / "one")
    model = load(tmp_path / "one").model
    anatomy = discover(model)
    again = Plan.of(["decoder.1"], target="remote")
    for refused in (
        lambda: closed_form(model, anatomy, again, windows()),
        lambda: bridge(model, anatomy, again, windows()),
        lambda: healed(model, made_up(open_)).__enter__(),
        lambda: trace(model, anatomy, windows(), ["block"]),
        lambda: Replay(model, anatomy, windows()),
        lambda: Attached(model, "some", Counts(), lambda _: None),
        lambda: apply_to_checkpoint(tmp_path / "one", again, tmp_path / "two"),
    ):
        before = snapshot(model)
        with pytest.raises(InputError, match="has bridges behind blocks"):
            refused()
        assert snapshot(model) == before
    assert not (tmp_path / "two").exists()


def test_refusals() -> None:
    model = build("llama")
    anatomy = discover(model)
    with pytest.raises(InputError, match=r"leads across a gap of whole blocks, .*; the plan has none"):
        bridge(model, anatomy, Plan.of(["decoder.1.mlp"]), windows())
    thin = HiddenChannels(stack="decoder", indices=tuple(range(32)))
    with pytest.raises(InputError, match="as wide as it is"):
        bridge(model, anatomy, Plan.of(["decoder.1"], channels=[thin]), windows())
