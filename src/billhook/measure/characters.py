"""Questions whose answer is one random character of a given set: how much of a model's answer is valid, how diverse."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from string import ascii_lowercase, ascii_uppercase, digits
from typing import Any

import torch
from torch import Tensor

from billhook.plan.errors import InputError


@dataclass(frozen=True)
class Question:
    """A request for one character at random, and the ``characters`` that are valid answers."""

    text: str
    characters: str


_ONLY = "Answer with that one character and nothing else."
QUESTIONS = (
    Question(f"Choose a random lowercase letter from a to z. {_ONLY}", ascii_lowercase),
    Question(f"Choose a random uppercase letter from A to Z. {_ONLY}", ascii_uppercase),
    Question(f"Choose a random digit from 0 to 9. {_ONLY}", digits),
    Question(f"Choose a random lowercase vowel. {_ONLY}", "aeiou"),
    Question(f"Choose a random lowercase letter from p to z. {_ONLY}", "pqrstuvwxyz"),
    Question(f"Choose a random digit from 1 to 6, as a die would. {_ONLY}", "123456"),
)


@dataclass(frozen=True)
class Answered:
    """``validity``: the probability of a valid answer; ``diversity``: the entropy of the answer given that it is valid,
    1 where all valid ones are alike likely and 0 where there is but one. Both are means over the questions."""

    validity: float
    diversity: float


def spellings(tokenizer: Any, vocabulary: int, questions: Sequence[Question] = QUESTIONS) -> list[Tensor]:
    """For each question and token of the vocabulary, which valid character the token spells, white space around it
    aside: [vocabulary] numbers of characters, -1 for none.

    InputError where the tokens of a tokenizer spell fewer than two of the characters.
    """
    known = min(len(tokenizer), vocabulary)
    written = [text.strip() for text in tokenizer.batch_decode([[token] for token in range(known)])]
    found = []
    for question in questions:
        numbers = {character: number for number, character in enumerate(question.characters)}
        spelt = torch.full((vocabulary,), -1)
        spelt[:known] = torch.tensor([numbers.get(text, -1) for text in written])
        if len(set(spelt.tolist())) < 3:
            raise InputError(f"the tokenizer has no tokens for single characters such as {question.characters[:3]}")
        found.append(spelt)
    return found


def answered(logits: Tensor, spelt: Sequence[Tensor]) -> Answered:
    """How a model answers, from its next-token logits [questions, vocabulary] at the end of each question.

    Exact, where sampling answers would estimate the same: the first token decides.
    """
    validity, diversity = 0.0, 0.0
    for row, numbers in zip(logits.double().softmax(-1), spelt, strict=True):
        valid = numbers >= 0
        shares = torch.zeros(int(numbers.max()) + 1, dtype=torch.float64, device=row.device)
        shares.index_add_(0, numbers[valid].to(row.device), row[valid.to(row.device)])
        of_valid = shares / shares.sum().clamp(min=torch.finfo(torch.float64).tiny)
        reachable = len(set(numbers[valid].tolist()))
        validity += float(shares.sum())
        diversity += float(torch.special.entr(of_valid).sum()) / math.log(reachable)
    return Answered(validity / len(spelt), diversity / len(spelt))
