"""Experts left out while the model runs: against the mixture written out, with work really saved, thresholds by kind of
token, and the search along their frontier."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import build
from running import equal, generate, ready, state

from billhook.anatomy import discover
from billhook.data import Windows
from billhook.evaluate.frontier import frontier
from billhook.evaluate.policy_quality import Judge
from billhook.evaluate.tune_policy import Goal, tune
from billhook.plan.address import Address
from billhook.plan.errors import InputError
from billhook.runtime.catalogue import policy_of, read_policy, write_policy
from billhook.runtime.expert_skip import ExpertSkip, _mixtures

MIXTURES = ["mixtral", "qwen3_moe", "olmoe", "deepseek_v3"]
WINDOWS = Windows.of(torch.randint(3, 90, (3, 8), generator=torch.Generator().manual_seed(4)), "test")


def heard(model: Any, anatomy: Any, inputs: dict[str, Any]) -> dict[Address, tuple[torch.Tensor, ...]]:
    """What the experts of each mixture are given."""
    given: dict[Address, tuple[torch.Tensor, ...]] = {}
    handles = [
        model.get_submodule(m.experts).register_forward_pre_hook(lambda module, args, a=a: given.update({a: args}))
        for a, m in _mixtures(anatomy).items()
    ]
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    return given


@pytest.mark.parametrize("name", MIXTURES)
@torch.no_grad()
def test_what_is_left_out_is_as_if_its_weight_were_zero(name: str) -> None:
    """Layer by layer: the experts under the policy against the plain ones with the weights below the threshold at 0."""
    model, anatomy, inputs = ready(name)
    mixtures = _mixtures(anatomy)
    importance = tuple(1 - 0.2 * i for i in range(len(mixtures)))
    given = heard(model, anatomy, inputs)
    worth = [i * w / w.sum(-1, keepdim=True) for (_, _, w), i in zip(given.values(), importance, strict=True)]
    picks = torch.cat([w.flatten() for w in worth])
    threshold = float(picks.quantile(0.5)) + 1e-6
    expected = {}
    for (a, (hidden, picked, weights)), i in zip(given.items(), importance, strict=True):
        kept = i * weights / weights.sum(-1, keepdim=True) >= threshold
        expected[a] = model.get_submodule(mixtures[a].experts)(hidden, picked, weights * kept), int((~kept).sum())
    seen: list[int] = []  # rows that the experts really work on
    with ExpertSkip(text=threshold, importance=importance).attach(model, anatomy) as attached:
        for a, (hidden, picked, weights) in given.items():
            found = model.get_submodule(mixtures[a].experts)(hidden, picked, weights)
            torch.testing.assert_close(found, expected[a][0], atol=1e-5, rtol=1e-4)
            assert attached.counts.left_out[a] == expected[a][1]
            assert attached.counts.picked[a] == picked.numel()
            seen.append(expected[a][1])
    assert sum(seen) > 0


def test_work_is_really_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    """The experts' own forward never sees the picks that are left out, and not at all where none is left."""
    model, anatomy, inputs = ready("mixtral")
    rows: list[int] = []
    kind = type(model.get_submodule("model.layers.0.mlp.experts"))
    original = kind.forward

    def counting(self: Any, hidden: Any, picked: Any, weights: Any) -> Any:
        rows.append(picked.numel())
        return original(self, hidden, picked, weights)

    monkeypatch.setattr(kind, "forward", counting)
    with torch.no_grad(), ExpertSkip(text=0.5).attach(model, anatomy) as attached:
        model(**inputs)  # two experts a token, whose shares add up to one: one of them goes
    tokens = inputs["input_ids"].numel()
    assert rows == [tokens] * 5
    assert sum(attached.counts.left_out.values()) == 5 * tokens
    rows.clear()
    with torch.no_grad(), ExpertSkip(text=1.0).attach(model, anatomy):
        model(**inputs)
    assert rows == []


@torch.no_grad()
def test_a_share_at_the_threshold_is_not_below_it() -> None:
    model, anatomy, _ = ready("mixtral")
    address, mixture = next(iter(_mixtures(anatomy).items()))
    picked, halves = torch.tensor([[0, 3], [2, 1]]), torch.full((2, 2), 0.5)
    with ExpertSkip(text=0.5).attach(model, anatomy) as attached:
        model.get_submodule(mixture.experts)(torch.ones(2, 32), picked, halves)
        assert (attached.counts.picked[address], attached.counts.left_out[address]) == (4, 0)


def test_importance_is_what_the_output_misses() -> None:
    """A mixture whose experts write nothing has no importance, the one that matters most has 1."""
    model = build("mixtral")
    with torch.no_grad():
        model.get_submodule("model.layers.2.mlp.experts").down_proj.zero_()
    anatomy = discover(model)
    before = state(model)
    fitted = ExpertSkip().fitted(model, anatomy, WINDOWS)
    assert state(model) == before
    assert fitted.importance[2] == 0 and max(fitted.importance) == 1 and len(fitted.importance) == 5
    assert fitted.fitted(model, anatomy, WINDOWS) is fitted
    rises = []
    with torch.no_grad():
        plain = model(WINDOWS.ids).logits.log_softmax(-1)
        for i in range(5):
            handle = model.get_submodule(f"model.layers.{i}.mlp").register_forward_hook(lambda m, a, out: out * 0)
            rises.append(float((plain.exp() * (plain - model(WINDOWS.ids).logits.log_softmax(-1))).sum()))
            handle.remove()
    assert fitted.importance == pytest.approx([r / max(rises) for r in rises], abs=1e-4)


def test_thresholds_by_kind_of_token() -> None:
    """A toy with two kinds of tokens: id 7 stands for an image. Only its experts are left out."""
    model, _, inputs = ready("mixtral")
    with pytest.raises(InputError, match="text alone"):
        ExpertSkip(vision=0.5).attach(model)
    model.config.image_token_id = 7
    inputs["input_ids"][:, 3:6] = 7
    before = state(model)
    with torch.no_grad(), ExpertSkip(vision=1.0).attach(model) as attached:
        model(**inputs)
        assert set(attached.counts.left_out.values()) == {2 * 2 * 3}
        attached.counts.reset()
        model(input_ids=inputs["input_ids"][:, 6:])
        assert not sum(attached.counts.left_out.values())
    assert state(model) == before
    plain = generate(model, inputs)
    with ExpertSkip(vision=0.0).attach(model):
        assert equal(generate(model, inputs), plain)


def test_what_is_refused() -> None:
    with pytest.raises(InputError, match="no mixture of experts"):
        policy_of("expert-skip:text=0.1").attach(build("llama"))
    with pytest.raises(InputError, match="importance has 2 numbers, the model has 5"):
        ExpertSkip(importance=(1.0, 0.5)).attach(build("mixtral"))
    with pytest.raises(InputError, match="parameter text"):
        policy_of("expert-skip:text=1.5")


def test_it_is_written_and_read(tmp_path: Any) -> None:
    policy = ExpertSkip(text=0.2, vision=0.4, importance=(1.0, 0.25))
    write_policy(policy, tmp_path / "p.json", {})
    assert read_policy(tmp_path / "p.json") == policy


@pytest.mark.parametrize(
    "edge", [lambda a, b: a + 2 * b <= 1, lambda a, b: a * a + b * b <= 0.6, lambda a, b: b <= 0.3]
)
def test_the_frontier_has_every_setting_that_no_other_beats(edge: Any) -> None:
    """Against all settings of the grid; monotone, so that few need be tried."""
    tried = []

    def meets(a: float, b: float) -> bool:
        tried.append((a, b))
        return bool(edge(a, b))

    found = set(frontier(meets, (0.0, 1.0), (0.0, 1.0), levels=8))
    grid = [(a / 8, b / 8) for a in range(9) for b in range(9)]
    good = [s for s in grid if edge(*s)]
    best = {s for s in good if not any(o != s and o[0] >= s[0] and o[1] >= s[1] for o in good)}
    assert best <= found and all(edge(*s) for s in found)
    assert len(tried) <= 17


def test_tuning_finds_thresholds_that_keep_the_target() -> None:
    model = build("mixtral")
    model.config.image_token_id = 7
    anatomy = discover(model)
    ids = WINDOWS.ids.clone()
    ids[:, 5:7] = 7
    judge = Judge(model, anatomy, Windows.of(ids, "two kinds"))

    def judged(policy: Any) -> Any:
        evidence, saved = judge(policy)
        return evidence, saved.flops

    for policy in (ExpertSkip(), ExpertSkip(vision=0.0)):
        fitted = policy.fitted(model, anatomy, WINDOWS)
        best, tried = tune(fitted, judged, Goal.parse("kl<=0.3"))
        evidence, saved = judge(best)
        assert evidence.kl.value <= 0.3
        assert saved.flops == min(t.cost for t in tried if t.met) < 1
        assert any(t.second is not None for t in tried) == (policy.vision is not None)
    assert saved.sublayers  # says which mixtures ran less
