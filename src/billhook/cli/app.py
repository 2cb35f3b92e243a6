"""The typer app: its commands, its version, and what becomes of an error."""

from __future__ import annotations

import errno
import os
import sys
import warnings
from importlib.metadata import version
from inspect import cleandoc
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from billhook.cli.apply import apply
from billhook.cli.bench import bench
from billhook.cli.compare import compare
from billhook.cli.compress import compress
from billhook.cli.eval import evaluate
from billhook.cli.generate import generate
from billhook.cli.heal import heal
from billhook.cli.inspect import inspect
from billhook.cli.output import printable
from billhook.cli.policies import policies
from billhook.cli.recipes import recipes
from billhook.cli.restore import restore
from billhook.cli.stack import stack
from billhook.cli.tune_policy import tune_policy
from billhook.cli.unstack import unstack
from billhook.plan.errors import InputError

USAGE_ERROR = 2
INTERRUPTED = 130  # 128 + SIGINT, as shells count it
_OURS = {  # the words of the library that checks options, and what stands in their place
    "Value error, ": "",
    "Input should be greater than or equal to": "it must be at least",
    "Input should be a valid integer, unable to parse string as an integer": "it must be a whole number",
}
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)


_UsageError: Any = typer.BadParameter.__base__  # typer brings its own click, or uses the one that is installed


class _Commands(TyperGroup):
    """Turns what a user can do something about into one line; anything else keeps its traceback."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().make_context(*args, **kwargs)
        except _UsageError as error:
            _misused(error)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except _UsageError as error:
            _misused(error)
        except InputError as error:
            _fail(f"error: {error}", USAGE_ERROR)
        except OSError as error:
            if error.errno not in _DISK:
                raise
            place = f"{error.filename}: " if error.filename else ""
            _fail(f"error: {place}{error.strerror}", USAGE_ERROR)
        except KeyboardInterrupt:
            resumes = ctx.invoked_subcommand in ("compress", "compare", "heal", "policies")
            _fail(f"interrupted{'; run the same command again to resume' if resumes else ''}", INTERRUPTED)


def _misused(error: Any) -> NoReturn:
    if type(error).__name__ == "NoArgsIsHelpError":  # nothing was given at all
        raise error
    message = error.format_message().rstrip(".")
    for theirs, ours in _OURS.items():
        message = message.replace(theirs, ours)
    _fail(f"error: {message} (see {error.ctx.command_path} --help)", USAGE_ERROR)


def _fail(message: str, code: int) -> NoReturn:
    typer.echo(f"billhook: {printable(' '.join(message.split()))}", err=True)
    raise typer.Exit(code)


app = typer.Typer(
    name="billhook",
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.command("inspect", no_args_is_help=True)(inspect)
app.command("compress", no_args_is_help=True)(compress)
app.command("compare", no_args_is_help=True)(compare)
app.command("heal", no_args_is_help=True)(heal)
app.command("restore", no_args_is_help=True)(restore)
app.command("apply", no_args_is_help=True)(apply)
app.command("stack", no_args_is_help=True)(stack)
app.command("unstack", no_args_is_help=True)(unstack)
app.command("eval", no_args_is_help=True)(evaluate)
app.command("bench", no_args_is_help=True)(bench)
app.command("generate", no_args_is_help=True)(generate)
app.command("tune-policy", no_args_is_help=True)(tune_policy)
app.add_typer(recipes)
app.add_typer(policies)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"billhook {version('billhook')}")
        raise typer.Exit


@app.callback()
def _billhook(
    _: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Finds what a pretrained transformer does not need, cuts it, heals what is left, and proves the result.

    Begin with [bold]billhook compress demo --budget params=0.8 --out out/demo[/]
    """


def _flow(group: typer.Typer) -> None:
    """Join the lines of each paragraph of the help: where the docstring breaks them is not where the terminal does."""
    for entry in (*group.registered_commands, group.registered_callback):
        if entry and entry.callback and entry.callback.__doc__:
            paragraphs = cleandoc(entry.callback.__doc__).split("\n\n")
            entry.help = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


for _group in (app, recipes, policies):
    _flow(_group)


def main() -> None:
    """The console script. Notices of the libraries underneath stay off the terminal."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    app()
