"""Budgets of time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from billhook.measure.channels import channels
from billhook.plan.errors import InputError
from billhook.recipes import compress as walk
from billhook.recipes import fast_enough as module
from billhook.recipes import widths
from billhook.recipes.compress import compress
from billhook.recipes.fast_enough import CLOSE, LOOKS, decode_time, fast_enough
from billhook.recipes.opened import opened


@given(st.floats(0.3, 0.95), st.floats(0.0, 0.25), st.floats(0.5, 2.0))
def test_fast_enough_and_no_milder_cut_was(asked: float, outside: float, bend: float) -> None:
    """Whatever of the time lies outside the blocks, and however time follows parameters."""
    looked: list[float] = []

    def time(share: float) -> float:
        return outside + (1 - outside) * share**bend

    def seek(share: float) -> float:
        looked.append(share)
        return share

    found, measured = fast_enough(asked, seek, time)
    assert measured == time(found) <= asked
    assert found == max(share for share in looked if time(share) <= asked)
    assert len(looked) <= LOOKS
    assert measured > asked - 0.25


def test_it_stops_when_it_is_close() -> None:
    looked: list[float] = []
    fast_enough(0.8, lambda share: looked.append(share) or share, lambda share: share - CLOSE / 2)
    assert looked == [pytest.approx(0.8)]


def test_what_cannot_be_made_fast() -> None:
    with pytest.raises(InputError, match=r"budget latency=0.5 cannot be met: with 0\.\d+ of the .* still takes 0.9"):
        fast_enough(0.5, lambda share: share, lambda share: 0.9)


def test_a_recipe_that_goes_only_so_far() -> None:
    def seek(share: float) -> float:
        if share < 0.7:
            raise InputError(f"budget params={share:.2f} cannot be met")
        return share

    found, _ = fast_enough(0.75, seek, lambda share: share - 0.02)
    assert found >= 0.7
    with pytest.raises(InputError, match=r"latency=0\.5 cannot be met.*budget params=.* cannot be met"):
        fast_enough(0.5, seek, lambda share: share)


def test_compress_cuts_until_it_is(tiny_lm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times: list[float] = []

    def timed(dense: Any, cut: Any) -> float:
        sizes = [sum(p.numel() for p in model.model.layers.parameters()) for model in (dense, cut)]
        times.append(0.1 + 0.9 * sizes[1] / sizes[0])
        return times[-1]

    surveys: list[int] = []

    def surveyed(*rest: Any) -> Any:
        surveys.append(len(times))
        return channels(*rest)

    monkeypatch.setattr(walk, "decode_time", timed)
    monkeypatch.setattr(widths, "channels", surveyed)
    budget = "latency=0.8"
    run = compress(tiny_lm, budget=budget, recipe="flap", heal="none", out=tmp_path / "out", max_new_tokens=2)
    assert run.asked == run.plan.budget == budget
    assert run.realised["latency"] in times and run.realised["latency"] <= 0.8
    assert run.realised["params"] == pytest.approx((run.realised["latency"] - 0.1) / 0.9, abs=0.02)
    once = compress(tiny_lm, budget="params=0.8", recipe="flap", heal="none", out=tmp_path / "once", max_new_tokens=2)
    assert run.search is not None and once.search is not None
    assert len(times) > 1 and surveys == [0, len(times)]  # one for all looks, and one for the other run
    assert run.search.work == once.search.work > 0
    assert "latency kept" in (tmp_path / "out" / "report.html").read_text()


def test_single_weights_save_no_time(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a token takes as long without the weights that recipe wanda takes away"):
        compress("no/such model", budget="latency=0.8", recipe="wanda", out=tmp_path / "out")


def test_time_is_measured_against_the_dense_model(tiny_lm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = opened(tiny_lm, dtype=None, device="cpu", trust_remote_code=False).model
    monkeypatch.setattr(
        module, "interleaved", lambda runs, rounds: {"dense": [2.0] * rounds, "cut": [1.0] * (rounds - 1) + [9.0]}
    )
    assert decode_time(model, model) == 0.5
