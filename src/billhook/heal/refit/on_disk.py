"""New weights that wait in a file until they are asked for, so that they do not make the model come twice in memory."""

from __future__ import annotations

import tempfile

import numpy as np
import torch
from torch import Tensor

from billhook.plan.errors import InputError


def on_disk(tensor: Tensor) -> Tensor:
    """The same values, mapped from a file without a name in the folder for temporary files (``TMPDIR``), which is gone
    with the tensor. What is changed in it stays in memory. A tensor on an accelerator stays where it is."""
    if tensor.device.type != "cpu" or not tensor.numel():
        return tensor
    values = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    try:
        with tempfile.TemporaryFile() as file:
            values.tofile(file)
            file.flush()
            mapped = np.memmap(file, dtype=np.uint8, mode="c", shape=values.shape)
    except OSError as error:
        raise InputError(f"new weights cannot be kept in {tempfile.gettempdir()}: {error}") from error
    return torch.from_numpy(mapped).view(tensor.dtype).reshape(tensor.shape)
