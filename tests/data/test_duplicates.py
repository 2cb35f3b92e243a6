"""Duplicates: found though they differ a little, the first kept, nothing else lost."""

from __future__ import annotations

import random

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from billhook.data import Text
from billhook.data.builtin import builtin
from billhook.data.duplicates import NGRAM, THRESHOLD, distinct, without_duplicates


def jaccard(one: list[int], other: list[int]) -> float:
    a, b = ({tuple(text[i : i + NGRAM]) for i in range(len(text) - NGRAM + 1)} for text in (one, other))
    return len(a & b) / len(a | b) if a | b else 0.0


@settings(max_examples=25)
@given(st.lists(st.integers(0, 5), max_size=12), st.integers(0, 10**6))
def test_of_copies_the_first_is_kept(order: list[int], seed: int) -> None:
    chance = random.Random(seed)
    sources = [[chance.randrange(1000) for _ in range(40)] for _ in range(6)]
    kept = distinct([np.array(sources[i]) for i in order])
    assert kept == sorted(order.index(i) for i in set(order))


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.integers(0, 12))
def test_near_copies_go_by_their_jaccard_similarity(seed: int, changes: int) -> None:
    chance = random.Random(seed)
    text = [chance.randrange(10**6) for _ in range(120)]
    other = list(text)
    for place in chance.sample(range(120), changes):
        other[place] = 10**6 + chance.randrange(10**6)
    assert distinct([np.array(text), np.array(other)]) == ([0] if jaccard(text, other) >= THRESHOLD else [0, 1])


def test_case_and_punctuation_do_not_make_a_difference_but_headings_stay() -> None:
    cat, again, dog = "The cat sat on the mat, and slept.\n", "the CAT sat on the mat and slept\n", "The dog did.\n"
    parts = ("= Life =\n", cat, "\n", "= Life =\n", again, dog, "\n")
    text, gone = without_duplicates(Text("t", parts))
    assert text.parts == (*parts[:4], *parts[5:]) and gone == 1 and text.name == "t"


def test_text_without_duplicates_is_left_as_it_is() -> None:
    text = Text("prose", builtin().parts[:200])
    again, gone = without_duplicates(Text("twice", text.parts + text.parts))
    assert (again.parts, gone) == (without_duplicates(text)[0].parts, 400 - len(again.parts))
    assert len(again.parts) > 190
