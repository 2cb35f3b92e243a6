"""What recipes choose, against the procedures of the papers written out as plain loops over the model's own modules."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import VOCABULARY, build
from torch import nn
from torch.nn.functional import cosine_similarity, cross_entropy

from billhook.anatomy import discover
from billhook.data import Windows
from billhook.measure.trace import trace
from billhook.plan.budget import Budget
from billhook.plan.target import Target
from billhook.recipes.catalogue import load
from billhook.recipes.find import Choice, find, pose_for

IDS = torch.randint(3, VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(2))
WINDOWS = Windows.of(IDS, "noise")


@pytest.fixture
def model() -> Any:
    """Blocks that differ: one writes much, one next to nothing, and the last one turns the stream around."""
    model = build("llama")
    with torch.no_grad():
        for block, factor in ((1, 6.0), (2, 0.3), (4, -4.0)):
            model.model.layers[block].mlp.down_proj.weight.mul_(factor)
    return model


def chosen(name: str, model: Any, budget: str, place: Path) -> Choice:
    opened: Any = SimpleNamespace(model=model, anatomy=discover(model))
    recipe = load(name)
    problem = pose_for(recipe, opened.anatomy.outline, Budget.parse(budget), Target.REMOTE)
    seen = trace(model, opened.anatomy, WINDOWS, ("block", "sublayer", "angular"))
    return find(recipe, opened, problem, WINDOWS, seen, seed=0, place=place, progress=None)


def order(choice: Choice) -> list[int]:
    return [int(step.units[0].removeprefix("decoder.")) for step in choice.found.steps]


@torch.no_grad()
def without(model: Any, gone: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The stream before the final norm, and the logits, of the model with its list of blocks made shorter."""
    last: list[torch.Tensor] = []
    hook = model.model.norm.register_forward_hook(lambda m, args, output: last.append(args[0]))
    layers = model.model.layers
    model.model.layers = nn.ModuleList(layer for i, layer in enumerate(layers) if i not in gone)
    logits = model(input_ids=IDS, use_cache=False).logits
    model.model.layers = layers
    hook.remove()
    return last[0], logits


@torch.no_grad()
def streams(model: Any) -> list[torch.Tensor]:
    """The stream before each block, as the model itself gives it, and behind the last one, before the final norm."""
    states = model(input_ids=IDS, output_hidden_states=True, use_cache=False).hidden_states
    return [*states[:-1], without(model, [])[0]]


def test_block_influence_reads_the_last_block_before_the_final_norm(model: Any, tmp_path: Path) -> None:
    """The last of ``hidden_states`` is behind the norm, which is no part of the block and would change its place."""
    states = streams(model)
    influence = [1 - cosine_similarity(x, y, dim=-1).mean().item() for x, y in pairwise(states)]
    found = chosen("block-influence", model, "blocks=1", tmp_path)
    assert order(found) == sorted(range(5), key=influence.__getitem__)[:4]
    assert [step.score for step in found.found.steps] == pytest.approx(sorted(influence)[:4], abs=1e-5)
    normed = model.model.norm(states[-1])
    assert 1 - cosine_similarity(states[4], normed, dim=-1).mean().item() != pytest.approx(influence[4], abs=1e-4)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_span_is_the_one_of_least_angle(model: Any, count: int, tmp_path: Path) -> None:
    states = streams(model)
    angles = [
        cosine_similarity(states[i], states[i + count], dim=-1).clamp(-1, 1).acos().mean() for i in range(6 - count)
    ]
    start = int(torch.stack(angles).argmin())
    found = chosen("angular-span", model, f"blocks={5 - count}", tmp_path).found.drops
    assert sorted(unit.block for unit in found) == list(range(start, start + count))


def test_greedy_takes_the_block_whose_absence_costs_least_each_time(model: Any, tmp_path: Path) -> None:
    def loss(gone: list[int]) -> float:
        logits = without(model, gone)[1][:, :-1]
        return cross_entropy(logits.flatten(0, 1), IDS[:, 1:].flatten()).item()

    gone: list[int] = []
    for _ in range(3):
        gone.append(min(set(range(5)) - set(gone), key=lambda block: loss([*gone, block])))
    assert order(chosen("block-greedy", model, "blocks=2", tmp_path)) == gone


def test_macro_influence_is_looked_at_again_against_the_dense_model(model: Any, tmp_path: Path) -> None:
    dense = without(model, [])[0]
    gone: list[int] = []
    for _ in range(3):
        likeness = {
            block: cosine_similarity(dense, without(model, [*gone, block])[0], dim=-1).mean().item()
            for block in set(range(5)) - set(gone)
        }
        gone.append(max(likeness, key=likeness.__getitem__))
    assert order(chosen("fusegpt", model, "blocks=2", tmp_path)) == gone


@pytest.mark.parametrize("limit", ["params=0.85", "params=0.7"])
def test_cfsp_by_the_formula_of_the_paper(limit: str, tmp_path: Path) -> None:
    """Angles summed over 131,072 tokens through a sigmoid at 10,000, all drawn in where one block would keep all;
    neurons by all three matrices."""
    model = build("llama")
    budget = Budget.parse(limit)
    share = pose_for(load("cfsp"), discover(model).outline, budget, Target.REMOTE).share
    given: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.mlp.down_proj.register_forward_hook(lambda m, args, output: given.append(args[0].double()))
    states = [state.double() for state in streams(model)]
    angles = torch.stack([(cosine_similarity(x, y, dim=-1).acos() / torch.pi).mean() for x, y in pairwise(states)])
    kept = ((angles - angles.mean()) * 131_072 / 10_000).sigmoid()
    above = kept / kept.mean() * (1 - share) - (1 - share)
    assert (above.max() >= share) == (limit == "params=0.85")  # there one block would keep all
    kept = 1 - share + above * (share / above.max() / 1.05 if above.max() >= share else 1)

    left = {keep.unit.block: set(keep.indices) for keep in chosen("cfsp", model, limit, tmp_path).keeps}
    for block, layer in enumerate(model.model.layers):
        down, up, gate = (getattr(layer.mlp, f"{name}_proj").weight.double().abs() for name in ("down", "up", "gate"))
        norm = given[block].flatten(0, 1).norm(dim=0)
        parts = [(down * norm) / (down * norm).sum(0), up.T / up.sum(1), gate.T / gate.sum(1)]
        importance = (torch.stack(parts).sum(0) * norm).mean(0)
        stay = left.get(block, set(range(len(norm))))
        assert len(stay) == pytest.approx(kept[block].item() * len(norm), abs=1)
        assert stay == set(importance.topk(len(stay)).indices.tolist())


def test_flap_sets_all_units_of_the_model_against_each_other(model: Any, tmp_path: Path) -> None:
    """Standardised in each sublayer; the lowest go until the parameters do, but for the last group of a sublayer."""
    given: dict[tuple[int, str], torch.Tensor] = {}
    writes = {}
    for block, layer in enumerate(model.model.layers):
        for inner, linear in (("neuron", layer.mlp.down_proj), ("group", layer.self_attn.o_proj)):
            key = (block, inner)
            linear.register_forward_hook(lambda m, args, output, key=key: given.update({key: args[0].flatten(0, 1)}))
            writes[key] = linear.weight.detach().double()
    without(model, [])
    ranked = []
    for (block, inner), weight in writes.items():
        figures = given[block, inner].double().var(0, correction=0) * weight.square().sum(0)
        standard = (figures - figures.mean()) / figures.std()
        units = standard if inner == "neuron" else standard.reshape(3, -1).mean(1)
        ranked += [(value.item(), block, inner, number) for number, value in enumerate(units)]
    found = chosen("flap", model, "params=0.85", tmp_path)
    counts = {(block, inner): sum(r[1:3] == (block, inner) for r in ranked) for _, block, inner, _ in ranked}
    gone = {
        (keep.unit.block, keep.inner, number)
        for keep in found.keeps
        for number in set(range(counts[keep.unit.block, keep.inner])) - set(keep.indices)
    }
    spared = {(b, i) for b, i in counts if sum(g[:2] == (b, i) for g in gone) == counts[b, i] - 1}
    lowest = [unit for _, *unit in sorted(ranked) if tuple(unit[:2]) not in spared or tuple(unit) in gone]
    assert (
        {tuple(unit) for unit in lowest[: len(gone) - 2]} <= gone <= {tuple(unit) for unit in lowest[: len(gone) + 2]}
    )
