"""Which weights to train: those that a short training of all of them changed most."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from billhook.heal.training.sharding import whole


def fpf(before: Mapping[str, Tensor], now: Mapping[str, Tensor], count: int) -> list[str]:
    """The ``count`` names whose tensors changed most, |now - before| / |before|.

    Source: FPF (arXiv 2304.04158), section 3: few modules change much, and training only these is enough. There the
    change is followed over tasks; here over the first period of one training.
    """
    change = {
        name: (whole((now[name].float() - old.float()).norm()) / whole(old.float().norm()).clamp(min=1e-12)).item()
        for name, old in before.items()
    }
    return sorted(sorted(change, key=lambda name: (-change[name], name))[:count])
