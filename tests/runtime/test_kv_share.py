"""Blocks that read the keys and values of an earlier one, on every decoder: what they attend to, what is stored, and
that what is shared by nobody changes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from families import FAMILIES, build
from running import GENERATING, equal, generate, ready, state
from torch import Tensor
from transformers import Cache, DynamicCache

from billhook.anatomy import discover
from billhook.data import Windows
from billhook.evaluate.policy_quality import Judge
from billhook.measure.cost import CostModel
from billhook.plan.errors import InputError
from billhook.runtime.catalogue import policy_of
from billhook.runtime.kv_lending import kinds, nearest
from billhook.runtime.kv_share import KvShare

DECODERS = [name for name in GENERATING if set(FAMILIES[name].stacks) <= {"decoder", "vision"}]
REFUSED = [name for name in GENERATING if name not in DECODERS]


@contextmanager
def redirected(lenders: dict[int, int]) -> Iterator[None]:
    """Every cache answers a borrowing layer with what its lender was last answered, and stores nothing for it."""
    original, given = Cache.update, {}

    def update(self: Cache, keys: Tensor, values: Tensor, layer: int, *args: Any, **kwargs: Any) -> Any:
        if layer not in lenders:
            given[layer] = original(self, keys, values, layer, *args, **kwargs)
        return given[lenders.get(layer, layer)]

    Cache.update = update  # type: ignore[method-assign]
    try:
        yield
    finally:
        Cache.update = original  # type: ignore[method-assign]


@pytest.mark.parametrize("name", DECODERS)
def test_a_block_reads_its_lenders_keys_and_values_and_stores_none(name: str) -> None:
    model, anatomy, prompt = ready(name)
    before, plain = state(model), generate(model, prompt)
    policy = policy_of("kv-share:span=2")
    assert isinstance(policy, KvShare)
    lenders = policy.lenders(kinds(model, anatomy))
    assert lenders, "nothing to share"
    with policy.attach(model, anatomy), torch.no_grad():
        ids, logits = generate(model, prompt)
        cache = DynamicCache(config=model.config.get_text_config())
        cached = model(**prompt, cache=cache).logits
        uncached = model(**prompt, use_cache=False).logits
    with redirected(lenders):
        by_hand = generate(model, prompt)
    torch.testing.assert_close(logits, by_hand[1], atol=1e-4, rtol=1e-4)
    assert torch.equal(ids, by_hand[0])
    assert not torch.equal(logits, plain[1])
    torch.testing.assert_close(cached, uncached, atol=FAMILIES[name].tolerance, rtol=1e-4)
    stored = {number for number, layer in enumerate(cache.layers) if getattr(layer, "keys", None) is not None}
    assert stored == set(kinds(model, anatomy)) - set(lenders)
    assert state(model) == before
    with policy_of("kv-share:span=1").attach(model, anatomy):
        assert equal(generate(model, prompt), plain)


@pytest.mark.parametrize("how", [{"num_beams": 3}, {"cache_implementation": "static"}])
def test_the_users_own_generate_just_works(how: dict[str, Any]) -> None:
    model, anatomy, prompt = ready("gemma3")
    policy = KvShare(span=3)
    with policy.attach(model, anatomy):
        ids, logits = generate(model, prompt, **how)
    with redirected(policy.lenders(kinds(model, anatomy))):
        by_hand = generate(model, prompt, **how)
    assert torch.equal(ids, by_hand[0])
    torch.testing.assert_close(logits, by_hand[1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_decoder_language_model_is_refused(name: str) -> None:
    model, anatomy, _ = ready(name)
    with pytest.raises(InputError, match="decoder language model"):
        policy_of("kv-share").attach(model, anatomy)


def test_the_nearest_before_it_of_its_kind_lends() -> None:
    like = {0: "near", 1: "far", 2: "near", 3: "near", 4: "far", 5: "near"}
    assert nearest(like, {2, 4, 5}) == {2: 0, 4: 1, 5: 3}
    assert nearest(like, {0, 1, 2, 3}) == {2: 0, 3: 0}
    assert KvShare(span=3).lenders(like) == {2: 0, 3: 0, 4: 1}
    assert KvShare(span=1).lenders(like) == {}
    assert KvShare(blocks="3+5").lenders(like) == {3: 2, 5: 2}
    with pytest.raises(InputError, match="block 1 cannot share: no block before it"):
        KvShare(blocks="1-2").lenders(like)
    with pytest.raises(InputError, match="block 6 cannot share: it makes none"):
        KvShare(blocks="6").lenders(like)
    with pytest.raises(InputError, match="there is no block 5; the decoder has 0 to 4"):
        KvShare(blocks="2+5").attach(build("llama"))


def test_windows_and_positions_are_not_mixed() -> None:
    """Gemma 3 has blocks with and without a window, SmolLM3 such whose keys do not know where they stand."""
    for name in ("gemma3", "smollm3"):
        model = build(name)
        found = kinds(model, discover(model))
        assert len(set(found.values())) == 2
        for block, lender in KvShare(span=4).lenders(found).items():
            assert found[block] == found[lender]


def test_the_cache_that_is_saved_is_counted_and_the_projections_are() -> None:
    """Two of five blocks of a Llama store nothing; each is spared its keys and values: 2 x 36 x 20 weights."""
    model = build("llama")
    anatomy = discover(model)
    ids = torch.randint(3, 90, (4, 10), generator=torch.Generator().manual_seed(2))
    judge = Judge(model, anatomy, Windows.of(ids, "text"), prompt=4)
    found, saved = judge(policy_of("kv-share:blocks=2+4"))
    assert found.kl.value > 0
    assert saved.kv_bytes == pytest.approx(3 / 5)
    assert saved.sublayers == {}
    config = model.config
    weights = 2 * 2 * config.hidden_size * config.num_key_value_heads * config.head_dim
    dense = CostModel(anatomy.outline, prompt_tokens=1, new_tokens=10).dense["flops"]
    assert saved.flops == pytest.approx(1 - 2 * weights * 10 / dense)


def test_keys_and_values_of_a_block_that_shares_are_not_computed() -> None:
    model = build("llama")
    model.model.layers[2].self_attn.k_proj.weight.data.fill_(torch.nan)
    model.model.layers[2].self_attn.v_proj.weight.data.fill_(torch.nan)
    ids = torch.tensor([[5, 9, 33]])
    with torch.no_grad():
        assert model(ids).logits.isnan().any()
        with policy_of("kv-share:blocks=2").attach(model):
            assert not model(ids).logits.isnan().any()
