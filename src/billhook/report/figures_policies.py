"""Quality against measured time, a line a policy."""

from __future__ import annotations

import math
from collections.abc import Callable

import plotly.graph_objects as go

from billhook.plan.policy_comparison import PolicyComparison, PolicyEntry
from billhook.report.figures import Picture, picture, plain
from billhook.report.palette import COMPRESSED, CUT, OTHER


def policy_front(comparison: PolicyComparison) -> list[PolicyEntry]:
    """The Pareto front: entries for which none writes as fast or faster with less damage, the fastest first."""
    found: list[PolicyEntry] = []
    best = float("inf")
    met = (entry for entry in comparison.entries if not entry.refused)
    for entry in sorted(met, key=lambda e: (-e.speedup, e.damage, e.name)):
        if entry.damage < best:
            best = entry.damage
            found.append(entry)
    return found


def policy_pictures(comparison: PolicyComparison) -> list[Picture]:
    """Damage against speed, and exact answers against speed where they were asked; empty where nothing was measured."""
    lines: dict[str, list[PolicyEntry]] = {}
    for entry in comparison.entries:
        if not entry.refused:
            lines.setdefault(entry.name, []).append(entry)
    if all(entry.baseline for entries in lines.values() for entry in entries):
        return []
    damage = _against_speed(lines, comparison, lambda entry: entry.damage, logarithmic=True)
    damage.update_yaxes(title_text="perplexity, times plain", type="log", nticks=8)
    found = [picture("damage", "How likely it finds the text", damage, 460)]
    asked = {name: [e for e in entries if e.exact is not None or e.drafting] for name, entries in lines.items()}
    if comparison.plain_exact is not None:
        kept = comparison.plain_exact
        exact = _against_speed(asked, comparison, lambda entry: kept if entry.exact is None else entry.exact)
        exact.update_yaxes(title_text="exact answers", tickformat=".0%", rangemode="tozero")
        found.append(picture("exact", "What it can still do", exact, 460))
    return found


def _against_speed(
    lines: dict[str, list[PolicyEntry]],
    comparison: PolicyComparison,
    height: Callable[[PolicyEntry], float],
    *,
    logarithmic: bool = False,
) -> go.Figure:
    """Annotations on a logarithmic axis are placed by the exponent."""
    figure = go.Figure()
    on_front = {entry.name for entry in policy_front(comparison)}
    for name, entries in lines.items():
        if not entries:
            continue
        entries = sorted(entries, key=lambda e: e.asked.rpartition("=")[2], reverse=True)
        base = entries[0].baseline
        colour = OTHER if base else COMPRESSED if name in on_front else CUT
        low = [e.speedup - e.timing.speedup.low if e.timing else 0.0 for e in entries]
        high = [e.timing.speedup.high - e.speedup if e.timing else 0.0 for e in entries]
        label = plain(name)
        figure.add_scatter(
            x=[e.speedup for e in entries], y=[height(e) for e in entries], name=label, mode="lines+markers",
            line={"width": 1.2, "color": colour, "dash": "dot" if base else "solid"}, showlegend=False,
            marker={"size": 7, "color": colour}, opacity=1.0 if name in on_front else 0.6,
            error_x={"type": "data", "array": high, "arrayminus": low, "thickness": 1, "width": 0, "color": colour},
            text=[plain(e.asked or "as given") for e in entries],
            hovertemplate=f"{label}, %{{text}}: %{{x:.2f}} times as fast, %{{y:.3g}}<extra></extra>",
        )  # fmt: skip
        if name.startswith("at random"):
            continue  # three draws of one thing: a label would say nothing
        last = entries[-1]
        figure.add_annotation(
            x=last.speedup, y=math.log10(height(last)) if logarithmic else height(last), text=label, showarrow=False,
            xanchor="left", yanchor="middle", xshift=8, font={"color": colour, "size": 11},
        )  # fmt: skip
    figure.update_xaxes(title_text="times as fast as the plain model", ticksuffix="×")
    return figure
