"""What a draft computes, and what it leaves alone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from drafting import DECODERS, dense, few, prompt, skips, untouched
from families import FAMILIES
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache, StaticCache

from billhook.plan.check import normalise
from billhook.runtime.draft import Draft, shapes
from billhook.surgery import simulate


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("name", DECODERS)
@given(data=st.data())
@few
def test_the_draft_is_the_simulated_plan(name: str, data: st.DataObject) -> None:
    """To the bit, with nothing verified before: on an empty cache its keys and values are all its own."""
    model, anatomy = dense(name)
    chosen = data.draw(skips(anatomy))
    draft = Draft(model, anatomy, chosen)
    inputs = FAMILIES[name].inputs(model, 1, None)
    with shapes(draft.stack) as shaped:
        model(**inputs)
    with simulate(model, anatomy, normalise(chosen, anatomy.outline)):
        expected = model(**inputs, use_cache=False).logits
    with draft.skipping(shaped):
        assert torch.equal(model(**inputs, use_cache=False).logits, expected)
    assert untouched(model)


@pytest.mark.parametrize(
    ("name", "static"),
    [("llama", False), ("gemma2", False), ("mistral", False), ("bloom", False), ("llama", True), ("bloom", True)],
)
def test_a_fork_leaves_the_verified_cache_alone(name: str, static: bool) -> None:
    """Its verified entries, whatever the draft writes; and the fork counts on where it stopped."""
    model, anatomy = dense(name)
    ids = prompt(7)
    verified = StaticCache(model.config, 16) if static else DynamicCache(config=model.config)
    draft = Draft(model, anatomy, ["decoder.0.attention", "decoder.2"])
    with shapes(draft.stack) as shaped:
        model(ids, cache=verified)
    verified.activate_past_recording()
    before = [(layer.keys.clone(), layer.values.clone()) for layer in verified.layers]
    with draft.skipping(shaped):
        fork = draft.fork(verified)
        for step in range(3):
            assert int(fork.get_seq_length()) == 7 + step
            model(ids[:, :1], cache=fork)
    assert [int(layer.get_seq_length()) for layer in verified.layers] == [7] * len(verified.layers)
    if not any(verified.is_sliding):
        assert int(draft.fork(verified, back=2).get_seq_length()) == 5
        assert int(verified.get_seq_length()) == 7
    for layer, (keys, values) in zip(verified.layers, before, strict=True):
        end = min(7, keys.shape[-2])
        assert torch.equal(layer.keys[..., :end, :], keys[..., :end, :])
        assert torch.equal(layer.values[..., :end, :], values[..., :end, :])
