from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

import pytest
from example import example_run, hostile_run, inspection, outline, two_stacks

from billhook.plan.plan import Plan
from billhook.plan.record import Measures, Run
from billhook.report.card import card
from billhook.report.drawing import columns
from billhook.report.page import page, write_report

SECTIONS = [
    "model", "evidence", "probes", "speed", "generations", "path", "importance", "angular", "loading", "provenance",
]  # fmt: skip


def sections(text: str) -> list[str]:
    return re.findall(r'<section id="(\w+)"', text)


def specs(text: str) -> list[dict[str, Any]]:
    return [json.loads(s) for s in re.findall(r'<script type="application/json">(.*?)</script>', text)]


def words(text: str) -> str:
    """The page as read: no scripts, no styles, no tags."""
    text = re.sub(r"<(script|style)\b.*?</\1>", "", text, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", text)).split())


def test_a_full_run_has_every_section_in_order() -> None:
    text = page(example_run())
    assert sections(text) == SECTIONS
    assert set(re.findall(r'href="#(\w+)"', text)) == set(SECTIONS)
    assert len(text) < 6_000_000
    assert text.count("plotly.js v") == 1


def test_headline_holds_the_numbers() -> None:
    text = words(page(example_run()))
    assert "HuggingFaceTB/ SmolLM2-135M without 20.8% of its block parameters" in text
    assert "Without 3 of 30 blocks, 4 attentions and 3 MLPs (20.8% of the block parameters), the model runs" in text
    assert "goes from 9.42 to 24.8 (2.63 times), agreeing with the original on 57.1% of next tokens." in text
    assert "79.2% asked: 80.0%" in text
    assert "1.23×" in text


def test_exact_answers_stand_beside_likelihood() -> None:
    text = words(page(example_run()))
    assert text.index("ratio, paired") < text.index("What it can still do") < text.index("copying words 83.3%")
    assert "addition, 1 digit 75.0% 4.2% −71 (−90 to −51) 24" in text
    assert (
        "On average the dense model answers 81.9% exactly right and the compressed one 38.9%; "
        "measurably worse in: addition, 1 digit; copying words." in text
    )
    assert "exact answers 81.9% → 38.9% mean of 3 probes" in text
    assert "runs of four tokens 12.0% came before in the same text (0.0% in the dense model's)" in text


def test_a_gain_in_speed_names_its_engine() -> None:
    run = example_run()
    named = [t.model_copy(update={"engine": "that engine, those threads"}) for t in run.timings]
    assert "that engine, those threads" in words(page(run.model_copy(update={"timings": tuple(named)})))
    assert "that engine, those threads" in card(run.model_copy(update={"timings": tuple(named)}))


@pytest.mark.parametrize(
    ("missing", "section"),
    [
        ({"evidence": ()}, "evidence"),
        ({"probes": ()}, "probes"),
        ({"timings": ()}, "speed"),
        ({"generations": ()}, "generations"),
        ({"search": None}, "path"),
        ({"measures": Measures(angular=example_run().measures.angular)}, "importance"),
        ({"measures": Measures(scores=example_run().measures.scores)}, "angular"),
    ],
)
def test_what_was_not_measured_is_left_out(missing: dict[str, Any], section: str) -> None:
    assert sections(page(example_run().model_copy(update=missing))) == [s for s in SECTIONS if s != section]


def test_a_search_that_never_looked_has_no_path() -> None:
    run = example_run()
    blind = tuple(step.model_copy(update={"objective": None}) for step in run.search.steps)
    blinded = run.model_copy(update={"search": run.search.model_copy(update={"steps": blind})})
    assert "path" not in sections(page(blinded))


def test_a_bare_run_carries_no_plotting_script() -> None:
    text = page(two_stacks())
    assert sections(text) == ["model", "loading", "provenance"]
    assert len(text) < 50_000
    assert "was not measured" in text


def test_inspection_adapts() -> None:
    text = page(inspection())
    assert sections(text) == ["model", "importance", "angular", "provenance"]
    assert "what it may not need" in text
    assert "Nothing was cut" in text
    assert ">cut<" not in text
    assert '"name":"cut"' not in text


def test_speed_without_memory_or_ideal() -> None:
    run = example_run()
    bare = {"ideal_speedup": None} | {
        f"{m}_{k}_bytes": None for m in ("dense", "compressed") for k in ("peak", "cache")
    }
    timings = tuple(t.model_copy(update=bare) for t in run.timings)
    text = page(run.model_copy(update={"timings": timings}))
    assert "peak memory" not in text
    assert "at best" not in words(text)
    assert "grey tick" not in text


def test_the_column_shows_every_block_and_every_cut() -> None:
    text = page(two_stacks())
    assert text.count('<div class="row"') == 18
    # 2 + 1 encoder blocks and MLPs, and of the decoder one cross-attention and a block of three
    assert len(re.findall(r'class="cell cut', text)) == 2 * 2 + 1 + 1 + 3
    assert 'title="decoder.2.cross_attention: 885 k parameters, cut"' in text


@pytest.mark.parametrize(("blocks", "numbered"), [(1, 1), (6, 6), (30, 30), (61, 13), (126, 13)])
def test_rows_grow_thinner_with_depth(blocks: int, numbered: int) -> None:
    (column,) = columns(Run(model="x", outline=outline(blocks), plan=Plan()))
    assert len(column.rows) == blocks
    assert 5 <= column.height <= 22
    assert blocks * (column.height + 2) < 900
    assert sum(1 for row in column.rows if row.label) == numbered


def test_the_map_is_ragged_and_marks_the_cheapest_spans() -> None:
    run = example_run()
    heat, best, cut = next(s["data"] for s in specs(page(run)) if s["data"][0]["type"] == "heatmap")
    rows = run.measures.angular["decoder"]
    assert [[v for v in row if v is not None] for row in heat["z"]] == rows
    assert {len(row) for row in heat["z"]} == {30}
    assert all(rows[n - 1][i] == min(rows[n - 1]) for i, n in zip(best["x"], best["y"], strict=True))
    assert list(zip(cut["x"], cut["y"], strict=True)) == [(13, 1), (22, 1), (25, 1)]


def test_the_path_marks_the_plan_and_what_was_asked() -> None:
    run = example_run()
    path = next(s for s in specs(page(run)) if "loss change" in json.dumps(s["layout"]))
    plan = next(t for t in path["data"] if t.get("name") == "the plan")
    chosen = run.search.steps[9]  # the search looked one step further
    assert (plan["x"], plan["y"]) == ([chosen.realised["params"]], [chosen.objective])
    assert path["layout"]["shapes"][0]["x0"] == 0.8
    hovers = [u for t in path["data"] for _, u in t.get("customdata", [])]
    assert sorted(hovers) == sorted(f"drop {u}" for step in run.search.steps for u in step.units)


def test_a_step_may_put_units_back() -> None:
    run = example_run()
    steps = list(run.search.steps)
    steps[0] = steps[0].model_copy(update={"units": ("decoder.25", "decoder.5.mlp")})
    steps[9] = steps[9].model_copy(update={"restored": ("decoder.5.mlp",)})
    swapped = run.model_copy(update={"search": run.search.model_copy(update={"steps": tuple(steps)})})
    path = next(s for s in specs(page(swapped)) if "loss change" in json.dumps(s["layout"]))
    assert next(t for t in path["data"] if t.get("name") == "the plan")["y"] == [steps[9].objective]
    hovers = [u for t in path["data"] for _, u in t.get("customdata", [])]
    assert "drop decoder.12.attention, put back decoder.5.mlp" in hovers


def test_absolute_budgets_are_marked_too() -> None:
    run = example_run().model_copy(update={"asked": "params=80M"})
    path = next(s for s in specs(page(run)) if "loss change" in json.dumps(s["layout"]))
    assert path["layout"]["shapes"][0]["x0"] == pytest.approx(80e6 / run.outline.block_params)
    assert "(not reached)" in page(run)


def test_unknown_importance_is_not_drawn() -> None:
    run = example_run()
    run = run.model_copy(update={"measures": Measures(scores={"loss": {"decoder.1": 1.0, "decoder.2": float("nan")}})})
    (spec,) = [s for s in specs(page(run)) if s["data"][0].get("customdata") == ["decoder.1"]]
    assert spec["data"][0]["y"] == [1.0]


def test_markup_in_the_run_stays_text() -> None:
    text = page(hostile_run())
    outside = re.sub(r'<script type="application/json">.*?</script>', "", text)
    assert "<img" not in re.sub(r"<script>.*?</script>", "", outside, flags=re.DOTALL)
    assert "owned = 1</script>" not in text
    assert words(text).count("owned = 1</script>") >= 10


def test_nothing_on_the_page_points_elsewhere() -> None:
    shell = re.sub(r"<script>.*?</script>", "", page(example_run()), flags=re.DOTALL)
    assert "url(" not in shell
    assert "@import" not in shell
    icon, *anchors = re.findall(r'\b(?:src|href)\s*=\s*"([^"]*)"', shell)
    assert icon == "data:,"
    assert all(anchor.startswith("#") for anchor in anchors)


def test_written_page_is_the_page_and_repeats(tmp_path: Path) -> None:
    run: Run = example_run()
    path = write_report(run, tmp_path / "new")
    assert path == tmp_path / "new" / "report.html"
    assert path.read_text(encoding="utf-8") == page(run)


def test_the_step_over_the_cliff_is_marked_where_the_search_was_to_stop_there() -> None:
    def marks(run: Run) -> dict[str, Any]:
        return {trace["name"]: trace for spec in specs(page(run)) for trace in spec["data"] if trace.get("name")}

    run = example_run()
    assert run.search is not None
    assert "the cliff" not in marks(run)
    found = marks(run.model_copy(update={"asked": "until=cliff"}))
    assert found["the plan"]["y"] == [run.search.steps[9].objective]
    assert found["the cliff"]["y"] == [run.search.steps[10].objective]
    text = words(page(run.model_copy(update={"asked": "until=cliff"})))
    assert "79.2% asked: until=cliff" in text
    assert "--budget until=cliff" in text
