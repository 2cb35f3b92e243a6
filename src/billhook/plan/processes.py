"""How many processes were started together, by ``accelerate launch`` or ``torchrun``, and which of them this one is."""

from __future__ import annotations

import os


def count() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this is the one that writes and prints."""
    return os.environ.get("RANK", "0") == "0"


def local(device: str) -> str:
    """Where several processes were started on a host, ``cuda`` is another device for each; any other word stays."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and "LOCAL_RANK" in os.environ else device
