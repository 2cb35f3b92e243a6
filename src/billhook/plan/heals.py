"""The ways to heal, by name."""

from __future__ import annotations

from typing import Literal, get_args

_Refit = Literal["closed-form", "bridge", "bias", "data-free", "scales", "eora"]
_Trained = Literal["tune", "lora", "distill", "tail", "lisa", "ist", "fpf", "skips", "kv-routing"]
Method = Literal[_Refit, _Trained]
Heal = Literal["none", Method]
TRAINED: tuple[str, ...] = get_args(_Trained)
