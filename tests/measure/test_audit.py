"""The depth audit against what its figures are by definition, on every family."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from families import FAMILIES, build
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.overrides import TorchFunctionMode

from billhook.anatomy import discover
from billhook.data import Windows
from billhook.measure.affine import affine
from billhook.measure.audit import SHARED, audit
from billhook.measure.likeness import depth_maps, neighbours
from billhook.measure.outcome import Outcome
from billhook.measure.replay import Replay
from billhook.measure.skipping import skip_effects
from billhook.measure.stitching import correlation, stitches, tokens_at, tokenwise
from billhook.measure.trace import trace
from billhook.plan.audit import StackAudit, Tokenwise

STACKS = [(name, stack) for name in FAMILIES for stack in FAMILIES[name].stacks]
CAUSAL = "decoder"
PREDICTS = {name for name, stack in STACKS if stack == CAUSAL and "encoder" not in FAMILIES[name].stacks}


def windows(rows: int = 4, length: int = 12, seed: int = 5) -> Windows:
    ids = torch.randint(3, 90, (rows, length), generator=torch.Generator().manual_seed(seed))
    return Windows.of(ids, "test")


def replay(model: nn.Module, source: Any = None, stack: str | None = None) -> Replay:
    return Replay(model, discover(model), windows() if source is None else source, stack)


def audited(model: nn.Module, inputs: Any, stack: str) -> StackAudit:
    anatomy = discover(model)
    seen = trace(model, anatomy, inputs, ("block", "sublayer"))
    return audit(model, anatomy, inputs, inputs, seen, stack)


@pytest.mark.parametrize(("name", "stack"), STACKS)
def test_every_family(name: str, stack: str) -> None:
    """Everything that can be asked of a stack is answered, in the right shape, with finite figures."""
    model = build(name)
    blocks = FAMILIES[name].stacks[stack]
    found = audited(model, [FAMILIES[name].inputs(model, 3, None)], stack)
    assert len(found.tokenwise) == blocks
    assert [len(row) for row in (*found.r2, *found.cka)] == [blocks + 1] * 2 * (blocks + 1)
    assert all(
        value is not None and value == pytest.approx(1, abs=1e-4)
        for value in (found.cka[i][i] for i in range(blocks + 1))
    )
    assert all(row[i] == pytest.approx(1, abs=0.05) for i, row in enumerate(found.r2))
    assert all(math.isfinite(value) for value in (*found.size.values(), *found.alignment.values()))
    sublayers = {str(s.address) for b in discover(model).stack(stack).blocks for s in b.sublayers}
    assert sublayers <= set(found.size) == set(found.alignment)
    if name == "gemma4":
        assert found.skips is None and found.stitches is None and found.left_out == SHARED
        return
    assert found.left_out is None and found.skips is not None and found.stitches is not None
    assert found.output == ("kl" if stack == CAUSAL and name in PREDICTS else "stream")
    causal = stack == CAUSAL
    assert len(found.skips.output_now) == blocks and len(found.skips.output_future) == causal * blocks
    for rows in (found.skips.now, found.skips.future):
        for skipped, row in enumerate(rows):
            assert [value is not None for value in row] == [later > skipped for later in range(blocks)]
    assert [value for row in found.stitches.output for value in row if value is None] == []


def test_skipping_is_what_plain_hooks_see() -> None:
    """Block 1 hands on what it gets for the first half of the tokens but the very first."""
    model = build("llama")
    source = windows()
    found = skip_effects(r := replay(model), Outcome(r))

    def run(skip: bool) -> tuple[list[Tensor], Tensor]:
        streams: list[Tensor] = []
        hooks = []

        def after(module: Any, args: Any, output: Any) -> Any:
            if skip:
                changed = output.clone()
                changed[:, 1:6] = args[0][:, 1:6]
                return changed
            return None

        hooks.append(model.model.layers[1].register_forward_hook(after))
        for layer in model.model.layers:
            hooks.append(layer.register_forward_hook(lambda m, args, output: streams.extend([args[0], output])))
        with torch.no_grad():
            logits = model(input_ids=source.ids).logits.log_softmax(-1)
        for hook in hooks:
            hook.remove()
        return [y - x for x, y in zip(streams[::2], streams[1::2], strict=True)], logits

    (dense, before), (altered, after) = run(False), run(True)
    kl = (before.exp() * (before - after)).sum(-1)
    for side, rows, outputs in (
        (slice(1, 6), found.now, found.output_now),
        (slice(6, None), found.future, found.output_future),
    ):
        for later in (2, 3, 4):
            change = (altered[later] - dense[later]).norm(dim=-1) / dense[later].norm(dim=-1)
            assert rows[1][later] == pytest.approx(change[:, side].mean().item(), rel=1e-4)
        assert outputs[1] == pytest.approx(kl[:, side].mean().item(), rel=1e-3, abs=1e-6)


def test_the_last_block_leaves_nothing_for_later_tokens() -> None:
    found = skip_effects(r := replay(build("llama")), Outcome(r))
    assert found.output_future[-1] == pytest.approx(0, abs=1e-5)
    assert found.output_now[-1] > 0.01


def test_encoders_skip_for_all_tokens() -> None:
    model = build("bert")
    inputs = [FAMILIES["bert"].inputs(model, 2, None)]
    found = skip_effects(r := replay(model, inputs), Outcome(r))
    assert found.future == () and found.output_future == ()
    streams = r.streams(0)
    error = r.onward(0, 4, streams[3])[-1] - streams[-1]
    expected = (error.square().sum(-1) / streams[-1].square().sum(-1)).mean().item()
    assert found.output_now[3] == pytest.approx(expected, rel=1e-4)


def test_depth_maps_by_their_formulas() -> None:
    model = build("llama")
    fit, held = replay(model, windows(20)), replay(model, windows(6, seed=6))
    r2, cka = depth_maps(fit, held, (0, 2, 5))
    x, y = (normalize(tokens_at(fit, depth), dim=-1).double() for depth in (2, 5))
    x, y = x - x.mean(0), y - y.mean(0)
    expected = (x.T @ y).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm())
    assert cka[1][2] == pytest.approx(expected.item(), rel=1e-4)
    assert cka[1][2] == pytest.approx(cka[2][1], rel=1e-5)
    assert r2[0][2] < r2[1][2] < r2[2][2]


def test_a_block_that_writes_nothing_and_one_that_is_affine() -> None:
    """Depth 2 is depth 1 again; depth 4 is an affine image of depth 3."""
    model = build("llama")
    matrix = torch.randn(36, 36, generator=torch.Generator().manual_seed(1)) / 6
    model.model.layers[1].forward = lambda hidden_states, *args, **kwargs: hidden_states
    model.model.layers[3].forward = lambda hidden_states, *args, **kwargs: hidden_states @ matrix + 0.5
    fit, held = replay(model, windows(40)), replay(model, windows(6, seed=6))
    r2, cka = depth_maps(fit, held, tuple(range(6)))
    assert cka[1][2] == pytest.approx(1, abs=1e-5)
    assert r2[1][2] == pytest.approx(1, abs=0.01)
    outcome = Outcome(held)
    split = tokenwise(fit, held, outcome)
    assert split[3].explained == pytest.approx(1, abs=1e-3)
    assert split[3].cosine_tokenwise == pytest.approx(1, abs=1e-3)
    assert split[3].output == pytest.approx(0, abs=1e-3)
    assert split[2].explained < 0.99 and split[2].output > 0.01
    joined = stitches(fit, held, outcome, (1, 2, 3, 4))
    assert joined.output[0][1] == pytest.approx(0, abs=1e-3)
    assert joined.output[2][3] == pytest.approx(0, abs=1e-3)
    assert joined.output[1][2] == pytest.approx(split[2].output)
    assert all(joined.output[i][i] == 0 for i in range(4))


def test_the_parts_of_an_update_add_up() -> None:
    """cos(u, t) |t| + cos(u, r) |r| = |u| for u = t + r, so both cosines cannot be wrong at once."""
    model = build("gpt2")
    fit, held = replay(model, windows(30)), replay(model, windows(1, 2, seed=6))
    row = tokenwise(fit, held, None)[2]
    x, y = tokens_at(held, 2), tokens_at(held, 3)
    guess = affine(tokens_at(fit, 2), tokens_at(fit, 3))(x)
    cosines = [nn.functional.cosine_similarity(y - x, part, -1).mean().item() for part in (guess - x, y - guess)]
    assert [row.cosine_tokenwise, row.cosine_rest] == pytest.approx(cosines, abs=1e-5)
    assert row.output is None and correlation((row,)) is None


def test_correlation_is_that_of_ranks() -> None:
    rows = [
        Tokenwise(explained=1 - share, cosine_tokenwise=0, cosine_rest=0, output=output)
        for share, output in ((0.1, 1.0), (0.2, 5.0), (0.9, 100.0), (0.5, 2.0))
    ]
    assert correlation(tuple(rows)) == pytest.approx(0.8)
    assert correlation(tuple(rows[:2])) is None


def test_neighbours_by_plain_loops() -> None:
    model = build("llama")
    r = replay(model, windows(3, 6))
    found = neighbours(r, (0, 3))
    streams = r.streams(0)[3] - tokens_at(r, 3).mean(0)
    pairs = [
        nn.functional.cosine_similarity(streams[row, i], streams[row, i + 4], dim=0).item()
        for row in range(3)
        for i in range(2)
    ]
    assert found[4][1] == pytest.approx(sum(pairs) / len(pairs), abs=1e-5)
    assert found[16] == (None, None)


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_padding_does_not_count(name: str) -> None:
    model = build(name)
    stack = next(iter(FAMILIES[name].stacks))
    inputs = FAMILIES[name].inputs(model, 3, "left" if name != "t5" else "right")
    rows = []
    for row in range(3):
        real = inputs["attention_mask"][row].bool()
        alone = {key: value[row : row + 1] for key, value in inputs.items() if key != "attention_mask"}
        rows.append(alone | {"input_ids": inputs["input_ids"][row : row + 1, real]})
    padded, alone = audited(model, [inputs], stack), audited(model, rows, stack)
    assert padded.held == alone.held
    assert padded.skips is not None and alone.skips is not None
    for one, other in (
        (padded.skips.now, alone.skips.now),
        (padded.skips.future, alone.skips.future),
        ((padded.skips.output_now,), (alone.skips.output_now,)),
        (padded.cka, alone.cka),
        (tuple(padded.neighbours.values()), tuple(alone.neighbours.values())),
    ):
        for a, b in zip(one, other, strict=True):
            assert [v for v in a if v is not None] == pytest.approx([v for v in b if v is not None], abs=2e-4, rel=2e-3)


class Largest(TorchFunctionMode):
    values = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.values = max(self.values, result.numel())
        return result


def test_memory_is_linear_in_tokens() -> None:
    model = build("llama")
    sizes = []
    for rows in (16, 64):
        with Largest() as largest:
            audited(model, windows(rows), CAUSAL)
        sizes.append(largest.values)
    assert 0 < sizes[1] <= 4 * sizes[0]


def test_work_is_counted_and_nothing_is_left_behind() -> None:
    model = build("llama").train()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    found = audited(model, windows(2, 8), CAUSAL)
    # 5 blocks over both texts; skips and tokenwise maps 4 + 3 + 2 + 1 each; stitches at depths 1 to 5, from 4 others
    assert found.work == 16 * (2 * 5 + 2 * 10 + 4 * (4 + 3 + 2 + 1 + 0))
    assert found == audited(model, windows(2, 8), CAUSAL)
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    assert all(module.training for module in model.modules())
    assert not any("forward" in module.__dict__ for module in model.modules())
