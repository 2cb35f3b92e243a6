"""Where an unfinished search keeps what it has paid for."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from pydantic import BaseModel

from billhook.plan.errors import InputError


def workplace(out: str | os.PathLike[str]) -> Path:
    """The hidden folder beside ``out`` for that."""
    path = Path(out).absolute()
    return path.parent / f".{path.name}.search"


@contextmanager
def claimed(out: str | os.PathLike[str]) -> Iterator[Path]:
    """The workplace of ``out``, held by this run alone. InputError at once if it cannot be, or be made.

    A killed run lets go of it. On leaving, the folders that were made and are still empty are removed.
    """
    place = workplace(out)
    made = [folder for folder in (place, *place.parents) if not folder.exists()]
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"output folder {out} cannot be made: {error}") from error
    lock = FileLock(place / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise InputError(f"another run is working on {out}; wait for it to end, or name another folder") from error
    try:
        yield place
    finally:
        lock.release()
        (place / ".lock").unlink(missing_ok=True)
        for folder in made:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def keep(path: Path, rows: Sequence[BaseModel]) -> None:
    """Written beside its place and renamed: a half-written file is never read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".part")
    fresh.write_text(json.dumps([row.model_dump(mode="json") for row in rows]), encoding="utf-8")
    fresh.replace(path)
