"""What self-speculation cannot do is refused in one line."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from drafting import SOME, dense, mild, prompt, untouched, write
from families import build

from billhook.anatomy import discover
from billhook.plan.address import Address
from billhook.plan.errors import InputError
from billhook.plan.plan import HiddenChannels, Keep, Plan
from billhook.plan.schedule import Schedule
from billhook.runtime.draft_search import SkipSearch
from billhook.runtime.speculate import Speculating, speculate


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "batch": ({"input_ids": prompt().repeat(2, 1)}, "one sequence at a time"),
    "beams": ({"num_beams": 2}, "one sequence at a time"),
    "no cache": ({"use_cache": False}, "needs a KV cache"),
    "hidden states": (
        {"return_dict_in_generate": True, "output_hidden_states": True},
        "no attentions or hidden states",
    ),
    "assistant": ({"assistant_model": "another"}, "says how to decode"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_cannot_do_is_refused(name: str) -> None:
    model, anatomy = mild()
    settings, message = REFUSED[name]
    with speculate(model, anatomy, SOME), pytest.raises(InputError, match=message):
        model.generate(**{"input_ids": prompt(), "max_new_tokens": 8, "do_sample": False} | settings)


def test_drafts_and_models_that_it_cannot_use() -> None:
    model, anatomy = mild()
    with pytest.raises(InputError, match="the model itself"):
        speculate(model, anatomy, [])
    with pytest.raises(InputError, match=r"decoder\.9 is not in"):
        speculate(model, anatomy, ["decoder.9"])
    with speculate(model, anatomy, SOME), pytest.raises(InputError, match="attached"):
        speculate(model, anatomy, SOME)
    for plan in (
        Plan.of(SOME, keeps=[Keep(unit=Address.parse("decoder.0.mlp"), inner="neuron", indices=tuple(range(24)))]),
        Plan.of(SOME, channels=[HiddenChannels(stack="decoder", indices=tuple(range(30)))]),
        Plan.of(SOME).model_copy(update={"schedule": Schedule.chain([0, 2, 2, 4])}),
    ):
        with pytest.raises(InputError, match="only skip whole blocks and sublayers, and this plan does more"):
            speculate(model, anatomy, plan)
    assert untouched(model)
    for name in ("t5", "bart", "bert", "vit"):
        other = build(name)
        with pytest.raises(InputError, match="needs a decoder language model"):
            speculate(other, discover(other), ["encoder.1"])
    sliding, its_anatomy = dense("mistral")
    with (
        speculate(sliding, its_anatomy, SkipSearch(its_anatomy, 0.5)),
        pytest.raises(InputError, match="without sliding windows"),
    ):
        write(sliding, prompt())


def test_a_sliding_static_cache_is_refused_once_it_is_full() -> None:
    model, anatomy = dense("mistral")
    with speculate(model, anatomy, SOME), pytest.raises(InputError, match="cannot take tokens back"):
        write(model, prompt(), cache_implementation="static")


def test_detach_twice_and_reports() -> None:
    model, anatomy = mild()
    speculating = speculate(model, anatomy, SOME)
    assert isinstance(speculating, Speculating) and not untouched(model)
    write(model, prompt())
    write(model, prompt())
    assert len(speculating.reports) == 2
    speculating.detach()
    speculating.detach()
    assert untouched(model)
