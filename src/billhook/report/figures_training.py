"""The picture of a training: its loss, on the text that was read and on text held back."""

from __future__ import annotations

import plotly.graph_objects as go

from billhook.heal.training.methods import METHODS
from billhook.plan.record import Run
from billhook.report.figures import RING, Picture, picture
from billhook.report.numbers import number, percent
from billhook.report.palette import COMPRESSED, OTHER


def curve(run: Run) -> list[Picture]:
    """The loss against the tokens read; empty where nothing was trained."""
    healing = run.healing
    training = healing.training if healing else None
    if healing is None or training is None:
        return []
    stream = ", terms of the stream included" if METHODS[healing.method].features != "none" else ""
    figure = go.Figure()
    read = [look for look in training.curve if look.loss is not None]
    for name, looks, values, color in (
        (f"as trained{stream}", read, [look.loss for look in read], OTHER),
        ("held back", training.curve, [look.held for look in training.curve], COMPRESSED),
    ):
        figure.add_scatter(
            x=[look.step * training.tokens_a_step for look in looks], y=values, mode="lines+markers", name=name,
            line={"width": 2, "color": color}, marker={"size": 6, "color": color},
            hovertemplate="%{x:,} tokens: %{y:.4f}<extra></extra>", cliponaxis=False,
        )  # fmt: skip
    best = next(look for look in training.curve if look.step == training.best)
    figure.add_scatter(
        x=[best.step * training.tokens_a_step], y=[best.held], mode="markers", name="kept", marker=RING | {"size": 16},
        hoverinfo="skip", cliponaxis=False,
    )  # fmt: skip
    figure.update_xaxes(title_text="tokens read", rangemode="tozero", nticks=7)
    figure.update_yaxes(title_text="nats a token", nticks=7)
    return [picture("training", "", figure, 340)]


def sentence(run: Run) -> str:
    """What the training did to the held-back loss, in words."""
    healing = run.healing
    training = healing.training if healing else None
    if healing is None or training is None:
        return ""
    way = METHODS[healing.method]
    missing = " with blocks missing" if way.skips else " with borrowed keys and values" if way.routes else ""
    what = f"divergence from the dense model{missing}" if training.goal == "dense" else "loss"
    first, best = training.curve[0].held, min(look.held for look in training.curve)
    if training.best == 0:
        begun = f"{number(first)} nats a token"
        return f"No step of {healing.method} lowered the {what} on held-back text ({begun}): nothing of it was kept."
    early = ", and ended before its text did, since nothing better came" if training.stopped_early else ""
    return (
        f"With {healing.method} the {what} on held-back text went from {number(first)} to {number(best)} nats a token "
        f"(by {percent(1 - best / first)}) within {training.best * training.tokens_a_step:,} tokens{early}."
    )
