"""The same text twice teaches nothing twice: exact and near duplicates, the first of each kept."""

from __future__ import annotations

import re
import zlib
from collections import defaultdict
from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

from billhook.data.text import Text

NGRAM = 5  # words in a row
THRESHOLD = 0.8  # of the n-grams of two texts together, the share that both have
_BANDS, _ROWS = 32, 4  # 128 hashes; two texts at the threshold meet in a band with probability 1 - 5e-8
_WORD = re.compile(r"\w+")

Ngrams = NDArray[np.uint64]


def without_duplicates(text: Text) -> tuple[Text, int]:
    """The text without parts (lines or documents) that stand in it already, and how many those were.

    A part counts as its words, in lower case, without punctuation. Parts of fewer than five words (headings, blank
    lines) are form rather than content and stay.
    """
    words = [np.array([_hashed(word) for word in _WORD.findall(part.lower())], np.uint64) for part in text.parts]
    kept = distinct(words)
    return Text(text.name, tuple(text.parts[i] for i in kept)), len(text.parts) - len(kept)


def distinct(texts: Sequence[NDArray[np.integer]]) -> list[int]:
    """The numbers of the texts (words or tokens as whole numbers) that are no duplicate of one kept before them.

    Two texts are duplicates if they are equal, or if the Jaccard similarity |A and B| / |A or B| of their sets of
    5-grams is 0.8 or more. MinHash with 128 hashes in 32 bands proposes pairs, whose similarity is then taken exactly;
    the hashes follow from no chance, so the same texts give the same result everywhere. Texts shorter than an n-gram
    are kept. Cost: 128 hashes for each n-gram; memory 8 bytes a word, and 128 x 8 bytes a text.

    Source: SlimPajama-DC (arXiv 2309.10818), section 2.2: MinHash over lower-cased n-grams without punctuation, 0.8,
    across all sources. It takes 13-grams of whole web pages; five words, because parts may be single paragraphs.
    """
    kept: list[int] = []
    grams: dict[int, Ngrams] = {}
    seen: list[dict[bytes, list[int]]] = [defaultdict(list) for _ in range(_BANDS)]
    for number, text in enumerate(texts):
        mine = _ngrams(np.asarray(text).astype(np.uint64))
        if not len(mine):
            kept.append(number)
            continue
        bands = [band.tobytes() for band in _minhash(mine).reshape(_BANDS, _ROWS)]
        rivals = {other for table, band in zip(seen, bands, strict=True) for other in table.get(band, ())}
        if any(_jaccard(mine, grams[other]) >= THRESHOLD for other in rivals):
            continue
        kept.append(number)
        grams[number] = mine
        for table, band in zip(seen, bands, strict=True):
            table[band].append(number)
    return kept


@cache
def _hashed(word: str) -> int:
    return zlib.crc32(word.encode())


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A fixed random-looking permutation of the 64-bit numbers (the finaliser of splitmix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _ngrams(words: NDArray[np.uint64]) -> Ngrams:
    """A hash of each n-gram, sorted, each once."""
    count = len(words) - NGRAM + 1
    if count < 1:
        return np.empty(0, np.uint64)
    total = np.zeros(count, np.uint64)
    for i in range(NGRAM):
        total = _mixed(total + words[i : i + count] + np.uint64(0x9E3779B97F4A7C15))
    return np.unique(total)


_SALTS = _mixed(np.arange(1, _BANDS * _ROWS + 1, dtype=np.uint64))


def _minhash(grams: Ngrams) -> NDArray[np.uint64]:
    smallest = np.full(len(_SALTS), np.iinfo(np.uint64).max)
    for piece in np.array_split(grams, len(grams) // 4096 + 1):
        smallest = np.minimum(smallest, _mixed(piece[None] ^ _SALTS[:, None]).min(axis=1))
    return smallest


def _jaccard(one: Ngrams, other: Ngrams) -> float:
    shared = len(np.intersect1d(one, other, assume_unique=True))
    return shared / (len(one) + len(other) - shared)
