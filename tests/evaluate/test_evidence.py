import math
import sys

import pytest
import torch
import torch.nn.functional as F
from families import build

from billhook.anatomy import discover
from billhook.data import Windows
from billhook.evaluate import evidence, evidence_of_each, remembered
from billhook.evaluate.intervals import mean_interval
from billhook.plan.address import Address
from billhook.plan.errors import InputError
from billhook.surgery import apply

COUNT, LENGTH = 6, 12


def windows(count=COUNT, length=LENGTH, seed=3, name="text"):
    ids = torch.randint(3, 90, (count, length), generator=torch.Generator().manual_seed(seed))
    return Windows(ids=ids, name=name, fingerprint=name)


def cut(model, *units):
    return apply(model, discover(model), [Address.parse(u) for u in units])


@pytest.fixture(scope="module")
def dense():
    return build("llama")


@pytest.fixture(scope="module")
def compressed(dense):
    return cut(dense, "decoder.2", "decoder.3.attention")


@pytest.fixture(scope="module")
def result(dense, compressed):
    return evidence(dense, compressed, [("calibration", windows()), ("other", windows(seed=4, name="another"))])


@torch.no_grad()
def test_perplexity_by_plain_cross_entropy(dense, compressed, result):
    ids = windows().ids
    losses = []
    for model in (dense, compressed):
        logits = model(ids).logits[:, :-1].double()
        losses.append(F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item())
    assert result[0].perplexity_dense.value == pytest.approx(math.exp(losses[0]), rel=1e-5)
    assert result[0].perplexity_compressed.value == pytest.approx(math.exp(losses[1]), rel=1e-5)
    assert result[0].perplexity_ratio.value == pytest.approx(math.exp(losses[1] - losses[0]), rel=1e-5)


def test_several_models_at_once_are_judged_as_one_after_another(dense, compressed, result):
    texts = [("calibration", windows()), ("other", windows(seed=4, name="another"))]
    other = cut(dense, "decoder.1")
    assert evidence_of_each(dense, [other, compressed], texts) == [evidence(dense, other, texts), result]


def test_a_remembered_dense_model_is_judged_as_a_running_one(dense, compressed, result):
    texts = [("calibration", windows()), ("other", windows(seed=4, name="another"))]
    known, whole, trunks = remembered(dense, texts), cut(dense), []
    hook = dense.get_decoder().layers[0].register_forward_hook(lambda *_: trunks.append(1))
    found = [evidence_of_each(dense, [model], texts, of_dense=known)[0] for model in (whole, compressed)]
    hook.remove()
    assert found[1] == result and found[0][0].kl.value == 0
    assert not trunks


@torch.no_grad()
def test_divergence_and_agreement_by_whole_logits(dense, compressed, result):
    ids = windows().ids
    p, q = (model(ids).logits[:, :-1].double().log_softmax(-1).flatten(0, 1) for model in (dense, compressed))
    assert result[0].kl.value == pytest.approx(F.kl_div(q, p, log_target=True, reduction="batchmean").item(), rel=1e-5)
    assert result[0].top1.value == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item())


def test_slicing_changes_nothing(dense, compressed, result, monkeypatch):
    monkeypatch.setattr(sys.modules["billhook.evaluate.evidence"], "SLICE_VALUES", 101 * 3)  # three tokens at once
    seen = []
    hook = dense.get_output_embeddings().register_forward_hook(lambda _m, _a, out: seen.append(out.numel()))
    (again,) = evidence(dense, compressed, [("calibration", windows())])
    hook.remove()
    assert max(seen) == 101 * 3
    assert again.kl.value == pytest.approx(result[0].kl.value, rel=1e-5)
    assert again.perplexity_ratio.value == pytest.approx(result[0].perplexity_ratio.value, rel=1e-5)


def test_records_what_was_asked(result):
    assert [(t.name, t.domain) for t in result] == [("text", "calibration"), ("another", "other")]
    assert {(t.windows, t.tokens) for t in result} == {(COUNT, COUNT * (LENGTH - 1))}


@pytest.mark.parametrize("name", ["llama", "gemma2", "olmoe"])
def test_a_model_against_itself_is_exactly_equal(name):
    model = build(name)
    for other in (model, cut(model)):
        (text,) = evidence(model, other, [("other", windows())])
        assert text.perplexity_ratio.model_dump() == {"value": 1.0, "low": 1.0, "high": 1.0}
        assert text.kl.model_dump() == {"value": 0.0, "low": 0.0, "high": 0.0}
        assert text.top1.model_dump() == {"value": 1.0, "low": 1.0, "high": 1.0}


def test_pairing_narrows_the_interval_of_the_ratio():
    """Two models that nearly agree, on windows of very different difficulty."""
    model = build("llama")
    near = build("llama")
    near.get_output_embeddings().weight.data += 0.01 * torch.randn(101, 36, generator=torch.Generator().manual_seed(0))
    (text,) = evidence(model, near, [("other", windows(count=12))])

    def width(interval):
        return math.log(interval.high / interval.low)

    unpaired = math.hypot(width(text.perplexity_dense), width(text.perplexity_compressed))
    assert width(text.perplexity_ratio) < unpaired / 5
    assert text.perplexity_ratio.low < text.perplexity_ratio.value < text.perplexity_ratio.high


def test_interval_is_over_windows(dense, compressed):
    each = [evidence(dense, compressed, [("other", Windows(w[None].repeat(2, 1), "w", ""))])[0] for w in windows().ids]
    (text,) = evidence(dense, compressed, [("other", windows())])
    expected = mean_interval([math.log(e.perplexity_ratio.value) for e in each])
    assert math.log(text.perplexity_ratio.low) == pytest.approx(expected.low)
    assert text.kl.high == pytest.approx(mean_interval([e.kl.value for e in each]).high)


def test_both_models_see_the_same_batches(dense, compressed):
    seen = ([], [])
    hooks = [
        model.get_submodule("model.layers.0").register_forward_hook(
            lambda _m, args, _o, to=to: to.append(args[0].clone())
        )
        for model, to in zip((dense, compressed), seen, strict=True)
    ]
    evidence(dense, compressed, [("other", windows())])
    for hook in hooks:
        hook.remove()
    assert [tuple(stream.shape[:2]) for stream in seen[0]] == [(1, LENGTH)] * COUNT
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


@torch.no_grad()
def test_bfloat16_models_are_judged_in_float32():
    dense = build("llama").bfloat16()
    compressed = cut(dense, "decoder.2")
    one = windows(count=1).ids
    p, q = (model(one).logits[0, :-1].float().log_softmax(-1) for model in (dense, compressed))
    (text,) = evidence(dense, compressed, [("other", Windows(one.repeat(2, 1), "w", ""))])
    assert text.kl.value == pytest.approx(F.kl_div(q, p, log_target=True, reduction="batchmean").item(), rel=1e-4)


def test_protocol_says_how():
    model = build("llama")
    plain = windows()
    (text,) = evidence(model, model, [("other", plain)])
    for words in ("per token", f"context {LENGTH} tokens", f"stride {LENGTH}", "no BOS"):
        assert words in text.protocol
    begun = plain.ids.clone()
    begun[:, 0] = model.config.bos_token_id
    (text,) = evidence(model, model, [("other", Windows(begun, "text", ""))])
    for words in (f"context {LENGTH} tokens", f"stride {LENGTH - 1}", "each window begins with BOS"):
        assert words in text.protocol


def test_flags_and_hooks_are_left_as_they_were():
    model, other = build("llama"), build("llama")
    model.train()
    model.get_decoder().eval()
    flags = [m.training for m in model.modules()]
    other.get_output_embeddings().weight.data[5] = math.nan
    with pytest.raises(InputError):
        evidence(model, other, [("other", windows())])
    assert [m.training for m in model.modules()] == flags
    assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in model.modules())


def test_progress(dense, compressed):
    calls = []
    evidence(dense, compressed, [("other", windows(count=3))], progress=lambda *call: calls.append(call))
    assert calls == [("evidence on text", n, 3) for n in (1, 2, 3)]


def test_refuses_a_model_that_gives_nan(dense):
    broken = build("llama")
    broken.get_output_embeddings().weight.data[5] = math.nan
    with pytest.raises(InputError, match=r"the compressed model's log-likelihood of window 0 of text is nan"):
        evidence(dense, broken, [("other", windows())])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bert", r"BertForMaskedLM does not predict the next token"),
        ("t5", r"T5ForConditionalGeneration is an encoder-decoder"),
        ("vit", r"ViTForImageClassification does not predict the next token"),
    ],
)
def test_refuses_other_models(name, message):
    model = build(name)
    with pytest.raises(InputError, match=f"evidence on text needs a causal language model: {message}"):
        evidence(model, model, [("other", windows())])


def test_refuses_a_trunk_without_head(dense):
    with pytest.raises(InputError, match="needs a causal language model"):
        evidence(dense.get_decoder(), dense.get_decoder(), [("other", windows())])


def test_refuses_different_vocabularies(dense):
    other = build("llama")
    other.resize_token_embeddings(90)
    with pytest.raises(InputError, match="101 and 90 tokens"):
        evidence(dense, other, [("other", windows())])


@pytest.mark.parametrize(("count", "length"), [(1, 12), (4, 1), (0, 12)])
def test_refuses_too_little_text(dense, count, length):
    with pytest.raises(InputError, match=f"text gives {count} windows of {length} tokens"):
        evidence(dense, dense, [("other", windows(count=count, length=length))])


def test_refuses_tokens_that_the_model_does_not_know(dense):
    with pytest.raises(InputError, match="text has token 500, but the model knows only 101"):
        evidence(dense, dense, [("other", Windows(torch.full((2, 5), 500), "text", ""))])
