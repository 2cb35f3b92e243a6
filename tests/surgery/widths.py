"""What the tests of width share: random plans that narrow, and the units that a plan takes away set to zero."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager

import torch
from hypothesis import strategies as st
from live import drops
from torch import nn

from billhook.anatomy import Anatomy, Inner
from billhook.plan.address import Address
from billhook.plan.plan import Keep, Plan

Pick = Callable[[Address, Inner], int]


def narrowings(anatomy: Anatomy, seed: int, gone: Collection[Address] = (), pick: Pick | None = None) -> list[Keep]:
    """A random keep for every sublayer that has inner units and is not ``gone``; ``pick`` says how many are left."""
    rng = random.Random(seed)
    keeps = []
    for address, units in anatomy.inner.items():
        for inner in units:
            number = pick(address, inner) if pick else rng.randint(inner.least, inner.count)
            if address in gone or address.parent in gone or (inner.parts > 1 and number < inner.count):
                continue
            keeps.append(keep(address, inner, rng.sample(range(inner.count), number)))
    return keeps


def keep(address: Address, inner: Inner, indices: Iterable[int]) -> Keep:
    return Keep(unit=address, inner=inner.kind, indices=tuple(sorted(indices)))


@st.composite
def plans(draw: st.DrawFn, anatomy: Anatomy) -> Plan:
    """Random drops, and what they leave narrowed at random."""
    gone = draw(drops(anatomy.outline))
    return Plan.of(gone, keeps=narrowings(anatomy, draw(st.integers(0, 999)), gone))


@contextmanager
def masked(model: nn.Module, anatomy: Anatomy, keeps: Iterable[Keep]) -> Iterator[None]:
    """The removed neurons and groups write nothing: their entries of the writing weight are zero."""
    state = dict(model.named_parameters())
    saved = {}
    with torch.no_grad():
        for edit in keeps:
            (inner,) = anatomy.inner[edit.unit]
            (piece,) = (piece for piece in inner.slices if piece.writes)
            weight = state[piece.parameter]
            saved[piece.parameter] = weight.clone()
            for unit in set(range(inner.count)) - set(edit.indices):
                weight.narrow(piece.axis, piece.start + unit * piece.width, piece.width).zero_()
        try:
            yield
        finally:
            for name, value in saved.items():
                state[name].copy_(value)
