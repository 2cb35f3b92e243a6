"""A short name for a model's weights."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

_SAMPLES = 256  # values looked at in each tensor


def fingerprint(model: nn.Module) -> str:
    """sha256 (hex) over the name, shape and up to 256 evenly spaced values of every parameter.

    Values are rounded to bfloat16, so a checkpoint has one fingerprint whether it was loaded in bfloat16 or float32
    (float16 rounds twice and may differ). A tied weight counts once, under its first name. Tensors of experts
    (``.experts.`` in the name) are skipped: the same checkpoint may hold them fused or apart. Milliseconds.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if ".experts." in name:
            continue
        flat = parameter.detach().flatten()
        count = min(_SAMPLES, flat.numel())
        spread = torch.arange(count, device=flat.device) * (flat.numel() - 1) // max(count - 1, 1)
        values = flat[spread].to("cpu", torch.bfloat16).view(torch.int16)
        digest.update(f"{name} {tuple(parameter.shape)}\n".encode())
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()
