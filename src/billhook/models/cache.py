"""Folders that are dear to make and always the same are made once and kept."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from billhook.models.atomic import building
from billhook.plan.errors import InputError


def cache_dir() -> Path:
    """``$BILLHOOK_CACHE``, else ``billhook`` in the user's cache folder."""
    if chosen := os.environ.get("BILLHOOK_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "billhook"


def cached(name: str, make: Callable[[Path], None]) -> Path:
    """The folder ``name`` of the cache; where it is missing, ``make`` fills an empty folder that becomes it.

    Safe between processes: the second waits for the first.
    """
    folder = cache_dir() / name
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.with_name(f".{name}.lock"))
        lock.acquire()
    except OSError as error:
        raise InputError(
            f"cache folder {folder.parent} cannot be written: {error}; set BILLHOOK_CACHE to one that can"
        ) from error
    try:
        if not folder.is_dir():
            with building(folder) as fresh:
                make(fresh)
    finally:
        lock.release()
    return folder
