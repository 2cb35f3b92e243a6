"""Which windows a model is calibrated on, and which it is judged on."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

from billhook.data.builtin import builtin, docstrings
from billhook.data.exercises import SUFFIX, with_exercises
from billhook.data.overlap import check_overlap
from billhook.data.source import read
from billhook.data.text import Text
from billhook.data.windows import Windows, first, spread
from billhook.data.written import written
from billhook.plan.errors import InputError

Source = str | os.PathLike[str] | Text
Progress = Callable[[str, int, int], None]
Domain = Literal["calibration", "other"]
_PROMPTED = "self:"
_HELD_BACK_SEED = 2**31  # text written for evaluation never shares a seed with text written for calibration


def calibration(
    source: Source,
    tokenizer: Any,
    *,
    tokens: int,
    length: int,
    seed: int = 0,
    model: Any = None,
    fewest: int | None = None,
    progress: Progress | None = None,
) -> Windows:
    """``tokens // length`` windows from the first 80% of a text, spread evenly and in order; fewer where the text is
    short and ``fewest`` tokens suffice.

    ``source``: a ``.txt``, ``.txt.gz``, ``.jsonl`` or ``.jsonl.gz`` file, a folder of them, a hub data set,
    ``builtin``, ``self`` (text that ``model`` samples; takes ``length`` decode steps), ``self:`` and one of the others
    (the same, going on from pieces of that text), any of these with ``+exercises`` behind it (see ``with_exercises``),
    or a ``Text``. The text is tokenised in one go with nothing between its lines; every window begins with BOS exactly
    where the tokenizer puts one by itself. The same source, tokenizer and seed give the same windows. InputError where
    the text is missing, unreadable or too short.
    """
    plain = plain_source(source)
    if is_written(plain):
        found = _written(plain, model, tokenizer, tokens, length, seed, progress)
    else:
        found = spread(read(plain).split()[0], tokenizer, tokens=tokens, length=length, seed=seed, fewest=fewest)
    return with_exercises(found, tokenizer, seed) if is_exercised(source) else found


def evaluation(
    source: Source,
    tokenizer: Any,
    *,
    tokens: int,
    length: int,
    calibrated_on: Sequence[Windows] = (),
    read_before: Iterable[str] = (),
    model: Any = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[tuple[Domain, Windows]]:
    """Windows to judge on that no calibration from ``source`` can contain: its last 20% (of ``self:`` and a text, that
    text's), and a text of another kind
    (``builtin``, or docstrings of the standard library where that is the source or a source ``read_before``).

    InputError if a text of ``calibrated_on`` holds more than 5% of their runs of tokens.
    """
    source = plain_source(source)
    if source == "self":
        held_back = _written(source, model, tokenizer, tokens, length, _HELD_BACK_SEED + seed, progress)
        name = "self"
    else:
        text = _prompts(source) or read(source)
        held_back = spread(text.split()[1], tokenizer, tokens=tokens, length=length)
        name = text.name
    # what the model went on from stands in what it wrote
    read_too = (known.removesuffix(SUFFIX).removeprefix(_PROMPTED) for known in read_before)
    other = docstrings() if builtin().name in (name, *read_too) else builtin()
    found: list[tuple[Domain, Windows]] = [
        ("calibration", held_back),
        ("other", spread(other, tokenizer, tokens=tokens, length=length)),
    ]
    for seen in calibrated_on:
        for _, windows_ in found:
            check_overlap(windows_, seen)
    return found


def windows(source: Source, tokenizer: Any, *, tokens: int, length: int, skip: int = 0) -> Windows:
    """The first ``tokens // length`` windows of a whole text, in a row, after ``skip`` windows: for an evaluation text
    of one's own, taken by the usual protocol (WikiText-2: windows of 1,024 or 2,048 that do not overlap)."""
    return first(read(source), tokenizer, tokens=tokens, length=length, skip=skip)


def is_exercised(source: Source) -> bool:
    """Whether exercises are to stand among the text."""
    return isinstance(source, str) and source.endswith(SUFFIX)


def plain_source(source: Source) -> Source:
    """The source without exercises."""
    return source.removesuffix(SUFFIX) if isinstance(source, str) else source


def is_written(source: Source) -> bool:
    """Whether the model itself is to write the text: ``self``, or ``self:`` and what it goes on from."""
    source = plain_source(source)
    return isinstance(source, str) and (source == "self" or source.startswith(_PROMPTED))


def _prompts(source: Source) -> Text | None:
    """What the model goes on from, if it is to."""
    return read(source.removeprefix(_PROMPTED)) if isinstance(source, str) and source.startswith(_PROMPTED) else None


def _written(
    source: Source, model: Any, tokenizer: Any, tokens: int, length: int, seed: int, progress: Progress | None
) -> Windows:
    if model is None:
        raise InputError("calibration source self needs the model that is to write the text")
    text = _prompts(source)
    prompts = None if text is None else text.split()[0]
    name = os.fspath(source) if not isinstance(source, Text) else source.name
    return written(
        model, tokenizer, tokens=tokens, length=length, seed=seed, prompts=prompts, name=name, progress=progress
    )
