"""What the pictures of a depth audit say, in words computed from the same figures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean

from billhook.plan.address import Address
from billhook.plan.audit import Matrix, StackAudit
from billhook.report.numbers import number, percent
from billhook.report.palette import kind_name

UNITS = {"kl": "nats", "stream": "of the last stream's energy"}


def contributions(audit: StackAudit) -> str:
    """Size and direction of each kind of sublayer in both halves, and the transition."""
    size = _halves(audit.size, _blocks(audit), lambda value: number(value, 2))
    cosine = _halves(audit.alignment, _blocks(audit), _signed)
    words = f"Mean size in the first and the second half of the stack: {size}. Mean cosine: {cosine}." if size else ""
    found = audit.transition
    if found is None:
        return f"{words} The stack is too short, or too quiet, to look for a transition.".strip()
    if not found.found:
        reason = (
            f"a steady slope explains {percent(found.slope)} of the differences between blocks"
            if found.slope >= found.step
            else f"the best step explains {percent(found.step)} of the differences between blocks"
        )
        return f"{words} There is no clear transition: {reason}."
    return (
        f"{words} There is a transition at block {found.block} (a step there explains {percent(found.step)} of the "
        f"differences between blocks, a steady slope {percent(found.slope)}): the size goes from "
        f"{number(found.size[0], 2)} to {number(found.size[1], 2)} of the stream, the cosine from "
        f"{_signed(found.alignment[0])} to {_signed(found.alignment[1])}."
    )


def skips(audit: StackAudit) -> str:
    """Both halves, for later blocks and for the output, and the block that is missed least."""
    if audit.skips is None:
        return ""
    blocks, words = _blocks(audit), []
    for name, rows in (("the tokens that skip", audit.skips.now), ("later tokens", audit.skips.future)):
        first, second = _mean(rows[: blocks // 2]), _mean(rows[blocks // 2 :])
        if first is not None and second is not None:
            words.append(
                f"For {name}, later blocks change by {percent(first)} on average if the skipped block is in the first "
                f"half, by {percent(second)} if it is in the second."
            )
    # no token reads the last block's output of another: it cannot matter for later ones
    for name, row in (("", audit.skips.output_now), (" of later tokens", audit.skips.output_future[:-1])):
        known = {i: value for i, value in enumerate(row) if value is not None}
        if known:
            least, most = min(known, key=known.__getitem__), max(known, key=known.__getitem__)
            words.append(
                f"The output{name} changes least without block {least} ({number(known[least], 2)} "
                f"{UNITS[audit.output]}), most without block {most} ({number(known[most], 2)})."
            )
    return " ".join(words)


def maps(audit: StackAudit) -> str:
    """How far an affine map reaches, and where the stream changes most."""
    depths, last = audit.depths, len(audit.depths) - 1
    steps = {i: audit.r2[i][i + 1] for i in range(last)}
    known = {i: value for i, value in steps.items() if value is not None}
    if not known:
        return ""
    weakest = min(known, key=known.__getitem__)
    words = [
        f"From one depth to the next an affine map explains {percent(fmean(known.values()))} on average, least from "
        f"depth {depths[weakest]} to {depths[weakest + 1]} ({percent(known[weakest])})."
    ]
    half = [v for i in range(last // 2 + 1) if (v := audit.r2[i][i + last // 2]) is not None]
    if half and last > 2:
        words.append(f"Over half of the stack it explains {percent(fmean(half))}.")
    span = _alike(audit.cka)
    words.append(
        f"The longest stretch with a CKA of 0.9 or more throughout is depth {depths[span[0]]} to {depths[span[1]]}."
        if span[1] > span[0]
        else "No two neighbouring depths have a CKA of 0.9."
    )
    return " ".join(words)


def tokenwise(audit: StackAudit) -> str:
    """How much of the updates a map explains, and whether the rest is what counts."""
    rows = audit.tokenwise
    order = sorted(range(len(rows)), key=lambda i: rows[i].explained)
    words = [
        f"An affine map of the same token explains {percent(fmean(row.explained for row in rows))} of an update on "
        f"average, least in block {order[0]} ({percent(rows[order[0]].explained)}) and most in block {order[-1]} "
        f"({percent(rows[order[-1]].explained)}). The mean cosine of an update is "
        f"{_signed(fmean(row.cosine_tokenwise for row in rows))} with its tokenwise part and "
        f"{_signed(fmean(row.cosine_rest for row in rows))} with the rest."
    ]
    if audit.correlation is not None:
        strength = abs(audit.correlation)
        how = "closely" if strength >= 0.7 else "loosely" if strength >= 0.3 else "hardly"
        words.append(
            f"The share that is left over and the change of the output with the map in the block's place are {how} "
            f"related: Spearman's rank correlation is {_signed(audit.correlation)}."
        )
    elif any(row.output is not None for row in rows):
        words.append(
            "Whether the share that is left over is what the output misses does not show: too few blocks, or all alike."
        )
    return " ".join(words)


def stitches(audit: StackAudit) -> str:
    """The cheapest way ahead and the dearest, and whether the way back costs more."""
    found = audit.stitches
    if found is None:
        return ""
    size = len(found.depths)
    pairs = {(a, b): v for a in range(size) for b in range(size) if a != b and (v := found.output[a][b]) is not None}
    ahead = {pair: value for pair, value in pairs.items() if pair[0] < pair[1]}
    back = [value for pair, value in pairs.items() if pair[0] > pair[1]]
    if not ahead:
        return ""
    best, worst = min(ahead, key=ahead.__getitem__), max(ahead, key=ahead.__getitem__)
    return (
        f"Ahead, the cheapest is from depth {found.depths[best[0]]} to {found.depths[best[1]]} "
        f"({number(ahead[best], 2)} {UNITS[audit.output]}), the dearest from {found.depths[worst[0]]} to "
        f"{found.depths[worst[1]]} ({number(ahead[worst], 2)}). "
        f"The mean is {number(fmean(ahead.values()), 2)} ahead and {number(fmean(back), 2)} back."
    )


def neighbours(audit: StackAudit) -> str:
    """The first, the middle and the last depth, at the shortest and the longest distance."""
    known = {gap: row for gap, row in audit.neighbours.items() if all(value is not None for value in row)}
    if not known:
        return ""
    places = sorted({0, len(audit.depths) // 2, len(audit.depths) - 1})
    parts = [
        f"{', '.join(_signed(row[i] or 0.0) for i in places)} for tokens {gap} apart"
        for gap, row in known.items()
        if gap in (min(known), max(known))
    ]
    return f"At depth {', '.join(str(audit.depths[i]) for i in places)} the mean cosine is {'; '.join(parts)}."


def _halves(values: Mapping[str, float], blocks: int, shown: Callable[[float], str]) -> str:
    """``attention 0.4 and 0.1; MLP 0.4 and 0.1``: means over the first and the second half, for each kind in both."""
    halves: dict[str, tuple[list[float], list[float]]] = {}
    for unit, value in values.items():
        address = Address.parse(unit)
        if address.sublayer is not None:
            halves.setdefault(address.sublayer, ([], []))[address.block >= blocks // 2].append(value)
    return "; ".join(
        f"{kind_name(kind)} {shown(fmean(first))} and {shown(fmean(second))}"
        for kind, (first, second) in halves.items()
        if first and second
    )


def _blocks(audit: StackAudit) -> int:
    return len(audit.tokenwise)


def _mean(rows: Sequence[Iterable[float | None]]) -> float | None:
    values = [value for row in rows for value in row if value is not None]
    return fmean(values) if values else None


def _alike(cka: Matrix) -> tuple[int, int]:
    """The longest run of depths of which every two have a CKA of 0.9 or more: first and last."""
    best = (0, 0)
    for start in range(len(cka)):
        end = start
        while end + 1 < len(cka) and all((cka[i][end + 1] or 0.0) >= 0.9 for i in range(start, end + 1)):
            end += 1
        best = max(best, (start, end), key=lambda run: run[1] - run[0])
    return best


def _signed(value: float) -> str:
    return f"{value:.2f}".replace("-", "−")
