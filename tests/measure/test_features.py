"""Neurons that compute nearly the same, found by their weights and merged."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from families import FAMILIES, VOCABULARY, build

from billhook.anatomy import Anatomy, Inner, discover
from billhook.anatomy.ups import ups
from billhook.heal import healed
from billhook.heal.combining.features import merged_features
from billhook.measure.features import Features, complexity
from billhook.measure.width import WidthTrace, units_of
from billhook.plan.address import Address
from billhook.plan.errors import InputError
from billhook.plan.plan import Keep, Plan
from billhook.scores import feature_merging
from billhook.surgery import apply

GATED = ["llama", "llama_bias", "phi3", "gemma2", "cohere", "granite"]
PLAIN = ["gpt2", "gpt_neox", "opt"]
IDS = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(2))


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def _units(model: Any) -> tuple[Anatomy, dict[Address, Inner], dict[str, Any]]:
    anatomy = discover(model)
    units = units_of(anatomy, "neuron", list(anatomy.inner))
    return anatomy, units, dict(model.named_parameters())


def _twin(inner: Inner, weights: dict[str, Any], one: int, other: int, scale: float) -> None:
    """Let a neuron read as another does, ``scale`` times through up, and write something of its own: as much as
    ``scale`` takes, or a part of it where there is no up."""
    free = ups(inner.slices)
    for piece in inner.slices:
        rows = weights[piece.parameter].movedim(piece.axis, 0)
        factor = scale if piece in free else (1 / scale if free else 0.9) if piece.writes else 1.0
        rows[piece.start + other] = factor * rows[piece.start + one]


@pytest.mark.parametrize("name", [*GATED, *PLAIN])
def test_a_neuron_that_computes_the_same_is_merged_at_no_cost(name: str) -> None:
    """Scaled and turned round where the MLP is gated; the outputs stay what they were."""
    model = build(name)
    anatomy, units, weights = _units(model)
    assert (len(ups(next(iter(units.values())).slices)) > 0) == (name in GATED)
    for inner in units.values():
        _twin(inner, weights, 3, 7, -2.5)
    before = model(input_ids=IDS).logits
    keeps = []
    for address, inner in units.items():
        found = Features(inner, weights).merges(1)
        assert (found[0].into, found[0].gone) == (3, 7) and found[0].distance < (1e-5 if name in GATED else 0.1)
        keeps.append(Keep(unit=address, inner="neuron", indices=tuple(i for i in range(inner.count) if i != 7)))
        assert complexity(inner, weights) < 1
    plan = Plan.of([], keeps=keeps)
    with healed(model, merged_features(model, anatomy, plan)):
        cut: Any = apply(model, anatomy, plan)
    torch.testing.assert_close(cut(input_ids=IDS).logits, before, atol=2e-3, rtol=2e-3)
    plain: Any = apply(model, anatomy, plan)
    assert (plain(input_ids=IDS).logits - before).abs().max() > 0.05


def _speaks(name: str) -> bool:
    model = build(name)
    return bool(units_of(discover(model), "neuron", list(discover(model).inner)))


@pytest.mark.parametrize("name", [name for name in FAMILIES if _speaks(name)])
def test_the_normal_form_computes_the_same_in_every_family(name: str) -> None:
    model = build(name)
    _, units, weights = _units(model)
    inputs = FAMILIES[name].inputs(model, 2, None)
    before = model(**inputs)[0]
    for inner in units.values():
        features = Features(inner, weights)
        for piece, rows in zip(features.pieces, features.rows, strict=True):
            old = weights[piece.parameter].movedim(piece.axis, 0)
            old[piece.start : piece.start + inner.count] = rows.reshape(inner.count, *old.shape[1:])
    torch.testing.assert_close(model(**inputs)[0], before, atol=2e-3, rtol=2e-3)


def test_a_group_reads_its_mean_and_writes_its_sum_and_the_nearest_go_first() -> None:
    """Against the same by the definition: all distances anew before every merge."""
    model = build("gpt2")
    _, units, weights = _units(model)
    inner = next(iter(units.values()))
    features = Features(inner, weights)
    rows = [r.double() for r in features.rows]
    down = [piece.writes for piece in features.pieces]
    found = features.merges(20)
    alive, size, largest = list(range(inner.count)), [1.0] * inner.count, None
    for merge in found:
        whole = torch.cat(rows, 1)[alive]
        distances = torch.cdist(whole, whole).square()
        largest = largest or distances.max().item()
        distances.fill_diagonal_(float("inf"))
        place = int(distances.argmin())
        a, b = sorted((alive[place // len(alive)], alive[place % len(alive)]))
        assert (merge.into, merge.gone) == (a, b)
        assert merge.distance == pytest.approx(distances.min().item() / largest, rel=1e-3)
        for n, part in enumerate(rows):
            total = part[a] + part[b] if down[n] else (size[a] * part[a] + size[b] * part[b]) / (size[a] + size[b])
            part[a] = total
        size[a] += size[b]
        alive.remove(b)
    for mine, wanted in zip(features.rows, rows, strict=True):
        torch.testing.assert_close(mine[alive], wanted[alive].float(), atol=1e-4, rtol=1e-4)


def test_the_score_is_the_order_of_the_merges_and_half_stays() -> None:
    model = build("llama")
    _, units, weights = _units(model)
    trace = WidthTrace(units, weights)
    for address, figures in feature_merging(trace, discover(model)).items():
        merges = Features(units[address], weights).merges(units[address].count // 2)
        assert [int(i) for i in figures.argsort(stable=True)[: len(merges)]] == [merge.gone for merge in merges]
        assert int(figures.isfinite().sum()) == len(merges) == round(0.5 * len(figures))


def test_what_is_no_merge_is_refused() -> None:
    model = build("llama")
    anatomy, units, weights = _units(model)
    address, inner = next(iter(units.items()))
    gone = Features(inner, weights).merges(1)[0].gone
    wrong = Keep(unit=address, inner="neuron", indices=tuple(i for i in range(inner.count) if i != (gone + 1) % 40))
    with pytest.raises(InputError, match="other neurons than merging"):
        merged_features(model, anatomy, Plan.of([], keeps=[wrong]))
    groups = next(iter(units_of(anatomy, "group", list(anatomy.inner)).values()))
    with pytest.raises(InputError, match="these units are groups"):
        Features(groups, weights)
    next(p for n, p in weights.items() if "up_proj" in n)[0, 0] = float("nan")
    with pytest.raises(InputError, match="not finite"):
        Features(inner, weights)
