"""The report: one HTML page that needs no network."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from billhook.plan.record import Run
from billhook.report import (
    answers,
    audit,
    cuts,
    drawing,
    figures,
    figures_result,
    figures_training,
    headline,
    healing,
    loading,
    numbers,
    palette,
    provenance,
)


def page(run: Run) -> str:
    """A run as one self-contained HTML page (about 5 MB, nearly all of it plotly's script).

    Sections whose part of ``run`` is absent are left out. A run whose plan cuts nothing and that holds only measures
    reads as an inspection. Every string from the run is escaped.
    """
    return rendered("page.html", _context(run))


def rendered(template: str, context: dict[str, Any]) -> str:
    """A template of this room, with the style, the script and (if ``drawing``) plotly inside."""
    environment = Environment(
        loader=PackageLoader("billhook.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": numbers.number, "percent": numbers.percent, "spread": numbers.spread,
                            "points": numbers.points, "quantity": numbers.quantity, "cost": numbers.bare,
                            "kind": palette.kind_name, "budget": headline.budget_name, "spec": _spec}  # fmt: skip
    shared = {
        "palette": palette,
        "style": Markup(_asset("style.css")),
        "script": Markup(_asset("draw.js")),
        # nothing to draw, nothing to carry along
        "plotly": Markup(get_plotlyjs()) if context["drawing"] else None,
    }
    return environment.get_template(template).render(shared | context)


def write_report(run: Run, folder: Path) -> Path:
    """Write the page as ``report.html`` into ``folder``, which is made if absent; returns the path of the page."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "report.html"
    path.write_text(page(run), encoding="utf-8")
    return path


def _context(run: Run) -> dict[str, Any]:
    pictures = {
        "angular": figures.angular_maps(run),
        "importance": figures.importance(run),
        "path": figures_result.search_path(run),
        "training": figures_training.curve(run),
        "speed": figures_result.speedups(run) + figures_result.memory(run),
    }
    columns = drawing.columns(run)
    audited = audit.parts(run)
    return {
        "run": run,
        "title": headline.title(run),
        "inspection": run.plan.empty and run.returned is None,
        "verdict": headline.verdict(run),
        "tiles": headline.tiles(run),
        "columns": columns,
        "kinds": list(dict.fromkeys(cell.kind for c in columns for row in c.rows for cell in row.cells)),
        "summary": cuts.summary(run) if not run.plan.empty else cuts.parts(run),
        "probe_sentence": answers.of_run(run),
        "repetition": answers.repetition(run.generations),
        "pictures": pictures,
        "importance_sentence": f"{figures.importance_sentence(run)} {figures.complexity_sentence(run)}".strip(),
        "span_sentence": figures.span_sentence(run) if pictures["angular"] else "",
        "stages": healing.stages(run),
        "healing": healing.way(run.healing) if run.healing else "",
        "away": healing.away(run),
        "training_sentence": figures_training.sentence(run),
        "speed_sentence": figures_result.speed_sentence(run),
        "loading": loading.loading(run),
        "commands": loading.commands(run),
        "facts": provenance.facts(run),
        "earlier": run.search is not None and not provenance.searched_now(run),
        "audit": audited,
        "audit_basis": audit.basis(run),
        "drawing": any(pictures.values()) or bool(audited),
    }


def _spec(picture: figures.Picture) -> Markup:
    """A figure as JSON that cannot close the script element it stands in."""
    return Markup(json.dumps(picture.spec, separators=(",", ":")).replace("<", "\\u003c"))


def _asset(name: str) -> str:
    return files("billhook.report").joinpath("templates", name).read_text(encoding="utf-8")
