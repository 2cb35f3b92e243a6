"""Questions with exact answers, drawn by code: what a model can do, not how likely it finds a text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from random import Random

Draw = Callable[[Random], tuple[str, str]]  # a question and its answer, which begins with a space

ITEMS = 24
SHOTS = 4

WORDS = (
    "apple", "bird", "boat", "book", "bread", "chair", "cloud", "door", "fish", "garden", "glass", "gold", "horse",
    "house", "island", "king", "lake", "lamp", "leaf", "milk", "moon", "mountain", "paper", "rain", "ring", "river",
    "road", "salt", "school", "ship", "snow", "stone", "sugar", "table", "tree", "water", "window", "wind", "wood",
    "wool",
)  # fmt: skip
CLOSING = {"(": ")", "[": "]", "{": "}"}


@dataclass(frozen=True)
class Item:
    """``prompt`` holds the examples and the question. ``answer`` ends with the end of its line, so that 12 is no
    answer where 1 is right."""

    prompt: str
    answer: str

    @property
    def lines(self) -> list[str]:
        """The examples and the question, each with its answer."""
        return (self.prompt + self.answer).splitlines()


def addition(draw: Random, digits: int) -> tuple[str, str]:
    """``17 + 25 = 42``, both numbers of so many digits."""
    a, b = (_number(draw, digits) for _ in range(2))
    return f"{a} + {b} =", f" {a + b}"


def multiplication(draw: Random, digits: int) -> tuple[str, str]:
    """``17 * 5 = 85``, the first number of so many digits, the second of one."""
    a, b = _number(draw, digits), draw.randrange(2, 10)
    return f"{a} * {b} =", f" {a * b}"


def brackets(draw: Random) -> tuple[str, str]:
    """``( [ ] { } )``: three or four pairs, one of them around the others; the answer is all that closes at the end."""
    outer, inner = draw.choice("([{"), draw.randrange(2, 4)
    line, still_open = [outer], [outer]
    while inner or len(still_open) > 1:
        if inner and (len(still_open) == 1 or draw.random() < 0.5):
            still_open.append(draw.choice("([{"))
            line.append(still_open[-1])
            inner -= 1
        else:
            line.append(CLOSING[still_open.pop()])
    line.append(CLOSING[outer])
    last = max(i for i, sign in enumerate(line) if sign in CLOSING) + 1
    return " ".join(line[:last]), "".join(f" {sign}" for sign in line[last:])


def copying(draw: Random) -> tuple[str, str]:
    """``river lamp door salt | river lamp door salt``"""
    words = " ".join(draw.sample(WORDS, 4))
    return f"{words} |", f" {words}"


def counting_on(draw: Random) -> tuple[str, str]:
    """``17 18 19 20 21``"""
    first = draw.randrange(1, 96)
    return " ".join(str(first + n) for n in range(4)), f" {first + 4}"


def recall(draw: Random) -> tuple[str, str]:
    """``river: 4, lamp: 7, door: 2. lamp: 7``"""
    keys, values = draw.sample(WORDS, 3), draw.sample(range(1, 10), 3)
    chosen = draw.randrange(3)
    pairs = ", ".join(f"{key}: {value}" for key, value in zip(keys, values, strict=True))
    return f"{pairs}. {keys[chosen]}:", f" {values[chosen]}"


PROBES: dict[str, Draw] = {
    "addition, 1 digit": partial(addition, digits=1),
    "addition, 2 digits": partial(addition, digits=2),
    "multiplication, 1 digit": partial(multiplication, digits=1),
    "multiplication, 2 digits": partial(multiplication, digits=2),
    "closing brackets": brackets,
    "copying words": copying,
    "counting on": counting_on,
    "recall by key": recall,
}


def questions(seed: int = 0, items: int = ITEMS) -> dict[str, tuple[Item, ...]]:
    """For each probe ``items`` different questions, all after the same SHOTS others with their answers, one a line.

    The same seed gives the same items on every machine; fewer are the first ones of more.
    """
    return {name: _items(name, draw, seed, items) for name, draw in PROBES.items()}


def _items(name: str, draw: Draw, seed: int, items: int) -> tuple[Item, ...]:
    source = Random(f"{name} {seed}")
    shots: dict[str, str] = {}
    while len(shots) < SHOTS:
        shots.update([draw(source)])
    examples = "".join(f"{asked}{said}\n" for asked, said in shots.items())
    found: dict[str, Item] = {}
    while len(found) < items:
        question, answer = draw(source)
        if question not in shots:
            found[question] = Item(examples + question, f"{answer}\n")
    return tuple(found.values())


def _number(draw: Random, digits: int) -> int:
    return draw.randrange(10 ** (digits - 1), 10**digits)
