"""Bias compensation: what removed channels wrote on average, added as a constant."""

from __future__ import annotations

from torch import Tensor

from billhook.heal.reconstruct import removed


def compensated(mean: Tensor, weight: Tensor, kept: Tensor, bias: Tensor | None = None) -> Tensor:
    """The bias [o] of a write that has lost inputs: b + W[:, gone] mean[gone], in float32.

    ``mean`` [n] is the mean of each input of the write over the calibration, ``weight`` [o, n] the write before the
    cut, ``kept`` [k] the inputs that stay. It is the bias that minimises the squared error of the output when nothing
    else changes: what remains is the fluctuation of the lost inputs around their means. A write without a bias gets one
    (which a checkpoint of the same architecture can hold only where its family has a place for it).

    Source: FLAP (arXiv 2312.11983), section 3.2, baseline bias compensation. Raises InputError for indices that are not
    distinct inputs. Cost: o n.
    """
    gone = removed(kept, weight.shape[1])
    lost = weight[:, gone].float() @ mean[gone].float()
    return lost if bias is None else bias.float() + lost
