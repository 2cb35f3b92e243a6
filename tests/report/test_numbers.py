import pytest
from hypothesis import given
from hypothesis import strategies as st

from billhook.plan.record import Interval
from billhook.report.numbers import bare, duration, number, percent, points, quantity, ranges


@pytest.mark.parametrize(
    ("value", "text"),
    [(22.81, "22.8"), (1234.5, "1,230"), (0.0312345, "0.0312"), (0, "0"), (1e-12, "1.00e-12"), (-2.345, "-2.35")],
)
def test_number(value: float, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (106_203_456, "parameters", "106 M parameters"),
        (269.1e6, "bytes", "269 MB"),
        (23040, "bytes per token", "23.0 kB per token"),
        (3.12e11, "FLOPs", "312 GFLOPs"),
        (25, "blocks", "25 blocks"),
        (0, "bytes", "0 B"),
    ],
)
def test_quantity(value: float, unit: str, text: str) -> None:
    assert quantity(value, unit) == text


def test_a_row_named_parameters_does_not_say_so_again() -> None:
    assert bare(106_203_456, "parameters") == "106 M"
    assert bare(25, "blocks") == "25"
    assert bare(269.1e6, "bytes") == "269 MB"


def test_percent_and_duration() -> None:
    assert [percent(x) for x in (0.8, 0.00123, 0, 1)] == ["80.0%", "0.12%", "0.0%", "100.0%"]
    assert [duration(x) for x in (0.42, 37, 245, 7800)] == ["0.42 s", "37 s", "4 min 05 s", "2 h 10 min"]


@given(st.sets(st.integers(0, 40)))
def test_ranges_name_each_number_once(numbers: set[int]) -> None:
    named: list[int] = []
    for part in filter(None, ranges(numbers).split(", ")):
        first, _, last = part.partition("–")
        named += range(int(first), int(last or first) + 1)
    assert named == sorted(numbers)


@given(st.floats(1e-6, 1e9))
def test_number_keeps_three_digits(value: float) -> None:
    assert float(number(value).replace(",", "")) == pytest.approx(value, rel=0.006)


@pytest.mark.parametrize(
    ("value", "half", "text"),
    [(-0.708, 0.196, "−71 (−90 to −51)"), (0.0, 0.0, "0 (0 to 0)"), (0.1, 0.104, "+10 (0 to +20)")],
)
def test_points(value: float, half: float, text: str) -> None:
    assert points(Interval(value=value, low=value - half, high=value + half)) == text
