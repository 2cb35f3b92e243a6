"""How small the result has to be, in the terms that a user pays for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from billhook.plan.errors import InputError

_SCALES = {"k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "p": 1e15}
_BYTES = {"b": 1.0, "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2.0**10, "mib": 2.0**20, "gib": 2.0**30}
_UNITS: dict[str, dict[str, float]] = {
    "params": {"k": 1e3, "m": 1e6, "b": 1e9},
    "size": _BYTES,
    "memory": _BYTES,
    "flops": _SCALES,
    "kv_bytes": _BYTES,
    "blocks": {"": 1.0},
}
_EXAMPLES = {"params": "80M", "size": "100MB", "memory": "300MB", "flops": "20G", "kv_bytes": "16KiB", "blocks": "24"}
_UNTIL_CLIFF = "until=cliff"
_MEASURED = "latency"
KINDS = tuple(_UNITS)
_AMOUNT = re.compile(r"([+-]?[0-9]*\.?[0-9]+(?:e[+-]?[0-9]+)?)\s*([a-z]*)", re.IGNORECASE | re.ASCII)
_ROUNDING = 1e-9  # 24 of 30 equal blocks must count as 0.8 of them


@dataclass(frozen=True)
class Limit:
    """An upper limit on one kind of cost: a fraction of dense where ``relative``, else in the kind's base unit
    (parameters in the blocks, bytes, FLOPs, bytes per token, blocks). ``text`` is what the user wrote."""

    kind: str
    amount: float
    relative: bool
    text: str


@dataclass(frozen=True)
class Budget:
    """What the result may cost; all limits must hold. Or no limit, ``until_cliff``: cut until the next step costs out
    of proportion to those before it. Read with ``Budget.parse``."""

    limits: tuple[Limit, ...]
    until_cliff: bool = False

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read ``KIND=AMOUNT``, several separated by commas: ``params=0.8``, ``size=100MB,kv_bytes=0.5``.

        An amount is a fraction of dense (between 0 and 1, exclusive) or an absolute number with its unit; only
        ``blocks`` counts without one. ``until=cliff`` stands alone, and so does ``latency``: the time of decoding,
        which is measured and always a fraction of dense. Raises InputError with the first thing that is wrong.
        """
        if any(part.partition("=")[0].strip() == "until" for part in text.split(",")):
            if "".join(text.split()) != _UNTIL_CLIFF:
                raise InputError(f"budget {text!r}: until is written {_UNTIL_CLIFF}, with no limit beside it")
            return cls((), until_cliff=True)
        limits = tuple(_parse_limit(part.strip()) for part in text.split(","))
        kinds = [limit.kind for limit in limits]
        for kind in kinds:
            if kinds.count(kind) > 1:
                raise InputError(f"budget {text!r} names {kind} twice; give one amount for each kind")
        if _MEASURED in kinds and len(kinds) > 1:
            raise InputError(f"budget {text!r}: latency is measured, and stands alone")
        return cls(limits)

    def __str__(self) -> str:
        return _UNTIL_CLIFF if self.until_cliff else ",".join(limit.text for limit in self.limits)

    @property
    def latency(self) -> float | None:
        """The share of the dense model's time that decoding may take, if the budget is that."""
        return next((limit.amount for limit in self.limits if limit.kind == _MEASURED), None)

    def ceilings(self, dense: Mapping[str, float]) -> dict[str, float]:
        """The limits in absolute terms, given the costs of the dense model; none for ``until=cliff``.

        Raises InputError where a limit asks for no reduction of this model, and for ``latency``, which no search can
        compute."""
        if self.latency is not None:
            raise InputError(f"budget {self} is measured, which only compress does; use {_either(KINDS)}")
        return {limit.kind: _ceiling(limit, dense[limit.kind]) for limit in self.limits}


def within(cost: float, ceiling: float) -> bool:
    """Whether a cost keeps a limit, a rounding error of the ceiling aside."""
    return cost <= ceiling * (1 + _ROUNDING)


def realised(costs: Mapping[str, float], dense: Mapping[str, float]) -> dict[str, float]:
    """Every cost as a fraction of dense; kinds that the dense model has none of are left out."""
    return {kind: costs[kind] / dense[kind] for kind in dense if dense[kind] > 0}


def _parse_limit(text: str) -> Limit:
    kind, equals, amount = (part.strip() for part in text.partition("="))
    if not equals:
        raise InputError(f"budget {text!r} is not of the form KIND=AMOUNT (such as params=0.8)")
    if kind not in (*_UNITS, _MEASURED):
        raise InputError(f"budget kind {kind!r} is unknown; use {_either((*KINDS, _MEASURED))}")
    found = _AMOUNT.fullmatch(amount)
    unit = found[2].lower() if found else ""
    units = _UNITS.get(kind, {})
    if not found or (unit and unit not in units):
        raise InputError(f"budget {text!r}: {amount!r} is not an amount of {kind}; {_would_be_right(kind)}")
    number = float(found[1])
    if not unit and 0 < number < 1:
        return Limit(kind, number, relative=True, text=f"{kind}={amount}")
    if unit not in units or number <= 0 or (kind == "blocks" and not number.is_integer()):
        raise InputError(f"budget {text!r} is out of range; {_would_be_right(kind)}")
    return Limit(kind, number * units[unit], relative=False, text=f"{kind}={amount}")


def _ceiling(limit: Limit, dense: float) -> float:
    if dense <= 0:
        raise InputError(f"budget {limit.text}: this model has no {limit.kind} to reduce")
    ceiling = limit.amount * dense if limit.relative else limit.amount
    if ceiling >= dense:
        raise InputError(f"budget {limit.text} asks for no reduction: the dense model has {dense:,.0f} {limit.kind}")
    return ceiling


def _would_be_right(kind: str) -> str:
    if kind == _MEASURED:
        return "give a fraction of the dense model's time between 0 and 1 (0.8)"
    return f"give a fraction of dense between 0 and 1 (0.8) or an absolute number ({_EXAMPLES[kind]})"


def _either(words: tuple[str, ...]) -> str:
    return f"{', '.join(words[:-1])} or {words[-1]}"


def split_budgets(text: str) -> list[str]:
    """``params=0.9,0.8`` -> ``["params=0.9", "params=0.8"]``, each of them a budget of its own."""
    found: list[str] = []
    kind = ""
    for part in text.split(","):
        name, equals, number = part.strip().rpartition("=")
        kind = name if equals else kind
        if not kind:
            raise InputError(f"budgets {text!r} do not begin with a kind; write KIND=0.9,0.8")
        budget = Budget.parse(f"{kind}={number}")
        if budget.until_cliff or budget.latency is not None:
            raise InputError(f"budget {budget} ends elsewhere for each method; a comparison needs amounts in advance")
        found.append(str(budget))
    return list(dict.fromkeys(found))
