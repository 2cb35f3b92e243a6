"""Quality against budget, a line a method, and the front: the best at each budget."""

from __future__ import annotations

import math

import plotly.graph_objects as go

from billhook.plan.budget import Budget
from billhook.plan.comparison import Comparison, Entry
from billhook.report.figures import Picture, picture, plain
from billhook.report.headline import budget_name
from billhook.report.numbers import number
from billhook.report.palette import COMPRESSED, CUT, OTHER

USABLE = 20.0
"""Times the perplexity of dense: what is worse is no longer a language model, and would hide the others."""


def name(entry: Entry, comparison: Comparison) -> str:
    """The recipe, with its seed where it was drawn more than once."""
    seeds = {other.seed for other in comparison.entries if other.recipe == entry.recipe}
    return f"{entry.recipe} (seed {entry.seed})" if len(seeds) > 1 else entry.recipe


def kept(entry: Entry) -> float:
    """What an entry keeps of what its budget limits, as a fraction of dense."""
    return entry.realised[_limited(entry.asked)]


def _limited(budget: str) -> str:
    return Budget.parse(budget).limits[0].kind


def front(comparison: Comparison) -> list[Entry]:
    """The entry with the least damage at each budget, in their order, without those above the ``ceiling``. By what was
    asked: by what is kept, one that is far worse would count for how it rounds to its budget."""
    best = [found[0] for budget in comparison.budgets if (found := comparison.at(budget))]
    top = ceiling(comparison) or math.inf
    return [entry for entry in best if entry.damage <= top]


def ceiling(comparison: Comparison) -> float | None:
    """The damage at which the picture ends, None where it shows all."""
    damages = [entry.damage for entry in comparison.entries if entry.evidence]
    top = max(USABLE, 3 * min(damages, default=1.0))
    return top if max(damages, default=1.0) > top else None


def quality(comparison: Comparison) -> list[Picture]:
    """Damage against what is kept of what the first budget that was met limits, up to the ``ceiling``; empty where
    nothing was judged."""
    lines: dict[str, list[Entry]] = {}
    for entry in comparison.entries:
        if entry.evidence:
            lines.setdefault(name(entry, comparison), []).append(entry)
    if not lines:
        return []
    figure = go.Figure()
    kind = next(_limited(budget) for budget in comparison.budgets if comparison.at(budget))

    def share(entry: Entry) -> float:
        return entry.realised[kind]

    best, top = sorted(front(comparison), key=share, reverse=True), ceiling(comparison)
    on_front = {name(entry, comparison) for entry in best}
    for label, entries in lines.items():
        entries = sorted(entries, key=share, reverse=True)
        colour = OTHER if entries[0].baseline else COMPRESSED if label in on_front else CUT
        figure.add_scatter(
            x=[share(e) for e in entries], y=[e.damage for e in entries], name=plain(label), mode="lines+markers",
            line={"width": 1.2, "color": colour, "dash": "dot" if entries[0].baseline else "solid"},
            marker={"size": 6, "color": colour}, opacity=1.0 if label in on_front else 0.55, showlegend=False,
            hovertemplate=f"{plain(label)}: %{{x:.1%}} kept, %{{y:.3g}} times the perplexity<extra></extra>",
        )  # fmt: skip
    figure.add_scatter(
        x=[share(e) for e in best], y=[e.damage for e in best], mode="lines", showlegend=False, hoverinfo="skip",
        line={"width": 4, "color": COMPRESSED}, opacity=0.35,
    )  # fmt: skip
    # annotations on a logarithmic axis are placed by the exponent
    for label in {name(entry, comparison): None for entry in best}:
        seen = [entry for entry in lines[label] if top is None or entry.damage <= top]
        entry = min(seen, key=share)
        figure.add_annotation(
            x=share(entry), y=math.log10(entry.damage), text=f"{plain(label)} {number(entry.damage)}×", showarrow=False,
            xanchor="left", yanchor="middle", xshift=8, font={"color": COMPRESSED},
        )  # fmt: skip
    shares = [share(e) for entries in lines.values() for e in entries]
    room = 0.35 * max(1 - min(shares), 0.05)
    figure.update_xaxes(title_text=f"{budget_name(kind)} kept", tickformat=".0%", range=[1, min(shares) - room])
    figure.update_yaxes(title_text="perplexity, times dense", type="log", nticks=8)
    if top is not None:
        least = min(e.damage for entries in lines.values() for e in entries)
        figure.update_yaxes(
            range=[math.log10(least) - 0.05, math.log10(top)], tickvals=[1, 1.5, 2, 3, 5, 10, 20, 50, 100]
        )
    return [picture("quality", "", figure, 520)]
