"""What the page and the card say of a healing."""

from __future__ import annotations

from typing import Any

import pytest
from example import example_run, healed_run
from test_page import specs, words

from billhook.plan.record import Run
from billhook.report import figures_training, healing, provenance
from billhook.report.card import card
from billhook.report.page import page


def untrained(run: Run, update: dict[str, object]) -> Run:
    """The run with other evidence of what its training began with."""
    assert run.healing is not None and run.healing.training is not None
    before = tuple(text.model_copy(update=update) for text in run.evidence)
    training = run.healing.training.model_copy(update={"untrained": before})
    return run.model_copy(update={"healing": run.healing.model_copy(update={"training": training})})


def test_every_stage_has_perplexity_divergence_and_agreement() -> None:
    text = words(page(healed_run()))
    divergence = "divergence from dense (KL)"
    for row in (
        "perplexity, cut and not yet healed 84.1", "perplexity, not yet trained 60.4", "perplexity, compressed 51.9",
        f"{divergence}, cut and not yet healed nats per token 1.21",
        f"{divergence}, not yet trained nats per token 0.712",
        f"{divergence}, compressed nats per token 0.851",
        "same next token as dense, cut and not yet healed 52.0%", "same next token as dense, not yet trained 63.0%",
        "same next token as dense, compressed 60.3%",
    ):  # fmt: skip
        assert row in text
    assert f"{divergence} nats per token 0.851" in words(page(example_run()))  # nothing was healed: one row


def test_a_training_that_led_away_from_the_dense_model_is_told() -> None:
    run = healed_run()
    told = "Nearer to the text, further from the dense model: KL 0.712 → 0.851."
    assert healing.away(run) == told
    assert told in words(page(run))
    kl = run.evidence[0].kl
    same = untrained(run, {})
    assert healing.away(same) == healing.away(example_run()) == ""
    worse = untrained(run, {"kl": kl.model_copy(update={"value": 0.1})})
    assert healing.away(worse) == "Further from the dense model: KL 0.100 → 1.12."


def test_the_card_says_how_it_was_healed_and_what_that_brought() -> None:
    line = next(line for line in card(healed_run()).splitlines() if line.startswith("Healing: "))
    assert line == (
        "Healing: closed-form, then lora; on TinyStories: perplexity 35.6 (cut and not yet healed) → 28.3 (not yet "
        "trained) → 24.8, KL 1.48 → 1.03 → 1.12. Nearer to the text, further from the dense model: KL 0.712 → 0.851."
    )
    assert "Healing" not in card(example_run())
    run = healed_run()
    assert run.healing is not None
    refused = run.healing.model_copy(update={"refused": True, "training": None, "steps": run.healing.steps[:1]})
    text = card(run.model_copy(update={"healing": refused}))
    assert "Healing: closed-form, refused: it made nothing better.\n" in text


def test_the_page_says_what_comes_from_an_earlier_run() -> None:
    told = "in the one run described here, but for the search and what it went by: those are of the earlier run"
    assert told in words(page(healed_run()))
    assert "measured in the one run described here." in words(page(example_run()))
    assert "Healing: closed-form, then lora." in words(page(healed_run()))


def test_a_refused_refit_is_not_the_refusal_of_the_training_after_it() -> None:
    run = healed_run()
    assert run.healing is not None
    facts = dict(provenance.facts(run.model_copy(update={"healing": run.healing.model_copy(update={"refused": True})})))
    assert facts["healing"] == "closed-form, then lora, the refit before it refused: it made nothing better"
    once = run.healing.model_copy(update={"refused": True, "training": None, "steps": run.healing.steps[:1]})
    facts = dict(provenance.facts(run.model_copy(update={"healing": once})))
    assert facts["healing"] == "closed-form, refused: it made nothing better"


def test_the_curve_of_a_training_shows_all_of_its_first_point_and_names_only_terms_that_it_has() -> None:
    def traces(run: Run) -> list[dict[str, Any]]:
        return next(s["data"] for s in specs(page(run)) if s["data"][-1].get("name") == "kept")

    run = healed_run()
    assert run.healing is not None
    assert [trace["name"] for trace in traces(run)] == ["as trained", "held back", "kept"]
    assert all(trace["cliponaxis"] is False for trace in traces(run))
    assert "With lora the loss on held-back text went from 3.30 to 3.00 nats a token" in words(page(run))
    steps = (run.healing.steps[0], run.healing.steps[1].model_copy(update={"method": "distill"}))
    distilled = run.model_copy(update={"healing": run.healing.model_copy(update={"steps": steps})})
    assert traces(distilled)[0]["name"] == "as trained, terms of the stream included"


def test_what_was_tried_in_vain_is_told() -> None:
    run = healed_run()
    assert run.healing is not None
    step = run.healing.steps[-1].model_copy(update={"method": "bias"})
    run = run.model_copy(update={"healing": run.healing.model_copy(update={"in_vain": (step,)})})
    assert "(bias tried later, in vain)" in healing.sentence(run)
    assert "(bias tried later, in vain)" in dict(provenance.facts(run))["healing"]


@pytest.mark.parametrize(
    ("method", "what"),
    [
        ("distill", "the divergence from the dense model on held-back text"),
        ("skips", "the divergence from the dense model with blocks missing on held-back text"),
        ("kv-routing", "the divergence from the dense model with borrowed keys and values on held-back text"),
    ],
)
def test_a_training_is_said_to_be_judged_as_it_was(method: str, what: str) -> None:
    run = healed_run()
    assert run.healing is not None and run.healing.training is not None
    step = run.healing.steps[-1].model_copy(update={"method": method})
    training = run.healing.training.model_copy(update={"goal": "dense"})
    told = run.healing.model_copy(update={"steps": (step,), "training": training})
    assert what in figures_training.sentence(run.model_copy(update={"healing": told}))


def test_where_no_refit_read_text_none_is_told() -> None:
    run = healed_run()
    assert run.healing is not None
    told = run.healing.model_copy(update={"tokens": 0, "work": 0})
    assert {"healing tokens", "work of the healing"} <= dict(provenance.facts(run)).keys()
    found = dict(provenance.facts(run.model_copy(update={"healing": told})))
    assert not {"healing tokens", "work of the healing"} & found.keys()
