"""From the names in a checkpoint to the names in the live model."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from billhook.models.checks import left_out
from billhook.plan.errors import InputError

#: Buffers that older versions of transformers stored and that every model makes anew.
_STALE = (r"rotary_emb\.inv_freq", r"(^|\.)position_ids$")


def live_names(model: Any, stored: Iterable[str], source: str) -> tuple[dict[str, str | None], tuple[str, ...]]:
    """Stored name -> live name, None for what has no place in the model; and those of them that the model does not
    ignore on purpose: the head of another task. ``model`` may be on the meta device.

    Several stored tensors may have one live name (experts that the model keeps fused), or the other way round (a fused
    weight that the model keeps apart then has the name of its first part); all of them lie in one module of one block.

    Raises InputError for tensors of a block or an expert that the model has no place for, and for weights of the model
    that are not stored.
    """
    expected = model.state_dict()
    ignored = _any_of((*(model._keys_to_ignore_on_load_unexpected or ()), *_STALE))
    optional = _any_of(model._keys_to_ignore_on_load_missing or ())
    rename = _renamer(model, expected)
    names = {name: rename(name) for name in stored}

    unknown = [name for name, live in names.items() if live[0] not in expected and not ignored(live[0])]
    heads = left_out(unknown, source, type(model))
    covered = {live for lives in names.values() for live in lives}
    for pair in model.all_tied_weights_keys.items():
        covered |= set(pair) if covered & set(pair) else set()
    missing = [name for name in expected if name not in covered and not optional(name)]
    if missing:
        raise InputError(f"{source} lacks weights that {type(model).__name__} needs: {_some(missing)}")
    return {name: lives[0] if lives[0] in expected else None for name, lives in names.items()}, heads


def _renamer(model: Any, expected: dict[str, Any]) -> Callable[[str], list[str]]:
    """transformers' own renaming on load: stored name -> the one or more live names whose weights it holds.

    It is private there; everything Billhook uses of it is in this function.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    targets = {pattern: entry.target_patterns for entry in converters for pattern in entry.source_patterns}
    prefix = model.base_model_prefix

    def rename(name: str) -> list[str]:
        live, pattern = rename_source_key(name, renamings, converters, prefix, expected)
        if live not in expected and name in expected:
            live, pattern = rename_source_key(name, [], [], prefix, expected)
        parts = targets.get(pattern, [""])
        return [live.replace(parts[0], part) for part in parts]

    return rename


def stored_parts(model: Any, name: str, tensor: Tensor) -> dict[str, Tensor]:
    """The tensors that are stored for the parameter ``name`` of a model, from one in its shape: as in saving. A fused
    one gives several, such as one for each expert."""
    from transformers.core_model_loading import revert_weight_conversion

    return dict(revert_weight_conversion(model, {name: tensor}))


def _any_of(patterns: Iterable[str]) -> Callable[[str], bool]:
    compiled = [re.compile(pattern) for pattern in patterns]
    return lambda name: any(pattern.search(name) for pattern in compiled)


def _some(names: list[str]) -> str:
    return ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if names[3:] else "")
