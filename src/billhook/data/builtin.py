"""English prose that every CPython ships: no network, no files of our own."""

from __future__ import annotations

import ast
import inspect
import re
import sysconfig
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

from billhook.data.text import Text
from billhook.plan.errors import InputError

_CODE = re.compile(r"::=|>>>|\.\.\. |^[+|=-]{3}|^ {6}", re.MULTILINE)
_ENOUGH = 600_000  # characters of docstrings


@cache
def builtin() -> Text:
    """The language reference that ``help()`` prints (``pydoc_data.topics``), prose only, every paragraph once: the
    topics quote each other. About 50,000 tokens; the exact text differs between versions of Python."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise InputError(
            "the builtin text is missing from this Python (module pydoc_data); give a text file"
        ) from error
    return Text("builtin", tuple(_prose(topics[key] for key in sorted(topics))))


@cache
def docstrings() -> Text:
    """Docstrings of the Python standard library, read from its source files (nothing is imported), prose only."""
    library = Path(sysconfig.get_path("stdlib"))
    text = Text("docstrings of the standard library", tuple(_prose(_docstrings(library))))
    if not text.parts:
        raise InputError(f"the second text to evaluate on is missing: no Python sources in {library}")
    return text


def _docstrings(library: Path) -> Iterator[str]:
    found = 0
    for path in sorted(library.glob("*.py")):
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, SyntaxError):
            continue  # a file that is no plain module has no docstrings to offer
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = ast.get_docstring(node, clean=False)
                if text:
                    found += len(text)
                    yield inspect.cleandoc(text)
        if found > _ENOUGH:
            return


def _prose(texts: Iterable[str]) -> Iterator[str]:
    """Paragraphs of running text, unwrapped, each once; code, grammars, tables and headings are dropped."""
    seen = set()
    for text in texts:
        for raw in re.split(r"\n[ \t]*\n", text):
            paragraph = " ".join(raw.split()).removeprefix("* ")
            if len(paragraph) < 80 or _CODE.search(raw) or paragraph in seen:
                continue
            if sum(c.isalpha() or c == " " for c in paragraph) < 0.88 * len(paragraph):
                continue
            seen.add(paragraph)
            yield paragraph + "\n\n"
