"""Where a result comes from: everything needed to judge it and to make it again."""

from __future__ import annotations

from collections.abc import Mapping

from billhook.plan.record import Run
from billhook.report.headline import budget_name
from billhook.report.healing import way
from billhook.report.numbers import duration, percent, quantity


def facts(run: Run) -> list[tuple[str, str]]:
    """Name and value of every fact that is known, in reading order."""
    made, measures, search = run.plan.provenance, run.measures, run.search
    calibration = measures.calibration if measures else ""
    found = [
        ("model", run.model),
        ("fingerprint of the model", made.model),
        ("calibration", calibration or made.calibration),
        ("fingerprint of the calibration", made.calibration if calibration != made.calibration and calibration else ""),
        ("calibration tokens", f"{measures.tokens:,}" if measures and measures.tokens else ""),
        ("recipe", made.recipe),
        ("base", run.returned.base if run.returned else ""),
        ("budget asked", run.asked or ""),
        *((f"{budget_name(name)} kept", percent(value)) for name, value in run.realised.items()),
        ("target", "" if run.plan.empty else str(run.plan.target)),
        ("seed", "" if made.seed is None else str(made.seed)),
    ]
    if search:
        surveyed = f"{search.surveyed:,}, for statistics of one pass" if search.surveyed else ""
        work = quantity(search.work, "block-token forwards")
        found += [
            ("search", f"{search.recipe}, objective {search.objective.replace('_', ' ')}"),
            ("tokens surveyed", surveyed),
            ("work of the search", f"{work} in {search.evaluations:,} evaluations"),
        ]
    if healing := run.healing:
        taken = sum(refit.taken for refit in healing.refits)
        told = healing.refits and not healing.refused
        refitted = f", {taken} of {len(healing.refits)} weights refitted" if told else ""
        grafted = sum(graft.neurons for graft in healing.grafts)
        found += [
            ("act" if healing.combined else "healing", f"{way(healing)}{refitted}"),
            ("paths of low rank", _ranks(healing.paths)),
            ("bridges across gaps", _ranks(healing.bridges)),
            ("neurons grafted", f"{grafted:,}" if grafted and not healing.refused else ""),
            ("healed on", ", then ".join(dict.fromkeys(step.text for step in healing.steps))),
            ("healing tokens", f"{healing.tokens:,}" if healing.tokens else ""),
            ("work of the healing", quantity(healing.work, "block-token forwards") if healing.work else ""),
        ]
        if training := healing.training:
            found += [
                ("trained parameters", f"{training.parameters:,}"),
                ("training tokens", f"{training.tokens:,}, {training.tokens_a_step:,} a step"),
                ("goal of the training", {"dense": "the dense model's next tokens", "text": "the text"}[training.goal]),
            ]
            if chosen := training.selection:
                kinds = f" of {len(chosen.groups)} kinds" if chosen.groups else ""
                towards = f", towards {chosen.target}" if chosen.target else ""
                found += [
                    ("training text selected", f"{chosen.word}{towards}: {chosen.why}"),
                    ("windows selected", f"{chosen.chosen:,} of {chosen.windows:,}{kinds}"),
                    ("weight of the windows", f"as {chosen.effective:,.0f} of equal weight"),
                    ("duplicates left out", f"{chosen.duplicates:,} of {chosen.parts:,} parts of the text"),
                    ("conflicting windows left out", f"{chosen.screened:,}" if chosen.screened else ""),
                ]
    found += [(f"time: {name.replace('_', ' ')}", duration(value)) for name, value in run.seconds.items()]
    found += made.versions.items()
    found += [(name.replace("_", " "), value) for name, value in run.environment.items()]
    return [(name, value) for name, value in found if value]


def searched_now(run: Run) -> bool:
    """Whether the search is of this run, and not of an earlier one whose result this run went on from."""
    return run.search is not None and "search" in run.seconds


def _ranks(paths: Mapping[str, int]) -> str:
    """``35, of rank 2 to 4``"""
    found = sorted(set(paths.values()))
    return f"{len(paths):,}, of rank {found[0]:,}" + (f" to {found[-1]:,}" if found[1:] else "") if found else ""
