"""What is trained, and towards what: the words for healing by training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Trains = Literal["lora", "tune", "lisa", "ist", "fpf"]
Goal = Literal["text", "dense"]
Features = Literal["none", "all", "tail"]


@dataclass(frozen=True)
class Training:
    """One way to train a cut model. Every number is a default that can be replaced with ``dataclasses.replace``.

    ``trains``: LoRA adapters; biases, norms and scales, as few as suffice; or all weights of blocks chosen anew each
    ``period`` of steps. ``goal``: the next token of the text, or the dense model's distribution over it.
    ``features``: whether the stream after the blocks that stay is to match the dense one as well, everywhere or in the
    last quarter of them only.

    A step takes ``rows`` windows; AdamW with ``rate`` as its highest rate, reached after ``warmup`` of all steps and
    falling to a tenth along a cosine. The held-back windows are looked at ``checks`` times; after ``patience`` looks
    without a better one it ends. ``rank`` is the mean rank of the adapters, ``blocks`` how many are trained at once.
    ``skips``: the share of the blocks stepped around in each step, others every time; held-back windows are looked at
    with blocks missing too. ``routes``: likewise the share of the blocks that read keys and values of an earlier one.
    """

    trains: Trains
    goal: Goal
    features: Features = "none"
    rate: float = 1e-3
    rows: int = 4
    warmup: float = 0.05
    checks: int = 10
    patience: int = 3
    rank: int = 32
    blocks: int = 4
    period: int = 10
    skips: float = 0.0
    routes: float = 0.0
    seed: int = 0

    @property
    def says(self) -> str:
        """In a sentence."""
        towards = "the dense model's next tokens" if self.goal == "dense" else "the next token of the text"
        stream = {"none": "", "all": " and its stream", "tail": " and its stream after the last blocks"}[self.features]
        missing = f", with {self.skips:.0%} of the blocks missing, others every time" if self.skips else ""
        if self.routes:
            missing += f", with {self.routes:.0%} of the blocks on keys and values of an earlier one, others every time"
        return f"Refitted in closed form, then trained towards {towards}{stream}: {_WHAT[self.trains]}{missing}."


_WHAT = {
    "lora": "low-rank adapters on every linear, merged",
    "tune": "as few as suffice of biases, norms and scales of linears, merged",
    "lisa": "all weights of a few blocks at a time, drawn at random",
    "ist": "all weights of the few blocks that matter most just then",
    "fpf": "the weights that a first short training of all changed most",
}

METHODS = {
    "tune": Training("tune", "dense", rate=3e-3, patience=9),  # its first steps may lead away
    "lora": Training("lora", "text"),
    "distill": Training("lora", "dense", "all"),
    "tail": Training("lora", "dense", "tail"),
    "lisa": Training("lisa", "dense", rate=1e-4),
    "ist": Training("ist", "dense", rate=1e-4),
    "fpf": Training("fpf", "dense", rate=1e-4),
    "skips": Training("lora", "dense", skips=0.2),
    "kv-routing": Training("lora", "dense", routes=0.5),
}
