"""Ranks under a budget."""

from __future__ import annotations

import itertools

import pytest
import torch
from families import build
from torch import Tensor

from billhook.anatomy import discover
from billhook.plan.address import Address
from billhook.plan.budget import Budget
from billhook.plan.errors import InputError
from billhook.plan.outline import BlockOutline, LinearOutline, Outline, StackOutline, SublayerOutline
from billhook.plan.target import Target
from billhook.search.ranks import Linear, RankProblem, pose_ranks, spread

LLAMA = discover(build("llama")).outline


def energies(problem: RankProblem, seed: int = 0) -> dict[Linear, tuple[Tensor, float]]:
    drawn = torch.Generator().manual_seed(seed)
    found = {}
    for linear, outline in problem.linears.items():
        all_ = torch.rand(min(outline.outputs, outline.inputs), generator=drawn).double() ** (seed + 2)
        falling = all_.sort(descending=True).values
        found[linear] = (falling[: outline.useful], float(falling.sum()))
    return found


def loss(ranks: dict[Linear, int], of: dict[Linear, tuple[Tensor, float]]) -> float:
    return sum(1 - of[linear][0][:rank].sum().item() / of[linear][1] for linear, rank in ranks.items())


@pytest.mark.parametrize("how", ["uniform", "global"])
@pytest.mark.parametrize("budget", ["params=0.8", "params=0.5", "flops=0.9,size=0.95"])
def test_budgets_are_met_and_nearly_used_up_and_no_rank_is_useless(how: str, budget: str) -> None:
    problem = pose_ranks(LLAMA, Budget.parse(budget))
    ranks = spread(problem, energies(problem), how)  # type: ignore[arg-type]
    assert problem.met(ranks)
    assert all(1 <= rank <= problem.linears[linear].useful for linear, rank in ranks.items())
    costs = problem.costs(ranks)
    assert any(costs[kind] > 0.97 * ceiling for kind, ceiling in problem.ceilings.items())


def test_uniform_is_one_share_for_all() -> None:
    problem = pose_ranks(LLAMA, Budget.parse("params=0.6"))
    ranks = spread(problem, energies(problem), "uniform")
    assert ranks.keys() == problem.linears.keys()
    for rank, outline in ((ranks[linear], outline) for linear, outline in problem.linears.items()):
        whole = outline.params / (outline.outputs + outline.inputs)
        assert abs(rank / whole - 0.59) < 0.06


def _small(sizes: list[tuple[int, int]]) -> Outline:
    linears = {f"l{i}": LinearOutline(outputs=o, inputs=i_) for i, (o, i_) in enumerate(sizes)}
    params = sum(o * i for o, i in sizes)
    part = SublayerOutline(params=params, active_params=params, linears=linears)
    stack = StackOutline(name="decoder", hidden_size=4, causal=True, blocks=(BlockOutline(sublayers={"mlp": part}),))
    return Outline(family="x", stacks=(stack,), other_params=0, head_params=0, bytes_per_param=4)


@pytest.mark.parametrize("seed", range(6))
def test_global_is_as_good_as_the_best_of_all_choices_at_the_cost_it_has(seed: int) -> None:
    problem = pose_ranks(_small([(6, 5), (8, 8), (5, 9)]), Budget.parse("params=0.7"))
    of = energies(problem, seed)
    ranks = spread(problem, of, "global")
    choices = [[None, *range(1, outline.useful + 1)] for outline in problem.linears.values()]
    best = min(
        loss(chosen, of)
        for picked in itertools.product(*choices)
        for chosen in [{n: r for n, r in zip(problem.linears, picked, strict=True) if r is not None}]
        if problem.met(chosen)
    )
    # what the last step leaves open is at most what lies in one rank
    most = max((values / total).max().item() for values, total in of.values())
    assert best <= loss(ranks, of) <= best + most
    assert loss(ranks, of) < loss(spread(problem, of, "uniform"), of) + 1e-12


def test_linears_without_figures_stay_as_they_are() -> None:
    problem = pose_ranks(LLAMA, Budget.parse("params=0.9"))
    known = {linear: value for linear, value in energies(problem).items() if linear[0].sublayer == "mlp"}
    assert {unit.sublayer for unit, _ in spread(problem, known, "global")} == {"mlp"}
    with pytest.raises(InputError, match="cannot be met with the 1 linears"):
        spread(problem, dict(itertools.islice(known.items(), 1)), "uniform")


@pytest.mark.parametrize(
    ("budget", "target", "message"),
    [
        ("params=0.01", Target.ANY, "every linear of this llama model at rank 1, params is still"),
        ("kv_bytes=0.9", Target.ANY, "kv_bytes is still 1.000"),
        ("until=cliff", Target.ANY, "give an amount"),
        ("params=0.9", Target.UNIFORM, "target uniform cannot carry"),
        ("params=0.9", Target.DECI, "target deci cannot carry"),
    ],
)
def test_what_cannot_be_met_is_refused(budget: str, target: Target, message: str) -> None:
    with pytest.raises(InputError, match=message):
        pose_ranks(LLAMA, Budget.parse(budget), target)
    with pytest.raises(InputError, match="can be taken apart"):
        pose_ranks(LLAMA, Budget.parse("params=0.9"), stack="encoder")


def test_the_address_of_a_linear_is_its_sublayer_and_its_path() -> None:
    problem = pose_ranks(LLAMA, Budget.parse("params=0.9"))
    assert (Address("decoder", 4, "attention"), "self_attn.o_proj") in problem.linears
