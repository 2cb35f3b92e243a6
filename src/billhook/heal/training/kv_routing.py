"""Keys and values read from earlier blocks at random while a model is trained, so that it bears any such sharing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from random import Random

from torch import nn

from billhook.anatomy import Anatomy
from billhook.anatomy.undo import Undo
from billhook.plan.errors import InputError
from billhook.runtime.kv_lending import STACK, kinds, lend, nearest


class Routes:
    """The blocks of a decoder among which keys and values can go. InputError where no two blocks have them alike."""

    def __init__(self, model: nn.Module, anatomy: Anatomy) -> None:
        self._model, self._kinds = model, kinds(model, anatomy)
        self._stack = anatomy.stack(STACK)
        if len(set(self._kinds.values())) == len(self._kinds):
            raise InputError("kv-routing needs two blocks whose keys and values are alike; this model has none")

    @contextmanager
    def drawn(self, share: float, draw: str) -> Iterator[None]:
        """Each block attends with probability ``share`` to keys and values of an earlier one instead of its own; the
        same draw, the same blocks. A share of 0 changes nothing.

        Source: "Stochastic KV Routing" (arXiv 2604.22782, the abstract): layers choose at random between their own and
        those of a preceding one. Chosen here: which one, the nearest that keeps its own, as in ``runtime.kv_share``, so
        that training meets what the policy does later; one draw for all tokens of a step.
        """
        random = Random(draw)
        borrowing = {number for number in self._kinds if random.random() < share}
        undo = Undo()
        try:
            if lenders := nearest(self._kinds, borrowing):
                lend(self._model, self._stack, lenders, undo)
            yield
        finally:
            undo.restore()
