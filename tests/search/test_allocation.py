"""From scores to widths: the budget, the order, the multiples."""

from __future__ import annotations

import pytest
import torch
from families import _decoder, build
from hypothesis import given, settings
from hypothesis import strategies as st

from billhook.anatomy import discover
from billhook.measure.cost import CostModel
from billhook.plan.budget import Budget
from billhook.plan.check import check
from billhook.plan.errors import InputError
from billhook.plan.plan import Plan
from billhook.plan.target import Target
from billhook.search.width import allocate, pose_width

OUTLINES = {name: discover(build(name)).outline for name in ("llama", "gemma2", "mixtral", "deepseek_v3")}
LLAMA = OUTLINES["llama"]


def posed(budget: str = "params=0.8", unit: str = "width", target: Target = Target.REMOTE, **more):
    return pose_width(LLAMA, Budget.parse(budget), unit, target, stack="decoder", **more)


def scores(problem, seed: int = 0) -> dict:
    generator = torch.Generator().manual_seed(seed)
    return {s.address: torch.rand(s.count, generator=generator, dtype=torch.float64) for s in problem.spaces}


@given(
    seed=st.integers(0, 99),
    share=st.integers(75, 97),
    unit=st.sampled_from(["neuron", "width"]),
    allocation=st.sampled_from(["uniform", "global", "standardised", "shared"]),
    multiple=st.sampled_from([1, 3, 8]),
)
@settings(max_examples=60)
def test_the_budget_is_met_within_one_step(seed: int, share: int, unit: str, allocation: str, multiple: int) -> None:
    """Never larger than asked, and no sublayer could have its last units back."""
    problem = posed(f"params={share / 100}", unit, multiple_of=multiple)
    shares = {space.address: 0.1 + i for i, space in enumerate(problem.spaces)}
    chosen = scores(problem, seed)
    keeps, costs = allocate(problem, chosen, allocation, shares=shares)
    check(Plan.of([], Target.REMOTE, keeps), LLAMA)
    true = CostModel(LLAMA).of([], keeps)
    assert costs == pytest.approx(true)
    assert problem.met(true)
    spaces = {space.address: space for space in problem.spaces}
    for keep in keeps:
        space = spaces[keep.unit]
        assert space.kind != "neuron" or len(keep.indices) % multiple == 0
        before = space.left[space.left.index(len(keep.indices)) - 1]
        back = true["params"] + (before - len(keep.indices)) * space.saving["params"]
        assert not problem.met({"params": back})
        gone = set(range(space.count)) - set(keep.indices)
        assert max(chosen[keep.unit][list(gone)]) <= min(chosen[keep.unit][list(keep.indices)])


def test_one_threshold_for_all() -> None:
    """Without multiples a global choice takes the lowest scores of the model, by what a unit gains if told so."""
    problem = posed(unit="neuron")
    chosen = scores(problem)
    keeps, _ = allocate(problem, chosen, "global")
    kept = {k.unit: k.indices for k in keeps}
    gone = [s for a, f in chosen.items() for i, s in enumerate(f.tolist()) if i not in kept.get(a, range(len(f)))]
    left = [s for a, f in chosen.items() for i, s in enumerate(f.tolist()) if i in kept.get(a, range(len(f)))]
    assert max(gone) < min(left)

    wide = posed(unit="width")
    equal = {s.address: torch.ones(s.count, dtype=torch.float64) for s in wide.spaces}
    by_unit = allocate(wide, equal, "global")[0]
    by_gain = allocate(wide, equal, "global", per="budget")[0]
    assert {keep.inner for keep in by_gain} == {"group"}  # a group frees more than a neuron
    assert "neuron" in {keep.inner for keep in by_unit}


def test_equal_shares_and_told_shares() -> None:
    problem = posed(unit="neuron")
    chosen = scores(problem)
    counts = [len(k.indices) for k in allocate(problem, chosen, "uniform")[0]]
    assert max(counts) - min(counts) <= 1
    shares = {space.address: 0.1 * (1 + i) for i, space in enumerate(problem.spaces)}
    lost = {
        k.unit: 1 - len(k.indices) / s.count
        for s, k in zip(problem.spaces, allocate(problem, chosen, "shared", shares=shares)[0], strict=True)
    }
    rates = [lost[a] / share for a, share in shares.items()]
    assert max(rates) - min(rates) < 2 / problem.spaces[0].count / 0.1


def test_ordinary_checkpoints_have_equal_widths() -> None:
    problem = posed(target=Target.UNIFORM)
    keeps, _ = allocate(problem, scores(problem), "uniform")
    check(Plan.of([], Target.UNIFORM, keeps), LLAMA)
    with pytest.raises(InputError, match="equal widths"):
        allocate(problem, scores(problem), "global")


def test_unknown_sublayers_stay() -> None:
    problem = posed(unit="neuron", budget="params=0.9")
    some = dict(list(scores(problem).items())[1:])
    keeps, _ = allocate(problem, some, "uniform")
    assert {keep.unit for keep in keeps} == set(some)


@pytest.mark.parametrize("budget", ["kv_bytes=0.7", "flops=0.9", "params=0.9,kv_bytes=0.8", "size=0.9"])
def test_other_budgets(budget: str) -> None:
    problem = posed(budget)
    keeps, costs = allocate(problem, scores(problem), "global", per="budget")
    assert problem.met(CostModel(LLAMA).of([], keeps))
    assert costs == pytest.approx(CostModel(LLAMA).of([], keeps))


@pytest.mark.parametrize(
    ("budget", "unit", "target", "words"),
    [
        ("params=0.2", "neuron", Target.REMOTE, "cannot be met"),
        ("params=0.01", "width", Target.REMOTE, "with every neuron or group of"),
        ("kv_bytes=0.9", "neuron", Target.REMOTE, "cannot be met"),
        ("params=0.8", "group", Target.DECI, "no group"),
        ("until=cliff", "neuron", Target.REMOTE, "single steps"),
    ],
)
def test_impossible_tasks(budget: str, unit: str, target: Target, words: str) -> None:
    with pytest.raises(InputError, match=words):
        posed(budget, unit, target)


def test_damaged_scores() -> None:
    problem = posed()
    chosen = scores(problem)
    address = problem.spaces[0].address
    with pytest.raises(InputError, match=str(address)):
        allocate(problem, {**chosen, address: chosen[address] * float("nan")})
    with pytest.raises(InputError, match=str(address)):
        allocate(problem, {**chosen, address: chosen[address][1:]})


@pytest.mark.parametrize("name", ["gemma2", "deepseek_v3"])
def test_other_families(name: str) -> None:
    problem = pose_width(OUTLINES[name], Budget.parse("params=0.95"), "width", Target.REMOTE, stack="decoder")
    keeps, _ = allocate(problem, scores(problem), "global", per="budget")
    check(Plan.of([], Target.REMOTE, keeps), OUTLINES[name])
    assert problem.met(CostModel(OUTLINES[name]).of([], keeps))


def test_experts_are_not_neurons() -> None:
    with pytest.raises(InputError, match="no neuron"):
        pose_width(OUTLINES["mixtral"], Budget.parse("params=0.9"), "neuron", Target.REMOTE)


def test_where_a_router_picks_within_groups_as_many_experts_of_each_stay() -> None:
    family = _decoder(
        "DeepseekV3ForCausalLM", blocks=2, num_key_value_heads=4, first_k_dense_replace=1, moe_intermediate_size=20,
        n_routed_experts=8, n_group=2, topk_group=1, num_experts_per_tok=2, q_lora_rank=None, kv_lora_rank=12,
        qk_rope_head_dim=6, qk_nope_head_dim=10, v_head_dim=9,
    )  # fmt: skip
    problem = pose_width(discover(family.build()).outline, Budget.parse("params=0.9"), "expert", Target.REMOTE)
    (space,) = problem.spaces
    assert space.left == (8, 6, 4)
    ((keep,), _) = allocate(problem, {space.address: torch.arange(8.0)}, "global")
    assert keep.indices == (1, 2, 3, 5, 6, 7)
    unknown = torch.tensor([0.0, 1, 2, 3, *[torch.inf] * 4])  # and with them those of the other group stay
    with pytest.raises(InputError, match="cannot be met with the units that have scores"):
        allocate(problem, {space.address: unknown}, "global")
