"""The pictures of a depth audit."""

from __future__ import annotations

import math
from collections.abc import Sequence

import plotly.graph_objects as go

from billhook.plan.address import Address
from billhook.plan.audit import Matrix, StackAudit
from billhook.report.figures import Picture, picture
from billhook.report.palette import COMPRESSED, CUT, KINDS, OTHER, kind_name

OUTPUT = {"kl": "divergence, nats", "stream": "error of the last stream"}
_SMALL = {"thickness": 10, "outlinewidth": 0, "nticks": 5}


def contributions(audit: StackAudit) -> list[Picture]:
    """What each sublayer writes: its size relative to the stream, and its direction."""
    found = []
    for name, title, values in (
        ("size", "size of what is written, relative to the stream", audit.size),
        ("alignment", "its cosine with the stream", audit.alignment),
    ):
        figure = go.Figure()
        kinds: dict[str, list[tuple[int, float]]] = {}
        for unit, value in values.items():
            address = Address.parse(unit)
            if address.sublayer is not None:
                kinds.setdefault(address.sublayer, []).append((address.block, value))
        for kind, points in kinds.items():
            blocks, heights = zip(*sorted(points), strict=True)
            _line(figure, blocks, heights, kind_name(kind), KINDS.get(kind, OTHER))
        if audit.transition is not None and audit.transition.found:
            figure.add_vline(x=audit.transition.block - 0.5, line={"dash": "dot", "color": CUT})
        figure.update_xaxes(title_text="block", showgrid=False)
        figure.update_yaxes(type="log" if name == "size" and min(values.values()) > 0 else "linear", nticks=6)
        found.append(picture(f"audit-{name}", title, figure, 270))
    return found


def skips(audit: StackAudit) -> list[Picture]:
    """Skipped block against affected block, now and later, and the output."""
    if audit.skips is None:
        return []
    panels = [("now", "for the tokens that skip", audit.skips.now)]
    panels += [("future", "for later tokens, which skip nothing", audit.skips.future)] if audit.skips.future else []
    found = [
        picture(f"audit-skip-{name}", title, _map(rows, "affected block", "skipped block", "change", most=1.0), 400)
        for name, title, rows in panels
    ]
    figure = go.Figure()
    blocks = range(len(audit.skips.output_now))
    _line(figure, blocks, audit.skips.output_now, "tokens that skip", COMPRESSED)
    if audit.skips.output_future:
        _line(figure, blocks, audit.skips.output_future, "later tokens", CUT)
    figure.update_xaxes(title_text="skipped block", showgrid=False)
    figure.update_yaxes(title_text=OUTPUT[audit.output], type="log", nticks=6)
    return [*found, picture("audit-skip-output", "what becomes of the output", figure, 270)]


def maps(audit: StackAudit) -> list[Picture]:
    """Affine maps and CKA between all depths."""
    r2 = _map(audit.r2, "to depth", "from depth", "R²", names=audit.depths, least=0.0, most=1.0)
    cka = _map(audit.cka, "depth", "depth", "CKA", names=audit.depths, least=0.0, most=1.0)
    return [
        picture("audit-r2", "explained by an affine map (R²)", r2, 400),
        picture("audit-cka", "likeness (linear CKA)", cka, 400),
    ]


def tokenwise(audit: StackAudit) -> list[Picture]:
    """The tokenwise part of every update, and the rest against the output."""
    rows = audit.tokenwise
    blocks = range(len(rows))
    lines = go.Figure()
    _line(lines, blocks, [row.explained for row in rows], "explained share", COMPRESSED)
    _line(lines, blocks, [row.cosine_tokenwise for row in rows], "cosine with tokenwise part", KINDS["mlp"])
    _line(lines, blocks, [row.cosine_rest for row in rows], "cosine with the rest", CUT)
    lines.update_xaxes(title_text="block", showgrid=False)
    found = [picture("audit-tokenwise", "each update, split", lines, 300)]
    known = [(i, row) for i, row in enumerate(rows) if row.output is not None]
    if known:
        dots = go.Figure()
        dots.add_scatter(
            x=[1 - row.explained for _, row in known], y=[row.output for _, row in known], mode="markers",
            marker={"size": 7, "color": [i for i, _ in known], "colorscale": "Viridis", "showscale": True,
                    "colorbar": {**_SMALL, "title": {"text": "block"}}},
            customdata=[i for i, _ in known],
            hovertemplate="block %{customdata}: %{x:.3f} unexplained, %{y:.3g}<extra></extra>",
        )  # fmt: skip
        dots.update_xaxes(title_text="share of the update that is not tokenwise")
        dots.update_yaxes(title_text=OUTPUT[audit.output], type="log", nticks=6)
        found.append(picture("audit-rest", "a map in the place of the block", dots, 300))
    return found


def stitches(audit: StackAudit) -> list[Picture]:
    """What becomes of the output when one depth gets the mapped stream of another."""
    if audit.stitches is None:
        return []
    title = f"what becomes of the output ({OUTPUT[audit.output]})"
    names = audit.stitches.depths
    figure = _map(audit.stitches.output, "to depth", "from depth", "change", names=names, log=True)
    return [picture("audit-stitches", title, figure, 400)]


def neighbours(audit: StackAudit) -> list[Picture]:
    """How much tokens have in common with those before them."""
    figure = go.Figure()
    hues = ("#08306b", "#2f6fb5", "#6aa6d8", "#a9c9e6")
    for (gap, row), hue in zip(audit.neighbours.items(), hues, strict=False):
        if any(value is not None for value in row):
            _line(figure, audit.depths, row, f"{gap} apart", hue)
    figure.update_xaxes(title_text="depth", showgrid=False)
    figure.update_yaxes(title_text="cosine", nticks=6)
    return [picture("audit-neighbours", "", figure, 300)] if figure.data else []


def _line(figure: go.Figure, x: Sequence[int], y: Sequence[float | None], name: str, hue: str) -> None:
    figure.add_scatter(
        x=list(x), y=list(y), name=name, mode="lines+markers", line={"width": 1, "color": hue},
        marker={"size": 5, "color": hue}, hovertemplate=f"%{{x}}: %{{y:.4g}}<extra>{name}</extra>",
    )  # fmt: skip


def _map(
    rows: Matrix,
    x: str,
    y: str,
    what: str,
    *,
    names: tuple[int, ...] | None = None,
    least: float | None = None,
    most: float | None = None,
    log: bool = False,
) -> go.Figure:
    """A heat map, rows from the top; with ``log`` the colours follow the logarithm, and 0 has none."""
    labels = [str(n) for n in (names or range(len(rows)))]
    shown = [[_log(v) if log else v for v in row] for row in rows]
    bar = {**_SMALL, "title": {"text": what, "side": "top"}}
    if log:
        finite = [v for row in shown for v in row if v is not None]
        ticks = list(range(math.floor(min(finite, default=0)), math.ceil(max(finite, default=0)) + 1))
        bar |= {"tickvals": ticks, "ticktext": [f"{10.0**t:g}" for t in ticks]}
    figure = go.Figure(
        go.Heatmap(
            z=shown, x=labels, y=labels, customdata=rows, colorscale="Viridis", zmin=least, zmax=most, colorbar=bar,
            hoverongaps=False, hovertemplate=f"{y} %{{y}}, {x} %{{x}}: %{{customdata:.3g}}<extra></extra>",
        )
    )  # fmt: skip
    figure.update_xaxes(title_text=x, showgrid=False, type="category", nticks=10)
    figure.update_yaxes(title_text=y, showgrid=False, type="category", autorange="reversed", nticks=10)
    return figure


def _log(value: float | None) -> float | None:
    return math.log10(value) if value else None
