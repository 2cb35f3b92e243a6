"""What ``accelerate launch`` asks of a training, read from the environment that it sets."""

from __future__ import annotations

import os

import torch

from billhook.plan import processes
from billhook.plan.errors import InputError


def sharded() -> bool:
    """Whether each process is to hold a part of every block (FSDP2), rather than all of them. InputError for what is
    asked besides and would not be done."""
    if not _asked("ACCELERATE_USE_FSDP", "false"):
        return False
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise InputError("training is sharded by FSDP2 alone; add --fsdp_version 2 to accelerate launch")
    if _asked("FSDP_OFFLOAD_PARAMS", "false"):
        raise InputError(
            "training keeps its shards on the devices; leave out --fsdp_offload_params of accelerate launch"
        )
    if _asked("FSDP_ACTIVATION_CHECKPOINTING", "false"):
        raise InputError(
            "training keeps its activations; leave out --fsdp_activation_checkpointing of accelerate launch"
        )
    if not _asked("FSDP_RESHARD_AFTER_FORWARD", "true"):
        raise InputError(
            "training lets each block go after its forward; leave out --fsdp_reshard_after_forward of accelerate launch"
        )
    return processes.count() > 1


def require_precision(dtype: torch.dtype) -> None:
    """InputError where another precision is asked for than that of the model, in which training computes anyway."""
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked != "no" and not (asked == "bf16" and dtype == torch.bfloat16):
        raise InputError(
            f"training computes in the dtype of the model ({str(dtype).removeprefix('torch.')}), with weights in "
            f"float32; leave out --mixed_precision {asked} of accelerate launch and choose with --dtype"
        )


def _asked(name: str, default: str) -> bool:
    return os.environ.get(name, default).lower() in ("1", "true", "yes", "full_shard")
