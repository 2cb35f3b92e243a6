"""One walk by several processes: one workplace, and what the first of them does for all."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from billhook.plan import processes
from billhook.plan.errors import InputError
from billhook.recipes.workplace import claimed, workplace

T = TypeVar("T")
PATIENCE = timedelta(days=2)  # how long the others wait while the first searches or proves


@contextmanager
def shared(out: str | os.PathLike[str], device: str = "cpu") -> Iterator[tuple[Path, bool]]:
    """The workplace of ``out``, held by the first process of all that work on it together (see ``claimed``), and
    whether this is the first one. InputError, in all of them, if it cannot be held, or not be seen by all."""
    if processes.count() == 1:
        with claimed(out) as place:
            yield place, True
        return
    from accelerate import PartialState  # seconds that a single process need not wait
    from accelerate.utils import gather_object

    state = PartialState(cpu=device == "cpu", timeout=PATIENCE)
    with ExitStack() as held:

        def claim() -> None:
            held.enter_context(claimed(out))

        of_the_first(claim)
        place = workplace(out)
        if not all(gather_object([place.is_dir()])):
            raise InputError(f"not every process sees {place.parent}; on several hosts it must be a folder of them all")
        yield place, state.is_main_process


def of_the_first(compute: Callable[[], T]) -> T:
    """What the first process computes, for all; an InputError of it is one of all. All must ask, for the same."""
    if processes.count() == 1:
        return compute()
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    state = PartialState()
    found: list[Any] = [None, None]
    if state.is_main_process:
        try:
            found[0] = compute()
        except InputError as error:
            found[1] = str(error)
    broadcast_object_list(found)
    if found[1] is not None:
        raise InputError(found[1])
    result: T = found[0]
    return result
