import pytest
import torch

from billhook.evaluate import generations, prepared
from billhook.evaluate.repetition import repeated
from billhook.models import load


@pytest.mark.parametrize(
    ("tokens", "share"),
    [
        ([1, 2, 3, 4, 5, 6, 7], 0.0),
        ([5] * 10, 6 / 7),  # seven 4-grams, one kind
        ([1, 2, 3, 4, 1, 2, 3, 4], 1 / 5),  # 1234 twice among five
        ([1, 2, 3], 0.0),
        ([], 0.0),
    ],
)
def test_share_of_4_grams_that_came_before(tokens, share):
    assert repeated(tokens) == pytest.approx(share)


def test_of_the_continuations_of_both_models(tiny_lm):
    """Of the tokens that were written: those of their text, read again, may be others."""
    found, stuck = load(str(tiny_lm)), load(str(tiny_lm)).model
    with torch.no_grad():
        for block in stuck.model.layers:  # the head is tied: what was read last is written, for ever
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
    (one,) = generations(found.model, stuck, found.tokenizer, ["Why?"], max_new_tokens=40)
    inputs = prepared(found.model, found.tokenizer, "Why?", 40)
    written = found.model.generate(**inputs, max_new_tokens=40, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert one.repeated_dense == repeated(written.tolist()) < 0.5
    assert one.repeated_compressed == pytest.approx(36 / 37)
