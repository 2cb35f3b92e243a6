"""Masks N:M that are learned: of each group of M weights, which of all masks it gets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from math import comb

import torch
from torch import Tensor

from billhook.anatomy.linears import Linear
from billhook.plan.errors import InputError
from billhook.search.adam import Adam
from billhook.search.sparse_steps import State

PRIOR = 3.0  # what a mask loses in its logit for each weight in which it differs from the prior
TEMPERATURE = (4.0, 0.05)  # of a choice, at the first step and at the last
SCALE = (1.0, 5.0)  # of the logits, at the first step and at the last
RATE = 0.1
MOST = 70  # masks to choose from: 4:8


@dataclass(frozen=True, eq=False)
class _Groups:
    """The groups of a linear that keep equally many weights: ``places`` [groups] among all of its groups, ``options``
    [masks, M], ``logits`` [groups, masks], and the choice that was ``drawn`` last."""

    places: Tensor
    options: Tensor
    logits: Tensor
    adam: Adam
    drawn: Tensor

    @classmethod
    def of(cls, kept: Tensor, count: int) -> _Groups:
        """``kept`` [groups, M]: the prior, of which those that keep ``count`` are taken."""
        size = kept.shape[1]
        options = torch.zeros(comb(size, count), size, device=kept.device)
        for option, members in zip(options, combinations(range(size), count), strict=True):
            option[list(members)] = 1
        places = (kept.sum(1) == count).nonzero()[:, 0]
        logits = PRIOR * (kept[places].float() @ options.T - count)
        return cls(places, options, logits, Adam(logits), logits.clone())


class LearnedMasks:
    """A rule (see ``sparse_steps``): of each M weights in a row a categorical distribution over all masks that keep as
    many as the prior does, learned by Gumbel-softmax, the weights fixed.

    A step gives each weight times its soft mask, sum over masks of c times mask with c = softmax((scale x logits +
    Gumbel noise) / temperature). The temperature falls and the scale rises, so that in the end one mask is drawn. Adam
    moves the logits. What it comes to is the likeliest mask of each group.

    Source: MaskLLM (arXiv 2409.17481) and its authors' code (NVlabs/MaskLLM): schedules of temperature and scale, and
    the weight of the prior, from there (scales are a hundred times larger there, logits about a hundred times smaller);
    the rate is our own. Left out: the reward for large weights that stay. Memory: for 2:4 and each
    weight 6 numbers in float32. Raises InputError for patterns of more than 70 masks.
    """

    def __init__(
        self, linears: Mapping[str, Linear], dense: Mapping[str, Tensor], prior: Mapping[str, Tensor], seed: int, m: int
    ) -> None:
        """``prior``: bool, in the shape of each weight; ``m`` divides its inputs."""
        self._linears, self._dense, self._prior, self._m = linears, dense, dict(prior), m
        self._groups: dict[str, list[_Groups]] = {}
        for name, linear in linears.items():
            kept = linear.rows(prior[name]).reshape(-1, m)
            counts = [n for n in range(1, m) if (kept.sum(1) == n).any()]
            if any(comb(m, count) > MOST for count in counts):
                raise InputError(f"masks of {m} weights are too many to learn; take a pattern of 8 or less")
            self._groups[name] = [_Groups.of(kept, count) for count in counts]
        device = next(iter(dense.values())).device
        self._draw = torch.Generator(device).manual_seed(seed)

    def given(self, name: str, along: float) -> Tensor:
        linear, old = self._linears[name], self._dense[name]
        mask = linear.rows(self._prior[name]).reshape(-1, self._m).float()
        temperature, scale = (a + (b - a) * along for a, b in (TEMPERATURE, SCALE))
        for groups in self._groups[name]:
            noise = torch.empty_like(groups.logits).exponential_(generator=self._draw).log_().neg_()
            torch.softmax(noise.add_(groups.logits, alpha=scale).div_(temperature), 1, out=groups.drawn)
            mask[groups.places] = groups.drawn @ groups.options
        return (old.float() * linear.whole(mask.reshape(linear.rows(old).shape), old)).to(old.dtype)

    def learn(self, name: str, slope: Tensor, along: float) -> None:
        linear = self._linears[name]
        of_mask = (linear.rows(slope).float() * linear.rows(self._dense[name]).float()).reshape(-1, self._m)
        temperature, scale = (a + (b - a) * along for a, b in (TEMPERATURE, SCALE))
        for groups in self._groups[name]:
            of_choice = of_mask[groups.places] @ groups.options.T
            mean = (of_choice * groups.drawn).sum(1, keepdim=True)
            of_logits = of_choice.sub_(mean).mul_(groups.drawn).mul_(scale / temperature)
            groups.adam.move(groups.logits, of_logits, RATE)

    def state(self) -> State:
        masks = {}
        for name, linear in self._linears.items():
            prior = linear.rows(self._prior[name])
            mask = prior.reshape(-1, self._m).clone()
            for groups in self._groups[name]:
                mask[groups.places] = groups.options.bool()[groups.logits.argmax(1)]
            masks[name] = linear.whole(mask.reshape(prior.shape), self._prior[name])
        return State(masks, {})
