"""How many processes were started together, by ``accelerate launch`` or ``torchrun``, and which of them this one is."""

from __future__ import annotations

import os


def count() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this is the one that writes and prints."""
    return count() == 1 or os.environ.get("RANK", "0") == "0"


def local(device: str) -> str:
    """Where several processes were started, ``cuda`` is another device for each of a host; any other word stays."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and count() > 1 else device
