"""A model with a policy on it, and the way back."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from transformers import PreTrainedModel

from billhook.anatomy.undo import Undo
from billhook.plan.errors import InputError
from billhook.runtime.counts import Counts

_MARK = "billhook_policy"


class Attached:
    """A policy at work on ``model``, whose own forward and ``generate`` run under it until ``detach``.

    ``counts`` says what ran and what was left out so far. Also a context manager, which detaches on leaving, after an
    exception as well.
    """

    def __init__(self, model: PreTrainedModel, policy: Any, counts: Counts, fit: Callable[[Undo], None]) -> None:
        """``fit`` changes the model and notes in the ``Undo`` how to change it back. Raises InputError where a policy is
        attached already; whatever ``fit`` raises leaves the model as it was."""
        if _MARK in vars(model):
            raise InputError(
                f"a policy is attached to this model already ({vars(model)[_MARK].policy}); detach it first"
            )
        self.model, self.policy, self.counts = model, policy, counts
        self._undo = Undo()
        self._undo.guard_hooks(model)
        try:
            fit(self._undo)
        except BaseException:
            self._undo.restore()
            raise
        vars(model)[_MARK] = self

    def detach(self) -> None:
        """Restore the model exactly. Doing it twice is no error."""
        if vars(self.model).get(_MARK) is self:
            del vars(self.model)[_MARK]
        self._undo.restore()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()
