"""The recipes that come with Billhook, one file each in this folder, and those of the user."""

from __future__ import annotations

import os
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from billhook.plan.errors import InputError

if TYPE_CHECKING:
    from billhook.recipes.schema import Recipe

#: The first that can meet the budget: neurons alone hold no keys and values.
DEFAULTS = ("angular-widths", "sublayer-greedy")
DEFAULTS_UNIFORM = ("block-greedy",)
_SUFFIXES = (".yaml", ".yml")


def names() -> list[str]:
    """The names of the recipes that come with Billhook, the default ones first."""
    first = (*DEFAULTS, *DEFAULTS_UNIFORM)
    files = (file.name for file in resources.files(__package__).iterdir())
    return [*first, *sorted({f.removesuffix(".yaml") for f in files if f.endswith(".yaml")} - set(first))]


def recipes() -> list[Recipe]:
    """All of them, the default ones first."""
    return [load(name) for name in names()]


def load(source: str | os.PathLike[str]) -> Recipe:
    """A recipe by its name, or from a YAML file (a path that ends in .yaml or .yml).

    Nothing in the file is executed. Raises InputError for an unknown name, a file that cannot be read, and with the
    first thing that is wrong in it.
    """
    return _parse(source_of(source), os.fspath(source))


def source_of(source: str | os.PathLike[str]) -> str:
    """The YAML of a recipe, as it stands in its file. InputError for an unknown name, or a file that cannot be read."""
    name = os.fspath(source)
    if name.endswith(_SUFFIXES):
        try:
            return Path(name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"recipe file {name} cannot be read: {error}") from error
    if name not in names():
        raise InputError(f"recipe {name!r} is unknown; use a .yaml file or one of {', '.join(names())}")
    return (resources.files(__package__) / f"{name}.yaml").read_text(encoding="utf-8")


def _parse(text: str, source: str) -> Recipe:
    from pydantic import ValidationError

    from billhook.recipes.schema import Recipe  # checks words against the scores, which need torch

    try:
        content = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"recipe {source} is not YAML: {reason}") from error
    if not isinstance(content, dict):
        raise InputError(
            f"recipe {source} is not valid: the top level: should be words with values, such as unit: block"
        )
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "the top level"
        reason = first["msg"].removeprefix("Value error, ")
        raise InputError(f"recipe {source} is not valid: {place}: {reason}") from error
