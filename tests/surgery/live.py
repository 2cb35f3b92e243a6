"""What the tests of surgery share: random valid plans, everything observable of a model, and two ways to run it."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from families import FAMILIES, Padding, tokens
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel

from billhook.anatomy import Anatomy, Sublayer
from billhook.data.decoding import cache_name
from billhook.plan.address import Address
from billhook.plan.check import check, units
from billhook.plan.errors import InputError
from billhook.plan.outline import Outline
from billhook.plan.plan import Plan

NEW_TOKENS = 6


def possible(drops: Iterable[Address], outline: Outline) -> bool:
    try:
        check(Plan.of(drops), outline)
    except InputError:
        return False
    return True


@st.composite
def drops(draw: st.DrawFn, outline: Outline, kinds: tuple[str, ...] = ("block", "sublayer")) -> list[Address]:
    """A random plan: units drawn in a random order, each taken where the plan stays possible with it."""
    candidates = [unit for kind in kinds for unit in units(outline, kind)]
    chosen: list[Address] = []
    if not candidates:
        return chosen
    for unit in draw(st.lists(st.sampled_from(candidates), min_size=1, max_size=len(candidates) // 2, unique=True)):
        if possible([*chosen, unit], outline):
            chosen.append(unit)
    return chosen


def logits(name: str, model: PreTrainedModel, batch: int, padding: Padding) -> Tensor:
    return model(**FAMILIES[name].inputs(model, batch, padding))[0]


def inputs_of(name: str) -> list[tuple[int, Padding]]:
    sides: tuple[Padding, ...] = ("left", "right") if FAMILIES[name].pads else (None,)
    return [(1, None), *((3, side) for side in sides)]


def generate(name: str, model: PreTrainedModel, *, use_cache: bool) -> tuple[Tensor, Tensor]:
    """Greedy ids and the raw logits of every step, on a left-padded batch of 3.

    The mixin's own ``generate``: Whisper's takes the cache apart afterwards and expects every slot of it to be used.
    """
    prompt = FAMILIES[name].prompt(model, 3, "left" if FAMILIES[name].pads else None)
    out = GenerationMixin.generate(
        model,
        **prompt,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        use_cache=use_cache,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return out.sequences, torch.stack(out.logits)


def step_by_step(name: str, model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Logits token by token through the cache, positions left to the model; and all at once without a cache."""
    inputs = FAMILIES[name].inputs(model, 2, None)
    key = "decoder_input_ids" if "decoder_input_ids" in inputs else "input_ids"
    if key == "input_ids":
        inputs = {key: tokens(model, 2, None)["input_ids"]}
    ids, cache, found = inputs[key], None, []
    for part in (ids[:, :3], *ids[:, 3:].split(1, dim=1)):
        output = model(**inputs | {key: part}, **{cache_name(model): cache}, use_cache=True)
        cache = getattr(output, cache_name(model))
        found.append(output.logits)
    return torch.cat(found, dim=1), model(**inputs, use_cache=False).logits


def assert_cache_is_exact(name: str, model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Gives what ``generate`` gave with the cache."""
    torch.testing.assert_close(*step_by_step(name, model), atol=FAMILIES[name].tolerance, rtol=0)
    with_cache, without = (generate(name, model, use_cache=cached) for cached in (True, False))
    torch.testing.assert_close(with_cache[1], without[1], atol=FAMILIES[name].tolerance, rtol=0)
    assert torch.equal(with_cache[0], without[0])
    return with_cache


def stock_load(folder: Path) -> PreTrainedModel:
    """What someone without Billhook does: the stock class, or the Auto class with the code in the folder."""
    config = json.loads((folder / "config.json").read_text())
    auto = sorted(config.get("auto_map") or {})
    loader = getattr(transformers, auto[0] if auto else config["architectures"][0])
    model, info = loader.from_pretrained(folder, trust_remote_code=bool(auto), output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


@contextmanager
def silenced(model: nn.Module, sublayers: Iterable[Sublayer]) -> Iterator[None]:
    """The sublayers' writing weights, and the biases beside them, set to zero."""
    state = dict(model.named_parameters(remove_duplicate=False))
    keys = {key for s in sublayers for write in s.writes for key in (write, _bias(write)) if key in state}
    saved = {key: state[key].detach().clone() for key in keys}
    with torch.no_grad():
        for key in keys:
            state[key].zero_()
        try:
            yield
        finally:
            for key, value in saved.items():
                state[key].copy_(value)


def _bias(write: str) -> str:
    return write.removesuffix(".weight") + (".bias" if write.endswith(".weight") else "_bias")


def silent(anatomy: Anatomy, chosen: Iterable[Address]) -> list[Sublayer]:
    """The sublayers that a plan drops, those of dropped blocks included."""
    found = []
    for address in chosen:
        block = anatomy.block(address.parent)
        found += [s for s in block.sublayers if address.sublayer in (None, s.kind)]
    return found


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything observable: the modules, weights and hooks by identity, flags and numbers by value, all configs."""
    seen: dict[str, Any] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        seen[f"{path}|module"] = id(module)
        for name, value in vars(module).items():
            if name in ("_parameters", "_buffers", "_modules"):
                seen[f"{path}|{name}"] = {key: id(part) for key, part in value.items()}
            elif isinstance(value, PreTrainedConfig):
                seen[f"{path}|{name}"] = id(value)
                seen[f"config {id(value)}"] = _config(value)
            elif isinstance(value, (bool, int, float, str, tuple, list, dict, type(None))):
                seen[f"{path}|{name}"] = repr(value)
    for key, parameter in model.named_parameters():
        seen[f"{key}|grad"] = parameter.requires_grad
    return seen


def _config(config: PreTrainedConfig) -> dict[str, Any]:
    parts = {key: value for key, value in vars(config).items() if not isinstance(value, PreTrainedConfig)}
    nested = {key: _config(value) for key, value in vars(config).items() if isinstance(value, PreTrainedConfig)}
    return copy.deepcopy(parts) | nested
