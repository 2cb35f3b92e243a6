"""The pictures of the dense model: angular distance span by span, importance unit by unit.

Every figure is plotly's JSON as a plain dictionary. Colours that depend on light or dark (text, grid) are left to the
page. Strings from the run are escaped, for plotly reads a little HTML in labels.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import plotly.graph_objects as go

from billhook.plan.address import Address
from billhook.plan.record import COMPLEXITY, Run
from billhook.report.cuts import dropped
from billhook.report.drawing import is_cut
from billhook.report.numbers import percent
from billhook.report.palette import CUT, KINDS, OTHER, kind_name

RING = {"symbol": "circle-open", "size": 12, "color": CUT, "line": {"width": 2}}


@dataclass(frozen=True)
class Picture:
    """A figure with its heading; ``spec`` is plotly JSON, ``height`` in pixels."""

    name: str
    title: str
    spec: dict[str, Any]
    height: int


def picture(name: str, title: str, figure: go.Figure, height: int) -> Picture:
    """Give a figure the margins and the legend that all of them share, and turn it into plain data."""
    figure.update_layout(
        template="none",
        margin={"l": 56, "r": 12, "t": 28, "b": 44},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        hovermode="closest",
        dragmode=False,  # dragging a finger scrolls the page
        legend={"orientation": "h", "x": 0, "xanchor": "left", "y": 1.0, "yanchor": "bottom"},
    )
    figure.update_xaxes(zeroline=False, ticks="", automargin=True, title_standoff=8)
    figure.update_yaxes(zeroline=False, ticks="", automargin=True, title_standoff=8)
    return Picture(name, title, json.loads(figure.to_json(validate=False)), height)


def plain(text: str) -> str:
    """Text that plotly shows as it is."""
    return html.escape(text)


def angular_maps(run: Run) -> list[Picture]:
    """One map a stack: x = first block of a span, y = its length, colour = angular distance over the span."""
    maps = run.measures.angular if run.measures else {}
    return [
        picture(f"angular-{stack}", _stack_title(stack, maps), _angular(run, stack, rows), 440)
        for stack, rows in maps.items()
        if any(rows)
    ]


def importance(run: Run) -> list[Picture]:
    """One panel for each score and stack, since scores live on scales of their own."""
    scores = run.measures.scores if run.measures else {}
    panels = []
    for score, values in scores.items():
        known = {Address.parse(unit): value for unit, value in values.items() if math.isfinite(value)}
        stacks = list(dict.fromkeys(address.stack for address in known))
        for stack in stacks:
            inside = {a: v for a, v in known.items() if a.stack == stack}
            heading = score.replace("_", " ") + (f" · {stack}" if len(stacks) > 1 else "")
            panels.append(picture(f"importance-{score}-{stack}", heading, _importance(run, inside), 270))
    return panels


def importance_sentence(run: Run) -> str:
    """The three units of each score that matter least, the least first; empty where nothing was scored."""
    found = []
    for score, values in (run.measures.scores if run.measures else {}).items():
        known = {Address.parse(unit): value for unit, value in values.items() if math.isfinite(value)}
        lowest = sorted(known, key=lambda unit: (known[unit], unit))[:3]
        if lowest:
            found.append(f"in {score.replace('_', ' ')}: {', '.join(map(str, lowest))}")
    return f"Lowest {'; '.join(found)}." if found else ""


def complexity_sentence(run: Run) -> str:
    """How many neurons of MLPs are left when those that compute nearly the same are merged; empty where that was not
    looked at."""
    shares = (run.measures.scores if run.measures else {}).get(COMPLEXITY, {})
    if not shares:
        return ""
    merged = [unit for unit, share in shares.items() if share < 1]
    words = (
        "Feature complexity: no two neurons of an MLP compute nearly the same (within a tenth of the largest squared "
        "distance of their weights)."
    )
    if merged:
        least = min(merged, key=lambda unit: (shares[unit], Address.parse(unit)))
        words = (
            f"Feature complexity: merging neurons that compute nearly the same (within a tenth of the largest squared "
            f"distance of their weights) leaves {percent(fmean(shares.values()))} of an MLP on average, least in "
            f"{least} ({percent(shares[least])})."
        )
        if min(shares.values()) <= 0.5:
            words += " No more than half are merged."
    return words


def _angular(run: Run, stack: str, rows: list[list[float]]) -> go.Figure:
    widest = max(len(row) for row in rows)
    lengths = list(range(1, len(rows) + 1))
    cells = [[*row, *[None] * (widest - len(row))] for row in rows]
    figure = go.Figure(
        go.Heatmap(
            z=cells,
            x=list(range(widest)),
            y=lengths,
            colorscale="Viridis",
            hoverongaps=False,
            hovertemplate="%{y} blocks from block %{x}: %{z:.3f}<extra></extra>",
            # the empty corner of the triangle holds the scale
            colorbar={
                "x": 0.97,
                "xanchor": "right",
                "y": 0.97,
                "yanchor": "top",
                "len": 0.45,
                "thickness": 10,
                "title": {"text": "angular<br>distance", "side": "top"},
                "outlinewidth": 0,
                "nticks": 4,
            },
        )
    )
    best = [(min(range(len(row)), key=row.__getitem__), n) for n, row in zip(lengths, rows, strict=True) if row]
    small = {
        "symbol": "circle",
        "size": 5 if len(rows) <= 48 else 3,
        "color": "#ffffff",
        "line": {"width": 1, "color": "#333333"},
    }
    figure.add_scatter(
        x=[i for i, _ in best], y=[n for _, n in best], mode="markers", marker=small, name="cheapest of its length",
        hovertemplate="cheapest %{y} blocks: from block %{x}<extra></extra>",
    )  # fmt: skip
    spans = _cut_spans(run, stack)
    if spans:
        figure.add_scatter(
            x=[i for i, _ in spans], y=[n for _, n in spans], mode="markers", marker=RING, name="cut", cliponaxis=False,
            hovertemplate="cut: %{y} blocks from block %{x}<extra></extra>",
        )  # fmt: skip
    figure.update_xaxes(title_text="first block of the span", showgrid=False, range=[-0.5, widest - 0.5])
    figure.update_yaxes(title_text="blocks in the span", showgrid=False, range=[0.5, len(rows) + 0.5])
    return figure


def _cut_spans(run: Run, stack: str) -> list[tuple[int, int]]:
    """Runs of whole blocks that the plan drops: (first, length)."""
    spans: list[tuple[int, int]] = []
    for block in sorted(a.block for a in dropped(run) if a.stack == stack and a.sublayer is None):
        if spans and block == sum(spans[-1]):
            spans[-1] = (spans[-1][0], spans[-1][1] + 1)
        else:
            spans.append((block, 1))
    return spans


def _importance(run: Run, values: dict[Address, float]) -> go.Figure:
    figure = go.Figure()
    kinds: dict[str, list[Address]] = {}
    for address in sorted(values):
        kinds.setdefault(address.sublayer or "block", []).append(address)
    for kind, units in kinds.items():
        figure.add_scatter(
            x=[u.block for u in units], y=[values[u] for u in units], name=kind_name(kind), mode="lines+markers",
            line={"width": 1, "color": KINDS.get(kind, OTHER)}, marker={"size": 6, "color": KINDS.get(kind, OTHER)},
            customdata=[str(u) for u in units], hovertemplate="%{customdata}: %{y:.4g}<extra></extra>",
        )  # fmt: skip
    drops = dropped(run)
    cut = [u for u in sorted(values) if is_cut(u, drops)]
    if cut:
        figure.add_scatter(
            x=[u.block for u in cut], y=[values[u] for u in cut], name="cut", mode="markers", marker=RING,
            hoverinfo="skip",
        )  # fmt: skip
    figure.update_xaxes(title_text="block", showgrid=False)
    figure.update_yaxes(type="log" if _wide(values.values()) else "linear", nticks=6)
    return figure


def _wide(values: Iterable[float]) -> bool:
    """Does a linear scale crush most of them? (The first and last block often tower over the rest.)"""
    ordered = sorted(values)
    return ordered[0] > 0 and ordered[-1] > 20 * ordered[len(ordered) // 2]


def _stack_title(stack: str, stacks: dict[str, Any]) -> str:
    return stack if len(stacks) > 1 else ""


def span_sentence(run: Run) -> str:
    """The spans that turn the stream least, one sentence a stack: a single block, and four in a row."""
    maps = run.measures.angular if run.measures else {}
    sentences = []
    for stack, rows in maps.items():
        best = {n: min(range(len(rows[n - 1])), key=rows[n - 1].__getitem__) for n in (1, 4) if len(rows) > n}
        spans = [f"block {i}" if n == 1 else f"of {n} in a row, blocks {i} to {i + n - 1}" for n, i in best.items()]
        if spans:
            sentences.append(f"The least turn in {stack}: {'; '.join(spans)}.")
    return " ".join(sentences)
