"""The regression: exact where it can be, never worse where it cannot."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from billhook.heal.refit.ridge import PENALTIES, Moments, solve


def drawn(seed: int, tokens: int, inputs: int, outputs: int, noise: float) -> tuple[Moments, Moments, torch.Tensor]:
    """Moments of two halves of the same problem, and the true change."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randn(inputs, outputs, generator=generator)
    fit, held = Moments(), Moments()
    for moments in (fit, held):
        h = torch.randn(tokens, inputs, generator=generator)
        w = torch.rand(tokens, generator=generator) + 0.1
        moments.add(h, h @ truth + noise * torch.randn(tokens, outputs, generator=generator), w)
    return fit, held, truth


def test_a_linear_truth_is_found() -> None:
    fit, held, truth = drawn(0, 50, 6, 4, noise=0.0)
    solution = solve(fit, held)
    assert solution is not None
    torch.testing.assert_close(solution.change, truth, atol=1e-4, rtol=1e-4)
    assert solution.penalty < 1e-3


def test_the_solution_is_that_of_the_normal_equations() -> None:
    fit, held, _ = drawn(1, 40, 5, 3, noise=1.0)
    solution = solve(fit, held)
    assert solution is not None
    system = fit.inputs.double() + solution.penalty * fit.inputs.diagonal().mean() * torch.eye(5)
    torch.testing.assert_close(system @ solution.change.double(), fit.cross.double(), atol=1e-3, rtol=1e-4)


@given(st.integers(0, 10_000), st.integers(2, 30), st.integers(1, 12), st.sampled_from([0.0, 0.3, 3.0, 30.0]))
def test_the_held_back_error_never_rises(seed: int, tokens: int, inputs: int, noise: float) -> None:
    fit, held, _ = drawn(seed, tokens, inputs, 3, noise)
    solution = solve(fit, held)
    if solution is not None:
        assert solution.error < held.energy
        assert solution.penalty in PENALTIES
        assert abs(held.error(solution.change) - solution.error) < 1e-6 * held.energy


@pytest.mark.parametrize("noise", [0.3, 3.0, 10.0, 30.0])
def test_where_the_search_begins_does_not_matter(noise: float) -> None:
    """With text enough that the held-back error has one valley."""
    fit, held, _ = drawn(4, 300, 8, 3, noise)
    found = [solve(fit, held, near) for near in PENALTIES]
    assert found[0] is not None
    assert {s and s.penalty for s in found} == {found[0].penalty}


def test_noise_is_refused() -> None:
    """Opposite on the held-back half: every change makes it worse."""
    fit, held, _ = drawn(2, 50, 6, 4, noise=0.0)
    held.cross = -held.cross
    assert solve(fit, held) is None


def test_the_error_is_that_of_the_tokens() -> None:
    generator = torch.Generator().manual_seed(3)
    h, r, change = (torch.randn(*shape, generator=generator) for shape in ((20, 4), (20, 3), (4, 3)))
    w = torch.rand(20, generator=generator)
    moments = Moments()
    for part in (slice(0, 7), slice(7, 20)):
        moments.add(h[part], r[part], w[part])
    expected = (w[:, None] * (r - h @ change).square()).sum().item()
    assert abs(moments.error(change) - expected) < 1e-4 * expected


def test_tokens_count_by_their_weight() -> None:
    """A token of weight 0 says nothing, whatever it is."""
    fit, held, truth = drawn(4, 50, 6, 4, noise=0.0)
    fit.add(torch.full((1, 6), 1e3), torch.full((1, 4), -1e3), torch.zeros(1))
    solution = solve(fit, held)
    assert solution is not None
    torch.testing.assert_close(solution.change, truth, atol=1e-3, rtol=1e-3)


def test_nothing_to_see() -> None:
    fit = Moments()
    fit.add(torch.zeros(5, 3), torch.ones(5, 2), torch.ones(5))
    assert solve(fit, fit) is None
