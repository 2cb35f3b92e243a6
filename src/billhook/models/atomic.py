"""Nothing is ever half-written: folders are built beside their place and renamed into it."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path

from filelock import FileLock, Timeout

from billhook.plan.errors import InputError


def check_out(
    out: str | os.PathLike[str], overwrite: bool = False, source: str | os.PathLike[str] | None = None
) -> Path:
    """The absolute path of ``out``; InputError if a result could not or must not be put there.

    An existing folder is only replaced with ``overwrite``, and only if it is empty or holds a model or a result of
    Billhook; never with one that is, or holds, the ``source`` that is read, and nothing is put into that. Nothing is
    made; what a killed run had moved aside is put back first.
    """
    path = Path(out).absolute()
    put_back(path)
    origin = Path(source).expanduser().resolve() if source is not None else None
    if origin is not None and origin.exists() and path.resolve() in (origin, *origin.parents):
        raise InputError(f"output folder {out} holds the model that is read; name another folder")
    if origin is not None and origin.is_dir() and origin in path.resolve().parents:
        raise InputError(f"output folder {out} lies inside the model that is read; name another folder")
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise InputError(f"output {out} exists and is not a folder; name a new folder")
    if path.is_dir() and not overwrite:
        raise InputError(f"output folder {out} already exists; choose another, or replace it with --overwrite")
    if path.is_dir() and any(path.iterdir()) and not _replaceable(path):
        raise InputError(f"output folder {out} holds something other than a model; it will not be replaced")
    above = next(folder for folder in path.parents if folder.exists())
    if not above.is_dir():
        raise InputError(f"output folder {out} cannot be made: {above} is not a folder")
    if not os.access(above, os.W_OK | os.X_OK):
        raise InputError(f"output folder {out} cannot be made: {above} is not writable")
    return path


def _replaceable(folder: Path) -> bool:
    """Whether a folder is a result of Billhook or a model: a ``config.json`` alone may belong to anything."""
    if any((folder / record).is_file() for record in ("billhook.json", "comparison.json")):
        return True
    return (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))


_BUSY = ".busy"  # held by the run that is building or replacing a folder, and let go by the system if it is killed
_REFUSED = re.compile(r"\(os error (\d+)\)")


@contextmanager
def building(out: str | os.PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """Yield a fresh folder beside ``out``; on success it becomes ``out``, on any exception it is removed.

    Raises InputError before anything is written where ``check_out`` would. A killed process leaves ``out`` as it was,
    and beside it a hidden folder ``.NAME.*.building`` that the next one removes. An old target is moved aside before
    the new one takes its place, and put back if that fails; where the process is killed just then, ``put_back`` does it
    later. OSError also for what the system refuses to libraries that have no such class: a full disk, say.
    """
    path = check_out(out, overwrite)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path)
        around = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".building", dir=path.parent))
        lock = FileLock(around / _BUSY)
        lock.acquire()
        fresh = around / path.name
        fresh.mkdir()
    except OSError as error:
        raise InputError(f"output folder {out} cannot be made: {error}") from error
    try:
        with refusals(path):
            yield fresh
        _move(fresh, path, overwrite)
    finally:
        shutil.rmtree(around, ignore_errors=True)
        lock.release()


@contextmanager
def refusals(path: Path) -> Iterator[None]:
    """What the system refused while something was written to ``path`` is an OSError that names it: Python leaves the
    name out, and libraries in Rust (safetensors, tokenizers) tell it in words only."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
    except Exception as error:
        found = _REFUSED.search(str(error))
        if found is None:
            raise
        number = int(found[1])
        raise OSError(number, os.strerror(number), str(path)) from error


def _sweep(path: Path) -> None:
    """Remove what killed runs had built of ``path``."""
    for busy in sorted(path.parent.glob(f".{escape(path.name)}.*.building/{_BUSY}")):
        try:
            with FileLock(busy, timeout=0):
                shutil.rmtree(busy.parent, ignore_errors=True)
        except Timeout:
            continue


def _move(fresh: Path, path: Path, overwrite: bool) -> None:
    if not path.exists():
        fresh.rename(path)
        return
    check_out(path, overwrite)  # it may have appeared while we were building
    old = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent))
    with FileLock(old / _BUSY):
        path.rename(old / path.name)
        try:
            fresh.rename(path)
        except OSError:
            (old / path.name).rename(path)
            raise
        finally:
            shutil.rmtree(old)


def put_back(path: Path) -> None:
    """Where a run was killed while it replaced ``path``, so that nothing is there: the old folder is moved back.
    Does nothing otherwise, nor while a run is at it."""
    if os.path.lexists(path):
        return
    for old in sorted(path.parent.glob(f".{escape(path.name)}.*.old")):
        try:
            with FileLock(old / _BUSY, timeout=0):
                if (old / path.name).is_dir() and not os.path.lexists(path):
                    (old / path.name).rename(path)
                    shutil.rmtree(old)
        except Timeout:
            continue
