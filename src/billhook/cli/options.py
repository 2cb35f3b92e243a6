"""The options that several commands share: one name, one meaning, one help text."""

from __future__ import annotations

from enum import StrEnum
from importlib import resources
from pathlib import Path
from typing import Annotated

import typer

from billhook.plan import heals
from billhook.plan.target import Target as TargetName

_SHARED = "Options of every command"
_FLAG = " "  # takes no value, and the help says so by leaving its place empty


class DtypeName(StrEnum):
    """``auto`` is the checkpoint's own."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"

    @property
    def chosen(self) -> str | None:
        """The name that the rooms below take: None for ``auto``."""
        return None if self is DtypeName.AUTO else self.value


def recipe_names(incomplete: str) -> list[str]:
    """For the shell. Read from the file names: the catalogue also checks what is in them, which takes seconds."""
    found = (file.name for file in resources.files("billhook.recipes").iterdir())
    return sorted(n.removesuffix(".yaml") for n in found if n.endswith(".yaml") and n.startswith(incomplete))


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", show_default=False, help="A hub id, a folder, a .gguf file, or [bold]demo[/] (SmolLM2-135M)."
    ),
]
Folder = Annotated[
    str,
    typer.Argument(metavar="DIR", show_default=False, help="A folder that Billhook wrote; any other MODEL will do."),
]
Against = Annotated[str, typer.Option(metavar="MODEL", show_default=False, help="The dense model to compare with.")]
Out = Annotated[Path, typer.Option(metavar="DIR", show_default=False, help="Where the result goes: a new folder.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", metavar=_FLAG, help="Replace an earlier result in that folder.")
]
Target = Annotated[
    TargetName | None,
    typer.Option(
        metavar="NAME",
        show_default=False,
        help="Who must be able to load the result. [bold]uniform[/]: whatever loads MODEL (whole blocks go, or as much "
        "of every block); "
        "[bold]remote[/]: transformers with trust_remote_code; [bold]deci[/]: vLLM and llama.cpp; "
        "[bold]any[/]: Billhook.",
    ),
]
Recipe = Annotated[
    str | None,
    typer.Option(
        metavar="NAME|FILE",
        show_default=False,
        autocompletion=recipe_names,
        help="The method: a name that [bold]billhook recipes[/] lists (it says which is the default), or a YAML file.",
    ),
]
Heal = Annotated[
    heals.Heal | None,
    typer.Option(
        metavar="NAME",
        show_default=False,
        help="[bold]closed-form[/]: what is left is refitted by least squares; where heads or neurons go "
        "[bold]bias[/], [bold]data-free[/] or [bold]scales[/]; [bold]eora[/]: paths of low rank beside linears with "
        "zeros (the budget holds for both); [bold]none[/]; or refitted and then "
        "trained, as [bold]billhook heal[/] does: [bold]distill[/], [bold]tail[/], [bold]lora[/], [bold]tune[/], "
        "[bold]lisa[/], [bold]ist[/], [bold]fpf[/], [bold]skips[/], [bold]kv-routing[/]. Else the recipe says.",
    ),
]
Select = Annotated[
    str,
    typer.Option(
        metavar="WORD",
        help="Which text a training reads, duplicates left out: [bold]distinct[/]: all; [bold]dsir:SOURCE[/]: what is "
        "like SOURCE; [bold]gradient:SOURCE[/]: what teaches the same; [bold]loss[/]: more of what is still wrong; "
        "[bold]paser[/]: more of the kinds that suffered most.",
    ),
]
CALIBRATION_HELP = (
    "The text: a .txt, .txt.gz, .jsonl or .jsonl.gz file, a folder, a hub data set, builtin, self (written by the "
    "model), or self:TEXT (going on from pieces of TEXT); with +exercises behind it, an eighth is questions with exact "
    "answers."
)
Calibration = Annotated[str, typer.Option(metavar="SOURCE", help=CALIBRATION_HELP)]
MaxNewTokens = Annotated[int, typer.Option(min=1, metavar="N", help="Tokens of each sample answer in the report.")]

POLICY_HELP = (
    "How the model runs: NAME, NAME:parameter=value,... as [bold]billhook policies[/] lists them, or a .json file "
    "that tune-policy wrote."
)
Policy = Annotated[str | None, typer.Option(metavar="NAME|FILE", show_default=False, help=POLICY_HELP)]
PolicyName = Annotated[str, typer.Option("--policy", metavar="NAME|FILE", show_default=False, help=POLICY_HELP)]

Json = Annotated[
    bool,
    typer.Option(
        "--json", metavar=_FLAG, rich_help_panel=_SHARED, help="One JSON object on standard output, no tables."
    ),
]
Seed = Annotated[
    int, typer.Option(min=0, metavar="N", rich_help_panel=_SHARED, help="For all that is drawn at random.")
]
Dtype = Annotated[
    DtypeName,
    typer.Option(metavar="NAME", rich_help_panel=_SHARED, help="auto (as stored), float32, bfloat16 or float16."),
]
Device = Annotated[str, typer.Option(metavar="NAME", rich_help_panel=_SHARED, help="Such as cpu, cuda, cuda:1, mps.")]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        metavar=_FLAG,
        rich_help_panel=_SHARED,
        help="Run the Python code that comes with the model.",
    ),
]
