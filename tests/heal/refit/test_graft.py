"""Grafting: the neurons that are needed are found, moved with all their parameters, and only where that pays."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from families import build
from torch import Tensor

from billhook.anatomy import discover
from billhook.data import Windows
from billhook.heal import Healing, closed_form
from billhook.heal.refit.graft import PENALTY, ROUNDS, choose, donors, part, survivors
from billhook.heal.refit.places import places
from billhook.heal.refit.pool import Pool, rows
from billhook.heal.refit.reads import reads_of
from billhook.heal.refit.ridge import Moments
from billhook.heal.refit.writes import scale_of, writes_of
from billhook.plan.address import Address
from billhook.plan.check import normalise

PLAIN = ["llama", "gpt2", "opt", "gpt_neox", "qwen3", "t5", "dinov2", "stablelm"]
OTHER = ["phi3", "mixtral", "bert"]


@pytest.fixture(autouse=True)
def no_gradients() -> Any:
    with torch.no_grad():
        yield


def moments(h: Tensor, r: Tensor) -> Moments:
    found = Moments()
    found.add(h, r, torch.ones(len(h)))
    return found


def drawn(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Values of 2 x 4 neurons, what each writes, and the sum that only neurons 1, 2, 4 and 7 have a part in."""
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(200, 8, generator=generator)
    columns = torch.randn(8, 5, generator=generator)
    needed = torch.tensor([1, 2, 4, 7])
    return h, columns, h[:, needed] @ columns[needed]


@pytest.mark.parametrize("constant", [False, True])
def test_the_neurons_that_are_needed_are_found(constant: bool) -> None:
    h, columns, goal = drawn(0)
    if constant:
        h, goal = torch.cat([h, torch.ones(200, 1)], -1), goal + 3.0
    fit, held = moments(h[:150], goal[:150]), moments(h[150:], goal[150:])
    found = choose(fit, held, columns, 4)
    assert found is not None and found.tolist() == [1, 2, 4, 7]


def test_its_own_neurons_stay_where_they_do_as_well() -> None:
    h, columns, _ = drawn(1)
    goal = h[:, :4] @ columns[:4]
    assert choose(moments(h[:150], goal[:150]), moments(h[150:], goal[150:]), columns, 4) is None


def test_a_part_of_the_moments_is_that_of_a_part_of_the_inputs() -> None:
    h, columns, goal = drawn(2)
    chosen = torch.tensor([0, 3, 7])
    found = part(moments(h, goal), columns, chosen)
    expected = moments(h[:, chosen], goal - h[:, chosen] @ columns[chosen])
    torch.testing.assert_close(found.inputs, expected.inputs, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(found.cross, expected.cross, rtol=1e-4, atol=1e-3)
    assert found.energy == pytest.approx(expected.energy, rel=1e-4)


@pytest.mark.parametrize(("own", "always", "seed"), [(4, 0, 0), (9, 1, 1), (17, 1, 2)])
def test_the_least_harmful_go_a_quarter_at_a_time(own: int, always: int, seed: int) -> None:
    """Harm by what it is: how much higher the least error is once the input is missing and the others are refitted."""
    generator = torch.Generator().manual_seed(seed)
    n = 2 * own + always
    mixed = torch.randn(n, n, generator=generator)
    h = torch.randn(300, n, generator=generator) @ mixed
    fit = moments(h, h @ torch.randn(n, 3, generator=generator) + torch.randn(300, 3, generator=generator))
    prior = torch.randn(n, 3, generator=generator)
    a = fit.inputs.double()
    strength = PENALTY * a.diagonal().mean()
    a = a + strength * torch.eye(n)
    goal = fit.cross.double() + strength * prior.double()

    def spared(inputs: list[int]) -> float:
        return float((goal[inputs] * torch.linalg.solve(a[inputs][:, inputs], goal[inputs])).sum())

    alive = list(range(n))
    for left in range(ROUNDS, 0, -1):
        surplus = len(alive) - always - own
        harm = {j: spared(alive) - spared([i for i in alive if i != j]) for j in alive if j < n - always}
        for j in sorted(harm, key=harm.__getitem__)[: -(-surplus // left)]:
            alive.remove(j)
    assert survivors(fit, prior, own, always).tolist() == [j for j in alive if j < n - always]


def test_constants_survive() -> None:
    h = torch.cat([drawn(3)[0], torch.zeros(200, 1)], -1)
    fit = moments(h, torch.ones(200, 5))
    assert survivors(fit, torch.zeros(9, 5), 4, 1).max() < 8


def test_donors_lie_beside_the_gap() -> None:
    model = build("llama")
    anatomy = discover(model)
    stack = anatomy.stack("decoder")
    last = len(stack.blocks) - 1

    def found(*texts: str) -> dict[str, list[str]]:
        drops = normalise([Address.parse(text) for text in texts], anatomy.outline)
        all_of_them = donors(model, places(stack), drops).items()
        return {str(into): [str(donor.address) for donor in of_it] for into, of_it in all_of_them}

    assert found("decoder.1") == {"decoder.0.mlp": ["decoder.1.mlp"]}
    assert found("decoder.1.mlp") == {"decoder.2.mlp": ["decoder.1.mlp"]}, "attention 1 reads before the gap"
    assert found("decoder.1", "decoder.2") == {
        "decoder.0.mlp": ["decoder.1.mlp", "decoder.2.mlp"],
        **({"decoder.3.mlp": ["decoder.2.mlp"]} if last >= 3 else {}),
    }
    assert found("decoder.1.attention") == {}
    assert found(f"decoder.{last}") == {f"decoder.{last - 1}.mlp": [f"decoder.{last}.mlp"]}


def test_in_a_parallel_block_the_attention_that_stays_reads_before_the_gap() -> None:
    model = build("gpt_neox")
    anatomy = discover(model)
    drops = normalise([Address("decoder", 1, "mlp")], anatomy.outline)
    assert list(donors(model, places(anatomy.stack("decoder")), drops)) == [Address("decoder", 2, "mlp")]


def test_a_long_gap_lends_what_lies_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("billhook.heal.refit.graft.DONORS", 1)
    model = build("llama")
    anatomy = discover(model)
    drops = normalise([Address("decoder", 1), Address("decoder", 2)], anatomy.outline)
    lent = donors(model, places(anatomy.stack("decoder")), drops)[Address("decoder", 0, "mlp")]
    assert [str(donor.address) for donor in lent] == ["decoder.1.mlp"]


@pytest.mark.parametrize("name", PLAIN)
def test_an_mlp_with_all_neurons_of_another_is_that_other(name: str) -> None:
    """Its write bias aside: what the first block's write puts out with the second one's neurons."""
    model = build(name)
    stack = discover(model).stacks[0]
    one, other = (next(s for s in b.sublayers if s.kind == "mlp") for b in stack.blocks[1:3])
    (write,), _ = writes_of(model, one, False)
    (source,), _ = writes_of(model, other, False)
    pool = Pool.of(reads_of(model, one), reads_of(model, other), {}, write, source.linear)
    n = len(pool.columns) // 2
    kept = model.state_dict()
    for chosen, goal in ((torch.arange(n), one), (torch.arange(n, 2 * n), other)):
        new = pool.chosen(chosen) | pool.writing(chosen, write)
        expected = {old: model.get_parameter(there) for old, there in zip(one.reads, goal.reads, strict=True)}
        expected[write.weight] = model.get_parameter(goal.writes[0])
        for weight, tensor in expected.items():
            assert new[weight].shape == kept[weight].shape
            torch.testing.assert_close(new[weight], tensor)
    assert {f"{r.removesuffix('weight')}{leaf}" for r in one.reads for leaf in rows(reads_of(model, one)[r])} == set(
        pool.chosen(torch.arange(n))
    )


@pytest.mark.parametrize(("name", "plain"), [*product(PLAIN, [True]), *product(OTHER[:2], [False])])
def test_only_mlps_made_of_rows_and_columns_take_part(name: str, plain: bool) -> None:
    model = build(name)
    stack = discover(model).stacks[0]
    drops = frozenset({stack.blocks[1].address})
    assert bool(donors(model, places(stack), drops)) == plain


def test_a_graft_makes_the_model_better_and_is_on_record() -> None:
    """The dropped block's neurons do what its write says; the kept MLP's own write next to nothing."""
    model = build("llama")
    anatomy = discover(model)
    model.model.layers[0].mlp.down_proj.weight.mul_(0.01)
    model.model.layers[1].self_attn.o_proj.weight.mul_(0.01)
    ids = torch.randint(3, 90, (64, 24), generator=torch.Generator().manual_seed(5))
    healing = closed_form(model, anatomy, [Address("decoder", 1)], Windows.of(ids, "test"))
    (graft,) = healing.grafts
    assert (graft.into, graft.source) == ("decoder.0.mlp", "decoder.1.mlp")
    n = model.config.intermediate_size
    assert 0.8 * n < graft.neurons <= n
    assert {"model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight"} <= set(healing.tensors)
    (refit,) = (r for r in healing.refits if r.weight == "model.layers.0.mlp.down_proj.weight")
    assert refit.after < 0.25
    assert healing.healed is not None and healing.cut is not None and healing.healed < 0.5 * healing.cut


def test_all_of_a_gap_lend_and_what_is_left_of_each_is_on_record(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    anatomy = discover(model)
    model.model.layers[0].mlp.down_proj.weight.mul_(0.3)
    for i in (1, 2):
        model.model.layers[i].self_attn.o_proj.weight.mul_(0.01)
    ids = torch.randint(3, 90, (64, 24), generator=torch.Generator().manual_seed(5))
    drops = [Address("decoder", 1), Address("decoder", 2)]

    def found() -> tuple[Healing, float]:
        healing = closed_form(model, anatomy, drops, Windows.of(ids, "test"))
        (refit,) = (r for r in healing.refits if r.weight == "model.layers.0.mlp.down_proj.weight")
        return healing, refit.after

    healing, error = found()
    grafts = [graft for graft in healing.grafts if graft.into == "decoder.0.mlp"]
    assert [graft.source for graft in grafts] == ["decoder.1.mlp", "decoder.2.mlp"]
    name = "model.layers.0.mlp.gate_proj.weight"
    old = model.get_parameter(name)
    own = sum(any(torch.equal(row, mine) for mine in old) for row in healing.tensors[name])
    assert own + sum(graft.neurons for graft in grafts) == len(old)
    monkeypatch.setattr("billhook.heal.refit.graft.DONORS", 1)
    _, error_of_one = found()
    assert error < error_of_one
    lent = torch.cat([model.get_parameter(name.replace("0", str(i), 1)) for i in (1, 2)])
    assert not any(torch.equal(row, theirs) for row in healing.tensors[name] for theirs in lent), "reads are guessed"


def test_how_a_write_reaches_the_stream_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[None] = []
    monkeypatch.setattr("billhook.heal.refit.walk.scale_of", lambda run: asked.append(None) or scale_of(run))
    model = build("llama")
    windows = Windows.of(torch.randint(0, 90, (16, 12), generator=torch.Generator().manual_seed(0)), "test")
    healing = closed_form(model, discover(model), [Address("decoder", 1), Address("decoder", 2)], windows)
    writes = [refit for refit in healing.refits if refit.weight.endswith(("o_proj.weight", "down_proj.weight"))]
    assert len(asked) == len(writes) == 5, "mlp 0, to which two offer neurons, and both of 3 and 4"
