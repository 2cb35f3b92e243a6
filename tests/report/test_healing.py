"""What the page and the card say of a healing."""

from __future__ import annotations

from example import example_run, healed_run
from test_page import words

from billhook.plan.record import Run
from billhook.report import healing
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
