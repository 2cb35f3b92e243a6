from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from billhook.heal.combining.nystrom import leverage, pruned
from billhook.heal.refit.ridge import Moments


def drawn(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def moments(h: Tensor) -> Moments:
    found = Moments()
    found.add(torch.cat([h, torch.ones(len(h), 1)], 1), h.new_zeros(len(h), 0), torch.ones(len(h)))
    return found


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 7), st.integers(1, 6), st.integers(0, 99))
def test_leverage_is_the_share_of_each_direction_above_the_ridge(n: int, count: int, seed: int) -> None:
    count = min(count, n - 1)
    h, size = drawn((20, n), seed), drawn((n,), seed + 1).abs() + 0.1
    values, vectors = torch.linalg.eigh((size * h).double().T @ (size * h).double())
    ridge = values[: n - count].sum() / count
    expected = (vectors.square() * (values / (values + ridge))).sum(1)
    found = leverage(h.T @ h, size, count)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert found.min() >= 0 and found.max() <= 1 and found.sum() <= 2 * count + 1e-6


def test_scales_that_cancel_change_nothing() -> None:
    h, write, factors = drawn((40, 6), 0), drawn((6, 3), 1), torch.tensor([1.0, 100, 0.01, 5, 1, 30])
    one = pruned(moments(h), moments(h), write, None, 1, 3)
    other = pruned(moments(h * factors), moments(h * factors), write / factors[:, None], None, 1, 3)
    assert one.units.tolist() == other.units.tolist()


def test_of_two_that_say_the_same_one_goes_and_the_other_speaks_for_both() -> None:
    """Units of two channels; the third repeats the first, twice as loud, with a constant that the bias takes."""
    h, write, bias = drawn((60, 8), 0), drawn((8, 5), 1), drawn((5,), 2)
    h[:, 4:6] = 2 * h[:, 0:2] + 0.3
    found = pruned(moments(h), moments(h), write, bias, 2, 3)
    assert {1, 3} < set(found.units.tolist()) and len(found.units) == 3
    channels = (2 * found.units[:, None] + torch.arange(2)).reshape(-1)
    expected = h @ write + bias
    torch.testing.assert_close(h[:, channels] @ found.write + found.bias, expected, atol=1e-3, rtol=1e-3)
    assert found.before > 0.01 and found.after < 1e-5 and found.penalty is not None


def test_the_write_is_that_of_the_formula() -> None:
    """W_S + (C_SS + p)^-1 C_SR W_R, and what is lost with it, on the text held back."""
    h, held, write = drawn((60, 6), 0) @ drawn((6, 6), 3), drawn((30, 6), 4) @ drawn((6, 6), 3), drawn((6, 4), 1)
    found = pruned(moments(h), moments(held), write, None, 1, 4)
    stays = found.units.tolist()
    gone = [unit for unit in range(6) if unit not in stays]
    c = (h.T @ h).double()
    assert found.penalty is not None
    ridge = found.penalty * c.diagonal()[stays].mean() * torch.eye(4, dtype=torch.float64)
    change = torch.linalg.solve(c[stays][:, stays] + ridge, c[stays][:, gone] @ write[gone].double())
    torch.testing.assert_close(found.write, (write[stays] + change).float(), atol=1e-4, rtol=1e-4)
    assert found.bias.tolist() == [0] * 4
    lost = (held @ write - held[:, stays] @ found.write).square().sum() / (held @ write).square().sum()
    kept = (held @ write - held[:, stays] @ write[stays]).square().sum() / (held @ write).square().sum()
    torch.testing.assert_close(
        torch.tensor([found.before, found.after]), torch.stack([kept, lost]), atol=1e-4, rtol=1e-3
    )
