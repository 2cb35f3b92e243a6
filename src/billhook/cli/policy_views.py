"""A policy's report for people."""

from __future__ import annotations

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from billhook.plan.policy_record import PolicyReport, Savings
from billhook.plan.record import TextEvidence


def views(report: PolicyReport) -> list[RenderableType]:
    """What it saves, what it costs, and how long things take."""
    found: list[RenderableType] = []
    if report.savings is not None:
        found += [_work(report.savings), _quality(report.evidence)]
    if report.drafting is not None:
        found.append(Text(f"{report.drafting}; {report.drafting.same_text:.1%} of the texts as without"))
    if report.timings:
        speed = _table("workload", "speed-up", "quartiles", "tokens/s")
        for timing in report.timings:
            ratio = timing.speedup
            speed.add_row(
                timing.workload.name,
                f"{ratio.value:.2f}x",
                f"{ratio.low:.2f} to {ratio.high:.2f}",
                f"{timing.compressed_tokens_per_second:.0f}",
            )
        found.append(speed)
        found.append(Text(report.timings[0].engine, style="dim"))
    found.append(Text(f"keys and values: {report.kv}", style="dim"))
    return found


def _work(saved: Savings) -> Table:
    work = _table("work of a generated token", "with", "plain")
    work.add_row("blocks run", f"{saved.blocks:.2f}", str(saved.blocks_plain))
    work.add_row("FLOPs", f"{saved.flops:.1%}", "100%")
    work.add_row("KV cache", f"{saved.kv_bytes:.1%}", "100%")
    return work


def _quality(evidence: tuple[TextEvidence, ...]) -> Table:
    quality = _table("text", "perplexity", "plain", "KL", "same top-1")
    for text in evidence:
        quality.add_row(
            text.name,
            f"{text.perplexity_compressed.value:.2f}",
            f"{text.perplexity_dense.value:.2f}",
            f"{text.kl.value:.4f} ({text.kl.low:.4f} to {text.kl.high:.4f})",
            f"{text.top1.value:.1%}",
        )
    return quality


def _table(*headings: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left")
    return table
