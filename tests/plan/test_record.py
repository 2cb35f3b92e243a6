"""The record of a run outlives the version that wrote it."""

from __future__ import annotations

import json
from pathlib import Path

from billhook.plan.record import Run

OLD = Path(__file__).parent / "fixtures" / "run-version-1.json"


def test_an_old_record_still_reads_in_full() -> None:
    """The file is kept as version 1 wrote it. Later fields may join it, none may go or change its meaning."""
    run = Run.model_validate_json(OLD.read_text(encoding="utf-8"))
    assert len(run.plan.drops) == 10 and run.plan.provenance.recipe == "greedy"
    assert run.search is not None and run.search.evaluations == 212
    assert [text.domain for text in run.evidence] == ["calibration", "other"]

    def kept(old: object, new: object) -> bool:
        if isinstance(old, dict):
            return isinstance(new, dict) and all(key in new and kept(value, new[key]) for key, value in old.items())
        if isinstance(old, list):
            return isinstance(new, list) and len(old) == len(new) and all(map(kept, old, new))
        return old == new

    assert kept(json.loads(OLD.read_text(encoding="utf-8")), json.loads(run.model_dump_json()))
