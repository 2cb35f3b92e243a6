"""The page of a comparison says what its numbers say."""

from __future__ import annotations

import html
import math

import pytest
from example import comparison

from billhook.plan.address import Address
from billhook.plan.comparison import Comparison, Entry
from billhook.plan.outline import InnerOutline
from billhook.plan.plan import Keep
from billhook.plan.record import Interval
from billhook.plan.target import Target
from billhook.report.comparison import budget_in_words, comparison_page, exact_answers, passes
from billhook.report.figures_comparison import USABLE, ceiling, front, kept, name, quality
from billhook.report.numbers import number, percent
from billhook.report.recommendation import recommendation


def only(found: Comparison, *recipes: str) -> Comparison:
    return found.model_copy(update={"entries": tuple(e for e in found.entries if e.recipe in recipes)})


def with_damage(entry: Entry, damage: float, spread: float = 0.0) -> Entry:
    ratio = Interval(value=damage, low=damage - spread, high=damage + spread)
    texts = tuple(text.model_copy(update={"perplexity_ratio": ratio}) for text in entry.evidence)
    return entry.model_copy(update={"evidence": texts})


def test_damage_is_the_geometric_mean_over_the_texts() -> None:
    entry = comparison().entries[0]
    ratios = [text.perplexity_ratio.value for text in entry.evidence]
    assert entry.damage == pytest.approx(math.sqrt(ratios[0] * ratios[1]))


def test_what_was_healed_is_judged_healed() -> None:
    """Order, front, advice and table go by the healed figure where there is one, and both stand on the page."""
    found = comparison()
    worst = found.at("params=0.8")[-1]
    better = worst.model_copy(update={"healed": with_damage(worst, 1.001).evidence})
    entries = tuple(better if entry is worst else entry for entry in found.entries)
    found = found.model_copy(update={"entries": entries, "heal": "closed-form"})
    assert found.at("params=0.8")[0] == better
    assert (better.damage, better.damage_as_cut) == (pytest.approx(1.001), worst.damage)
    assert better in front(found)
    said = next(sentence for sentence in recommendation(found) if sentence.startswith("At params=0.8"))
    assert f"{name(better, found)} is best with 1.00 times" in said
    assert f"after healing, {number(worst.damage)} before" in said
    page = comparison_page(found)
    assert page.count("<th>healed<small>") == 4
    assert "1.00<small>" in page


def test_narrower_sublayers_are_drawn_in_part() -> None:
    found = comparison()
    inner = InnerOutline(count=1536, params=1728, active_params=1728)
    outline = found.outline
    stack = outline.stacks[0]
    wide = stack.blocks[0].sublayers["mlp"].model_copy(update={"inner": {"neuron": inner}})
    block = stack.blocks[0].model_copy(update={"sublayers": {**stack.blocks[0].sublayers, "mlp": wide}})
    stacks = (stack.model_copy(update={"blocks": (block, *stack.blocks[1:])}),)
    keep = Keep(unit=Address("decoder", 0, "mlp"), inner="neuron", indices=tuple(range(768)))
    entry = found.at("params=0.8")[0].model_copy(update={"drops": (), "keeps": (keep,)})
    found = found.model_copy(update={"entries": (entry,), "outline": outline.model_copy(update={"stacks": stacks})})
    page = comparison_page(found)
    assert page.count("--left:") == 1
    assert 'title="decoder.0.mlp: 50.0% left"' in page
    assert "decoder.0.mlp: 768 neurons kept" in page


def test_entries_stand_in_the_order_of_their_damage_and_the_refused_apart() -> None:
    found = comparison()
    damages = [entry.damage for entry in found.at("params=0.8")]
    assert damages == sorted(damages)
    assert len(damages) == 7
    page = comparison_page(found)
    assert "attention-drop</b> has no result: budget params=0.8 cannot be met" in page


def test_the_front_is_the_best_at_each_budget_however_it_rounds() -> None:
    found = comparison()
    assert [(e.recipe, e.asked) for e in front(found)] == [("sublayer-greedy", b) for b in found.budgets]
    less = {"params": found.at("params=0.8")[0].realised["params"] - 1e-5}
    far_worse = with_damage(found.at("params=0.8")[1].model_copy(update={"realised": less}), 66_000.0)
    entries = tuple(far_worse if e == found.at("params=0.8")[1] else e for e in found.entries)
    rounded = found.model_copy(update={"entries": entries})
    assert front(rounded) == front(found)
    assert comparison_page(rounded).count("●") == 2


def test_what_is_broken_is_not_on_the_front() -> None:
    found = comparison()
    entries = tuple(with_damage(e, 2 * USABLE) if e.evidence and e.asked == "params=0.8" else e for e in found.entries)
    broken = found.model_copy(update={"entries": entries})
    assert front(broken) == broken.at("params=0.9")[:1]
    (drawn,) = quality(broken)
    thick = drawn.spec["data"][-1]
    assert thick["line"]["width"] == 4 and len(thick["x"]) == 1
    assert [note["text"].split()[0] for note in drawn.spec["layout"]["annotations"]] == ["sublayer-greedy"]


def test_budgets_of_several_kinds_are_drawn_along_the_first() -> None:
    """The table of each budget says what is kept of its own."""
    found = comparison()
    entries = tuple(
        e.model_copy(update={"asked": "blocks=24", "realised": {"params": 0.7, "blocks": 0.8}})
        if e.asked == "params=0.8"
        else e
        for e in found.entries
    )
    mixed = found.model_copy(update={"budgets": ("params=0.9", "blocks=24"), "entries": entries})
    (drawn,) = quality(mixed)
    assert drawn.spec["layout"]["xaxis"]["title"]["text"] == "block parameters kept"
    assert {x for trace in drawn.spec["data"] for x in trace["x"]} == {0.896, 0.7}
    assert {kept(entry) for entry in mixed.at("blocks=24")} == {0.8}
    assert [entry.asked for entry in front(mixed)] == ["params=0.9", "blocks=24"]


def test_the_advice_names_the_best_and_the_best_that_loads_anywhere() -> None:
    first, *rest = recommendation(comparison())
    assert first.startswith("Use sublayer-greedy: ")
    assert first.endswith("If the result must load in any engine, use block-greedy.")
    assert "At params=0.9, sublayer-greedy is best with" in rest[0]
    assert "No better than evenly spaced removal somewhere: block-influence at params=0.9 and params=0.8." in rest


def test_a_method_within_the_interval_of_the_best_is_named() -> None:
    found = comparison()
    two = [e for e in found.at("params=0.8") if e.recipe in ("sublayer-greedy", "block-greedy")]
    close = found.model_copy(update={"budgets": ("params=0.8",)})
    for spread, told in ((0.5, True), (0.01, False)):
        entries = (with_damage(two[0], 2.0, spread), with_damage(two[1], 2.4, spread))
        advice = recommendation(close.model_copy(update={"entries": entries}))
        assert ("within its 95% interval on every text: block-greedy" in advice[1]) is told


@pytest.mark.parametrize("ratios", [((2, 0.1), (4, 0.1)), ((6, 5), (1, 0.1))], ids=["above", "below"])
def test_apart_on_one_text_is_apart(ratios: tuple[tuple[float, float], ...]) -> None:
    found = comparison().model_copy(update={"budgets": ("params=0.8",)})
    best, other = (next(e for e in found.at("params=0.8") if e.recipe == r) for r in ("sublayer-greedy", "random"))
    intervals = [Interval(value=value, low=value - spread, high=value + spread) for value, spread in ratios]
    texts = zip(other.evidence, intervals, strict=True)
    apart = tuple(text.model_copy(update={"perplexity_ratio": interval}) for text, interval in texts)
    entries = (with_damage(best, 2.0, 0.1), other.model_copy(update={"evidence": apart}))
    assert "95%" not in recommendation(found.model_copy(update={"entries": entries}))[1]


def test_what_chance_was_refused_is_said_once() -> None:
    found = comparison()
    refused = found.entries[-1].model_copy(update={"recipe": "random", "baseline": True})
    entries = (*found.entries, *(refused.model_copy(update={"seed": seed}) for seed in range(3)))
    assert comparison_page(found.model_copy(update={"entries": entries})).count("<b>random</b> has no result") == 1


def test_the_page_does_not_claim_a_single_sitting() -> None:
    assert "in one sitting or, where it was interrupted, in several" in " ".join(comparison_page(comparison()).split())


def test_as_good_as_evenly_spaced_is_no_better() -> None:
    found = comparison().model_copy(update={"budgets": ("params=0.8",)})
    even, own = (next(e for e in found.at("params=0.8") if e.recipe == r) for r in ("evenly-spaced", "block-greedy"))
    for damage, told in ((even.damage, True), (0.99 * even.damage, False)):
        advice = recommendation(found.model_copy(update={"entries": (even, with_damage(own, damage))}))
        assert ("evenly spaced removal somewhere: block-greedy at params=0.8." in advice[-1]) is told


def test_the_best_overall_must_have_met_every_budget() -> None:
    found = comparison()
    lost = tuple(
        e.model_copy(update={"refused": "no", "evidence": ()})
        if (e.recipe, e.asked) == ("sublayer-greedy", "params=0.8")
        else e
        for e in found.entries
    )
    assert recommendation(found.model_copy(update={"entries": lost}))[0].startswith("Use block-greedy: ")


def test_where_no_method_met_every_budget_the_one_that_met_most_is_named() -> None:
    found = comparison()

    def without(*lost: tuple[str, str]) -> str:
        entries = tuple(
            e.model_copy(update={"refused": "no", "evidence": ()}) if (e.recipe, e.asked) in lost else e
            for e in found.entries
            if e.baseline or e.recipe in ("sublayer-greedy", "block-greedy")
        )
        lucky = tuple(with_damage(e, 1.01) if e.recipe == "random" and e.evidence else e for e in entries)
        return recommendation(found.model_copy(update={"entries": lucky}))[0]

    low, high = "params=0.8", "params=0.9"
    rest = "no method that looks at the model met every budget."
    half = without(("sublayer-greedy", low), ("block-greedy", low))
    assert half == f"Use sublayer-greedy at params=0.9; {rest}"
    assert without(("sublayer-greedy", low), ("block-greedy", high)).startswith("Use sublayer-greedy at params=0.9;")
    most = without(("sublayer-greedy", low), ("sublayer-greedy", high), ("block-greedy", high))
    assert most == f"Use block-greedy at params=0.8; {rest}"
    assert without(*((who, at) for who in ("sublayer-greedy", "block-greedy") for at in (low, high))) == (
        "No method that looks at the model met any of these budgets."
    )


def test_no_method_at_all() -> None:
    found = only(comparison(), "attention-drop")
    assert recommendation(found) == ["No method could meet any of these budgets on this model."]
    assert quality(found) == []
    assert "plotly" not in comparison_page(found).lower()


def test_exact_answers_have_a_column() -> None:
    found = comparison()
    best = found.at("params=0.9")[0]
    assert exact_answers(best) == percent((0.75 + 0.5) / 2 / best.damage * math.sqrt(1.1))
    page = comparison_page(found)
    assert "exact answers<small>dense: 62.5%</small>" in page
    assert page.count(f"<td>{exact_answers(best)}</td>") == 1
    unasked = found.model_copy(update={"entries": tuple(e.model_copy(update={"probes": ()}) for e in found.entries)})
    assert "<td>–</td>" in comparison_page(unasked) and "<small>dense: " not in comparison_page(unasked)


def test_the_page_says_how_to_make_it_again_and_that_nothing_was_healed() -> None:
    found = comparison()
    odd = found.model_copy(update={"entries": tuple(e.model_copy(update={"seed": e.seed + 7}) for e in found.entries)})
    page = html.unescape(comparison_page(odd))
    methods = "--recipe sublayer-greedy --recipe block-greedy --recipe block-influence --recipe attention-drop"
    options = f"--budget params=0.9,params=0.8 --calibration builtin {methods} --seed 7"
    assert f"billhook compare 'a model' {options} --out DIR" in page
    assert "judged as it was cut" in page


@pytest.mark.parametrize("given", [("own recipe.yaml", "block-greedy"), ()])
def test_the_command_names_what_was_named(given: tuple[str, ...]) -> None:
    """A file of the user's own by its path, all that come along by naming none, and the dtype that was asked for."""
    found = comparison().model_copy(update={"recipes": given, "dtype": "float32"})
    named = "--recipe 'own recipe.yaml' --recipe block-greedy " if given else ""
    expected = f"--calibration builtin {named}--seed 0 --dtype float32 --out DIR"
    assert expected in html.unescape(comparison_page(found))


def test_the_advice_says_what_likelihood_does_not_show() -> None:
    """Exact answers of the best and of dense at each budget, and who answers more; a baseline is no advice."""
    found = comparison()
    best, other, even = (found.at("params=0.8")[i] for i in (0, 1, 2))
    said = recommendation(found)[2]
    assert said.startswith("At params=0.8, sublayer-greedy is best")
    assert said.endswith(f" It answers {exact_answers(best)} of the questions exactly right, the dense model 62.5%.")
    most = other.probes[0].model_copy(update={"compressed": 0.7})
    for entry, told in ((other, True), (even.model_copy(update={"baseline": True}), False)):
        entries = (best, entry.model_copy(update={"probes": (most,)}))
        advice = recommendation(found.model_copy(update={"budgets": ("params=0.8",), "entries": entries}))[1]
        assert advice.endswith(f"; most of all does {entry.recipe}, 70.0%.") is told
    unasked = tuple(entry.model_copy(update={"probes": ()}) for entry in found.entries)
    assert not any("exactly right" in s for s in recommendation(found.model_copy(update={"entries": unasked})))


def test_repetition_has_a_column_and_is_in_the_advice() -> None:
    """A comparison from before it was measured has dashes there, and says nothing of it."""
    old = comparison()
    assert "repeated 4-grams</th>" in comparison_page(old) and "<td>–</td>" in comparison_page(old)
    assert not any("four tokens" in sentence for sentence in recommendation(old))
    known = tuple(
        e if e.refused else e.model_copy(update={"repeated": (0.125, 0.3 + e.seed / 10)}) for e in old.entries
    )
    found = Comparison.model_validate_json(old.model_copy(update={"entries": known}).model_dump_json())
    page = comparison_page(found)
    assert "repeated 4-grams<small>dense: 12.5%</small>" in page
    assert page.count("<td>30.0%</td>") == 10 and page.count("<td>50.0%</td>") == 2
    said = "Of its runs of four tokens 30.0% came before in the same text, of the dense model's 12.5%."
    assert all(sentence.endswith(said) for sentence in recommendation(found)[1:3])


def test_work_is_told_in_passes_over_the_calibration() -> None:
    found = comparison()
    entry = next(e for e in found.entries if e.target is Target.REMOTE and e.evidence)
    assert passes(entry, found) == pytest.approx(3_000_000 / (30 * 3072))
    assert "<td>33<small>3,000,000</small></td>" in comparison_page(found)


def test_budgets_in_words() -> None:
    assert budget_in_words("params=0.8") == "80.0% of block parameters"
    assert budget_in_words("size=100MB") == "size=100MB"


def test_chance_is_never_recommended() -> None:
    found = comparison()
    lucky = tuple(with_damage(e, 1.01) if e.recipe == "random" else e for e in found.entries)
    advice = recommendation(found.model_copy(update={"entries": lucky}))
    assert advice[0].startswith("Use sublayer-greedy: ")
    assert "random (seed 0) is best" in advice[1]


def test_what_is_no_language_model_any_more_does_not_hide_the_others() -> None:
    found = comparison()
    tame = tuple(with_damage(e, 2.0) if e.evidence else e for e in found.entries)
    whole = found.model_copy(update={"entries": tame})
    assert ceiling(whole) is None and "lies above the picture" not in comparison_page(whole)
    capped = found.model_copy(update={"entries": (with_damage(tame[0], 500.0), *tame[1:])})
    assert ceiling(capped) == USABLE and "lies above the picture" in comparison_page(capped)
    (drawn,) = quality(capped)
    assert drawn.spec["layout"]["yaxis"]["range"] == pytest.approx([math.log10(2.0) - 0.05, math.log10(USABLE)])
    assert not any("500" in note["text"] for note in drawn.spec["layout"]["annotations"])
    awful = found.model_copy(update={"entries": tuple(with_damage(e, 90.0) if e.evidence else e for e in tame)})
    assert ceiling(awful) is None  # the best of what there is stays in the picture
