"""Masks of single weights, and the walk that finds them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import VOCABULARY, build
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from billhook.anatomy import Anatomy, discover
from billhook.data import Windows
from billhook.heal import healed
from billhook.measure.cost import cost
from billhook.plan.budget import Budget
from billhook.plan.errors import InputError
from billhook.plan.plan import Plan
from billhook.search.masks import chosen, most_salient, spread
from billhook.search.second_order import second_order
from billhook.search.sparsity import By, Sparse, pose_weights, sparsify
from billhook.search.zeroth_order import sparsities, zeroth_order
from billhook.surgery import apply, simulate

WINDOWS = Windows.of(torch.randint(3, VOCABULARY, (4, 24), generator=torch.Generator().manual_seed(2)), "noise")
quick = settings(max_examples=40, deadline=None, derandomize=True, database=None)


@pytest.fixture(autouse=True)
def no_gradients() -> Any:
    with torch.no_grad():
        yield


def _draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@given(
    st.integers(1, 9),
    st.sampled_from([4, 8, 12]),
    st.floats(0, 1),
    st.sampled_from([None, (2, 4), (1, 4)]),
    st.booleans(),
)
@quick
def test_the_share_is_kept_and_the_most_salient_stay(
    rows: int, width: int, share: float, pattern: tuple[int, int] | None, by_row: bool
) -> None:
    saliency = _draw(rows, width).abs()
    mask = chosen(saliency, share, pattern, by_row)
    most = pattern[0] / pattern[1] if pattern else 1.0
    assert int(mask.sum()) == int(rows * width * min(share, most) + 1e-9)
    groups, kept = (t.reshape(-1, 4 if pattern else width if by_row else rows * width) for t in (saliency, mask))
    assert pattern is None or (kept.sum(1) <= pattern[0]).all()
    assert kept.sum(1).max() - kept.sum(1).min() <= 1
    for figures, stays in zip(groups, kept, strict=True):
        if stays.any() and not stays.all():
            assert figures[stays].min() >= figures[~stays].max()


def test_of_equals_the_first_stays() -> None:
    assert most_salient(torch.ones(1, 4), torch.tensor([2])).tolist() == [[True, True, False, False]]
    assert spread(torch.tensor([3, 3, 3, 2]), 0.5).tolist() == [1, 2, 1, 1]


def _error(weight: Tensor, new: Tensor, gram: Tensor) -> float:
    change = (weight - new).double()
    return float((change @ gram.double() * change).sum())


@pytest.mark.parametrize("pattern", [None, (2, 4)])
def test_second_order_makes_good_what_goes(pattern: tuple[int, int] | None) -> None:
    """Against the same mask without the correction, and against a choice by magnitude."""
    x = _draw(400, 32) @ _draw(32, 32, seed=1)
    weight, gram = _draw(20, 32, seed=3), x.T @ x
    mask, new = second_order(weight, gram, 0.5, pattern)
    assert int(mask.sum()) == 20 * 16 and not new[~mask].any()
    plain = chosen(weight.abs(), 0.5, pattern, by_row=False)
    assert _error(weight, new, gram) < 0.75 * _error(weight, weight * mask, gram)
    assert _error(weight, new, gram) < 0.95 * _error(weight, weight * plain, gram)


def test_what_goes_is_made_good_in_the_blocks_of_inputs_behind_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where each four inputs are compared when they are reached, four blocks do what one does."""
    x = _draw(400, 32) @ _draw(32, 32, seed=1)
    weight, gram = _draw(20, 32, seed=3), x.T @ x
    mask, new = second_order(weight, gram, 0.5, (2, 4))
    monkeypatch.setattr("billhook.search.second_order.BLOCK", 8)
    again, same = second_order(weight, gram, 0.5, (2, 4))
    assert torch.equal(mask, again)
    torch.testing.assert_close(new, same, atol=1e-4, rtol=1e-4)


def test_one_weight_goes_as_the_optimal_brain_surgeon_has_it() -> None:
    """The one with least w^2 / [H^-1]_jj, and the others change by -w / [H^-1]_jj H^-1_j."""
    x = _draw(50, 6) @ _draw(6, 6, seed=1)
    weight = _draw(1, 6, seed=5)
    weight[0, 0] = 1e-4  # the first input goes, so all others are still to be settled
    mask, new = second_order(weight, gram := x.T @ x, 5 / 6)
    assert mask.tolist() == [[False] + [True] * 5]
    system = gram.double() + 0.01 * gram.diagonal().mean().double() * torch.eye(6, dtype=torch.float64)
    inverse = system.inverse()
    expected = weight.double() - weight[0, 0].double() / inverse[0, 0] * inverse[0]
    torch.testing.assert_close(new.double(), expected, atol=1e-5, rtol=1e-4)


def test_inputs_without_energy_go_first() -> None:
    x = _draw(50, 8)
    x[:, 3] = 0
    mask, _ = second_order(_draw(5, 8, seed=1).sign(), x.T @ x, 7 / 8)
    assert not mask[:, 3].any() and int(mask.sum()) == 35


def _run(name: str, by: By, share: float = 0.5, pattern: tuple[int, int] | None = None) -> tuple[Any, Anatomy, Sparse]:
    model = build(name)
    anatomy = discover(model)
    shares = dict.fromkeys(range(len(anatomy.stack("decoder").blocks)), share)
    return model, anatomy, sparsify(model, anatomy, "decoder", shares, WINDOWS, by=by, pattern=pattern)


@pytest.mark.parametrize("by", ["magnitude", "wanda", "second-order"])
@pytest.mark.parametrize("pattern", [None, (2, 4)])
def test_a_plan_with_the_masks_keeps_to_budget_and_pattern(by: By, pattern: tuple[int, int] | None) -> None:
    model, anatomy, found = _run("gpt2", by, 0.5, pattern)
    plan = Plan.of([], sparsities=found.edits, arrays=found.arrays)
    applied = apply(model, anatomy, plan)  # checks masks against counts and pattern
    zeros = {edit.unit: sum(edit.zeros.values()) for edit in found.edits}
    linear = sum(s.linear_params for _, s in anatomy.outline.sublayers())
    assert sum(zeros.values()) == pytest.approx(0.5 * linear, rel=2e-3)
    assert cost(anatomy.outline, zeros=zeros)["params"] == sum(
        int((p != 0).sum()) for n, p in applied.named_parameters() if n.startswith("transformer.h.")
    )
    again = _run("gpt2", by, 0.5, pattern)[2]
    assert (again.edits, again.arrays) == (found.edits, found.arrays)


@pytest.mark.parametrize(("name", "block"), [("llama", 1), ("llama", 4), ("gemma4", 5)])
def test_wanda_compares_within_outputs_on_what_sparse_blocks_give(name: str, block: int) -> None:
    """By plain hooks: the first block sees the dense stream, a later one what those before it, made sparse, write, and
    the keys and values that they lend."""
    model, anatomy, found = _run(name, "wanda")
    plan = Plan.of([], sparsities=found.edits, arrays=found.arrays)
    new = apply(model, anatomy, plan)
    first = Plan.of([], sparsities=[e for e in found.edits if e.unit.block < block], arrays=found.arrays)
    given: dict[str, Tensor] = {}

    def watch(module: Any, args: Any, output: Any) -> None:
        given["x"] = args[0].reshape(-1, args[0].shape[-1])

    linear = model.model.layers[block].mlp.gate_proj
    handle = linear.register_forward_hook(watch)
    for around, right in ((simulate(model, anatomy, first), True), (simulate(model, anatomy, []), False)):
        with around:
            model(input_ids=WINDOWS.ids)
        saliency = linear.weight.abs() * given["x"].norm(dim=0)
        wanted = chosen(saliency, 0.5, None, by_row=True)
        assert torch.equal(new.model.layers[block].mlp.gate_proj.weight != 0, wanted) is right
    handle.remove()


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "phi3", "gemma2", "deepseek_v3"])
def test_each_is_nearer_to_dense_than_the_one_before(name: str) -> None:
    """Magnitude, Wanda, second order: by the output of the first block, whatever its layout."""
    if name == "deepseek_v3":
        with pytest.raises(InputError, match="fused experts"):
            _run(name, "wanda")
        return
    errors = []
    for by in ("magnitude", "wanda", "second-order"):
        model, anatomy, found = _run(name, by, 0.4)  # type: ignore[arg-type]
        plan = Plan.of([], sparsities=[e for e in found.edits if e.unit.block == 0], arrays=found.arrays)
        dense = model(input_ids=WINDOWS.ids, output_hidden_states=True).hidden_states[1]
        new = {n: t for n, t in found.healing.tensors.items() if ".0." in n} if found.healing else {}
        with healed(model, found.healing.__class__(new, (), {}, 0, 0)) if new else simulate(model, anatomy, []):
            cut = apply(model, anatomy, plan)
        errors.append(float((cut(input_ids=WINDOWS.ids, output_hidden_states=True).hidden_states[1] - dense).norm()))
    assert errors[0] > errors[1] * 0.98 and errors[1] > errors[2]


def test_what_cannot_be_is_refused() -> None:
    outline = discover(build("llama")).outline
    for budget, message in (
        ("size=0.5", "params alone"),
        ("until=cliff", "parameters alone"),
        ("params=0.001", "cannot be met"),
    ):
        with pytest.raises(InputError, match=message.replace("params alone", "parameters alone")):
            pose_weights(outline, Budget.parse(budget))
    with pytest.raises(InputError, match="pattern 2:5 does not divide"):
        _run("llama", "magnitude", 0.5, (2, 5))


def test_blocks_where_the_loss_is_steep_keep_more() -> None:
    sizes = dict.fromkeys(range(4), 100)
    found = sparsities({0: 3.0, 1: 1.0, 2: 1.0, 3: 1.0}, sizes, 0.5)
    assert sum(found.values()) / 4 == pytest.approx(0.5)
    assert found[0] == pytest.approx(0.6 - 0.2) and max(found.values()) <= 0.6
    assert sparsities({0: 9.0, 1: 0.0}, {0: 10, 1: 10}, 0.5)[0] == pytest.approx(0.4)
    assert sparsities({0: 1.0, 1: 0.0}, {0: 10, 1: 90}, 0.2, room=0.5)[0] == pytest.approx(0.0)


def test_a_block_that_writes_nothing_has_no_slope() -> None:
    model: Any = build("llama")
    attention, mlp = model.model.layers[1].self_attn, model.model.layers[1].mlp
    for linear in (attention.v_proj, attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj):
        linear.weight.zero_()  # no small change of any of these alone changes what it writes
    before = {n: p.clone() for n, p in model.named_parameters()}
    slopes, work = zeroth_order(model, discover(model), "decoder", WINDOWS)
    assert slopes[1] < 0.01 * min(slope for block, slope in slopes.items() if block != 1)
    assert work == 2 * 5 * WINDOWS.ids.numel() * 5
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
