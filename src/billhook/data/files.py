"""Text from files: ``.txt``, ``.jsonl``, both also gzipped, and folders of them."""

from __future__ import annotations

import gzip
import json
import zlib
from pathlib import Path

from billhook.data.text import LIMIT, Text
from billhook.plan.errors import InputError

SUFFIXES = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz")
KINDS = ", ".join(SUFFIXES)


def read_file(path: Path) -> Text:
    """One file, its first 16 million characters. A ``.txt`` is taken as it is, byte for byte, its parts are its lines;
    the parts of a ``.jsonl`` are its documents."""
    if not path.name.lower().endswith(SUFFIXES):
        raise InputError(f"text file {path} is not of a kind that can be read ({KINDS})")
    content = _content(path)
    if not content.strip():
        raise InputError(f"text file {path} is empty")
    if ".jsonl" in path.name.lower():
        return Text(path.name, tuple(_documents(path, content)))
    return Text(path.name, tuple(content.splitlines(keepends=True)))


def read_folder(path: Path) -> Text:
    """All text files of a folder in order of name, each a run of parts."""
    files = sorted(file for file in path.iterdir() if file.is_file() and file.name.lower().endswith(SUFFIXES))
    if not files:
        raise InputError(f"folder {path} holds no text files ({KINDS})")
    parts: list[str] = []
    for file in files:
        parts += read_file(file).parts
        if not parts[-1].endswith("\n"):
            parts.append("\n")
        if sum(map(len, parts)) > LIMIT:
            break
    return Text(path.resolve().name, tuple(parts))


def _content(path: Path) -> str:
    opener = gzip.open if path.suffix.lower() == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8", newline="") as file:
            content = str(file.read(LIMIT))
    except UnicodeDecodeError as error:
        raise InputError(f"text file {path} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"text file {path} is not a whole gzip file: {error}") from error
    except OSError as error:
        raise InputError(f"text file {path} cannot be read: {error.strerror or error}") from error
    if "\0" in content:
        raise InputError(f"text file {path} is binary: it holds zero bytes")
    return content if len(content) < LIMIT else content[: content.rfind("\n") + 1] or content


def _documents(path: Path, content: str) -> list[str]:
    documents = []
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{path} line {number} is not JSON: {error}") from error
        documents.append(document(row, f"{path} line {number}") + "\n\n")
    return documents


def document(row: object, place: str) -> str:
    """The field ``text`` of a row; without one all its fields that are strings, a line each."""
    if not isinstance(row, dict):
        raise InputError(f"{place} is not a JSON object with a field text")
    if isinstance(row.get("text"), str):
        return str(row["text"])
    strings = [value for value in row.values() if isinstance(value, str) and value]
    if not strings:
        raise InputError(f"{place} has neither a field text nor any other field that is a string")
    return "\n".join(strings)
