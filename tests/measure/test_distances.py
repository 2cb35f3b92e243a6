"""Distances of logits against their definitions, one position and one token at a time."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from families import FAMILIES, build
from hypothesis import given
from hypothesis import strategies as st

from billhook.anatomy import discover
from billhook.data import Windows
from billhook.measure.distances import DISTANCES, OutputDistance, angle, euclidean, jensen_shannon
from billhook.measure.replay import Replay
from billhook.plan.address import Address
from billhook.plan.errors import InputError
from billhook.surgery import simulate

UNIT = Address("decoder", 2, "mlp")
IDS = torch.randint(3, 90, (3, 12), generator=torch.Generator().manual_seed(2))


def naive(kind: str, p: list[float], q: list[float]) -> float:
    if kind == "euclidean":
        return math.dist(p, q)
    if kind == "angle":
        cosine = sum(a * b for a, b in zip(p, q, strict=True)) / (math.hypot(*p) * math.hypot(*q))
        return math.acos(max(-1.0, min(1.0, cosine))) / math.pi
    one, other = ([math.exp(x) / sum(map(math.exp, row)) for x in row] for row in (p, q))
    mean = [(a + b) / 2 for a, b in zip(one, other, strict=True)]
    return sum(sum(a * math.log(a / m) for a, m in zip(row, mean, strict=True) if a > 0) / 2 for row in (one, other))


logits = st.lists(st.floats(-20, 20, width=32), min_size=7, max_size=7)


@pytest.mark.parametrize("kind", DISTANCES)
@given(rows=st.lists(st.tuples(logits, logits), min_size=1, max_size=4))
def test_the_definition(kind: str, rows: list[tuple[list[float], list[float]]]) -> None:
    rows = [pair for pair in rows if all(math.hypot(*row) > 1e-3 for row in pair)] or [([1.0] * 7, [2.0] * 7)]
    dense, now = (torch.tensor(side) for side in zip(*rows, strict=True))
    found = DISTANCES[kind](dense, now)
    assert found.shape == (len(rows),)
    assert found.tolist() == pytest.approx([naive(kind, p, q) for p, q in rows], rel=1e-4, abs=1e-5)
    assert DISTANCES[kind](now, dense).tolist() == pytest.approx(found.tolist(), rel=1e-4, abs=1e-6), "symmetric"


@pytest.mark.parametrize("kind", DISTANCES)
def test_nothing_is_nothing_from_itself_and_farther_is_more(kind: str) -> None:
    generator = torch.Generator().manual_seed(1)
    dense, noise = torch.randn(5, 50, generator=generator), torch.randn(5, 50, generator=generator)
    assert DISTANCES[kind](dense, dense).abs().max() < 1e-6
    means = [DISTANCES[kind](dense, dense + scale * noise).mean() for scale in (1e-3, 0.01, 0.1, 1.0, 10.0)]
    assert all(a < b for a, b in pairwise(means))


def test_small_angles_are_told_apart() -> None:
    """The arccos of a float32 cosine gives 0 or 3e-4 here."""
    dense = torch.zeros(1, 8)
    dense[0, 0] = 1.0
    for small in (1e-6, 1e-5, 1e-4):
        now = dense.clone()
        now[0, 1] = small
        assert angle(dense, now).item() == pytest.approx(small / math.pi, rel=1e-3)


def test_the_ends_of_the_scales() -> None:
    one, other = torch.tensor([[9.0, 0.0]]), torch.tensor([[0.0, 4.0]])
    assert angle(one, other).item() == pytest.approx(0.5)
    assert angle(one, -one).item() == pytest.approx(1.0)
    assert euclidean(one, other).item() == pytest.approx(math.hypot(9, 4))
    assert jensen_shannon(100 * one, 100 * other).item() == pytest.approx(math.log(2))
    assert jensen_shannon(one, one + 5).item() == pytest.approx(0, abs=1e-6), "a shift of all logits says nothing"


@pytest.mark.parametrize("kind", DISTANCES)
@pytest.mark.parametrize("name", ["llama", "gemma2", "granite", "opt"])
def test_the_distance_of_a_state_is_that_of_the_models_own_logits(name: str, kind: str) -> None:
    model = build(name)
    anatomy = discover(model)
    replay = Replay(model, anatomy, Windows.of(IDS, "test"))
    distance = OutputDistance(replay, kind, chunk=5)
    assert distance(replay.final) == pytest.approx(0, abs=1e-7)
    with torch.no_grad():
        dense = model(input_ids=IDS).logits.flatten(0, 1)
        with simulate(model, anatomy, [UNIT]):
            now = model(input_ids=IDS).logits.flatten(0, 1)
    expected = [naive(kind, p, q) for p, q in zip(dense.tolist(), now.tolist(), strict=True)]
    assert distance(replay.without(UNIT)) == pytest.approx(sum(expected) / len(expected), rel=1e-3)
    replay.move(replay.state | {UNIT})
    assert distance(replay.final) == pytest.approx(sum(expected) / len(expected), rel=1e-3), "dense is kept"


def test_padding_does_not_count() -> None:
    model = build("llama")
    anatomy = discover(model)
    inputs = FAMILIES["llama"].inputs(model, 3, "right")
    lengths = inputs["attention_mask"].sum(1).tolist()
    total = 0.0
    for row, length in enumerate(lengths):
        alone = Replay(model, anatomy, Windows.of(inputs["input_ids"][row : row + 1, :length], "test"))
        total += OutputDistance(alone, "angle")(alone.without(UNIT)) * length
    padded = Replay(model, anatomy, [inputs])
    assert OutputDistance(padded, "angle")(padded.without(UNIT)) == pytest.approx(total / sum(lengths), rel=1e-4)


@pytest.mark.parametrize("kind", DISTANCES)
def test_a_broken_model_is_infinitely_far(kind: str) -> None:
    model = build("llama")
    replay = Replay(model, discover(model), Windows.of(IDS, "test"))
    distance = OutputDistance(replay, kind)
    assert distance([torch.full_like(s, float("nan")) for s in replay.final]) == math.inf


@pytest.mark.parametrize("name", ["bert", "t5", "vit"])
def test_other_models_are_refused(name: str) -> None:
    model = build(name)
    replay = Replay(model, discover(model), [FAMILIES[name].inputs(model, 2, None)])
    with pytest.raises(InputError, match="decoder-only language model"):
        OutputDistance(replay, "angle")
