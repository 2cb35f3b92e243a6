"""From a live model to its anatomy, or to a refusal that says what was and was not found."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from billhook.anatomy.config import hidden_size, owner_of
from billhook.anatomy.families import PINNED, refusal, refused_targets
from billhook.anatomy.outline import draw
from billhook.anatomy.residual import with_residuals
from billhook.anatomy.roles import NotUnderstood, looks_like_block, read_block
from billhook.anatomy.types import Anatomy, Block, Counter, Stack
from billhook.anatomy.width import widened
from billhook.plan.address import Address
from billhook.plan.errors import InputError

_FINAL_NORMS = ("norm", "final_norm", "final_layer_norm", "final_layernorm", "ln_f", "layer_norm", "layernorm")
_FINAL_NORMS_ELSEWHERE = ("post_layernorm", "final_layer_norm", "layernorm")

#: Why an attention is pinned whose cache others use.
READ_LATER = "later blocks read its keys and values"


def discover(model: PreTrainedModel) -> Anatomy:
    """Find the stacks, blocks and sublayers of a transformers model. Works on the meta device too; touches no weight.

    Raises InputError with the list of what was and was not found where any part is not understood: a model is either
    understood whole or refused.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "model_type"):
        raise InputError(f"{type(model).__name__} is not a transformers model: it has no config with a model_type")
    family = config.model_type
    reason = refusal(config)
    if reason:
        raise InputError(f"{family} model refused: {reason}")

    lists = _block_lists(model)
    if not lists:
        raise InputError(
            f"{family} model not understood: found no list of blocks with an attention inside "
            f"(lists found: {', '.join(_all_lists(model)) or 'none'})"
        )
    names = _stack_names(model, lists)
    found: list[str] = []
    problems: list[str] = []
    stacks: list[Stack] = []
    for path, name in names.items():
        blocks, odd = _read_blocks(model, path, name)
        found.append(f"{name} ({path}, {len(blocks)} blocks)")
        problems += odd
        counters = _counters(model, path, name, encoder_decoder=bool(getattr(config, "is_encoder_decoder", False)))
        if not counters:
            problems.append(f"no config value that counts the blocks of {name}")
        stacks.append(Stack(name, path, tuple(blocks), counters, _final_norm(model, path), name == "decoder"))
    if problems:
        more = f" (and {len(problems) - 4} more)" if len(problems) > 4 else ""
        raise InputError(
            f"{family} model not understood: found {', '.join(found)}; not found: {'; '.join(problems[:4])}{more}"
        )

    outline = draw(model, tuple(stacks), _pins(model, stacks), refused_targets(config, _single_decoder(stacks)))
    anatomy = Anatomy(
        family=family,
        stacks=tuple(stacks),
        embedding=_path_of(model, _call(model, "get_input_embeddings")),
        head=_path_of(model, _call(model, "get_output_embeddings")),
        outline=outline,
    )
    return with_residuals(model, widened(model, anatomy))


def _all_lists(model: PreTrainedModel) -> list[str]:
    return [path for path, module in model.named_modules() if isinstance(module, nn.ModuleList)]


def _block_lists(model: PreTrainedModel) -> list[str]:
    lists = []
    for path in _all_lists(model):
        members = list(model.get_submodule(path).children())
        if members and len({type(m) for m in members}) == 1 and looks_like_block(members[0]):
            lists.append(path)
    return lists


def _stack_names(model: PreTrainedModel, lists: list[str]) -> dict[str, str]:
    """Path of each list -> stack name: vision, text, encoder or decoder."""
    is_pair = bool(getattr(model.config, "is_encoder_decoder", False))
    names: dict[str, str] = {}
    for path in lists:
        if "vision" in path or "visual" in path:
            name = "vision"
        elif "text_model" in path:
            name = "text"
        elif is_pair:
            name = "encoder" if "encoder" in path.split(".") else "decoder"
        else:
            name = "decoder" if _generates(model) or "language_model" in path else "encoder"
        if name in names.values():
            raise InputError(f"{model.config.model_type} model not understood: two stacks would be called {name}")
        names[path] = name
    return names


def _generates(model: PreTrainedModel) -> bool:
    """Whether the model's attention is causal, from the first attention module that says so."""
    for module in model.modules():
        if isinstance(getattr(module, "is_causal", None), bool) and any(True for _ in module.parameters()):
            return bool(module.is_causal)
    can_generate = getattr(model, "can_generate", None)
    return bool(can_generate and can_generate())


def _read_blocks(model: PreTrainedModel, path: str, name: str) -> tuple[list[Block], list[str]]:
    config = owner_of(model, path)[1].config
    modes = getattr(config, "kv_sharing_modes", None)
    blocks, odd = [], []
    for index, module in enumerate(model.get_submodule(path).children()):
        try:
            block = read_block(module, Address(name, index), f"{path}.{index}", config, hidden_size(config))
            blocks.append(replace(block, lends=modes is not None and modes[index] == "store"))
        except NotUnderstood as problem:
            odd.append(f"{name}.{index}: {problem}")
            blocks.append(Block(Address(name, index), f"{path}.{index}", (), (), False))
    return blocks, odd


def _counters(model: PreTrainedModel, path: str, name: str, *, encoder_decoder: bool) -> tuple[Counter, ...]:
    """Every config value that states this stack's length, in the root config first, then in the owner's own copy."""
    length = len(list(model.get_submodule(path).children()))
    above, owner = owner_of(model, path)
    keys: tuple[str, ...] = ("num_hidden_layers",)
    if encoder_decoder:
        keys = (
            ("encoder_layers", "num_layers", "num_hidden_layers")
            if name == "encoder"
            else ("decoder_layers", "num_decoder_layers")
        )
    places: dict[int, tuple[str, Any, tuple[str, ...]]] = {}
    root = _config_path(model, owner.config)
    if root is not None:
        places[id(owner.config)] = (root, owner.config, keys)
    else:
        # the owner works on a private copy of the config (T5), in which the stack is the only one
        places[id(model.config)] = ("config", model.config, keys)
        places[id(owner.config)] = (f"{above}.config", owner.config, (*keys, "num_layers", "num_hidden_layers"))
    counters = []
    for place, config, names in places.values():
        attribute_map = getattr(config, "attribute_map", {})
        written = dict.fromkeys(attribute_map.get(key, key) for key in names)
        counters += [Counter(place, key) for key in written if getattr(config, key, None) == length]
    return tuple(counters)


def _config_path(model: PreTrainedModel, config: Any) -> str | None:
    """Where ``config`` is found from the model: ``config`` or ``config.NAME``; None if it is a private copy."""
    if config is model.config:
        return "config"
    return next((f"config.{key}" for key, value in vars(model.config).items() if value is config), None)


def _final_norm(model: PreTrainedModel, path: str) -> str | None:
    parent = path.rpartition(".")[0]
    for place, names in ((parent, _FINAL_NORMS), (parent.rpartition(".")[0], _FINAL_NORMS_ELSEWHERE)):
        children = dict(model.get_submodule(place).named_children())
        for name in names:
            if name in children:
                return f"{place}.{name}" if place else name
    return None


def _pins(model: PreTrainedModel, stacks: list[Stack]) -> dict[str, str]:
    pinned = {
        f"{stack.name}.{unit}": reason
        for stack in stacks
        for unit, reason in PINNED.get(model.config.model_type, {}).items()
    }
    for stack in stacks:
        config = owner_of(model, stack.path)[1].config
        if getattr(config, "hidden_size_per_layer_input", 0):
            reason = "the model's per-layer embedding is one tensor for all blocks"
            pinned |= {str(block.address): reason for block in stack.blocks}
        for block in stack.blocks:
            if block.lends:
                pinned |= {str(block.address): READ_LATER, f"{block.address}.attention": READ_LATER}
    return pinned


def _single_decoder(stacks: list[Stack]) -> bool:
    return [stack.name for stack in stacks] == ["decoder"]


def _call(model: PreTrainedModel, name: str) -> Any:
    """``model.NAME()``, None where the model has no such part: transformers raises NotImplementedError then, models
    with code of their own AttributeError."""
    try:
        return getattr(model, name)()
    except (AttributeError, NotImplementedError):
        return None


def _path_of(model: PreTrainedModel, wanted: nn.Module | None) -> str | None:
    return next((path for path, module in model.named_modules() if module is wanted), None)
