"""Blocks that take turns: only those whose turn it is cost what training costs."""

from __future__ import annotations

import gc
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build
from heal.training.training_bed import PLAN, TOKENS, quick, run, text
from torch import nn

from billhook.anatomy import discover
from billhook.heal import UNTOUCHED
from billhook.heal.training import loop
from billhook.heal.training.lisa import lisa
from billhook.heal.training.state import keep, kept
from billhook.heal.training.train import train
from billhook.heal.training.weights import Weights
from billhook.plan.errors import InputError

BLOCKS = 4  # that PLAN leaves of five
PATHS = [f"model.layers.{block}" for block in range(5)]
HALF, FULL = torch.bfloat16, torch.float32


def names_in(model: nn.Module, paths: Iterable[str]) -> list[str]:
    return [f"{path}.{name}" for path in paths for name, _ in model.get_submodule(path).named_parameters()]


@pytest.mark.parametrize("dtype", [HALF, FULL])
def test_a_block_is_copied_when_its_turn_begins_and_rounded_when_it_ends(dtype: torch.dtype) -> None:
    model = build("llama").to(dtype).requires_grad_(False)
    before = dict(model.named_parameters())
    was = {name: parameter.clone() for name, parameter in before.items()}
    first, second = names_in(model, PATHS[:1]), names_in(model, PATHS[1:2])
    weights = Weights(model, PATHS, names_in(model, PATHS), chosen=[])
    assert not weights.parameters
    assert all(model.get_parameter(name) is parameter for name, parameter in before.items())
    weights.choose(first)
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == set(first)
    assert {weights.parameters[name].dtype for name in first} == {FULL}
    with torch.no_grad():
        for name in first:
            weights.parameters[name].add_(1e-4)
    trained = {name: (was[name].float() + 1e-4).to(dtype) for name in first}
    snapshot = weights.snapshot()
    weights.choose(second)
    assert list(weights.parameters) == [*first, *second]
    assert all(torch.equal(model.get_parameter(name), trained[name]) for name in first)
    assert {model.get_parameter(name).dtype for name in first} == {dtype}
    weights.choose([*first, *second])
    assert all(torch.equal(model.get_parameter(name), trained[name].float()) for name in first)
    with torch.no_grad():
        for name in first:
            weights.parameters[name].add_(1.0)
    assert snapshot.keys() == set(first)
    assert all(torch.equal(tensor, trained[name]) for name, tensor in snapshot.items())
    assert all(torch.equal(tensor, was[name]) for name, tensor in before.items()), "what is shared stays"
    assert all(model.get_parameter(name) is before[name] for name in names_in(model, PATHS[2:]))
    weights.remove()
    assert all(model.get_parameter(name) is parameter for name, parameter in before.items())


def test_a_block_stays_in_float32_while_any_of_it_is_trained() -> None:
    """Modules with weights of several dtypes do not run everywhere."""
    model = build("gpt2").to(HALF)
    path = discover(model).stacks[0].blocks[0].path
    weights = Weights(model, [path], names_in(model, [path]))
    weights.choose([f"{path}.ln_1.weight"])
    assert {parameter.dtype for parameter in weights.parameters.values()} == {FULL}
    assert [parameter.requires_grad for parameter in weights.parameters.values()].count(True) == 1


def test_a_shard_that_rests_is_rounded_where_it_is() -> None:
    model = build("llama").to(HALF)
    shards: list[nn.Parameter] = []
    weights = Weights(
        model, PATHS, names_in(model, PATHS), lambda path: shards.extend(model.get_submodule(path).parameters()), []
    )
    weights.choose(names_in(model, PATHS[:1]))
    with torch.no_grad():
        for parameter in weights.parameters.values():
            parameter.add_(1e-4)
    rounded = {name: parameter.to(HALF).float() for name, parameter in weights.parameters.items()}
    weights.choose([])
    assert all(torch.equal(model.get_parameter(name), tensor) for name, tensor in rounded.items())
    assert {id(shard) for shard in shards} == {id(model.get_parameter(name)) for name in weights.names}


def bytes_by_dtype(tensors: Iterable[torch.Tensor]) -> dict[torch.dtype, int]:
    found: dict[int, tuple[torch.dtype, int]] = {
        t.untyped_storage().data_ptr(): (t.dtype, t.untyped_storage().nbytes()) for t in tensors
    }
    return {kind: sum(size for dtype, size in found.values() if dtype == kind) for kind in (FULL, HALF)}


def alive() -> list[torch.Tensor]:
    """Every tensor, with its gradient."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    return [*tensors, *(t.grad for t in tensors if isinstance(t, nn.Parameter) and t.grad is not None)]


@pytest.mark.parametrize("method", ["lisa", "ist", "fpf"])
def test_memory_is_that_of_the_blocks_whose_turn_it_is(method: str, tmp_path: Path) -> None:
    """In float32: copies, gradients and two moments of what is trained (with fpf copies of the blocks that have any of
    it). In the model's dtype: what came of earlier turns, and of that the best."""
    model = build("llama").to(HALF)
    anatomy = discover(model)
    sizes = [sum(p.numel() for p in model.get_submodule(block.path).parameters()) for block in anatomy.stacks[0].blocks]
    before = alive()
    known, begun = {id(tensor) for tensor in before}, bytes_by_dtype(before)
    steps = []

    def count(_: str, done: int, __: int) -> None:
        now = alive()
        steps.append(done)
        size = {kind: size - begun[kind] for kind, size in bytes_by_dtype(now).items()}
        new = {id(tensor): tensor for tensor in now if id(tensor) not in known and isinstance(tensor, nn.Parameter)}
        asking = sum(tensor.numel() for tensor in new.values() if tensor.requires_grad)
        assert asking <= (sum(sizes) if method == "fpf" and done <= 2 else max(sizes) if method != "fpf" else asking)
        copies = sum(tensor.numel() for tensor in new.values() if tensor.dtype == FULL)
        assert asking <= copies <= (sum(sizes) if method == "fpf" else asking)
        assert size[FULL] <= 4 * copies + 12 * asking + 4096, (done, size, asking, copies)
        assert size[HALF] <= 2 * 2 * sum(sizes[:BLOCKS]) + 4096, (done, size)

    train(
        model, anatomy, PLAN, UNTOUCHED, text(), quick(method, period=2, blocks=1), tokens=TOKENS,
        state=tmp_path / "state", progress=count,
    )  # fmt: skip
    assert steps == list(range(1, 13))


@pytest.mark.parametrize(("method", "steps"), [("lisa", 4), ("fpf", 12)])
def test_moments_are_as_old_as_the_turn(method: str, steps: int, tmp_path: Path) -> None:
    """Those of fpf were there before it chose."""
    run("llama", quick(method, blocks=1, rate=3e-3), tmp_path / "state")
    found = kept(tmp_path / "state", {})
    assert found is not None
    ages = {key.removeprefix("step "): tensor.item() for key, tensor in found[0].items() if key.startswith("step ")}
    assert ages == dict.fromkeys(found[1]["layers"]["chosen"], steps)


def test_a_block_that_never_had_a_turn_is_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the dense model, in the state, and in the result; also after going on from that state."""
    seen: dict[str, Any] = {}
    through = loop.Loop.through

    def look(self: Any, subject: Any) -> Any:
        seen["student"] = self._student
        return through(self, subject)

    monkeypatch.setattr(loop.Loop, "through", look)
    training = quick("lisa", period=6, blocks=1)
    drawn = {f"model.layers.{block}." for period in range(2) for block in lisa(BLOCKS, 1, period, training.seed)}
    for _ in range(2):
        model, healing, record = run("llama", training, tmp_path / "state")
        student = seen["student"]
        known = {parameter.data_ptr() for parameter in model.parameters()}
        for path in student.paths:
            shared = {p.data_ptr() in known for p in student.model.get_submodule(path).parameters()}
            assert shared == {f"{path}." not in drawn}
        found = kept(tmp_path / "state", {})
        assert found is not None
        assert {".".join(key.split(" ")[1].split(".")[:3]) + "." for key in found[0]} == drawn
        assert len(healing.tensors) < len(names_in(student.model, student.paths))
        assert record.parameters == sum(p.numel() for block in student.blocks for p in block.parameters())


class Killed(Exception):
    pass


@pytest.mark.parametrize("method", ["lisa", "ist", "fpf"])
def test_interrupted_in_bfloat16_and_run_again(method: str, tmp_path: Path) -> None:
    """To the same bits, in the middle of a turn and with blocks that rest rounded."""

    def stop(_: str, done: int, __: int) -> None:
        if done == 10:
            raise Killed

    def to_the_end(state: Path, progress: Any = None) -> Any:
        model = build("llama").to(HALF)
        training = quick(method, period=3, blocks=1, rate=3e-3)
        return train(
            model, discover(model), PLAN, UNTOUCHED, text(), training, tokens=TOKENS, state=state, progress=progress
        )

    whole, expected = to_the_end(tmp_path / "whole")
    with pytest.raises(Killed):
        to_the_end(tmp_path / "state", stop)
    again, record = to_the_end(tmp_path / "state")
    assert record == expected and record.best > 0
    assert whole.tensors.keys() == again.tensors.keys()
    assert all(torch.equal(again.tensors[key], tensor) for key, tensor in whole.tensors.items())


def test_a_block_whose_first_turn_came_after_the_best_look_is_no_part_of_the_result(tmp_path: Path) -> None:
    training = quick("lisa", period=4, blocks=1, rate=3e-3)
    turns = [lisa(BLOCKS, 1, period, training.seed)[0] for period in range(3)]
    assert turns[2] not in turns[:2], "as the seed is"
    _, healing, record = run("llama", training, tmp_path / "state")
    assert record.best == 8
    assert {name.split(".")[2] for name in healing.tensors} == {str((0, 2, 3, 4)[turn]) for turn in turns[:2]}


def test_a_state_in_another_format_is_refused(tmp_path: Path) -> None:
    run("llama", quick("lisa"), tmp_path / "state", tokens=48)
    found = kept(tmp_path / "state", {})
    assert found is not None
    keep(tmp_path / "state", found[0], {key: fact for key, fact in found[1].items() if key != "format"})
    with pytest.raises(InputError, match=r"belongs to another run \(format is None there and 2 here\)"):
        run("llama", quick("lisa"), tmp_path / "state", tokens=48)
