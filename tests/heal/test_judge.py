"""What a way to heal left, judged on text that it never saw."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import build
from heal.training.training_bed import PLAN, text

from billhook.anatomy import discover
from billhook.data import Windows
from billhook.heal import UNTOUCHED, Healing, closed_form
from billhook.heal.judge import divergences, judged_apart
from billhook.plan.errors import InputError
from billhook.recipes.heal import METHODS, record_of

NAME = "model.layers.3.mlp.down_proj.weight"


def test_kept_where_it_is_nearer_on_the_windows_held_back_and_gone_where_not(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    anatomy, windows, given = discover(model), text(), []

    def scaled(by: float, *args: Any) -> Healing:
        given.append(args[3])
        return Healing({NAME: by * model.get_parameter(NAME).detach()}, (), {}, 7, 3)

    factors = (0.0, 0.5, 0.8, 1.25, 2.0)
    ways = {by: judged_apart(lambda *args, by=by: scaled(by, *args)) for by in factors}
    found = {by: way(model, anatomy, PLAN, windows, None) for by, way in ways.items()}
    assert all(torch.equal(seen.ids, windows.ids[:21]) for seen in given), "the last eighth is held back"
    for by, healing in found.items():
        whole = Healing({NAME: by * model.get_parameter(NAME).detach()}, (), {}, 7, 3)
        was, now = divergences(model, anatomy, PLAN, [UNTOUCHED, whole], windows.ids[21:])
        assert (healing.cut, healing.healed, healing.tokens, healing.work) == (was, now, 7, 3)
        assert healing.refused == (now >= was) == (not healing.tensors)
        record = record_of(healing)
        assert (record.divergence, record.refused) == ((was, now), now >= was)
    for figures, refused in (([2.0, 1.0], False), ([1.0, 2.0], True)):
        with monkeypatch.context() as told:
            told.setattr("billhook.heal.judge.divergences", lambda *_, figures=figures: figures)
            healing = ways[0.5](model, anatomy, PLAN, windows, None)
        assert (healing.refused, not healing.tensors) == (refused, refused)
    with pytest.raises(InputError, match="at least two windows"):
        ways[0.0](model, anatomy, PLAN, Windows.of(windows.ids[:1], "one"), None)


def test_the_ways_that_hold_nothing_back_themselves_are_judged_so() -> None:
    assert METHODS["closed-form"] is closed_form
    assert all(METHODS[way].__qualname__.startswith("judged_apart") for way in ("bias", "data-free"))
