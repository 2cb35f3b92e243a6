"""Every answer is worked out again, in another way than the one that made it."""

from __future__ import annotations

import re
import subprocess
import sys
from itertools import pairwise

import pytest

from billhook.data.questions import ITEMS, PROBES, SHOTS, questions

ASKED = questions()


def adds_up(line: str) -> bool:
    a, sign, b, _, c = re.fullmatch(r"(\d+) ([+*]) (\d+) (=) (\d+)", line).groups()
    return int(c) == (sum([int(a), int(b)]) if sign == "+" else sum([int(a)] * int(b)))


def balanced(line: str) -> bool:
    signs = line.replace(" ", "")
    assert set(signs) <= set("()[]{}") and signs
    while (shorter := re.sub(r"\(\)|\[\]|\{\}", "", signs)) != signs:
        signs = shorter
    return not signs


def copied(line: str) -> bool:
    before, after = line.split(" | ")
    return before == after and len(set(before.split())) == 4


def consecutive(line: str) -> bool:
    numbers = [int(n) for n in line.split()]
    return [b - a for a, b in pairwise(numbers)] == [1] * 4


def recalled(line: str) -> bool:
    listed, asked = line.split(". ")
    return listed.split(", ").count(asked) == 1


CHECKS = {
    "addition, 1 digit": adds_up,
    "addition, 2 digits": adds_up,
    "multiplication, 1 digit": adds_up,
    "multiplication, 2 digits": adds_up,
    "closing brackets": balanced,
    "copying words": copied,
    "counting on": consecutive,
    "recall by key": recalled,
}


@pytest.mark.parametrize("name", PROBES)
def test_examples_and_answers_are_right(name: str) -> None:
    for item in ASKED[name]:
        lines = (item.prompt + item.answer).splitlines()
        assert len(lines) == SHOTS + 1
        assert all(CHECKS[name](line) for line in lines), lines


@pytest.mark.parametrize("name", PROBES)
def test_a_wrong_answer_would_be_seen(name: str) -> None:
    """The checks above can fail: no answer fits another question, but for those that share it."""
    for one, other in pairwise(ASKED[name]):
        line = one.prompt.splitlines()[-1] + other.answer.rstrip()
        assert CHECKS[name](line) == (one.answer == other.answer), line


@pytest.mark.parametrize("name", PROBES)
def test_questions_differ_and_none_is_among_its_examples(name: str) -> None:
    asked = [item.prompt.splitlines() for item in ASKED[name]]
    assert len({lines[-1] for lines in asked}) == len(asked) == ITEMS
    assert all(len(set(lines)) == SHOTS + 1 for lines in asked)
    assert not any((item.prompt.splitlines()[-1] + item.answer) in item.prompt for item in ASKED[name])


@pytest.mark.parametrize("name", PROBES)
def test_an_answer_ends_its_line(name: str) -> None:
    assert all(re.fullmatch(r"( \S+)+\n", item.answer) for item in ASKED[name])
    assert not any(item.prompt.endswith(" ") for item in ASKED[name])


def test_digits_are_those_of_the_name() -> None:
    for digits in (1, 2):
        unit = "digit" if digits == 1 else "digits"
        for kind in ("addition", "multiplication"):
            firsts = [re.match(r"\d+", i.prompt.splitlines()[-1])[0] for i in ASKED[f"{kind}, {digits} {unit}"]]
            assert {len(first) for first in firsts} == {digits}


def test_the_last_opening_bracket_is_no_clue_to_all_that_must_close() -> None:
    assert all(len(item.answer.split()) >= 2 for item in ASKED["closing brackets"])


def test_a_seed_repeats_in_another_process_and_another_seed_differs() -> None:
    code = "from billhook.data.questions import questions; print(questions())"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.strip() == str(ASKED)
    assert all(questions(1)[name] != ASKED[name] for name in PROBES)


def test_fewer_questions_are_the_first_ones_of_more() -> None:
    assert questions(items=5) == {name: asked[:5] for name, asked in ASKED.items()}
