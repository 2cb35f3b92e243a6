"""Attention of one new token: the same as the usual one, on every family that writes."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES
from transformers import AttentionInterface

from billhook.data import one_query
from billhook.data.one_query import one_query_at_a_time

WRITERS = [name for name, family in FAMILIES.items() if family.generates]


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("padding", [None, "left"])
def test_it_writes_what_the_usual_attention_writes(name: str, padding: str | None) -> None:
    family = FAMILIES[name]
    if padding and not family.pads:
        pytest.skip("it takes no padding")
    model = family.build()
    prompt = family.prompt(model, batch=3, padding=padding)
    asked = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "output_logits": True}
    usual = model.generate(**prompt, **asked, return_dict_in_generate=True)
    with one_query_at_a_time():
        ours = model.generate(**prompt, **asked, return_dict_in_generate=True)
    assert torch.equal(ours.sequences, usual.sequences)
    for one, other in zip(ours.logits, usual.logits, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=family.tolerance)


def test_heads_that_share_keys_and_the_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, n, 4, generator=generator) for heads, n in ((6, 1), (2, 5), (2, 5)))
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = 3, True
    usual = AttentionInterface()["sdpa"]
    wanted = [usual(module, q, k, v, None, scaling=scale)[0] for scale in (None, 0.7)]
    asked: list[torch.Tensor] = []
    products = one_query._products
    monkeypatch.setattr(one_query, "_products", lambda *given: asked.append(given[0]) or products(*given))
    with one_query_at_a_time():
        attend = AttentionInterface()["sdpa"]
        found = [attend(module, q, k, v, None, scaling=scale)[0] for scale in (None, 0.7)]
        mask = torch.tensor([True, False, True, True, True]).expand(2, 1, 1, 5)
        masked = attend(module, q, k, v, mask)[0]
    torch.testing.assert_close(found, wanted)
    assert len(asked) == 2  # what has a mask goes the usual way
    torch.testing.assert_close(masked, usual(module, q, k, v, mask)[0])


def test_afterwards_all_is_as_it_was() -> None:
    usual = AttentionInterface()["sdpa"]
    with pytest.raises(ZeroDivisionError), one_query_at_a_time():
        assert AttentionInterface()["sdpa"] is not usual
        raise ZeroDivisionError
    assert AttentionInterface()["sdpa"] is usual
