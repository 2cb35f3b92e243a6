"""Search on a live model: the objective of ``measure`` is one, to the bit also across a crash."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from families import VOCABULARY, build

from billhook.anatomy import discover
from billhook.data import Windows
from billhook.measure.ablation import Ablator
from billhook.measure.cost import cost
from billhook.plan.address import Address
from billhook.plan.budget import Budget
from billhook.search import Found, Ledger, Memo, greedy, pose
from billhook.surgery import apply

IDS = torch.randint(3, VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(5))
TEXT = Windows(IDS, "noise", "n")


class Killed(Exception):
    pass


class Mortal(Ablator):
    """Dies instead of giving one more figure than ``life``."""

    life = 10**9

    def at(self, drops: Iterable[Address]) -> float:
        self.life -= 1
        if self.life < 0:
            raise Killed
        return super().at(drops)


def search(ledger: Ledger | None = None, life: int = 10**9, lazy: bool = True) -> tuple[Found, Mortal]:
    model = build("llama")
    anatomy = discover(model)
    objective = Mortal(model, anatomy, TEXT)
    objective.life = life
    problem = pose(anatomy.outline, Budget.parse("params=0.6"))
    return greedy(problem, Memo(objective, ledger), lazy=lazy, refine=1.0), objective


def test_the_plan_keeps_the_budget_on_the_model_itself() -> None:
    found, _ = search()
    model = build("llama")
    anatomy = discover(model)
    smaller = apply(model, anatomy, found.drops)
    gone = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in smaller.parameters())
    dense = anatomy.outline.block_params
    assert gone == dense - cost(anatomy.outline, found.drops)["params"]
    assert dense - gone <= 0.6 * dense
    fresh = Ablator(model, anatomy, TEXT)
    fresh.move(found.drops)
    assert found.steps[-1].objective == fresh.value(), "the figure of the plan is the model's, to the bit"


def test_lazy_works_less_and_does_not_do_much_worse() -> None:
    (lazy, _), (plain, _) = search(), search(lazy=False)
    assert lazy.work < plain.work
    assert (lazy.steps[-1].objective or 0) < 1.2 * (plain.steps[-1].objective or 0)


@pytest.mark.parametrize("life", [0, 1, 10, 12])
def test_a_resumed_search_is_the_uninterrupted_one_to_the_bit(life: int, tmp_path: Path) -> None:
    expected, whole = search()
    with pytest.raises(Killed):
        search(Ledger(tmp_path / "l.jsonl", {"model": "llama"}), life)
    resumed, fewer = search(Ledger(tmp_path / "l.jsonl", {"model": "llama"}))
    assert resumed == expected, "drops, steps, exact figures and the work counter"
    assert whole.life - fewer.life <= 1 - life, "the finished part is not evaluated again"
