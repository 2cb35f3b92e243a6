"""Bars with the time left, on standard error."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskProgressColumn, TextColumn
from rich.text import Text

from billhook.plan import processes

Callback = Callable[[str, int, int], None]

_HEARTBEAT = 10.0  # seconds between lines where standard error is no terminal
_AVERAGE = 3600.0  # seconds to estimate the speed over: the steps of a search are uneven


@contextmanager
def bars() -> Iterator[Callback]:
    """Yield a callback (label, done, total) that draws one bar a label.

    The bars stay when all is done and vanish on an exception, so that its one line stands alone. Where standard error
    is no terminal there is a plain line every ten seconds instead. Of several processes the first one draws.
    """
    if not processes.is_first():
        yield lambda _label, _done, _total: None
        return
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _heartbeat(console)
        return
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=26), TaskProgressColumn(), _Left())
    drawn = Progress(*columns, console=console, speed_estimate_period=_AVERAGE)
    try:
        yield _draw(drawn)
    except BaseException:
        drawn.live.transient = True
        raise
    finally:
        drawn.stop()
    if drawn.tasks:
        console.print()


def _draw(drawn: Progress) -> Callback:
    tasks: dict[str, Task] = {}

    def advance(label: str, done: int, total: int) -> None:
        drawn.start()  # only now: nothing is drawn where there is nothing to wait for
        if label not in tasks:
            number = drawn.add_task(label, total=total or None)
            tasks[label] = next(task for task in drawn.tasks if task.id == number)
        drawn.update(tasks[label].id, completed=done, total=total or None)

    return advance


def _heartbeat(console: Console) -> Callback:
    last = time.monotonic()
    begun: dict[str, tuple[float, int]] = {}  # when each label began, and how far it was then: resumed is not at 0

    def advance(label: str, done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if label not in begun or done <= begun[label][1]:
            begun[label] = now, done
        if now - last < _HEARTBEAT:
            return
        last = now
        since, first = begun[label]
        left = f", {_clock((now - since) / (done - first) * (total - done))} left" if first < done < total else ""
        console.print(f"billhook: {label}: {done} of {total}{left}", markup=False, highlight=False, soft_wrap=True)

    return advance


class _Left(ProgressColumn):
    """``1:02 left``, and when all is done the time that it took."""

    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        if task.finished:
            return Text(_clock(task.finished_time or 0.0), style="dim")
        left = task.time_remaining
        return Text("" if left is None else f"{_clock(left)} left", style="dim")


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
