"""Adam for one tensor at a time, as its slope comes by."""

from __future__ import annotations

import torch
from torch import Tensor

DECAYS = (0.9, 0.999)
LEAST = 1e-12


class Adam:
    """The moments of the slopes of a tensor (Kingma and Ba, arXiv 1412.6980), float32 and in its shape."""

    def __init__(self, values: Tensor) -> None:
        self._first = torch.zeros_like(values, dtype=torch.float32)
        self._second = torch.zeros_like(values, dtype=torch.float32)
        self._steps = 0

    def move(self, values: Tensor, slope: Tensor, rate: float) -> None:
        """Change the values in place, each by ``rate`` where its slope is always the same."""
        self._steps += 1
        one, two = DECAYS
        slope = slope.float()
        self._first.lerp_(slope, 1 - one)
        self._second.mul_(two).addcmul_(slope, slope, value=1 - two)
        size = (self._second / (1 - two**self._steps)).sqrt_().add_(LEAST)
        values.addcdiv_(self._first, size, value=-rate / (1 - one**self._steps))
