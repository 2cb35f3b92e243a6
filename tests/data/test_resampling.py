"""Importance resampling: like the target, and the same again."""

from __future__ import annotations

import numpy as np
import torch

from billhook.data.resampling import log_ratios, resampled


def mixed(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows over one set of tokens, then over another; and a target over the second."""
    chance = torch.Generator().manual_seed(seed)
    one = torch.randint(0, 50, (30, 32), generator=chance)
    other = torch.randint(50, 100, (10, 32), generator=chance)
    return torch.cat([one, other]), torch.randint(50, 100, (8, 24), generator=chance)


def test_text_like_the_target_is_preferred() -> None:
    ids, target = mixed()
    ratios = log_ratios(ids, target)
    assert ratios[30:].min() > ratios[:30].max()
    assert resampled(ratios, 10, 0).tolist() == list(range(30, 40))


def test_the_order_of_words_counts() -> None:
    rows = torch.tensor([[1, 2, 3] * 8, [3, 2, 1] * 8] * 4)
    ratios = log_ratios(rows, rows[:1])
    assert (ratios[::2] > ratios[1::2]).all()


def test_a_text_is_nothing_like_itself_in_particular() -> None:
    ids = mixed()[0]
    np.testing.assert_allclose(log_ratios(ids, ids), 0, atol=1e-9)


def test_draws_follow_the_weights_and_the_seed() -> None:
    weights = np.log(np.array([0.5, 0.3, 0.15, 0.05]))
    draws = [resampled(weights, 1, seed).item() for seed in range(4000)]
    np.testing.assert_allclose(np.bincount(draws) / 4000, np.exp(weights), atol=0.03)
    assert resampled(weights, 3, 7).tolist() == resampled(weights, 3, 7).tolist()
    assert len(set(resampled(weights, 3, 7).tolist())) == 3
