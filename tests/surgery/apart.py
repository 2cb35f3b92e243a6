"""Random plans that take linears apart, for the tests of surgery and of what builds on it."""

from __future__ import annotations

import random
from collections.abc import Collection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from billhook.anatomy import Anatomy
from billhook.plan.address import Address
from billhook.plan.plan import Factorise, Plan


def basis(outputs: int, rank: int, seed: int = 0) -> NDArray[Any]:
    """Random orthonormal columns."""
    drawn = np.random.default_rng(seed).standard_normal((outputs, rank))
    return np.linalg.qr(drawn)[0].astype(np.float32)


def factorings(
    anatomy: Anatomy, seed: int, spared: Collection[Address] = (), share: float = 0.6
) -> dict[Factorise, NDArray[Any]]:
    """About a ``share`` of all linears that can be taken apart at a random rank, outside of the ``spared`` units."""
    draw = random.Random(seed)
    found = {}
    for address, sublayer in anatomy.outline.sublayers():
        for path, linear in sublayer.linears.items():
            if draw.random() < share and linear.useful and address not in spared and address.parent not in spared:
                edit = Factorise(unit=address, linear=path, rank=draw.randint(1, linear.useful))
                found[edit] = basis(linear.outputs, edit.rank, seed)
    return found


def plan_of(anatomy: Anatomy, seed: int, drops: Collection[Address] = (), share: float = 0.6) -> Plan:
    return Plan.of(drops).factorised(factorings(anatomy, seed, drops, share))
