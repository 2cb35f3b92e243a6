"""What a user may name as a text: a file, a folder, a hub data set, or ``builtin``."""

from __future__ import annotations

import os
import re
from pathlib import Path

from billhook.data.builtin import builtin
from billhook.data.files import KINDS, SUFFIXES, document, read_file, read_folder
from billhook.data.text import Text
from billhook.plan.errors import InputError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(:[\w.-]+)?")
_HUB_LIMIT = 4 * 2**20  # characters streamed of a hub data set
_USAGE = f"a text is a file ({KINDS}), a folder of them, a hub data set, builtin, self or self:TEXT"


def read(source: str | os.PathLike[str] | Text) -> Text:
    """The text that ``source`` names; InputError saying what is wrong with it."""
    if isinstance(source, Text):
        return source
    name = os.fspath(source)
    if name == "builtin":
        return builtin()
    if not name:
        raise InputError(f"text '' does not exist; {_USAGE}")
    path = Path(name).expanduser()
    if path.is_dir():
        return read_folder(path)
    if path.is_file():
        return read_file(path)
    if name.lower().endswith(SUFFIXES) or not _HUB_ID.fullmatch(name):
        raise InputError(f"text {name} does not exist; {_USAGE}")
    return _hub(name)


def _hub(name: str) -> Text:
    """The train split of a hub data set (``OWNER/NAME``, or ``OWNER/NAME:CONFIG``), its first 4 million characters."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise InputError(
            f"text {name} is no file or folder; to read hub data sets install the extra: pip install 'billhook[hub]'"
        ) from error
    repository, _, config = name.partition(":")
    documents: list[str] = []
    size = 0
    try:
        for number, row in enumerate(load_dataset(repository, config or None, split="train", streaming=True), 1):
            documents.append(document(row, f"hub data set {name} row {number}") + "\n\n")
            size += len(documents[-1])
            if size > _HUB_LIMIT:
                break
    except InputError:
        raise
    except Exception as error:  # whatever the library, the network or the data set throws
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise InputError(f"text {name} is no file or folder, and not readable as a hub data set: {reason}") from error
    return Text(name, tuple(documents))
