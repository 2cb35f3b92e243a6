"""The pictures of the result: the path of the search, speed, memory."""

from __future__ import annotations

import textwrap

import plotly.graph_objects as go

from billhook.plan.address import Address
from billhook.plan.budget import Budget
from billhook.plan.check import normalise
from billhook.plan.record import Run, SearchRecord, Step, Timing
from billhook.report.cuts import dropped
from billhook.report.figures import RING, Picture, picture, plain
from billhook.report.headline import asked_fractions, budget_name
from billhook.report.numbers import percent, quantity
from billhook.report.palette import COMPRESSED, CUT, DENSE, KINDS, OTHER, kind_name


def search_path(run: Run) -> list[Picture]:
    """The objective after every step against what is kept; empty where the search never looked at it."""
    search = run.search
    budget = _path_budget(run)
    if search is None or budget is None:
        return []
    seen = [(i, step) for i, step in enumerate(search.steps) if step.objective is not None and budget in step.realised]
    if not seen:
        return []
    figure = go.Figure()
    kept = [step.realised[budget] for _, step in seen]
    height = [step.objective for _, step in seen]
    figure.add_scatter(
        x=kept, y=height, mode="lines", line={"width": 1.5, "color": OTHER}, hoverinfo="skip", showlegend=False
    )
    kinds = [_kind(step.units or step.restored) for _, step in seen]
    for kind in dict.fromkeys(kinds):
        chosen = [n for n, k in enumerate(kinds) if k == kind]
        figure.add_scatter(
            x=[kept[n] for n in chosen], y=[height[n] for n in chosen], mode="markers", name=kind_name(kind),
            marker={"size": 8, "color": KINDS.get(kind, OTHER)},
            customdata=[[seen[n][0] + 1, _change(seen[n][1])] for n in chosen],
            hovertemplate="step %{customdata[0]}: %{customdata[1]}<br>%{x:.1%} kept, "
            + plain(search.objective.replace("_", " ")) + " %{y:.4g}<extra></extra>",
        )  # fmt: skip
    stop = _stop(run, search)
    if stop is not None and stop in dict(seen):
        step = dict(seen)[stop]
        figure.add_scatter(
            x=[step.realised[budget]], y=[step.objective], mode="markers", name="the plan", marker=RING | {"size": 16},
            hoverinfo="skip",
        )  # fmt: skip
    if stop is not None and stop + 1 in dict(seen) and run.asked and Budget.parse(run.asked).until_cliff:
        step = dict(seen)[stop + 1]
        figure.add_scatter(
            x=[step.realised[budget]], y=[step.objective], mode="markers", name="the cliff",
            marker={"symbol": "x", "size": 12, "color": CUT}, hoverinfo="skip",
        )  # fmt: skip
    asked = asked_fractions(run).get(budget)
    if asked is not None:
        figure.add_vline(x=asked, line={"width": 1.5, "dash": "dot", "color": CUT})
        figure.add_annotation(
            x=asked, y=1, yref="paper", text=f"asked: {percent(asked)}", showarrow=False,
            xanchor="right", yanchor="top", xshift=-6, font={"color": CUT},
        )  # fmt: skip
    last = min([*kept, *([asked] if asked is not None else [])])
    end = last - 0.04 * (1 - last)
    figure.update_xaxes(title_text=f"{budget_name(budget)} kept", tickformat=".0%", range=[1, end])
    figure.update_yaxes(title_text=plain(search.objective.replace("_", " ")), nticks=7)
    return [picture("search-path", "", figure, 360)]


def speedups(run: Run) -> list[Picture]:
    """Dense time / compressed time of every workload with quartiles, and the ideal as a tick."""
    if not run.timings:
        return []
    names = _workload_names(run.timings)
    figure = go.Figure()
    values = [t.speedup for t in run.timings]
    figure.add_scatter(
        x=[v.value for v in values], y=names, mode="markers", name="measured",
        marker={"size": 11, "color": COMPRESSED},
        error_x={"type": "data", "symmetric": False, "array": [v.high - v.value for v in values],
                 "arrayminus": [v.value - v.low for v in values], "color": COMPRESSED, "thickness": 2, "width": 5},
        hovertemplate="%{y}: %{x:.3f} times<extra></extra>",
    )  # fmt: skip
    ideal = [(t.ideal_speedup, n) for t, n in zip(run.timings, names, strict=True) if t.ideal_speedup is not None]
    if ideal:
        figure.add_scatter(
            x=[x for x, _ in ideal], y=[n for _, n in ideal], mode="markers", name="ideal",
            marker={"symbol": "line-ns", "size": 20, "line": {"width": 2.5, "color": OTHER}},
            hovertemplate="%{y}: at best %{x:.3f} times<extra></extra>",
        )  # fmt: skip
    figure.add_vline(x=1, line={"width": 1.5, "dash": "dot", "color": DENSE})
    figure.update_xaxes(title_text="times as fast as dense", nticks=6)
    figure.update_yaxes(showgrid=False, autorange="reversed", type="category")
    return [picture("speed", "speed", figure, 110 + 52 * len(names))]


def memory(run: Run) -> list[Picture]:
    """Compressed bytes in percent of dense, peak and KV cache."""
    names = _workload_names(run.timings)
    figure = go.Figure()
    for label, color, dense, compressed in (
        ("peak memory", COMPRESSED, "dense_peak_bytes", "compressed_peak_bytes"),
        ("KV cache", KINDS["attention"], "dense_cache_bytes", "compressed_cache_bytes"),
    ):
        pairs = [(name, getattr(t, dense), getattr(t, compressed)) for t, name in zip(run.timings, names, strict=True)]
        pairs = [(name, before, after) for name, before, after in pairs if before and after is not None]
        if pairs:
            figure.add_bar(
                x=[after / before for _, before, after in pairs], y=[name for name, _, _ in pairs], name=label,
                orientation="h", marker={"color": color, "opacity": 1 if label == "peak memory" else 0.55},
                text=[percent(after / before) for _, before, after in pairs], textposition="inside",
                insidetextanchor="end", insidetextfont={"color": "#ffffff"},
                customdata=[f"{quantity(b, 'bytes')} → {quantity(a, 'bytes')}" for _, b, a in pairs],
                hovertemplate="%{y}, " + label + ": %{customdata}<extra></extra>",
            )  # fmt: skip
    if not figure.data:
        return []
    rows = len({name for trace in figure.data for name in trace.y})
    figure.add_vline(x=1, line={"width": 1.5, "dash": "dot", "color": DENSE})
    figure.update_layout(bargap=0.35, bargroupgap=0.08)
    figure.update_xaxes(title_text="share of the dense model's bytes", tickformat=".0%", rangemode="tozero", nticks=6)
    figure.update_yaxes(showgrid=False, autorange="reversed", type="category")
    return [picture("memory", "memory", figure, 110 + 52 * rows)]


def _path_budget(run: Run) -> str | None:
    steps = run.search.steps if run.search else ()
    known = list(steps[-1].realised) if steps else []
    return next((name for name in (*asked_fractions(run), "params", *known) if name in known), None)


def _stop(run: Run, search: SearchRecord) -> int | None:
    """The step at which the search stood at the plan: the last one of most searches, an earlier one of those that look
    past the cut-off."""
    goal, gone = dropped(run), set[Address]()
    for i, step in enumerate(search.steps):
        gone |= {Address.parse(unit) for unit in step.units}
        gone -= {Address.parse(unit) for unit in step.restored}
        if normalise(gone, run.outline) == goal:
            return i
    return None


def _kind(units: tuple[str, ...]) -> str:
    kinds = {Address.parse(unit).sublayer or "block" for unit in units}
    return kinds.pop() if len(kinds) == 1 else "several kinds"


def _change(step: Step) -> str:
    """What a step did: ``drop decoder.3, put back decoder.5.mlp``."""
    done = (("drop", step.units), ("put back", step.restored))
    return ", ".join(f"{verb} {_units(units)}" for verb, units in done if units)


def _units(units: tuple[str, ...]) -> str:
    shown = ", ".join(units[:4]) + (f" and {len(units) - 4} more" if len(units) > 4 else "")
    return plain(shown)


def _workload_names(timings: tuple[Timing, ...]) -> list[str]:
    """One label a timing, wrapped for narrow screens; the engine where there are several."""
    several = len({t.engine for t in timings}) > 1
    labels = [t.workload.name + (f" ({t.engine})" if several else "") for t in timings]
    return ["<br>".join(plain(line) for line in textwrap.wrap(label, 18)) or "workload" for label in labels]


def speed_sentence(run: Run) -> str:
    """How much of the ideal was reached, in words."""
    if not run.timings:
        return ""
    words = "A dot is the median over rounds, its whiskers the quartiles."
    shares = [t.speedup.value / t.ideal_speedup for t in run.timings if t.ideal_speedup]
    if not shares:
        return words
    low, high = percent(min(shares)), percent(max(shares))
    reached = low if low == high else f"{low} to {high}"
    return f"{words} The grey tick is the best that the removed blocks could give; {reached} of it is reached."
