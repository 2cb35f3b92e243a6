"""How much the output answers to an inner unit."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from billhook.anatomy import Anatomy
from billhook.measure.sensitivity import Answer
from billhook.measure.width import WidthTrace
from billhook.plan.address import Address
from billhook.scores.registry import score


@score("taylor", needs="slopes")
def taylor(
    trace: WidthTrace,
    anatomy: Anatomy,
    answer: Answer = "loss",
    within: Literal["all", "text", "token"] = "all",
) -> dict[Address, Tensor]:
    """|h dL/dh|, the change of L if the unit falls silent, to first order, a token: summed ``within`` all tokens, each
    text or token before its size is taken, then the mean.

    ``answer`` says what L is (see ``sensitivity``): the ``loss`` as in Molchanov et al. 2017 (arXiv 1611.06440, section
    2.2) and LLM-Pruner (arXiv 2305.11627), or the ``entropy`` of the model's own prediction as in AMP, whose code sums
    within an image (visresearch/AMP). Cost: one forward and one backward pass."""
    sums = {"all": "total", "text": "texts", "token": "absolute"}[within]
    return {a: getattr(s, sums).abs() / s.count for a, s in trace.slopes.items()}


@score("fisher", needs="slopes")
def fisher(
    trace: WidthTrace, anatomy: Anatomy, answer: Literal["loss", "sampled"] = "sampled"
) -> dict[Address, Tensor]:
    """E[(h dL/dh)^2] / 2 over tokens: the rise of the divergence from the dense model if the unit falls silent, to
    second order (nats a token); ``answer`` says whose tokens L is the loss of.

    Squares of the slopes of the negative log-likelihood of ``sampled`` tokens are the diagonal of the Fisher
    information of a gate before each unit (Theis et al. 2018, arXiv 1801.05787; Kwon et al. 2022, arXiv 2204.09656, for
    heads and neurons, with the ``loss`` on the text, called the empirical Fisher). There the slope is summed over each
    batch of texts before it is squared; here tokens count apart, for less noise from the same text. Figures of all
    sublayers compare. Cost: one forward and one backward pass.
    """
    return {a: s.squares / (2 * s.count) for a, s in trace.slopes.items()}
