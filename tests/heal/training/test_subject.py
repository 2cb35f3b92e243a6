"""What is trained follows from what the cut did."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from families import build
from heal.training.training_bed import PLAN, quick, run, text

from billhook.anatomy import discover
from billhook.heal.training import loop
from billhook.heal.training.damage import damage, feature_weights, sample
from billhook.heal.training.loop import split
from billhook.heal.training.lora import LEAST, linears, ranks_by_loss
from billhook.heal.training.methods import METHODS, Training
from billhook.heal.training.scales import scales_of
from billhook.heal.training.student import Student, ends_of, frozen
from billhook.heal.training.subject import _gain
from billhook.heal.training.tune import SUFFICES, subsets
from billhook.plan.record import TrainingRecord
from billhook.surgery import apply

FIT = split(text().ids)[0]
FEW = sample(FIT, range(len(FIT)))


def untrained(name: str) -> Student:
    model = build(name)
    anatomy = discover(model)
    return Student(apply(model, anatomy, PLAN), model, ends_of(anatomy, PLAN.drops, anatomy.stacks[0]), "dense")


@pytest.fixture
def begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Of a family and a training: what is trained by name, the weights of the student's feature terms, the record."""
    seen: dict[str, Any] = {}
    through = loop.Loop.through

    def look(self: Any, subject: Any) -> Any:
        seen.update(names=list(subject.holder.parameters), weights=dict(self._student.weights))
        return through(self, subject)

    def begin(name: str, training: Training) -> tuple[list[str], dict[int, float], TrainingRecord]:
        *_, record = run(name, training, tmp_path / f"{len(list(tmp_path.iterdir()))}", tokens=48)
        return seen["names"], seen["weights"], record

    monkeypatch.setattr(loop.Loop, "through", look)
    return begin


@pytest.mark.parametrize("method", ["lora", "distill"])
def test_a_block_that_lost_more_has_wider_adapters(method: str, begun: Any) -> None:
    both = untrained("llama")
    with frozen(both):
        lost = damage(both, FEW).errors
    _, _, record = begun("llama", quick(method, rank=32))
    assert record.ranks == tuple(ranks_by_loss(lost, 32))
    assert record.ranks[lost.index(max(lost))] > record.ranks[lost.index(min(lost))] > LEAST


def test_the_stream_counts_as_the_damage_says(begun: Any) -> None:
    both = untrained("llama")
    with frozen(both):
        found = damage(both, FEW)
    for method, blocks in (("distill", {0, 1, 2, 3}), ("tail", {3}), ("lisa", set())):
        _, weights, _ = begun("llama", quick(method))
        assert weights == pytest.approx(feature_weights(found, METHODS[method].features))
        assert set(weights) == blocks


def test_tune_takes_the_least_that_suffices(begun: Any) -> None:
    """In short steps all that there is, in longer ones the biases."""
    for rate, number in ((1e-3, 3), (1e-2, 0)):
        both, training = untrained("gpt2"), quick("tune", rate=rate)
        blocks = discover(both.model).stacks[0].blocks
        linear = [path for block in blocks for path in linears(both.model, block, block.path, block.path)]
        options = subsets(both.model, both.paths, scales_of(both.model, linear))
        with frozen(both):
            gains = [_gain(both, subset, FEW, training) for subset in options]
        assert not any(module._forward_hooks for module in both.model.modules()), "nothing is left of a probe"
        assert number == [gain >= SUFFICES * gains[-1] for gain in gains].index(True)
        assert set(begun("gpt2", training)[0]) == set(options[number])
