"""The restarted forward pass is the model's own, on every family."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, build, tokens
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from billhook.anatomy import Anatomy, discover
from billhook.data import Windows
from billhook.measure.batches import batches_of
from billhook.measure.patch import Reached, hooked, observing
from billhook.measure.replay import Replay
from billhook.plan.address import Address
from billhook.plan.check import units
from billhook.plan.errors import InputError
from billhook.surgery import simulate

SUPPORTED = list(FAMILIES)
STACKS = [(name, stack) for name in SUPPORTED for stack in FAMILIES[name].stacks]


def windows(rows: int = 3, length: int = 9) -> Windows:
    ids = torch.randint(3, 90, (rows, length), generator=torch.Generator().manual_seed(5))
    return Windows.of(ids, "test")


def last_stream(model: nn.Module, path: str, inputs: dict[str, Tensor]) -> Tensor:
    """What the model's own forward has after the last block that it has now."""
    seen = []
    last = model.get_submodule(path)[-1]

    def keep(block, args, kwargs, output):
        seen.append(output[0] if isinstance(output, tuple) else output)

    with observing(model), hooked([(last, keep)]):
        model(**inputs)
    return seen[0]


def fingerprint(model: nn.Module) -> list:
    return [
        (name, id(m), m.training, sorted(m.__dict__), len(m._forward_hooks), len(m._forward_pre_hooks))
        for name, m in model.named_modules()
    ]


def droppable(anatomy: Anatomy, stack: str) -> list[Address]:
    kinds = units(anatomy.outline, "block") + units(anatomy.outline, "sublayer")
    return [a for a in kinds if a.stack == stack]


@pytest.mark.parametrize(("name", "stack"), STACKS)
def test_every_unit_equals_simulation(name: str, stack: str) -> None:
    """Bit for bit, whatever block the pass starts at; and again from a state with a unit gone."""
    model = build(name)
    anatomy = discover(model)
    inputs = FAMILIES[name].inputs(model, 2, None)
    replay = Replay(model, anatomy, [inputs], stack)
    path = anatomy.stack(stack).path
    assert torch.equal(replay.final[0], last_stream(model, path, inputs))
    for committed in ([], droppable(anatomy, stack)[-1:]):
        for unit in committed:
            replay.move(replay.state | {unit})
        for unit in droppable(anatomy, stack):
            got = replay.without(unit)[0]
            drops = set(committed) | {unit}
            if unit.block == len(anatomy.stack(stack).blocks) - 1 and unit.sublayer is None:
                drops -= {a for a in committed if a.block == unit.block}
            with simulate(model, anatomy, drops):
                assert torch.equal(got, last_stream(model, path, inputs)), f"{unit} after {committed}"


@pytest.mark.parametrize("name", [n for n in SUPPORTED if FAMILIES[n].inputs is tokens and FAMILIES[n].generates])
def test_logits_are_the_models_own(name: str) -> None:
    model = build(name)
    replay = Replay(model, discover(model), windows())
    with torch.no_grad():
        expected = model(input_ids=windows().ids, use_cache=False).logits
    got = replay.logits(windows().ids[1, 2:7], replay.final[0][1, 2:7])
    torch.testing.assert_close(got, expected[1, 2:7], rtol=1e-6, atol=1e-6)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_any_sequence_of_commits(data: st.DataObject) -> None:
    """Whatever is asked and committed in whatever order, the state is that of the simulated drops; work is exact."""
    name = data.draw(st.sampled_from(["llama", "bloom", "falcon", "gemma3", "gemma4"]))
    model = build(name)
    anatomy = discover(model)
    replay = Replay(model, anatomy, windows())
    blocks = len(anatomy.stacks[0].blocks)
    assert replay.work == blocks * 27
    drops: set[Address] = set()
    keep = Address("decoder", data.draw(st.integers(0, blocks - 1)))
    for unit in data.draw(st.permutations([a for a in droppable(anatomy, "decoder") if a.parent != keep]))[:4]:
        for other in data.draw(st.lists(st.sampled_from(droppable(anatomy, "decoder")), max_size=1)):
            replay.without(other)
        if data.draw(st.booleans()):
            replay.without(unit)
            before = replay.work
            replay.move(replay.state | {unit})
            assert replay.work == before
        else:
            replay.move(replay.state | {unit})
        drops.add(unit)
        with simulate(model, anatomy, drops):
            assert torch.equal(
                replay.final[0], last_stream(model, anatomy.stacks[0].path, {"input_ids": windows().ids})
            )


def test_moving_to_any_state() -> None:
    """Units come back too, and only the blocks from the first difference on are run."""
    model = build("llama")
    anatomy = discover(model)
    replay = Replay(model, anatomy, windows(2, 6))
    dense = replay.final[0]
    for drops, blocks in (
        ({"decoder.1", "decoder.3.mlp"}, 3),
        ({"decoder.1", "decoder.3"}, 1),
        ({"decoder.2.attention"}, 4),
        ({"decoder.2.attention", "decoder.4"}, 0),
        (set(), 3),
    ):
        before = replay.work
        replay.move(map(Address.parse, drops))
        assert replay.work - before == blocks * 12
        with simulate(model, anatomy, drops):
            expected = last_stream(model, anatomy.stacks[0].path, {"input_ids": windows(2, 6).ids})
        assert torch.equal(replay.final[0], expected)
    assert torch.equal(replay.final[0], dense)


def test_work_is_exact() -> None:
    model = build("llama")
    replay = Replay(model, discover(model), windows(2, 6))
    counts = []
    for unit in ("decoder.1", "decoder.1.mlp", "decoder.4", "decoder.4.attention"):
        before = replay.work
        replay.without(Address.parse(unit))
        counts.append(replay.work - before)
    assert counts == [3 * 12, 4 * 12, 0, 12]
    replay.move(replay.state | {Address("decoder", 2)})
    before = replay.work
    replay.without(Address("decoder", 1, "mlp"))
    assert replay.work - before == 3 * 12
    replay.move(replay.state | {Address("decoder", 3, "attention"), Address("decoder", 3, "mlp")})
    before = replay.work
    replay.without(Address("decoder", 1, "mlp"))
    assert replay.work - before == 2 * 12, "a block without sublayers is not run"


def test_blocks_whose_keys_and_values_others_read_run_again_and_count() -> None:
    """Of gemma4 blocks 2 and 3 lend theirs to 4, 5 and 6, after what is changed in front of them as well."""
    model = build("gemma4")
    anatomy = discover(model)
    assert [block.address.block for block in anatomy.stacks[0].blocks if block.lends] == [2, 3]
    replay = Replay(model, anatomy, windows(2, 6))
    replay.move(replay.state | {Address("decoder", 0, "mlp")})
    counts = []
    for unit in ("decoder.2.mlp", "decoder.3.mlp", "decoder.4.mlp", "decoder.6.attention"):
        before = replay.work
        got = replay.without(Address.parse(unit))[0]
        counts.append(replay.work - before)
        with simulate(model, anatomy, ["decoder.0.mlp", unit]):
            assert torch.equal(got, last_stream(model, anatomy.stacks[0].path, {"input_ids": windows(2, 6).ids}))
    assert counts == [5 * 12, (4 + 1) * 12, (3 + 2) * 12, (1 + 2) * 12]


def test_model_is_left_as_it_was() -> None:
    model = build("llama").train()
    model.model.layers[2].mlp.eval()
    before = fingerprint(model)
    replay = Replay(model, discover(model), windows())
    replay.without(Address("decoder", 1, "mlp"))
    replay.move(replay.state | {Address("decoder", 3)})
    assert fingerprint(model) == before
    assert all(p.requires_grad for p in model.parameters())


def test_model_is_left_as_it_was_after_an_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama").train()
    replay = Replay(model, discover(model), windows())
    before = fingerprint(model)
    state = [s.clone() for s in replay.final]

    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(type(model.model.layers[4].mlp), "forward", fail)
    with pytest.raises(KeyboardInterrupt):
        replay.move(replay.state | {Address("decoder", 1, "mlp")})
    assert fingerprint(model) == before
    assert replay.state == frozenset()
    assert torch.equal(replay.final[0], state[0])


def test_a_forward_of_its_own_comes_back() -> None:
    """Some tools put a forward on the instance; it must survive."""
    model = build("llama")
    block = model.model.layers[1]
    block.forward = own = block.forward
    Replay(model, discover(model), windows()).without(Address("decoder", 2))
    assert block.__dict__["forward"] is own


def test_windows_are_batched_by_tokens() -> None:
    model = build("llama")
    ids = windows(7, 20)
    assert [b["input_ids"].shape[0] for b in batches_of(ids, model, tokens_at_once=60)] == [3, 3, 1]
    assert [b["input_ids"].shape[0] for b in batches_of(ids, model, tokens_at_once=5)] == [1] * 7


@pytest.mark.parametrize("unit", ["decoder.9", "encoder.0", "decoder.0.cross_attention"])
def test_unknown_units_are_refused(unit: str) -> None:
    model = build("llama")
    replay = Replay(model, discover(model), windows())
    with pytest.raises(InputError, match=unit):
        replay.without(Address.parse(unit))


def test_several_stacks_need_a_name() -> None:
    model = build("clip")
    inputs = FAMILIES["clip"].inputs(model, 2, None)
    with pytest.raises(InputError, match="text, vision"):
        Replay(model, discover(model), [inputs])


def test_nan_is_named() -> None:
    model = build("llama")
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(InputError, match=r"out of decoder\.2"):
        Replay(model, discover(model), windows())


def test_reached_does_not_escape() -> None:
    model = build("llama")
    try:
        Replay(model, discover(model), windows())
    except Reached:
        pytest.fail("the private signal escaped")


@torch.no_grad()
def test_logits_of_a_mixture_that_balances_its_experts() -> None:
    """Its forward adds up the routers' choices, of which there are none while every block hands on."""
    model = build("mixtral")
    model.config.output_router_logits = True
    replay = Replay(model, discover(model), windows(1))
    ids = replay.batches[0]["input_ids"][0]
    torch.testing.assert_close(replay.logits(ids, replay.final[0][0]), model(input_ids=ids[None]).logits[0])
