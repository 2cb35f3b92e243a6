"""Healing of sublayers that got narrower: exact where it can be, the same model simulated, applied and reloaded."""

from __future__ import annotations

import random
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, build
from heal.training.training_bed import TOKENS, quick, text
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from billhook.anatomy import Anatomy, discover
from billhook.data import Windows
from billhook.export.huggingface import save
from billhook.heal import UNTOUCHED, closed_form, healed
from billhook.heal.judge import divergences
from billhook.heal.training.loop import split
from billhook.heal.training.train import train
from billhook.measure.patch import hooked
from billhook.plan.address import Address
from billhook.plan.plan import Keep, Plan
from billhook.surgery import apply, simulate
from billhook.surgery.narrow import kept_entries
from billhook.surgery.reopen import load

#: Grouped queries, fused reads, Conv1D, experts, a parallel block, norms behind the writes.
ALL = ["llama", "phi3", "gpt2", "qwen3_moe", "falcon", "gemma2"]


def windows(rows: int = 16, seed: int = 5) -> Windows:
    return Windows.of(torch.randint(3, 90, (rows, 12), generator=torch.Generator().manual_seed(seed)), "test")


def narrowed(anatomy: Anatomy, gone: Collection[Address] = (), stack: str = "decoder") -> list[Keep]:
    """Three quarters of the units of every sublayer but those of the first block."""
    keeps = []
    for address, units in anatomy.inner.items():
        if address.stack == stack and address.block and address not in gone and address.parent not in gone:
            for inner in units:
                number = max(inner.least, inner.count * 3 // 4) if inner.parts == 1 else inner.count
                left = random.Random(str(address)).sample(range(inner.count), number)
                keeps.append(Keep(unit=address, inner=inner.kind, indices=tuple(sorted(left))))
    return keeps


def last_stream(model: nn.Module, anatomy: Anatomy, inputs: dict[str, Tensor]) -> Tensor:
    seen = []

    def keep(block: Any, args: Any, kwargs: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    with torch.no_grad(), hooked([(model.get_submodule(anatomy.stacks[-1].path)[-1], keep)]):  # type: ignore[index]
        model(**inputs)
    return seen[0]


@pytest.mark.parametrize("name", ALL)
def test_simulated_applied_and_reloaded_agree(name: str, tmp_path: Path) -> None:
    """With a sublayer gone as well where the block is not a parallel one."""
    model = build(name)
    anatomy = discover(model)
    gone = [] if anatomy.stacks[0].blocks[2].parallel else [Address("decoder", 2, "mlp")]
    plan = Plan.of(gone, "remote", narrowed(anatomy, gone))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    healing = closed_form(model, anatomy, plan, windows())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items()), "the model stays"
    inputs = FAMILIES[name].inputs(model, 3, "left")
    with torch.no_grad():
        with simulate(model, anatomy, plan):
            cut = model(**inputs).logits
        with healed(model, healing):
            with simulate(model, anatomy, plan):
                expected = model(**inputs).logits
            applied = apply(model, anatomy, plan)
        assert bool((expected - cut).abs().max() > 1e-4) == bool(healing.taken), "healing shows in the logits"
        assert torch.equal(applied(**inputs).logits, expected)
        save(applied, anatomy, plan, tmp_path)
        torch.testing.assert_close(load(tmp_path).model(**inputs).logits, expected, atol=1e-5, rtol=1e-5)
    assert healing.taken or name == "gemma2"


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "qwen3_moe"])
def test_only_what_stays_is_new(name: str) -> None:
    """Tensors have the shapes of the original model, and its values where units go."""
    model = build(name)
    anatomy = discover(model)
    keeps = narrowed(anatomy)
    healing = closed_form(model, anatomy, Plan.of([], keeps=keeps), windows())
    touched = 0
    for edit in keeps:
        (inner,) = anatomy.inner[edit.unit]
        lost = set(range(inner.count)) - set(edit.indices)
        for parameter, (axis, entries) in kept_entries(inner, lost).items():
            if parameter in healing.tensors:
                here = torch.tensor(entries)
                old, new = model.get_parameter(parameter).detach(), healing.tensors[parameter]
                assert torch.equal(new.index_select(axis, here), old.index_select(axis, here))
                assert new.shape == old.shape and not torch.equal(new, old)
                touched += 1
    assert touched


@pytest.mark.parametrize("name", ["llama", "gpt2", "granite", "stablelm_parallel", "vit"])
def test_the_reported_error_is_that_of_the_healed_model(name: str) -> None:
    model = build(name)
    anatomy = discover(model)
    keeps = narrowed(anatomy, stack=anatomy.stacks[-1].name)
    plan = Plan.of([], keeps=keeps)
    inputs = FAMILIES[name].inputs(model, 8, None)
    healing = closed_form(model, anatomy, plan, [inputs])
    dense = last_stream(model, anatomy, inputs)[-1]
    with healed(model, healing), simulate(model, anatomy, plan):
        now = last_stream(model, anatomy, inputs)[-1]
    error = ((now - dense).square().sum(-1) / dense.square().sum(-1)).mean().item()
    assert healing.taken
    assert healing.refits[-1].after == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize("kind", ["mlp", "attention"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "llama_bias"])
def test_what_others_know_comes_back_whole(name: str, kind: str) -> None:
    """The units that go read as others do that stay: these write for both, whatever the two wrote, on any text."""
    model = build(name)
    anatomy = discover(model)
    address = Address("decoder", 2, kind)
    (inner,) = anatomy.inner[address]
    last, first = inner.count - 1, 0
    for piece in inner.slices:
        if not piece.writes:
            tensor = model.get_parameter(piece.parameter).data
            start, width = piece.start, piece.width
            twin = tensor.narrow(piece.axis, start + first * width, width).clone()
            tensor.narrow(piece.axis, start + last * width, width).copy_(twin)
    plan = Plan.of([], keeps=[Keep(unit=address, inner=inner.kind, indices=tuple(range(last)))])
    healing = closed_form(model, anatomy, plan, windows(60))
    inputs = {"input_ids": windows(3, seed=6).ids}
    dense = last_stream(model, anatomy, inputs)
    with simulate(model, anatomy, plan):
        cut = last_stream(model, anatomy, inputs)
    with healed(model, healing), simulate(model, anatomy, plan):
        now = last_stream(model, anatomy, inputs)
    assert healing.refits[0].weight in anatomy.sublayer(address).writes, "nothing before it and no read is refitted"
    assert healing.refits[0].after < 1e-3 * healing.refits[0].before
    assert (now - dense).norm() < 0.05 * (cut - dense).norm()


@settings(max_examples=5)
@given(st.sampled_from(["llama", "gpt2", "qwen3_moe", "falcon"]), st.integers(2, 12), st.integers(0, 99))
def test_the_held_back_error_never_rises(name: str, rows: int, seed: int) -> None:
    model = build(name)
    anatomy = discover(model)
    healing = closed_form(model, anatomy, Plan.of([], keeps=narrowed(anatomy)), windows(rows, seed))
    for refit in healing.refits:
        assert refit.after < refit.before if refit.taken else refit.after == refit.before
    assert healing.refused or healing.cut is None or healing.healed < healing.cut  # type: ignore[operator]


def test_nothing_is_grafted_into_what_gets_narrower() -> None:
    model = build("llama")
    anatomy = discover(model)
    gone = [Address("decoder", 2)]
    beside = Keep(unit=Address("decoder", 1, "mlp"), inner="neuron", indices=tuple(range(30)))
    healing = closed_form(model, anatomy, Plan.of(gone, keeps=[beside]), windows(40))
    assert str(beside.unit) not in {graft.into for graft in healing.grafts}


@pytest.mark.parametrize(("name", "method"), [("llama_bias", "tune"), ("gpt2", "lora"), ("llama", "distill")])
def test_training_of_what_got_narrower(name: str, method: str, tmp_path: Path) -> None:
    """Nearer to the dense model, as saved and loaded again."""
    model = build(name)
    anatomy = discover(model)
    plan = Plan.of(["decoder.1"], "remote", narrowed(anatomy, [Address("decoder", 1)]))
    recipe = quick(method, rate=5e-3)
    healing, record = train(model, anatomy, plan, UNTOUCHED, text(), recipe, tokens=TOKENS, state=tmp_path / "state")
    _, held = split(text().ids)
    was, now = divergences(model, anatomy, plan, [UNTOUCHED, healing], held)
    assert record.best > 0
    assert min(look.held for look in record.curve) < record.curve[0].held
    if record.goal == "dense":
        assert now == pytest.approx(min(look.held for look in record.curve), rel=1e-4)
        assert now < was
    with healed(model, healing):
        applied = apply(model, anatomy, plan)
    save(applied, anatomy, plan, tmp_path / "saved")
    inputs = FAMILIES[name].inputs(model, 2, "left")
    with torch.no_grad():
        expected = applied(**inputs).logits
        torch.testing.assert_close(load(tmp_path / "saved").model(**inputs).logits, expected, atol=1e-5, rtol=1e-5)
