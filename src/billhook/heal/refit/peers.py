"""One fit by several processes: each reads its share of the windows, sums are over all, and the first one decides."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn

from billhook.data import Windows
from billhook.heal.held import from_the_end, held_windows, parted
from billhook.heal.refit.on_disk import on_disk
from billhook.heal.refit.ridge import Moments, Solution, solve
from billhook.plan import processes
from billhook.plan.errors import InputError


@dataclass(frozen=True)
class Peers:
    """``count`` processes that ask each other the same, in the same order; this is number ``rank``, with the model on
    ``device``. One alone has nobody to ask: all answers are its own.

    What follows from sums follows for all, since these are the same to the last bit. Where a narrow choice could come
    out the other way on another kind of device, the first one makes it."""

    count: int = 1
    rank: int = 0
    device: str = "cpu"

    def windows(self, windows: Windows) -> Windows:
        """Every ``count``-th of those to fit on, and of those held back. InputError where some had none to fit on."""
        fitted, held = parted(windows)
        if len(fitted.ids) < self.count:
            raise InputError(f"{self.count} processes cannot share {len(fitted.ids)} windows to fit on; start fewer")
        mine = slice(self.rank, None, self.count)
        return Windows.of(torch.cat([fitted.ids[mine], held[mine]]), windows.name)

    def held_back(self, rows: list[int]) -> list[Tensor]:
        """Of batches of so many rows of its windows, which are held back: bool [rows] a batch. Of few there may be none
        for it."""
        (total,) = self.added(sum(rows))
        return from_the_end(rows, len(range(self.rank, held_windows(int(total)), self.count)))

    def added(self, *numbers: float) -> list[float]:
        """The sum of each over all."""
        if self.count == 1:
            return list(numbers)
        self._agree()
        sums = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        distributed.all_reduce(sums)
        return sums.tolist()

    def summed(self, moments: Moments) -> Moments:
        """Those of the tokens of all. Some may have added none, but all the same shapes."""
        if self.count > 1:
            moments.energy, tokens = self.added(moments.energy, moments.tokens)
            moments.tokens = int(tokens)
            distributed.all_reduce(moments.inputs)
            distributed.all_reduce(moments.cross)
        return moments

    def first(self, find: Callable[[], Tensor | None]) -> Tensor | None:
        """What the first process finds."""
        found = find() if self.rank == 0 else None
        if self.count == 1:
            return found
        like = self._told(None if found is None else (found.shape, found.dtype))
        return None if like is None else self._sent(found, *like)

    def solved(self, fit: Moments, held: Moments, near: float) -> Solution | None:
        """``solve``, by the first process."""
        found = solve(fit, held, near) if self.rank == 0 else None
        if self.count == 1:
            return found
        facts = self._told(None if found is None else (found.penalty, found.error))
        change = None if found is None else found.change
        return None if facts is None else Solution(self._sent(change, fit.cross.shape, torch.float32), *facts)

    def same(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """With the values that the first process has: on another kind of device the last bits may be others."""
        if self.count == 1:
            return tensors
        self._agree()
        found = {}
        for name, tensor in tensors.items():
            sent = self._sent(None if self.rank else tensor, tensor.shape, tensor.dtype)
            found[name] = on_disk(sent) if self.rank else tensor
        return found

    @contextmanager
    def together(self) -> Iterator[None]:
        """An InputError of one inside is one of all: the others hear of it where they ask next, at the latest here."""
        try:
            yield
            self._agree()
        except _Told:
            raise
        except InputError as error:
            self._agree(str(error))
            raise

    def _agree(self, trouble: str | None = None) -> None:
        """Every question begins with this one: whether all of them are well."""
        if self.count == 1:
            return
        troubled = torch.tensor(float(trouble is not None), device=self.device)
        distributed.all_reduce(troubled)
        if troubled:
            said: list[str | None] = [None] * self.count
            distributed.all_gather_object(said, trouble)
            raise _Told(next(text for text in said if text is not None))

    def _told(self, facts: Any) -> Any:
        self._agree()
        found = [facts]
        distributed.broadcast_object_list(found)
        return found[0]

    def _sent(self, tensor: Tensor | None, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        found = torch.empty(shape, dtype=dtype, device=self.device) if tensor is None else tensor.contiguous()
        distributed.broadcast(found, 0)
        return found


ALONE = Peers()


def peers_of(source: object, model: nn.Module) -> Peers:
    """The processes that were started together, where they are given windows. Other batches are not shared out: each
    process reads all of them, alone."""
    if processes.count() == 1 or not isinstance(source, Windows):
        return ALONE
    from accelerate import PartialState  # seconds that a single process need not wait

    device = next(model.parameters()).device
    state = PartialState(cpu=device.type == "cpu")
    return Peers(state.num_processes, state.process_index, str(device))


class _Told(InputError):
    """What all of them know of."""
