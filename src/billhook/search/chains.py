"""A chain of layers for one sample, or for a data set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from billhook.anatomy import Anatomy
from billhook.measure.patch import observing
from billhook.plan.check_schedule import check_schedule
from billhook.plan.errors import InputError
from billhook.plan.outline import Outline
from billhook.plan.schedule import Schedule
from billhook.runtime.chain import Chain
from billhook.runtime.numbers import write_numbers
from billhook.search.tree import tree_search

Visits = tuple[int, ...]

SPANS = (1, 2, 4)
LONGEST = 1.5


@dataclass(frozen=True)
class Sample:
    """Token ids of a prompt [P] and of the answer [A] that should follow it."""

    prompt: Tensor
    answer: Tensor


@dataclass(frozen=True)
class FoundChain:
    """A chain, the share of the samples that it answers, and its reward."""

    visits: Visits
    correct: float
    reward: float

    @property
    def policy(self) -> Chain:
        return Chain(blocks=write_numbers(self.visits))


def find_chains(
    model: PreTrainedModel,
    anatomy: Anatomy,
    samples: Sequence[Sample],
    *,
    simulations: int = 100,
    price: float = 0.2,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[FoundChain]:
    """Chains of the decoder's blocks that answer the samples, best first: one sample gives test-time depth for it, many
    give one chain for a data set.

    reward = share of samples answered - ``price`` x visits / blocks. A sample is answered if every token of its answer
    is the likeliest one after those before it. The search begins at the model's own chain; a move skips, or visits once
    more, a span of 1, 2 or 4 visits; no chain is longer than 1.5 times the model. A text has one right continuation
    here and the search sees it: like the paper's, this says what depth could do, it is no policy for unseen text.

    Source: CoLa (arXiv 2507.07996): Monte Carlo tree search over skipped and looped spans of layers, correctness traded
    against length. Chosen here: the lengths of spans, that the reward pays for length, the price, and an answer as
    greedy tokens. Cost: one forward of every sample a simulation. InputError without samples.
    """
    if not samples:
        raise InputError("a chain of layers is looked for on at least one sample")
    blocks = len(anatomy.stack("decoder").blocks)
    shares: dict[Visits, float] = {}

    def reward(visits: Visits) -> float:
        with Chain(blocks=write_numbers(visits)).attach(model, anatomy), observing(model):
            shares[visits] = sum(_answers(model, sample) for sample in samples) / len(samples)
        if progress is not None:
            progress("chains", len(shares), simulations + 1)
        return shares[visits] - price * len(visits) / blocks

    root = tuple(range(blocks))
    found = tree_search(root, lambda v: _moves(v, blocks, anatomy.outline), reward, simulations=simulations, seed=seed)
    return [FoundChain(visits, shares[visits], value) for visits, value in found]


def _moves(visits: Visits, blocks: int, outline: Outline) -> list[Visits]:
    found: dict[Visits, None] = {}
    for span in SPANS:
        for start in range(len(visits) - span + 1):
            end = start + span
            found[visits[:start] + visits[end:]] = None
            found[visits[:end] + visits[start:end] + visits[end:]] = None
    return [v for v in found if v and len(v) <= LONGEST * blocks and _possible(v, outline)]


def _possible(visits: Visits, outline: Outline) -> bool:
    try:
        check_schedule(Schedule.chain(visits), outline)
    except InputError:
        return False
    return True


def _answers(model: PreTrainedModel, sample: Sample) -> bool:
    ids = torch.cat([sample.prompt, sample.answer]).to(model.device)
    logits = model(input_ids=ids[None], use_cache=False).logits[0, len(sample.prompt) - 1 : -1]
    return bool((logits.argmax(-1).cpu() == sample.answer.cpu()).all())
