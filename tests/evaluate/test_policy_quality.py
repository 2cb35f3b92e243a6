"""A policy judged: as generation does it, against the plain model, with its work counted; and tuned to a target."""

from __future__ import annotations

import math

import pytest
import torch
from families import build

from billhook.anatomy import discover
from billhook.data import Windows
from billhook.evaluate import evidence
from billhook.evaluate.policy_quality import Judge
from billhook.evaluate.policy_speed import policy_speed
from billhook.evaluate.tune_policy import Goal, tune
from billhook.evaluate.workload import Workload
from billhook.measure.cost import CostModel
from billhook.plan.errors import InputError
from billhook.plan.plan import Plan
from billhook.plan.record import Interval, TextEvidence
from billhook.runtime.catalogue import policy_of
from billhook.runtime.policy import Policy
from billhook.surgery import apply

IDS = torch.randint(3, 90, (9, 10), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def judge() -> Judge:
    model = build("llama")
    return Judge(model, discover(model), Windows.of(IDS, "text"), prompt=4)


@pytest.mark.parametrize("text", ["ffn-skip:threshold=1", "similarity-exit:decoder=1", "chain", "lora-drop:period=1"])
def test_what_leaves_out_nothing_costs_nothing_and_saves_nothing(judge: Judge, text: str) -> None:
    found, saved = judge(policy_of(text))
    assert (found.kl.value, found.top1.value, found.perplexity_ratio.value) == (0.0, 1.0, 1.0)
    assert (saved.blocks, saved.flops, saved.kv_bytes, saved.sublayers) == (5.0, 1.0, 1.0, {})


def test_a_static_skip_is_judged_as_the_cut_model_is(judge: Judge) -> None:
    """On other ways of computing the same: token by token here, windows at once there."""
    units = ["decoder.3", "decoder.1.mlp"]
    found, saved = judge(policy_of(f"static-skip:units={'+'.join(units)}"))
    anatomy, plan = judge.anatomy, Plan.of(units)
    (other,) = evidence(judge.model, apply(judge.model, anatomy, plan), [("calibration", judge.windows)])
    for figure in ("perplexity_dense", "perplexity_compressed", "perplexity_ratio", "kl", "top1"):
        assert getattr(found, figure).value == pytest.approx(getattr(other, figure).value, rel=1e-3), figure
    costs = CostModel(anatomy.outline, prompt_tokens=1, new_tokens=10)
    assert saved.flops == pytest.approx(costs.of(plan.drops)["flops"] / costs.dense["flops"])
    assert saved.kv_bytes == pytest.approx(0.8)
    assert saved.sublayers == {"decoder.1.mlp": 0.0, "decoder.3.attention": 0.0, "decoder.3.mlp": 0.0}


def test_work_is_counted_of_generated_tokens_and_projections_are_charged(judge: Judge) -> None:
    """The middle block at every second of 5 generated tokens: at 2 of them it makes keys and values only."""
    found, saved = judge(policy_of("lora-drop:blocks=2,period=2"))
    assert found.kl.value > 0
    assert saved.sublayers == {"decoder.2.attention": 3 / 5, "decoder.2.mlp": 3 / 5}
    assert saved.kv_bytes == 1.0
    costs = CostModel(judge.anatomy.outline, prompt_tokens=1, new_tokens=10)
    block = costs.saving(judge.anatomy.stack("decoder").blocks[2].address)["flops"]
    assert costs.dense["flops"] - 2 / 5 * block < saved.flops * costs.dense["flops"] < costs.dense["flops"]
    idle = 2 * 36 * 60 * 10 * 2  # multiplications and additions of queries and output, ten tokens
    kept = costs.saving(judge.anatomy.stack("decoder").blocks[2].sublayers[0].address)["flops"] - idle
    assert saved.flops * costs.dense["flops"] == pytest.approx(costs.dense["flops"] - 2 / 5 * (block - kept))


def test_a_loop_costs_what_it_runs(judge: Judge) -> None:
    _, saved = judge(policy_of("chain:blocks=0-4+4"))
    assert saved.blocks == pytest.approx(6.0)
    assert saved.kv_bytes == pytest.approx(1.2)


def test_it_refuses_what_it_cannot_judge() -> None:
    model = build("t5")
    with pytest.raises(InputError, match="encoder-decoder"):
        Judge(model, discover(model), Windows.of(IDS, "text"))
    model = build("llama")
    with pytest.raises(InputError, match="2 or more windows"):
        Judge(model, discover(model), Windows.of(IDS[:1], "text"))


def evidence_of(kl: float) -> TextEvidence:
    flat = Interval(value=kl, low=kl, high=kl)
    return TextEvidence(
        name="", domain="other", windows=2, tokens=2, protocol="", perplexity_dense=flat, perplexity_compressed=flat,
        perplexity_ratio=flat, kl=flat, top1=flat,
    )  # fmt: skip


def test_the_dial_is_turned_as_far_as_the_target_allows() -> None:
    """KL rises with 1 - threshold; the bound is crossed at 0.37."""
    asked: list[float] = []

    def judged(policy: Policy) -> tuple[TextEvidence, float]:
        threshold: float = policy.threshold  # type: ignore[attr-defined]
        asked.append(threshold)
        return evidence_of(1 - threshold), threshold

    best, tried = tune(policy_of("ffn-skip:span=3"), judged, Goal.parse("kl<=0.63"))
    assert 0.37 <= best.threshold < 0.37 + 2 / 2**9  # type: ignore[attr-defined]
    assert best.span == 3  # type: ignore[attr-defined]
    assert len(asked) == len(set(asked)) == len(tried) == 11
    assert all(t.met == (t.value >= 0.37) for t in tried)


def test_a_dial_that_is_a_whole_number_is_asked_for_each_value_once() -> None:
    asked: list[int] = []

    def judged(policy: Policy) -> tuple[TextEvidence, float]:
        asked.append(policy.period)  # type: ignore[attr-defined]
        return evidence_of(policy.period / 10), 1 / policy.period  # type: ignore[attr-defined]

    best, _ = tune(policy_of("lora-drop"), judged, Goal.parse("kl <= 0.5"))
    assert best.period == 5  # type: ignore[attr-defined]
    assert len(asked) == len(set(asked))
    with pytest.raises(InputError, match=r"misses kl<=0.05 even where it leaves out nothing"):
        tune(policy_of("lora-drop"), judged, Goal.parse("kl<=0.05"))
    with pytest.raises(InputError, match="no threshold"):
        tune(policy_of("chain"), judged, Goal.parse("kl<=0.05"))


@pytest.mark.parametrize("text", ["kl>=0.1", "top1<=0.9", "loss<=1", "kl<0.1", "kl<=", ""])
def test_a_target_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="not of the form"):
        Goal.parse(text)


@pytest.mark.parametrize("text", ["top1>=1.01", "perplexity<=0.99"])
def test_a_target_that_the_plain_model_misses_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="more than the plain model keeps"):
        Goal.parse(text)
    assert Goal.parse("top1>=1").bound == Goal.parse("perplexity<=1").bound == 1.0


def test_speed_is_timed_in_turns_and_leaves_the_model_plain() -> None:
    model = build("llama")
    workloads = [
        Workload(name="prefill", batch=1, prompt_tokens=20, new_tokens=0),
        Workload(name="decode", batch=2, prompt_tokens=8, new_tokens=3),
    ]
    timings = policy_speed(
        model, discover(model), policy_of("ffn-skip"), Windows.of(IDS, "text"), workloads=workloads, rounds=2
    )
    assert [t.workload.name for t in timings] == ["prefill", "decode"]
    assert all(math.isfinite(t.speedup.value) and t.speedup.value > 0 for t in timings)
    assert "billhook_policy" not in vars(model)
    with pytest.raises(InputError, match="has 90 tokens"):
        policy_speed(model, discover(model), policy_of("chain"), Windows.of(IDS, "text"), workloads=[
            Workload(name="prefill", batch=4, prompt_tokens=30, new_tokens=0)])  # fmt: skip
