"""Experts in the form in which they are taken apart: exact where nothing is lost, the nearest where something is."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, build
from torch.nn.functional import silu

from billhook.anatomy import discover
from billhook.data import Windows
from billhook.heal import closed_form, healed, merge
from billhook.heal.combining.condense import Expert, foremost, low_reads, low_writes, nearest
from billhook.plan.errors import InputError
from billhook.plan.plan import Factorise, Keep, Plan
from billhook.surgery import apply, simulate

WINDOWS = Windows.of(torch.randint(3, 90, (16, 12), generator=torch.Generator().manual_seed(5)), "test")
KEPT = {"mixtral": (1, 2), "qwen3_moe": (0, 3, 4), "olmoe": (0, 2, 5, 7)}


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def neurons(expert: Expert, x: torch.Tensor) -> torch.Tensor:
    gate, up = (x @ expert.gate_up.T).chunk(2, dim=-1)
    return silu(gate) * up


def test_the_neurons_that_write_most_come_first_and_nothing_changes() -> None:
    expert, x = Expert(drawn(12, 5), drawn(4, 6, seed=1)), drawn(30, 5, seed=2)
    new = foremost(expert, neurons(expert, x))
    torch.testing.assert_close(neurons(new, x) @ new.down.T, neurons(expert, x) @ expert.down.T)
    written = neurons(new, x).square().sum(0) * new.down.square().sum(0)
    assert (written.diff() <= 0).all() and not torch.equal(new.down, expert.down)
    unseen = foremost(expert, x[:0] @ drawn(5, 6))
    assert (unseen.down.square().sum(0).diff() <= 0).all()


def test_low_rank_is_of_the_others_and_nearest_on_what_is_given() -> None:
    expert, x = Expert(drawn(12, 5), drawn(4, 6, seed=1)), drawn(300, 5, seed=2) * torch.tensor([9.0, 3, 1, 1, 0.1])
    new = low_reads(expert, x, 2)
    assert torch.equal(new.gate_up[[0, 1, 6, 7]], expert.gate_up[[0, 1, 6, 7]])
    others = [2, 3, 4, 5, 8, 9, 10, 11]
    assert torch.linalg.matrix_rank(new.gate_up[others], atol=1e-4) == 2
    u, s, v = torch.linalg.svd(expert.gate_up[others])
    plain = u[:, :2] * s[:2] @ v[:2]
    off = [(x @ (expert.gate_up[others] - w).T).square().sum() for w in (new.gate_up[others], plain)]
    assert off[0] < off[1]
    h = neurons(new, x)
    last = low_writes(new, h, 2)
    assert torch.equal(last.down[:, :2], expert.down[:, :2]) and torch.equal(last.gate_up, new.gate_up)
    assert torch.linalg.matrix_rank(last.down[:, 2:], atol=1e-4) == 2


def test_without_tokens_it_is_the_plain_decomposition() -> None:
    w = drawn(6, 4)
    u, s, v = torch.linalg.svd(w)
    torch.testing.assert_close(nearest(w, w[:0], 2), u[:, :2] * s[:2] @ v[:2])


@pytest.mark.parametrize("name", KEPT)
@torch.no_grad()
def test_merged_experts_are_cut_without_further_loss(name: str) -> None:
    """What the merging leaves is of the rank of the plan already: the cut, which does not see the text, keeps it."""
    model = build(name)
    anatomy = discover(model)
    sublayers = dict(anatomy.outline.sublayers())
    units = [(a, path) for a, s in sublayers.items() for path in s.mixtures][1:3]
    ranks = {a: max(sublayers[a].mixtures[path].useful - 1, 1) for a, path in units}
    keeps = [Keep(unit=a, inner="expert", indices=KEPT[name]) for a, _ in units]
    merged = Plan.of([], keeps=keeps)
    edits = tuple(Factorise(unit=a, linear=path, rank=ranks[a]) for a, path in units)
    plan = merged.model_copy(update={"edits": (*merged.edits, *edits)})
    found = merge(model, anatomy, plan, WINDOWS)
    x = FAMILIES[name].inputs(model, 3, "left")
    with healed(model, found):
        with simulate(model, anatomy, merged):
            expected = model(**x).logits
        torch.testing.assert_close(apply(model, anatomy, plan)(**x).logits, expected, atol=1e-3, rtol=1e-3)
    with pytest.raises(InputError, match="experts in two parts cannot be healed"):
        closed_form(model, anatomy, plan, WINDOWS)
    alone = plan.model_copy(update={"edits": edits})
    with pytest.raises(InputError, match="takes away experts"):
        merge(model, anatomy, alone, WINDOWS)
    spare = next(a for a, s in sublayers.items() if s.mixtures and a not in ranks)
    more = plan.model_copy(update={"edits": (*plan.edits, edits[0].model_copy(update={"unit": spare}))})
    with pytest.raises(InputError, match="takes away experts"):
        merge(model, anatomy, more, WINDOWS)
