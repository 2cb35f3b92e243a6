"""Self-speculation timed: what its drafts are worth is counted, and the texts are compared."""

from __future__ import annotations

import pytest
import torch
from families import build

from billhook.anatomy import discover
from billhook.cli.policy_views import views
from billhook.data import Windows
from billhook.evaluate.generation_speed import generation_speed
from billhook.plan.policy_record import PolicyReport
from billhook.plan.record import Workload
from billhook.runtime.self_speculation import SelfSpeculation

TEXT = Windows.of(torch.randint(3, 90, (3, 10), generator=torch.Generator().manual_seed(2)), "text")
SHORT = Workload(name="generate", batch=1, prompt_tokens=64, new_tokens=14)


def test_a_draft_that_is_always_right() -> None:
    """What is skipped writes nothing: three plain steps begin a text, then every round gives five tokens."""
    model = build("llama")
    anatomy = discover(model)
    for name in (w for s in anatomy.stack("decoder").blocks[2].sublayers for w in s.writes):
        model.get_parameter(name).data.zero_()
    policy = SelfSpeculation(units="decoder.2", longest=4, threshold=0.0, give_up=False)
    model.generation_config.eos_token_id = list(range(0, 100, 2))  # ends nothing here
    timing, drafting = generation_speed(model, anatomy, policy, TEXT, workload=SHORT, rounds=2)
    assert (drafting.drafted, drafting.accepted, drafting.acceptance) == (16, 16, 1.0)
    assert (drafting.tokens_per_verify, drafting.same_text) == (5.0, 1.0)
    assert timing.workload.prompt_tokens == 10
    assert timing.rounds == 2
    assert "generate" not in vars(model)


def test_texts_that_differ_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A verification that accepts whatever was drafted."""
    monkeypatch.setattr(
        "billhook.runtime.draft_loop.greedy", lambda drafted, scores: [*drafted, int(scores[-1].argmax())]
    )
    model = build("llama")
    policy = SelfSpeculation(units="decoder.1+decoder.2+decoder.3", threshold=0.0, give_up=False)
    timing, drafting = generation_speed(model, discover(model), policy, TEXT, workload=SHORT, rounds=2)
    assert drafting.same_text is not None and drafting.same_text < 1
    report = PolicyReport(
        model="m", policy=policy.name, parameters={}, kv=policy.kv, timings=(timing,), drafting=drafting
    )
    assert any("drafted tokens accepted" in str(view) for view in views(report))
