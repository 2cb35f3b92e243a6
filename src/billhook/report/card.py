"""The model card: README.md of the checkpoint."""

from __future__ import annotations

import re

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from billhook.plan.record import Run
from billhook.plan.target import Target
from billhook.report import answers, cuts, headline, healing, loading, numbers, provenance
from billhook.report.cuts import tied

_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def card(run: Run) -> str:
    """The card as Markdown with YAML front matter, as model hubs read it. Text from the run is escaped."""
    environment = Environment(
        loader=PackageLoader("billhook.report"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": numbers.number, "percent": numbers.percent, "spread": numbers.spread,
                            "points": numbers.points, "quantity": numbers.bare,
                            "budget": headline.budget_name, "text": _text}  # fmt: skip
    return environment.get_template("card.md").render(
        run=run,
        front=yaml.safe_dump(_front(run), sort_keys=False, allow_unicode=True),
        title=headline.title(run),
        verdict=headline.verdict(run),
        healing=healing.sentence(run),
        away=healing.away(run),
        summary=cuts.summary(run),
        probe_sentence=answers.of_run(run),
        repetition=answers.repetition(run.generations),
        loading=loading.loading(run),
        commands=loading.commands(run),
        facts=provenance.facts(run),
    )


def _front(run: Run) -> dict[str, object]:
    ordinary = loading.is_ordinary(run)
    front: dict[str, object] = {
        "library_name": "transformers" if ordinary or run.plan.target is not Target.ANY else "billhook"
    }
    if _HUB_ID.fullmatch(run.model):  # a folder or a file is nothing that a hub could link to
        front["base_model"] = run.model
    if loading.is_language_model(run.outline):
        front["pipeline_tag"] = "text-generation"
    if run.returned:
        return front | {"tags": ["billhook", "restored", f"target-{run.plan.target}"]}
    edited = run.plan.keeps or run.plan.channels or run.plan.sparsities or run.plan.factors or run.plan.schedule
    ways = ["depth-pruning"] if run.plan.drops or not edited else []
    ways += ["width-pruning"] if run.plan.keeps or run.plan.channels else []
    ways += sorted({f"sparsity-{edit.pattern.replace(':', '-')}" for edit in run.plan.sparsities})
    ways += ["low-rank"] if run.plan.factors else []
    ways += ["weight-sharing"] if tied(run) else []
    return front | {"tags": ["billhook", "pruned", *ways, f"target-{run.plan.target}"]}


def _text(value: object) -> str:
    """Text that Markdown shows as it is, also inside a table."""
    flat = " ".join(str(value).split())
    return re.sub(r"([\\`*_{}\[\]<>#|~&])", r"\\\1", flat)
