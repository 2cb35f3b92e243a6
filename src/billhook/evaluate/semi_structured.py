"""2:4 weights in the form that sparse tensor cores read, for as long as something is timed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.sparse import to_sparse_semi_structured
from transformers import PreTrainedModel

from billhook.anatomy.undo import Undo

OUTPUTS, INPUTS = 32, 64
"""What the sides of a weight must be multiples of, for both of torch's backends in half precision."""


def fits(weight: Tensor) -> bool:
    """Whether a weight [outputs, inputs] is one for these kernels: in half precision, of a size that they take, and
    with two zeros or more among each four inputs of an output."""
    if weight.dtype not in (torch.float16, torch.bfloat16) or weight.ndim != 2:
        return False
    outputs, inputs = weight.shape
    if outputs % OUTPUTS or inputs % INPUTS:
        return False
    kept = weight.detach().reshape(outputs, -1, 4).count_nonzero(-1)
    return bool((kept <= 2).all())


def has_kernels(device: torch.device) -> bool:
    """Whether a device multiplies such weights: CUDA from compute capability 8.0 on, in a torch built with
    cuSPARSELt."""
    return (
        device.type == "cuda"
        and torch.cuda.get_device_capability(device) >= (8, 0)
        and torch.backends.cusparselt.is_available()
    )


@contextmanager
def semi_structured(model: PreTrainedModel) -> Iterator[int]:
    """Give each linear of a model whose weight fits a semi-structured copy of it, where its device has the kernels, and
    tell how many these are. The weights that were there are back on leaving, also by an exception.

    Linears of a class of their own stay as they are. Memory: the copies, 9/16 of what they are copies of, beside them.
    """
    undo, count = Undo(), 0
    try:
        for module in model.modules():
            if type(module) is nn.Linear and has_kernels(module.weight.device) and fits(module.weight):
                packed = to_sparse_semi_structured(module.weight.detach().contiguous())
                undo.set(module, "weight", nn.Parameter(packed, requires_grad=False))
                count += 1
        yield count
    finally:
        undo.restore()
