"""The page of a comparison of policies says what its numbers say."""

from __future__ import annotations

import math

import pytest
from example import policy_comparison

from billhook.cli.policy_comparison import line
from billhook.plan.policy_comparison import PolicyComparison, PolicyEntry
from billhook.plan.record import Interval
from billhook.report.figures_policies import policy_front, policy_pictures
from billhook.report.policy_comparison import policy_comparison_page
from billhook.report.policy_recommendation import policy_recommendation


def at(found: PolicyComparison, name: str, asked: str = "flops=0.9") -> PolicyEntry:
    return next(entry for entry in found.entries if entry.name == name and entry.asked == asked)


def changed(found: PolicyComparison, entry: PolicyEntry, **values: object) -> PolicyComparison:
    entries = (e.model_copy(update=values) if e is entry else e for e in found.entries)
    return found.model_copy(update={"entries": tuple(entries)})


def timed(entry: PolicyEntry, speed: float, half: float = 0.01) -> dict[str, object]:
    assert entry.timing is not None
    interval = Interval(value=speed, low=speed - half, high=speed + half)
    return {"timing": entry.timing.model_copy(update={"speedup": interval})}


def test_figures_of_an_entry() -> None:
    found = policy_comparison()
    entry = at(found, "static-skip", "flops=0.8")
    assert entry.damage == pytest.approx(1.5**2)
    assert entry.speedup == pytest.approx(1.25**2)
    assert entry.exact == pytest.approx((0.4 + 0.3) / 2)
    plain = at(found, "plain", "")
    assert (plain.damage, plain.speedup, plain.exact) == (1.0, 1.0, 0.6)
    assert [e.name for e in found.at("flops=0.9")][:2] == ["ffn-skip", "static-skip"]


def test_nothing_is_faster_and_better_than_the_front() -> None:
    found = policy_comparison()
    best = policy_front(found)
    assert [(e.name, e.asked) for e in best][:2] == [("static-skip", "flops=0.8"), ("static-skip", "flops=0.9")]
    assert best[-1].name == "plain"
    for entry in (e for e in found.entries if not e.refused):
        assert any(b.speedup >= entry.speedup and b.damage <= entry.damage for b in best)
    damage, exact = policy_pictures(found)
    assert damage.spec["layout"]["yaxis"]["type"] == "log"
    labels = {a["text"]: a["y"] for a in damage.spec["layout"]["annotations"]}
    assert labels["static-skip"] == pytest.approx(math.log10(1.5**2))  # a logarithmic axis takes exponents
    assert {a["text"]: a["y"] for a in exact.spec["layout"]["annotations"]}["static-skip"] == pytest.approx(0.35)


def test_the_advice_goes_by_measured_time() -> None:
    found = policy_comparison()
    first, *rest = policy_recommendation(found)
    assert first.startswith("Use ffn-skip: of those that save time at every amount of work")
    assert "self-speculation leaves the text as it is and is 0.940 times as fast: no gain on this machine." in rest
    assert any(s.startswith("At flops=0.8, ffn-skip has the lowest perplexity, 1.08 times") for s in rest)
    assert any("The fastest is static-skip" in s for s in rest)
    slow = next(s for s in rest if s.startswith("Leaves out work and is not certain to save time here: voids at"))
    quartiles = at(found, "voids").timing.speedup
    assert f"(0.900×, quartiles {quartiles.low:.3f} to {quartiles.high:.3f})" in slow
    assert "No better than skipping blocks evenly: voids at flops=0.9, voids at flops=0.8." in rest
    hidden = next(s for s in rest if s.startswith("Loses exact answers"))
    assert hidden.endswith("ffn-skip at flops=0.9, ffn-skip at flops=0.8.")


def test_slow_in_a_quarter_of_the_rounds_is_not_faster() -> None:
    found = policy_comparison()
    entry = at(found, "ffn-skip")
    assert policy_recommendation(changed(found, entry, **timed(entry, 1.02, 0.03)))[0].startswith("Use static-skip")


def test_what_leaves_the_text_alone_and_is_faster_comes_first() -> None:
    found = policy_comparison()
    entry = at(found, "self-speculation", "")
    said = policy_recommendation(changed(found, entry, **timed(entry, 1.4)))
    assert said[0].startswith("Use self-speculation: 1.40 times as fast, and the text stays as it is; where the text")
    assert "worth it here" in said[1]


def test_what_spares_cache_is_advised_at_its_budget_and_owes_no_time() -> None:
    found = policy_comparison()
    entry = at(found, "ffn-skip")
    sharing = {"name": "kv-share", "asked": "kv_bytes=0.5", **timed(entry, 0.9)}
    entries = (*found.entries, entry.model_copy(update=sharing))
    found = found.model_copy(update={"entries": entries, "budgets": (*found.budgets, "kv_bytes=0.5")})
    first, *rest = policy_recommendation(found)
    assert first.startswith("Use ffn-skip: of those that save time at every amount of work")
    assert any(said.startswith("At kv_bytes=0.5, kv-share has the lowest perplexity") for said in rest)
    assert not any("kv-share" in said for said in rest if said.startswith("Leaves out work"))
    assert "<h2>Keeping 50.0% of the cache</h2>" in policy_comparison_page(found)
    alone = found.model_copy(update={"entries": entries[-1:], "budgets": ("kv_bytes=0.5",)})
    assert policy_recommendation(alone)[0].startswith("At kv_bytes=0.5, kv-share has the lowest perplexity")


def test_where_nothing_saves_time_the_plain_model_runs() -> None:
    found = policy_comparison()
    for entry in [e for e in found.entries if e.timing]:
        found = changed(found, next(e for e in found.entries if e is entry), **timed(entry, 0.9))
    assert policy_recommendation(found)[0].startswith("Run the plain model")


def test_the_page_holds_every_figure_and_how_to_make_it_again() -> None:
    page = policy_comparison_page(policy_comparison())
    assert "billhook policies compare &#39;a model&#39; --budget flops=0.9,flops=0.8 --calibration builtin" in page
    assert "150 of 200 drafted tokens accepted (75.0%)" in page
    assert "lora-drop</b> does not apply: never so cheap" in page
    assert "exact answers<small>plain: 60.0%</small>" in page
    assert "decoder.3.mlp: 0.30 runs a token" in page
    assert page.count("--left:") == 8
    assert "keys and values: ffn-skip" in page


def test_a_line_of_the_live_table() -> None:
    found = policy_comparison()
    words = line(at(found, "static-skip")).split()
    assert words == ["static-skip", "flops=0.9", "90.0%", "100.0%", "1.25×", "1.50×", "35.0%"]
    assert line(at(found, "lora-drop", "flops=0.8")).endswith("never so cheap")
