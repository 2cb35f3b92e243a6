"""Which drafted tokens are accepted."""

from __future__ import annotations

import itertools

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from billhook.runtime.draft_verify import greedy, sampled

EVEN = (0.25, 0.25, 0.25, 0.25)


def one_hot(*choices: int) -> Tensor:
    return torch.eye(4)[list(choices)]


@pytest.mark.parametrize(
    ("drafted", "choices", "expected"),
    [
        ([], [2], [2]),
        ([1], [1, 3], [1, 3]),
        ([1], [0, 3], [0]),
        ([1, 2], [1, 2, 0], [1, 2, 0]),
        ([1, 2], [1, 3, 2], [1, 3]),
        ([1, 2], [3, 2, 0], [3]),  # right again behind a wrong one: not wanted any more
    ],
)
def test_greedy_keeps_what_the_full_model_says(drafted: list[int], choices: list[int], expected: list[int]) -> None:
    assert greedy(drafted, one_hot(*choices)) == expected


@pytest.mark.parametrize(
    ("p", "q"),
    [
        ((0.5, 0.3, 0.2, 0.0), (0.1, 0.2, 0.3, 0.4)),
        ((0.0, 0.0, 0.5, 0.5), (0.5, 0.5, 0.0, 0.0)),  # nothing the draft says can be accepted
        ((0.999, 0.001, 0.0, 0.0), (0.001, 0.0, 0.0, 0.999)),
        ((0.97, 0.01, 0.01, 0.01), (1.0, 0.0, 0.0, 0.0)),
        (EVEN, EVEN),
        ((0.1, 0.2, 0.3, 0.4), EVEN),
    ],
)
def test_sampled_tokens_are_distributed_as_the_full_model_s(p: tuple[float, ...], q: tuple[float, ...]) -> None:
    """Two tokens drafted from q, where p turns round after the first: the pairs, and what follows them, come from p."""
    torch.manual_seed(0)
    count = 6000
    first, draft = torch.tensor(p, dtype=torch.float64), torch.tensor(q, dtype=torch.float64)
    after = {token: first.roll(token) for token in range(4)}
    seen = dict.fromkeys(itertools.product(range(4), repeat=2), 0)
    for _ in range(count):
        drafted = torch.multinomial(draft, 2, replacement=True).tolist()
        rows = torch.stack([first, after[drafted[0]], after[drafted[1]]])
        tokens = sampled(drafted, [draft, draft], rows)
        while len(tokens) < 2:  # what is decoded next, one token at a time
            tokens += sampled([], [], after[tokens[-1]][None])
        seen[tokens[0], tokens[1]] += 1
    expected = {(a, b): count * float(first[a] * after[a][b]) for a, b in seen}
    assert not any(seen[pair] for pair, often in expected.items() if often == 0)
    pairs = [pair for pair, often in expected.items() if often > 0]
    assert chisquare([seen[x] for x in pairs], [expected[x] for x in pairs], sum_check=False).pvalue > 0.01


def test_equal_but_for_rounding() -> None:
    """A rejection that only rounding explains leaves nothing of p - q; the draw is from p all the same."""
    p, q = torch.tensor([0.5, 0.0]), torch.tensor([1.0, 0.0])
    torch.manual_seed(0)
    assert {tuple(sampled([0], [q], torch.stack([p, p]))) for _ in range(40)} == {(0,), (0, 0)}
