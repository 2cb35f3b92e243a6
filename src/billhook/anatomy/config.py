"""What a config says about the number of blocks, and how it reads when some of them are gone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from billhook.anatomy.types import Stack
from billhook.anatomy.vocabulary import INDEX_LISTS, LEADING_COUNTS, NOT_PER_BLOCK, TRAILING_COUNTS
from billhook.plan.errors import InputError


def shortened(config: Any, keys: tuple[str, ...], kept: list[int], blocks: int) -> dict[str, Any]:
    """New values of everything in one config that depends on the blocks of one stack.

    ``keys`` are the counters of the stack in this config, ``kept`` the original numbers of the blocks that stay, in
    order, out of ``blocks``. Lists with one entry a block keep the right members; lists of block numbers are
    renumbered; counts of leading and trailing blocks count what is left of them. A backbone hands on the stream from
    the same places as before.
    """
    changes: dict[str, Any] = dict.fromkeys(keys, len(kept))
    for key, value in vars(config).items():
        if isinstance(value, (list, tuple)) and len(value) == blocks and key not in NOT_PER_BLOCK:
            changes[key] = type(value)(value[i] for i in kept)
    for key in INDEX_LISTS:
        value = getattr(config, key, None)
        if value is not None:
            changes[key] = [new for new, old in enumerate(kept) if old in value]
    step = getattr(config, "decoder_sparse_step", None)
    if step is not None and step > 1:
        # an every-n-th pattern does not survive a gap: list the dense blocks instead
        dense = [i for i in range(blocks) if (i + 1) % step or i in config.mlp_only_layers]
        changes |= {"decoder_sparse_step": 1, "mlp_only_layers": [new for new, old in enumerate(kept) if old in dense]}
    for key, counts in _counting(blocks).items():
        value = getattr(config, key, None)
        if isinstance(value, int):
            changes[key] = sum(counts(old, value) for old in kept)
    if getattr(config, "_out_indices", None):
        changes |= _outlets(config, kept)
    return changes


def _outlets(config: Any, kept: list[int]) -> dict[str, Any]:
    """After which blocks a backbone config hands on the stream: stage i comes after block i - 1, stage 0 before all."""
    names = config.stage_names[: len(kept) + 1]
    wanted = (index % len(config.stage_names) for index in config._out_indices)
    at = sorted({sum(old < index for old in kept) for index in wanted})
    return {"stage_names": names, "_out_indices": at, "_out_features": [names[i] for i in at]}


def _counting(blocks: int) -> dict[str, Callable[[int, int], bool]]:
    leading: dict[str, Callable[[int, int], bool]] = {key: lambda i, n: i < n for key in LEADING_COUNTS}
    return leading | {key: lambda i, n: i >= blocks - n for key in TRAILING_COUNTS}


def resolve(model: Any, path: str) -> Any:
    """The object at a dotted attribute path, such as ``config.text_config`` or ``decoder.config``."""
    for name in path.split("."):
        model = getattr(model, name)
    return model


def owners(stack: Stack) -> dict[str, tuple[str, ...]]:
    """Config path -> the counters of the stack in that config."""
    grouped: dict[str, tuple[str, ...]] = {}
    for counter in stack.counters:
        grouped[counter.owner] = (*grouped.get(counter.owner, ()), counter.key)
    return grouped


def owner_of(model: PreTrainedModel, path: str) -> tuple[str, nn.Module]:
    """The nearest module above ``path`` that carries a config, and its path."""
    parts = path.split(".")
    for end in range(len(parts) - 1, -1, -1):
        above = ".".join(parts[:end])
        module = model.get_submodule(above)
        if hasattr(getattr(module, "config", None), "to_dict"):
            return above, module
    raise InputError(f"no module above {path} carries a config")


def hidden_size(config: Any) -> int:
    """Width of the residual stream."""
    return int(config.hidden_size)
