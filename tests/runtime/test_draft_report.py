"""When to draft, and when to stop speculating."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from drafting import EAGER, SOME, mild, prompt, write

from billhook.runtime.draft_length import Confidence
from billhook.runtime.draft_report import Report
from billhook.runtime.speculate import speculate


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def test_it_stops_when_it_is_slower() -> None:
    report = Report()
    for _ in range(3):
        assert report.wants_plain
        report.plain(1.0)
        assert not report.slower()
    for window in range(2):
        for _ in range(8):
            assert not report.wants_plain
            report.round(4, 1, draft_seconds=1.5, verify_seconds=1.0)  # two tokens in 2.5 seconds
        assert report.wants_plain
        report.plain(1.0)
        assert report.slower() == (window == 1)
    assert report.speedup == pytest.approx(0.8)
    assert report.acceptance == 0.25 and report.tokens_per_verify == 2
    report.search_seconds = 40.0  # 32 tokens in 40 seconds, and in 80 with the search
    assert report.speedup == pytest.approx(0.4)


def test_one_slow_window_does_not_stop_it() -> None:
    report = Report()
    for _ in range(3):
        report.plain(1.0)
    for seconds in (2.5, 1.5, 2.5, 1.5):
        for _ in range(8):
            report.round(4, 1, draft_seconds=seconds, verify_seconds=0.0)
        report.plain(1.0)
        assert not report.slower()


def test_it_decodes_plainly_once_it_has_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    model, anatomy = mild()
    plain = write(model, prompt(), max_new_tokens=40)
    monkeypatch.setattr(Report, "slower", lambda self: self.rounds > 0)
    with speculate(model, anatomy, SOME, confidence=EAGER) as speculating:
        assert torch.equal(write(model, prompt(), max_new_tokens=40), plain)
    (report,) = speculating.reports
    assert report.stopped is not None and report.rounds == 8
    assert report.plain_tokens == 40 - 1 - report.tokens


def test_confidence() -> None:
    rule = Confidence(longest=3, threshold=0.5, target=0.8, step=0.1)
    assert [rule.enough(1, 0.6), rule.enough(1, 0.4), rule.enough(3, 0.9)] == [False, True, True]
    rule.update(4, 4)
    assert rule.threshold == pytest.approx(0.4)  # all accepted: draft on at less confidence
    rule.update(4, 0)
    assert rule.threshold == pytest.approx(0.5)
