"""Selecting text: weights of sum one, the right windows ahead, read as often as they say, the same after a crash."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from families import build
from heal.training.training_bed import PLAN, quick, text
from hypothesis import given
from hypothesis import strategies as st

from billhook.anatomy import discover
from billhook.data import Windows
from billhook.heal import UNTOUCHED
from billhook.heal.selecting.clusters import clusters
from billhook.heal.selecting.harm import harmed
from billhook.heal.selecting.paser import concepts_of, paser
from billhook.heal.selecting.reweighting import by_alignment, by_loss, losses
from billhook.heal.selecting.select import Selection, select
from billhook.heal.training.drawing import lap, lap_length
from billhook.heal.training.head import halves
from billhook.heal.training.loop import split
from billhook.heal.training.student import Student, ends_of
from billhook.heal.training.train import train
from billhook.plan.errors import InputError
from billhook.plan.record import Select, SelectionRecord
from billhook.surgery import apply
from billhook.surgery.live import drops_of


@given(st.lists(st.floats(0, 1), min_size=1, max_size=40).filter(lambda w: sum(w) > 1e-3), st.integers(0, 99))
def test_a_lap_reads_each_window_as_often_as_it_weighs(raw: list[float], seed: int) -> None:
    weights = torch.tensor(raw, dtype=torch.float64)
    weights /= weights.sum()
    order = lap(len(raw), weights, seed, 3)
    assert order == lap(len(raw), weights, seed, 3)
    assert len(order) == lap_length(len(raw), weights) == sum(w > 0 for w in weights.tolist())
    for number, weight in enumerate(weights.tolist()):
        assert abs(order.count(number) - weight * len(order)) < 1 + 1e-6


@given(st.sets(st.integers(0, 29), min_size=1), st.integers(0, 99))
def test_equal_weights_read_each_once(chosen: set[int], seed: int) -> None:
    weights = torch.zeros(30, dtype=torch.float64)
    weights[list(chosen)] = 1 / len(chosen)
    assert sorted(lap(30, weights, seed, 0)) == sorted(chosen)
    assert sorted(lap(30, None, seed, 0)) == list(range(30))


def test_low_losses_count_less_and_high_ones_alike() -> None:
    weights = by_loss(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0], dtype=torch.float64))
    assert weights.sum().item() == pytest.approx(1)
    assert (weights / weights[-1]).tolist() == pytest.approx([np.exp(-1), np.exp(-0.5), 1, 1, 1])
    assert by_loss(torch.ones(4).double()).tolist() == [0.25] * 4


def test_well_aligned_windows_count_more() -> None:
    weights = by_alignment(torch.tensor([-0.1, 0.0, 0.1], dtype=torch.float64))
    assert weights.sum().item() == pytest.approx(1)
    logs = weights.log()
    assert logs.std(unbiased=False).item() == pytest.approx(1) and (logs.diff() > 0).all()
    assert by_alignment(torch.ones(4).double()).tolist() == [0.25] * 4


def test_points_apart_are_groups_apart() -> None:
    chance = np.random.default_rng(0)
    centres = np.repeat(np.eye(8)[:3] * 10, [8, 12, 6], axis=0)
    found = clusters(centres + 0.1 * chance.normal(size=centres.shape), seed=0)
    assert [len(set(part)) for part in np.split(found, [8, 20])] == [1, 1, 1] and len(set(found)) == 3
    assert clusters(np.ones((9, 4)), 0).tolist() == [0] * 9
    assert clusters(np.ones((1, 4)), 0).tolist() == [0]


def test_the_harmed_group_gets_more_and_the_most_harmed_of_it() -> None:
    groups = np.array([0] * 6 + [1] * 6)
    harm = np.array([1.0] * 6 + [4, 2, 3, 4, 2, 3])
    none = [frozenset[int]()] * 12
    assert paser(groups, harm, none, 4).chosen == [0, 6, 8, 9]
    assert len(paser(groups, harm, none, 11).chosen) == 11, "what a group cannot fill goes to the other"
    assert len(paser(groups, 0 * harm, none, 6).chosen) == 6


def test_what_is_left_over_goes_to_the_group_that_was_short_of_most() -> None:
    """Shares of 3.75 and 1.25 of 5 are 4 and 1."""
    groups, harm = np.array([0] * 6 + [1] * 6), np.array([3.0] * 6 + [1.0] * 6)
    chosen = paser(groups, harm, [frozenset[int]()] * 12, 5).chosen
    assert [sum(number < 6 for number in chosen), sum(number >= 6 for number in chosen)] == [4, 1]


def test_known_concepts_that_never_met_are_a_conflict() -> None:
    concepts = [frozenset(c) for c in ({1, 2}, {3, 4}, {1, 3}, {1, 2, 5}, {6, 7})]
    found = paser(np.zeros(5, int), np.array([5.0, 4, 3, 2, 1]), concepts, 4)
    assert (found.chosen, found.screened) == ([0, 1, 3, 4], 1)


def test_concepts_are_what_a_window_says_often_and_others_seldom() -> None:
    ids = np.array([[1, 1, 2, 2, 3, 9], [1, 1, 3, 3, 4, 2], [1, 1, 4, 4, 8, 3], [1, 1, 5, 5, 5, 7]])
    assert concepts_of(ids) == [{2}, {3}, {4}, set()]


def test_harm_and_what_the_dense_model_sees_come_of_one_forward_each() -> None:
    dense, ids = build("llama"), text(3).ids
    anatomy = discover(dense)
    ends = ends_of(anatomy, drops_of(PLAN, anatomy), anatomy.stacks[0])
    student = Student(apply(dense, anatomy, PLAN), dense, ends, "dense")
    forwards = Counter[str]()
    for name, model in (("dense", dense), ("cut", student.model)):
        model.get_decoder().layers[0].register_forward_hook(lambda *_, name=name: forwards.update([name]))
    harm, points = harmed(student, ids)
    assert forwards == {"dense": 3, "cut": 3}
    np.testing.assert_array_equal(harm, losses(student, ids).numpy())
    seen = [halves(dense, row[None])[0][0].detach().double().mean(0).numpy() for row in ids]
    np.testing.assert_array_equal(points, np.stack(seen))


def selection(word: Select, rows: int = 24, count: int = 6, **target: Any) -> Selection:
    return Selection(word, text(rows), count, rows, 0, **target)


def weighed(word: Select, name: str = "llama") -> tuple[torch.Tensor | None, SelectionRecord]:
    target = {"target": text(4, seed=9)} if word in ("dsir", "gradient") else {}
    model = build(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = select(model, discover(model), PLAN, UNTOUCHED, selection(word, **target), "dense", 0)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    return found


CASES = [*((word, "llama") for word in get_args(Select)), ("gradient", "gpt2"), ("paser", "qwen3_moe")]


@pytest.mark.parametrize(("word", "name"), CASES)
def test_every_word_gives_weights_of_sum_one_and_says_so(word: Select, name: str) -> None:
    weights, record = weighed(word, name)
    again, _ = weighed(word, name)
    assert record.windows == len(split(text().ids)[0]) == 20
    if weights is None:
        assert word == "distinct" and record.chosen == record.effective == 20
        return
    assert again is not None and torch.equal(weights, again)
    assert weights.shape == (20,) and weights.min() >= 0 and weights.sum().item() == pytest.approx(1)
    assert record.chosen == (weights > 0).sum().item()
    assert record.chosen == (20 if word in ("loss", "gradient") else 6)
    assert 1 <= record.effective <= record.chosen + 1e-6
    assert sum(group.chosen for group in record.groups) == (6 if word == "paser" else 0)


def test_gradients_of_the_target_itself_are_aligned_best() -> None:
    model, windows = build("llama"), text()
    target = Windows.of(windows.ids[3:4], "target")
    weights, record = select(model, discover(model), PLAN, UNTOUCHED, selection("gradient", target=target), "text", 0)
    assert weights is not None and weights.argmax().item() == 3 and record.target == "target"


class Killed(Exception):
    pass


def test_weighted_training_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    def stop(label: str, done: int, total: int) -> None:
        if done == 10:
            raise Killed

    weights = torch.rand(20, generator=torch.Generator().manual_seed(0)).double()
    weights[:7] = 0
    weights /= weights.sum()

    def go(state: str, **options: Any) -> Any:
        model = build("llama")
        return train(
            model, discover(model), PLAN, UNTOUCHED, text(), quick("tune"), tokens=12 * 48, state=tmp_path / state,
            **options,
        )  # fmt: skip

    whole, expected = go("whole", weights=weights)
    with pytest.raises(Killed):
        go("state", weights=weights, progress=stop)
    again, record = go("state", weights=weights)
    assert record == expected != go("plain")[1]
    assert all(torch.equal(again.tensors[key], tensor) for key, tensor in whole.tensors.items())
    with pytest.raises(InputError, match=r"belongs to another run \(weights is"):
        go("state")


def test_nothing_to_choose_from_is_refused() -> None:
    with pytest.raises(InputError, match="reads 20 windows, and text test has 20 to learn from"):
        selection("paser", count=20)
    assert selection("loss", count=20).count == 20
