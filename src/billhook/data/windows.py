"""Text in, windows of tokens out."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from typing import Any

import torch

from billhook.data.text import LIMIT, Text
from billhook.plan.errors import InputError


@dataclass(frozen=True, eq=False)
class Windows:
    """Token windows of equal length, never padded: ``ids`` int64 [n, length]. ``fingerprint`` is a sha256 of them."""

    ids: torch.Tensor
    name: str
    fingerprint: str

    @classmethod
    def of(cls, ids: torch.Tensor, name: str) -> Windows:
        """Name and fingerprint a tensor of token ids [n, length]."""
        ids = ids.to("cpu", torch.int64).contiguous()
        digest = hashlib.sha256(f"{ids.shape[1]}\n".encode() + ids.numpy().astype("<i8").tobytes())
        return cls(ids, name, digest.hexdigest())

    @property
    def tokens(self) -> int:
        return self.ids.numel()

    def share(self, share: float) -> Windows:
        """Evenly spread windows, this share of all of them and at least one."""
        count = max(1, round(share * len(self.ids)))
        if count == len(self.ids):
            return self
        return Windows.of(self.ids[torch.arange(count) * len(self.ids) // count], f"{self.name}, {share:.0%}")


def first(text: Text, tokenizer: Any, *, tokens: int, length: int, skip: int = 0) -> Windows:
    """The first windows of a text in a row, after ``skip`` windows left out."""
    count = count_of(tokens, length)
    ids, prefix = _encode(text, tokenizer)
    _check_enough(text.name, ids, skip + count, length, prefix)
    return Windows.of(_cut(ids, range(skip, skip + count), length, prefix), text.name)


def spread(
    text: Text, tokenizer: Any, *, tokens: int, length: int, seed: int = 0, fewest: int | None = None
) -> Windows:
    """Windows taken evenly from the whole text, in its order; all that there are where ``fewest`` tokens suffice. Any
    seed but 0 shifts where they are taken."""
    ids, prefix = _encode(text, tokenizer)
    available = _check_enough(text.name, ids, count_of(tokens if fewest is None else fewest, length), length, prefix)
    count = min(count_of(tokens, length), available)
    shift = random.Random(seed).randrange(available) if seed else 0
    chosen = sorted((i * available // count + shift) % available for i in range(count))
    return Windows.of(_cut(ids, chosen, length, prefix), text.name)


def prefix_of(tokenizer: Any) -> list[int]:
    """The tokens that the tokenizer puts before a text by itself: one BOS, a [CLS], or nothing."""
    bare = tokenizer("a", add_special_tokens=False).input_ids
    full = tokenizer("a").input_ids
    place = next(i for i in range(len(full)) if full[i : i + len(bare)] == bare)
    return list(full[:place])


def check_tokenizer(tokenizer: Any, model_vocab: int) -> None:
    """InputError if the tokenizer knows a token whose id is beyond the model's ``model_vocab`` rows of embedding."""
    token, number = max(tokenizer.get_vocab().items(), key=lambda item: int(item[1]))
    if number >= model_vocab:
        raise InputError(
            f"the tokenizer does not fit the model: its token {token!r} is number {number}, "
            f"and the model embeds tokens 0 to {model_vocab - 1}"
        )


def _encode(text: Text, tokenizer: Any) -> tuple[list[int], list[int]]:
    """All tokens of the text, encoded in one go with none added; and the tokens that go before each window."""
    if tokenizer is None:
        raise InputError(f"text {text.name} cannot be used: the model has no tokenizer")
    if not text.content.strip():
        raise InputError(f"text {text.name} is empty")
    return tokenizer(text.content, add_special_tokens=False, verbose=False).input_ids, prefix_of(tokenizer)


def count_of(tokens: int, length: int) -> int:
    if length < 2 or tokens < length:
        raise InputError(
            f"{tokens} tokens in windows of {length} are impossible: take 2 or more a window, and one window"
        )
    return tokens // length


def _check_enough(name: str, ids: list[int], count: int, length: int, prefix: list[int]) -> int:
    """How many windows there are, if there are ``count``."""
    fresh = length - len(prefix)
    available = (len(ids) - len(prefix)) // fresh  # a window that brings its own prefix needs that many tokens more
    if not prefix:
        available = len(ids) // length
    if available < count:
        cut = f" (its first {LIMIT // 2**20} million characters are used)" if len(ids) > LIMIT // 16 else ""
        raise InputError(
            f"text {name} has {len(ids)} tokens{cut}, {count * length} are needed ({count} windows of {length}); "
            "give a longer text"
        )
    return available


def _cut(ids: list[int], numbers: Any, length: int, prefix: list[int]) -> torch.Tensor:
    fresh = length - len(prefix)
    rows = []
    for number in numbers:
        start = number * fresh
        own = bool(prefix) and ids[start : start + len(prefix)] == prefix  # the text spells it out here already
        rows.append(ids[start : start + length] if own else prefix + ids[start : start + fresh])
    return torch.tensor(rows, dtype=torch.int64)
