"""What a plan removes, in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from billhook.plan.address import Address
from billhook.plan.check import normalise
from billhook.plan.outline import Outline
from billhook.plan.plan import Factorise, HiddenChannels, Keep, Plan, Sparsify
from billhook.plan.record import Run
from billhook.plan.target import Target
from billhook.plan.visits import orders, repeated, shared, unvisited
from billhook.report.numbers import quantity, ranges
from billhook.report.palette import kind_name

UNITS = {"neuron": "neuron", "group": "KV group", "expert": "expert"}


def dropped(run: Run) -> frozenset[Address]:
    """The removal in its shortest form, what a schedule never visits included."""
    schedule = run.plan.schedule
    if schedule is None or not schedule.constant:
        return normalise(run.plan.drops, run.outline)
    anywhere = run.plan.model_copy(update={"target": Target.ANY})
    left_out = unvisited(orders(anywhere, run.outline), run.outline) - shared(run.plan, run.outline).keys()
    return normalise(run.plan.drops | left_out | schedule.skips(), run.outline)


def tied(run: Run) -> bool:
    """Whether blocks run more than once, with the same weights."""
    schedule = run.plan.schedule
    if schedule is None or not schedule.constant:
        return False
    anywhere = run.plan.model_copy(update={"target": Target.ANY})
    return any(repeated(order) for order in orders(anywhere, run.outline).values())


def summary(run: Run) -> list[tuple[str, str]]:
    """What was cut, one line a stack and kind: ``("attention of decoder", "3, 11–13")``."""
    order = [stack.name for stack in run.outline.stacks]
    groups: dict[tuple[str, str], list[int]] = {}
    for address in sorted(dropped(run), key=lambda a: (order.index(a.stack), a.sublayer or "", a.block)):
        groups.setdefault((address.stack, address.sublayer or ""), []).append(address.block)
    gone = [
        ((f"{kind_name(kind)} of " if kind else "") + _blocks(stack, run.outline), ranges(blocks))
        for (stack, kind), blocks in groups.items()
    ]
    return [
        *gone,
        *flattened(run),
        *sharing(run.plan, run.outline),
        *widths(run),
        *thinned(run),
        *zeros(run),
        *ranks(run),
    ]


def flattened(run: Run) -> list[tuple[str, str]]:
    """``("blocks flattened into another", "5 into 6 (2 KV groups and 701 neurons of it stay)")``."""
    if run.healing is None or run.healing.method != "flatten":
        return []
    stays: dict[tuple[Address, Address], Counter[str]] = {}
    for graft in run.healing.grafts:
        source, into = Address.parse(graft.source).parent, Address.parse(graft.into).parent
        stays.setdefault((source, into), Counter()).update(group=graft.groups, neuron=graft.neurons)
    several = len(run.outline.stacks) > 1
    lines = [
        f"{f'{source.stack} ' if several else ''}{source.block} into {into.block} ("
        + " and ".join(f"{n:,} {UNITS[kind]}{'' if n == 1 else 's'}" for kind, n in units.items())
        + " of it stay)"
        for (source, into), units in sorted(stays.items())
    ]
    return [("blocks flattened into another", ", ".join(lines))]


def ranks(run: Run) -> list[tuple[str, str]]:
    """``("linears of blocks", "0–29: 187 of 210 in two parts, of rank 32 to 220")``, and experts taken apart."""
    found = []
    sublayers = dict(run.outline.sublayers())
    linears = [edit for edit in run.plan.factors if edit.linear in sublayers[edit.unit].linears]
    for stack in dict.fromkeys(edit.unit.stack for edit in linears):
        edits = [edit for edit in linears if edit.unit.stack == stack]
        total = sum(len(s.linears) for a, s in run.outline.sublayers() if a.stack == stack)
        least, most = min(edit.rank for edit in edits), max(edit.rank for edit in edits)
        span = f"{least:,}" if least == most else f"{least:,} to {most:,}"
        where = ranges({edit.unit.block for edit in edits})
        what = f"linears of {_blocks(stack, run.outline)}"
        found.append((what, f"{where}: {len(edits):,} of {total:,} in two parts, of rank {span}"))
    return [*found, *_experts_apart(run)]


def _experts_apart(run: Run) -> list[tuple[str, str]]:
    """``("neurons of those experts in blocks", "0–3: 24 of 256 whole, the others of rank 24")``."""
    sublayers = dict(run.outline.sublayers())
    alike: dict[tuple[str, int, int], set[int]] = {}
    for edit in run.plan.factors:
        mixture = sublayers[edit.unit].mixtures.get(edit.linear)
        if mixture is not None:
            alike.setdefault((edit.unit.stack, edit.rank, mixture.neurons), set()).add(edit.unit.block)
    return [
        (
            f"neurons of those experts in {_blocks(stack, run.outline)}",
            f"{ranges(blocks)}: {rank:,} of {neurons:,} whole, the others of rank {rank:,}",
        )
        for (stack, rank, neurons), blocks in alike.items()
    ]


def sharing(plan: Plan, outline: Outline) -> list[tuple[str, str]]:
    """``("blocks with the weights of another", "13 (of 12), 14 (of 15)")``; the order in which blocks run where that
    does not say it; nothing without a schedule."""
    if plan.schedule is None:
        return []
    whose: dict[str, list[str]] = {}
    for new, first in sorted(shared(plan, outline).items()):
        whose.setdefault(new.stack, []).append(f"{new.block} (of {first.block})")
    lines = [
        (f"{_blocks(stack, outline)} with the weights of another", ", ".join(pairs)) for stack, pairs in whose.items()
    ]
    for stack, order in orders(plan, outline).items():
        if stack not in whose and repeated(order):
            lines.append((f"order of {_blocks(stack, outline)}", ", ".join(map(str, order))))
    return lines


def widths(run: Run) -> list[tuple[str, str]]:
    """``("neurons of blocks", "3, 11–13: 4,608 of 6,144 kept, 1,098 to 1,210 in each")``."""
    sublayers = dict(run.outline.sublayers())
    groups: dict[tuple[str, str], list[Keep]] = {}
    for keep in run.plan.keeps:
        groups.setdefault((keep.unit.stack, keep.inner), []).append(keep)
    found = []
    for (stack, kind), keeps in groups.items():
        left = [len(keep.indices) for keep in keeps]
        before = sum(sublayers[keep.unit].inner[kind].count for keep in keeps)
        least, most = f"{min(left):,}", f"{max(left):,}"
        each = "" if len(left) == 1 else f", {least if least == most else f'{least} to {most}'} in each"
        where = ranges({keep.unit.block for keep in keeps})
        what = f"{UNITS[kind]}s of {_blocks(stack, run.outline)}"
        found.append((what, f"{where}: {sum(left):,} of {before:,} kept{each}"))
    return found


def thinned(run: Run) -> list[tuple[str, str]]:
    """``("hidden channels", "459 of 576 kept, in all that reads or writes the stream")``."""
    several = len(run.outline.stacks) > 1
    return [
        (
            f"hidden channels{f' of {edit.stack}' if several else ''}",
            f"{len(edit.indices):,} of {run.outline.stack(edit.stack).hidden_size:,} kept, "
            f"in all that reads or writes the stream",
        )
        for edit in run.plan.channels
    ]


def zeros(run: Run) -> list[tuple[str, str]]:
    """``("weights of blocks", "0–29: 53,084,160 of 106,168,320 set to zero, 2:4")``, one line a stack and pattern."""
    sublayers = dict(run.outline.sublayers())
    groups: dict[tuple[str, str], list[Sparsify]] = {}
    for edit in run.plan.sparsities:
        groups.setdefault((edit.unit.stack, edit.pattern), []).append(edit)
    found = []
    for (stack, pattern), edits in groups.items():
        where = ranges({edit.unit.block for edit in edits})
        gone, of = sum(zeros_in(edit) for edit in edits), sum(sublayers[edit.unit].linear_params for edit in edits)
        what = f"weights of {_blocks(stack, run.outline)}"
        found.append((what, f"{where}: {gone:,} of {of:,} set to zero, {pattern}"))
    return found


def narrower(
    keeps: Iterable[Keep],
    sparsities: Iterable[Sparsify],
    factors: Iterable[Factorise],
    channels: Iterable[HiddenChannels] = (),
) -> list[str]:
    """``decoder.3.mlp: 1,098 neurons kept``, one a keep; ``decoder.3.mlp: 1,327,104 weights zero``; ``decoder.3.mlp:
    mlp.up_proj of rank 220``, one a linear; ``decoder: 459 hidden channels kept``."""
    kept = [f"{k.unit}: {len(k.indices):,} {UNITS[k.inner]}{'s' if len(k.indices) > 1 else ''} kept" for k in keeps]
    sparse = [f"{edit.unit}: {zeros_in(edit):,} weights zero" for edit in sparsities]
    thin = [f"{edit.stack}: {len(edit.indices):,} hidden channels kept" for edit in channels]
    return [*kept, *thin, *sparse, *(f"{edit.unit}: {edit.linear} of rank {edit.rank:,}" for edit in factors)]


def zeros_in(edit: Sparsify) -> int:
    """How many weights become zero."""
    return sum(edit.zeros.values())


def _lost(run: Run) -> list[tuple[str, int]]:
    """For each kind of inner unit, and for single weights: how many were cut."""
    sublayers = dict(run.outline.sublayers())
    found: Counter[str] = Counter()
    for keep in run.plan.keeps:
        found[keep.inner] += sublayers[keep.unit].inner[keep.inner].count - len(keep.indices)
    for edit in run.plan.sparsities:
        found["weight"] += zeros_in(edit)
    for thin in run.plan.channels:
        found["hidden channel"] += run.outline.stack(thin.stack).hidden_size - len(thin.indices)
    return [(UNITS.get(kind, kind), number) for kind, number in sorted(found.items())]


def parts(run: Run) -> list[tuple[str, str]]:
    """What the dense model consists of, a line for each stack and kind: ``("MLP", "30 of them, 80 M parameters")``."""
    several = len(run.outline.stacks) > 1
    sizes: dict[tuple[str, str], list[int]] = {}
    for address, sublayer in run.outline.sublayers():
        sizes.setdefault((address.stack, address.sublayer or ""), []).append(sublayer.params)
    lines = [
        (
            (f"{stack} " if several else "") + kind_name(kind),
            f"{len(found)} of them, {quantity(sum(found), 'parameters')}",
        )
        for (stack, kind), found in sizes.items()
    ]
    return [*lines, ("outside the blocks", quantity(run.outline.other_params, "parameters"))]


def counts(run: Run) -> str:
    """``5 of 30 blocks, 3 attentions and 2 MLPs``, ``1,200 neurons``; empty where nothing was cut."""
    sublayers = dict(run.outline.sublayers())
    found = Counter(a.sublayer or "block" for a in dropped(run))
    total = sum(1 for _ in run.outline.blocks())
    parts = [f"{found.pop('block')} of {total} blocks"] if "block" in found else []
    parts += [f"{n} {kind_name(kind)}{'s' if n > 1 else ''}" for kind, n in sorted(found.items())]
    tied = len(shared(run.plan, run.outline))
    parts += [f"the weights of {tied} more that run{'s' if tied == 1 else ''} with another's"] if tied else []
    parts += [f"{n:,} {what}{'s' if n > 1 else ''}" for what, n in _lost(run)]
    linears = [edit for edit in run.plan.factors if edit.linear in sublayers[edit.unit].linears]
    parts += [f"{ranks_lost(run):,} ranks of {len(linears):,} linears"] if linears else []
    return " and ".join(filter(None, [", ".join(parts[:-1]), *parts[-1:]]))


def ranks_lost(run: Run) -> int:
    """How many ranks the linears have lost that are in two parts now."""
    sublayers = dict(run.outline.sublayers())
    linears = [(sublayers[edit.unit].linears.get(edit.linear), edit.rank) for edit in run.plan.factors]
    return sum(min(o.outputs, o.inputs) - rank for o, rank in linears if o is not None)


def _blocks(stack: str, outline: Outline) -> str:
    """``blocks``, or ``vision blocks`` where there are other stacks beside."""
    return f"{stack} blocks" if len(outline.stacks) > 1 else "blocks"
