"""A threshold of their own for the tokens of images: they leave and the words do not, and the other way round."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import build
from running import equal, generate, ready, state
from torch import Tensor

from billhook.anatomy import Anatomy
from billhook.plan.address import Address
from billhook.plan.errors import InputError
from billhook.runtime.catalogue import policy_of
from billhook.runtime.images import Images
from billhook.runtime.online import Pass
from billhook.runtime.silence import stream_out, with_stream
from billhook.runtime.similarity_exit import SimilarityExit, _Exit

FIRST = 2


def by_hand(model: Any, anatomy: Anatomy, prompt: dict[str, Any], *, images: bool) -> tuple[Tensor, Tensor]:
    """What the model generates where, from the third block on, every block hands on the stream as it came in, for the
    tokens of images or for all others; its keys and values are made for all of them."""
    leaving: list[Tensor] = []

    def look(module: Any, args: Any, kwargs: Any) -> None:
        leaving[:] = [(kwargs["input_ids"] == model.config.image_token_id) == images]

    def stay(module: Any, args: Any, kwargs: Any, out: Any) -> Any:
        into = args[0] if args else kwargs["hidden_states"]
        return with_stream(out, torch.where(leaving[0][..., None], into, stream_out(out)))

    handles = [model.register_forward_pre_hook(look, with_kwargs=True)]
    for block in anatomy.stack("decoder").blocks[FIRST:]:
        handles.append(model.get_submodule(block.path).register_forward_hook(stay, with_kwargs=True))
    try:
        return generate(model, prompt)
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("images", [True, False])
def test_images_leave_and_words_do_not_and_vice_versa(images: bool) -> None:
    """Keys and values of what left are there: what stays, and what is generated, attends to them."""
    model, anatomy, prompt = ready("gemma3_image")
    before, plain = state(model), generate(model, prompt)
    leaves, stays = -1.0, 1.0
    policy = SimilarityExit(decoder=stays if images else leaves, vision=leaves if images else stays, first=FIRST)
    with policy.attach(model, anatomy) as attached:
        under = generate(model, prompt)
        attached.counts.reset()
        with torch.no_grad():
            model(**prompt)
    expected = by_hand(model, anatomy, prompt, images=images)
    assert torch.equal(under[0], expected[0])
    torch.testing.assert_close(under[1], expected[1], atol=2e-3, rtol=2e-3)
    assert not torch.allclose(under[1], plain[1], atol=0.1)
    assert state(model) == before
    # a whole prompt: the work of those that leave is not done, all but their keys and values
    leaving = int(((prompt["input_ids"] == model.config.image_token_id) == images).sum())
    for kind, projected in (("mlp", 0), ("attention", leaving)):
        unit = Address("decoder", FIRST, kind)
        assert attached.counts.skipped[unit] == leaving and attached.counts.projected[unit] == projected
        assert attached.counts.ran[unit] == prompt["input_ids"].numel() - leaving


def test_two_equal_thresholds_are_one_and_quiet_ones_change_nothing() -> None:
    model, anatomy, prompt = ready("gemma3_image")
    plain = generate(model, prompt)
    found = {}
    for text in ("decoder=-0.5", "decoder=-0.5,vision=-0.5", "decoder=1,vision=1"):
        with policy_of(f"similarity-exit:{text},first=1").attach(model, anatomy):
            found[text] = generate(model, prompt)
    assert equal(found["decoder=-0.5"], found["decoder=-0.5,vision=-0.5"])
    assert equal(found["decoder=1,vision=1"], plain)


def test_a_text_without_images_is_read_as_if_there_were_no_threshold_for_them() -> None:
    model, anatomy, _ = ready("gemma3_image")
    words = {"input_ids": torch.tensor([[5, 9, 33, 12, 60]]), "attention_mask": torch.ones(1, 5, dtype=torch.long)}
    plain = generate(model, words)
    with SimilarityExit(decoder=1.0, vision=-1.0, first=1).attach(model, anatomy) as attached:
        assert equal(generate(model, words), plain)
        assert not sum(attached.counts.skipped.values())


def test_rounding_does_not_pass_a_threshold_of_one() -> None:
    """A block writes nothing, and the cosine of float32 is now and then a little above 1."""
    model, anatomy, _ = ready("gemma3_image")
    images, now = Images(model), Pass("decoder", 0, 400, 1, None)
    images._here = torch.zeros(1, 400, dtype=torch.bool)
    trigger, block = _Exit(SimilarityExit(decoder=1.0, vision=0.5, first=1), images), anatomy.stack("decoder").blocks[0]
    stream = torch.randn(1, 400, 36, generator=torch.Generator().manual_seed(0))
    assert (torch.cosine_similarity(stream, stream, dim=-1) > 1).any()
    trigger.begin(now)
    trigger.saw(block, stream, stream, now)
    skip = trigger.decide(block, stream, now)
    assert skip is not None and skip.where is not None and not skip.where.any()


def test_what_is_refused() -> None:
    for name in ("llama", "t5"):
        with pytest.raises(InputError, match=r"no decoder of this \w+ model reads images; leave out vision"):
            policy_of("similarity-exit:vision=0.9").attach(build(name))
    with pytest.raises(InputError, match="parameter vision"):
        policy_of("similarity-exit:vision=1.5")
    model, anatomy, prompt = ready("gemma3_image")
    embedded = model.get_input_embeddings()(prompt["input_ids"][:, :5])
    refused = pytest.raises(InputError, match="tells images by input_ids")
    with SimilarityExit(vision=0.5).attach(model, anatomy), torch.no_grad(), refused:
        model(inputs_embeds=embedded)


def test_tuning_turns_the_threshold_of_words_alone() -> None:
    policy = SimilarityExit(vision=0.8)
    assert [name for name, *_ in policy.dials] == ["decoder"]
    assert policy.turned(0.5) == SimilarityExit(decoder=0.5, vision=0.8)
