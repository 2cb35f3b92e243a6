"""Billhook finds what a pretrained transformer does not need, cuts it, heals what is left, and proves the result.

The walk, step by step: ``load``, ``discover``, ``calibration``, ``trace``, a search, ``apply`` or ``simulate``,
``evidence``, ``save``. The whole walk at once: ``compress``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from billhook.anatomy import Anatomy, discover
    from billhook.data import Windows, calibration, windows
    from billhook.evaluate import bench, evidence, generate
    from billhook.export.huggingface import save
    from billhook.heal import healed, refill, restore, scale_updates
    from billhook.measure.trace import trace
    from billhook.models import Loaded, building
    from billhook.plan.address import Address
    from billhook.plan.errors import InputError
    from billhook.plan.plan import Plan
    from billhook.plan.record import Run
    from billhook.recipes.compress import compress
    from billhook.recipes.inspect import inspect
    from billhook.runtime.catalogue import policy_of
    from billhook.runtime.speculate import speculate
    from billhook.surgery import apply, simulate
    from billhook.surgery.reopen import load

#: Imported when first used: the command line must answer before torch is there.
_HOMES = {
    "billhook.anatomy": ("Anatomy", "discover"),
    "billhook.data": ("Windows", "calibration", "windows"),
    "billhook.evaluate": ("bench", "evidence", "generate"),
    "billhook.export.huggingface": ("save",),
    "billhook.heal": ("healed", "refill", "restore", "scale_updates"),
    "billhook.measure.trace": ("trace",),
    "billhook.models": ("Loaded", "building"),
    "billhook.plan.address": ("Address",),
    "billhook.plan.errors": ("InputError",),
    "billhook.plan.plan": ("Plan",),
    "billhook.plan.record": ("Run",),
    "billhook.recipes.compress": ("compress",),
    "billhook.recipes.inspect": ("inspect",),
    "billhook.runtime.catalogue": ("policy_of",),
    "billhook.runtime.speculate": ("speculate",),
    "billhook.surgery": ("apply", "simulate"),
    "billhook.surgery.reopen": ("load",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "Address",
    "Anatomy",
    "InputError",
    "Loaded",
    "Plan",
    "Run",
    "Windows",
    "apply",
    "bench",
    "building",
    "calibration",
    "compress",
    "discover",
    "evidence",
    "generate",
    "healed",
    "inspect",
    "load",
    "policy_of",
    "refill",
    "restore",
    "save",
    "scale_updates",
    "simulate",
    "speculate",
    "trace",
    "windows",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME_OF[name]), name)
