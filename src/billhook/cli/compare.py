"""``billhook compare``."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from billhook.cli import options
from billhook.cli.output import comparison_json, print_json, print_views
from billhook.cli.progress import bars

if TYPE_CHECKING:
    from billhook.plan.comparison import Entry

_BUDGETS = "One or more budgets, each a fraction of dense or a number with its unit: params=0.9,0.8,0.7."
_RECIPES = (
    "A method to take part: a name or a YAML file; give it again for more. "
    "If not given, all that come along but those of single weights."
)
_HEAL = "[bold]closed-form[/]: judge each result once more after its linears were refitted, and go by that."


def compare(
    model: options.Model,
    budget: Annotated[str, typer.Option(metavar="KIND=NUMBER,...", show_default=False, help=_BUDGETS)],
    out: options.Out,
    recipe: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME|FILE", show_default=False, autocompletion=options.recipe_names, help=_RECIPES),
    ] = None,
    heal: Annotated[Literal["none", "closed-form"], typer.Option(metavar="NAME", help=_HEAL)] = "none",
    calibration: options.Calibration = "builtin",
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
    seed: options.Seed = 0,
    dtype: options.Dtype = options.DtypeName.AUTO,
    device: options.Device = "cpu",
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Run every method on MODEL at each budget, and say which cuts it best.

    DIR gets comparison.html and comparison.json. Random and evenly spaced removal always take part.
    Results are judged as they were cut, also where the recipe would heal; --heal closed-form adds the healed figures.
    An interrupted run continues where it was when the same command is given again.

    [dim]Example:[/] billhook compare demo --budget params=0.9,0.8,0.7 --out out/comparison
    """
    with bars() as progress:
        from billhook.recipes.compare import compare as walk

        result = walk(
            model,
            budgets=budget,
            out=out,
            recipes=recipe or (),
            heal=heal,
            calibration=calibration,
            seed=seed,
            dtype=dtype.chosen,
            device=device,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
            progress=progress,
            told=_rows(),
        )
    if as_json:
        print_json(comparison_json(result, out))
        return
    from billhook.cli.comparison import advice, tables

    print_views(*tables(result), advice(result, out))


def _rows() -> Callable[[Entry], None]:
    """A table on standard error that grows by a row with each result; the bars stay below it."""
    from billhook.cli.comparison import row

    begun = False

    def tell(entry: Entry) -> None:
        nonlocal begun
        if not begun:
            typer.echo(_line("method", "budget", "× perplexity", "answers", "block-tokens"), file=sys.stderr)
            begun = True
        typer.echo(_line(*row(entry)), file=sys.stderr)

    return tell


def _line(method: str, budget: str, *cells: str) -> str:
    """At most 78 columns; the last cell of a method that was refused, and its only one, says why in as many lines as it
    takes."""
    start = f"{method:<24} {budget:<14} "
    if len(cells) > 1:
        return start + "".join(map("{:>{}}".format, cells, (15, 8, 15)))
    return textwrap.fill(cells[0], 78, initial_indent=start, subsequent_indent="    ", break_on_hyphens=False)
