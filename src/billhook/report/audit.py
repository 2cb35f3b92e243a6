"""The depth audit as parts of the page: a picture or two, what they show, and what they say of this model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from billhook.plan.audit import StackAudit
from billhook.plan.record import Run
from billhook.report import figures_audit, sentences_audit
from billhook.report.figures import Picture

Drawn = Callable[[StackAudit], list[Picture]]
Said = Callable[[StackAudit], str]

_PARTS: tuple[tuple[str, str, Drawn, Said], ...] = (
    (
        "What each sublayer adds to the stream",
        "How long what it writes is beside the stream, and whether it points the same way: a cosine below 0 takes "
        "away from what is there, one above 0 makes more of it.",
        figures_audit.contributions,
        sentences_audit.contributions,
    ),
    (
        "What skipping a block does to all that follows",
        "Each row is one block skipped for the first half of a text, each column a later block: the change of what "
        "that block writes, relative to what it wrote before. Dark means that it never needed the skipped block.",
        figures_audit.skips,
        sentences_audit.skips,
    ),
    (
        "How alike the depths are",
        "Depth i is the input of block i. Left: how much of the stream at one depth an affine map of the stream at "
        "another explains, on text the map never saw. Right: linear CKA, which asks for a rotation and a scale only. "
        "Every token counts alike.",
        figures_audit.maps,
        sentences_audit.maps,
    ),
    (
        "What a block does token by token, and the rest",
        "An affine map of each token's own stream is fitted to the block; what it cannot give, attention and all that "
        "is not linear, is the rest. Right: the map put in the place of the block.",
        figures_audit.tokenwise,
        sentences_audit.tokenwise,
    ),
    (
        "Stitching one depth to another",
        "The stream at one depth, mapped as closely as an affine map can onto that at another, is put in its place, "
        "and the model runs on from there.",
        figures_audit.stitches,
        sentences_audit.stitches,
    ),
    (
        "What tokens have in common with their neighbours",
        "Mean cosine between the streams of tokens of one text, less what all tokens share.",
        figures_audit.neighbours,
        sentences_audit.neighbours,
    ),
)


@dataclass(frozen=True)
class Part:
    """One topic of one stack: ``how`` to read the pictures, and what they ``say``."""

    title: str
    how: str
    says: str
    pictures: list[Picture]


def parts(run: Run) -> list[Part]:
    """Every topic that was measured, stack by stack."""
    found = []
    for stack, audit in run.audits.items():
        for title, how, drawn, said in _PARTS:
            pictures = drawn(audit)
            if pictures:
                name = f"{title} · {stack}" if len(run.audits) > 1 else title
                found.append(Part(name, how, said(audit), pictures))
    return found


def basis(run: Run) -> str:
    """What the audit rests on, in one sentence a stack."""
    return " ".join(
        f"{stack}: maps fitted on {audit.fitted:,} tokens, everything judged on {audit.held:,} others; "
        f"{audit.work:,} block-token forwards.{f' Not all was measured: {audit.left_out}.' if audit.left_out else ''}"
        for stack, audit in run.audits.items()
    )
