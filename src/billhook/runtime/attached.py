"""A model with a policy on it, and the way back."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from transformers import PreTrainedModel

from billhook.anatomy.bridge import require_no_bridges
from billhook.anatomy.undo import Undo
from billhook.plan.errors import InputError
from billhook.runtime.counts import Counts

_MARK = "billhook_policy"


class Attached:
    """A policy at work on ``model``, whose own forward and ``generate`` run under it until ``detach``.

    ``counts`` says what ran and what was left out so far. Also a context manager, which detaches on leaving, after an
    exception as well.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        policy: Any,
        counts: Counts,
        fit: Callable[[Undo], None],
        *,
        beams: bool = True,
    ) -> None:
        """``fit`` changes the model and notes in the ``Undo`` how to change it back. Raises InputError where a policy
        is attached already; whatever ``fit`` raises leaves the model as it was. Without ``beams`` beam search is
        refused."""
        if _MARK in vars(model):
            raise InputError(f"a policy is attached to this model already ({vars(model)[_MARK].name}); detach it first")
        require_no_bridges(model)
        self.model, self.policy, self.counts = model, policy, counts
        self._undo = Undo()
        self._undo.guard_hooks(model)
        try:
            fit(self._undo)
            if not beams:
                self._refuse_beams()
        except BaseException:
            self._undo.restore()
            raise
        vars(model)[_MARK] = self

    @property
    def name(self) -> str:
        """The policy's, which may be no more than a name."""
        return str(getattr(self.policy, "name", self.policy))

    def detach(self) -> None:
        """Restore the model exactly. Doing it twice is no error."""
        if vars(self.model).get(_MARK) is self:
            del vars(self.model)[_MARK]
        self._undo.restore()

    def _refuse_beams(self) -> None:
        """Beam search moves rows about between two passes; what is kept of a row would be another one's."""
        original, own = self.model.generate, vars(self.model).get("generate")

        def generate(*args: Any, **kwargs: Any) -> Any:
            given = kwargs.get("generation_config") or (args[1] if len(args) > 1 else None)
            config = given or self.model.generation_config
            if (kwargs.get("num_beams") or config.num_beams or 1) > 1:
                raise InputError(f"policy {self.name} keeps what it saw of each row: beam search is not sound")
            return original(*args, **kwargs)

        vars(self.model)["generate"] = generate
        mine = vars(self.model)
        self._undo.then(lambda: mine.pop("generate") if own is None else mine.__setitem__("generate", own))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()
