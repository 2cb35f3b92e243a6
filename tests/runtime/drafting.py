"""What the tests of self-speculation share: models, random skips, and what must not be left behind."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from families import FAMILIES, build, params
from hypothesis import Phase, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from billhook.anatomy import Anatomy, discover
from billhook.plan.address import Address
from billhook.plan.check import units, unsound
from billhook.runtime.draft_length import Confidence

DECODERS = [n for n in params if FAMILIES[n].stacks.get("decoder") and "encoder" not in FAMILIES[n].stacks]
few = settings(max_examples=2, deadline=None, derandomize=True, database=None, phases=[Phase.explicit, Phase.generate])
EAGER = Confidence(longest=4, threshold=0.0, step=0.0)
SOME = ("decoder.1.attention", "decoder.2", "decoder.3.mlp")


@cache
def dense(name: str) -> tuple[PreTrainedModel, Anatomy]:
    """One model a family for the whole file: every test has to leave it as it was."""
    model = build(name)
    return model, discover(model)


@cache
def mild() -> tuple[PreTrainedModel, Anatomy]:
    """A model that a draft without ``SOME`` often agrees with: what they write is small. Some tokens are rejected."""
    model = build("llama")
    anatomy = discover(model)
    for block in anatomy.stack("decoder").blocks[1:4]:
        for write in (w for s in block.sublayers for w in s.writes):
            model.get_parameter(write).mul_(0.3)
    return model, anatomy


@st.composite
def skips(draw: st.DrawFn, anatomy: Anatomy) -> list[Address]:
    outline = anatomy.outline
    candidates = [a for kind in ("block", "sublayer") for a in units(outline, kind) if a.stack == "decoder"]
    chosen: list[Address] = []
    for unit in draw(st.lists(st.sampled_from(candidates), min_size=1, max_size=6, unique=True)):
        if unsound([*chosen, unit], outline) is None:
            chosen.append(unit)
    return chosen


def prompt(length: int = 9, seed: int = 1) -> Tensor:
    return torch.randint(3, 90, (1, length), generator=torch.Generator().manual_seed(seed))


def write(model: PreTrainedModel, ids: Tensor, **settings: Any) -> Any:
    return model.generate(input_ids=ids, **{"max_new_tokens": 24, "do_sample": False} | settings)


def untouched(model: PreTrainedModel) -> bool:
    inside = [name for module in model.modules() for name in vars(module) if name in ("forward", "generate")]
    return (
        not inside
        and not any(module._forward_hooks for module in model.modules())
        and vars(model).get("billhook_policy") is None
    )
