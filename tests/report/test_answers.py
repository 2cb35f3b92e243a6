from __future__ import annotations

import pytest
from example import example_run

from billhook.plan.record import Generation, Interval
from billhook.report.answers import accuracy, of_run, repetition, sentence


def test_the_mean_over_the_probes() -> None:
    assert accuracy(example_run().probes) == pytest.approx(((0.75 + 0.833 + 0.875) / 3, (0.0417 + 0.25 + 0.875) / 3))


def test_only_what_is_measurably_worse_is_named() -> None:
    probes = example_run().probes
    lost = Interval(value=-0.5, low=-0.6, high=-0.4)
    assert sentence(probes).endswith("measurably worse in: addition, 1 digit; copying words.")
    assert sentence(probes[2:]).endswith("in no probe does the whole interval lie below 0.")
    assert sentence([p.model_copy(update={"difference": lost}) for p in probes]).endswith("worse in: every probe.")
    assert sentence(()) == ""


def test_it_is_said_where_such_questions_were_practised() -> None:
    run = example_run()
    assert run.measures is not None and of_run(run) == sentence(run.probes)
    practised = run.model_copy(update={"measures": run.measures.model_copy(update={"calibration": "self+exercises"})})
    assert of_run(practised).startswith(sentence(run.probes)) and "read exercises" in of_run(practised)
    assert of_run(practised.model_copy(update={"probes": ()})) == ""


def test_repetition_is_the_mean_where_it_was_measured() -> None:
    old = Generation(prompt="x", dense="y", compressed="z")
    new = [old.model_copy(update={"repeated_dense": a, "repeated_compressed": a + 0.5}) for a in (0.1, 0.3)]
    assert repetition([old, *new]) == pytest.approx((0.2, 0.7))
    assert repetition([old]) is None
