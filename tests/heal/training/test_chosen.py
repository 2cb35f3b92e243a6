"""Who is trained: LISA, IST, FPF, and the least expressive subset."""

from __future__ import annotations

import torch
from families import build
from heal.training.training_bed import quick, text
from torch import nn

from billhook.anatomy import discover
from billhook.heal.training.fpf import fpf
from billhook.heal.training.ist import ist, most_important
from billhook.heal.training.layers import Layers
from billhook.heal.training.lisa import lisa
from billhook.heal.training.student import Student
from billhook.heal.training.tune import least_expressive, subsets
from billhook.heal.training.weights import Weights


def test_lisa_draws_anew_each_period_and_the_same_for_one_seed() -> None:
    draws = [lisa(10, 3, period, 0) for period in range(20)]
    assert draws == [lisa(10, 3, period, 0) for period in range(20)] != [lisa(10, 3, period, 1) for period in range(20)]
    assert all(len(set(draw)) == 3 for draw in draws)
    assert {block for draw in draws for block in draw} == set(range(10))
    assert lisa(2, 5, 0, 0) == [0, 1]


class Adding(nn.Module):
    """A block that adds a constant to the stream."""

    def __init__(self, what: float) -> None:
        super().__init__()
        self.what = what

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states + self.what


def test_ist_finds_the_block_whose_absence_hurts() -> None:
    blocks = [Adding(0.1), Adding(4.0), Adding(0.0), Adding(1.0)]

    def loss() -> float:
        stream = torch.zeros(1, 1, 1)
        for block in blocks:
            stream = block(stream)
        return abs(5.1 - stream.item())

    found = ist([0.0] * 4, blocks, loss, 2, "0")
    assert most_important(found, 2) == [1, 3]
    assert abs(found[1] - 0.5 * 0.75 * 4.0) < 1e-5 and abs(found[2]) < 1e-5
    assert loss() < 1e-6, "no hook is left"
    assert ist(found, blocks, loss, 2, "0")[1] > found[1], "what was known before counts half"


def test_fpf_takes_what_changed_most_for_its_size() -> None:
    before = {"a": torch.ones(4), "b": 100 * torch.ones(4), "c": torch.ones(4)}
    now = {"a": 1.5 * torch.ones(4), "b": 101 * torch.ones(4), "c": torch.ones(4)}
    assert fpf(before, now, 1) == ["a"]
    assert fpf(before, now, 2) == ["a", "b"]


def test_only_the_chosen_are_trained() -> None:
    model = build("llama")
    student = Student(model, build("llama"), [(b.path, b.path) for b in discover(model).stacks[0].blocks], "dense")
    names = [f"{path}.{name}" for path in student.paths for name, _ in model.get_submodule(path).named_parameters()]
    before = {name: model.get_parameter(name).detach() for name in names}
    for method, blocks in (("lisa", {2}), ("ist", {2}), ("fpf", {5})):
        layers = Layers(student, Weights(model, student.paths, names), before, quick(method))
        layers.choose(0, text(2).ids)
        asking = {name.split(".")[2] for name in names if model.get_parameter(name).requires_grad}
        assert {len(asking)} == blocks
        assert {n for n in names if model.get_parameter(n).requires_grad} == set(layers.facts["chosen"])


def test_subsets_grow() -> None:
    def kinds(name: str) -> list[list[str]]:
        model = build(name)
        paths = [block.path for block in discover(model).stacks[0].blocks]
        return subsets(model, paths)

    assert len(kinds("llama")) == 1, "no biases: norms are all there is"
    biases, norms, both = kinds("gpt2")
    assert set(biases) | set(norms) == set(both) and not set(biases) & set(norms)
    assert any("c_attn.bias" in name for name in biases) and all(".ln_" in name for name in norms)
    assert any("ln_1.bias" in name for name in norms), "a norm is one thing"
    model = build("llama")
    paths = [block.path for block in discover(model).stacks[0].blocks]
    norms, most = subsets(model, paths, ["a.scale"])
    assert most == [*norms, "a.scale"]


def test_the_least_that_suffices() -> None:
    gains = {"a": 0.5, "b": 0.95, "ab": 1.0}
    options = [["a"], ["b"], ["a", "b"]]
    asked: list[str] = []

    def gain(subset: list[str]) -> float:
        asked.append("".join(subset))
        return gains["".join(subset)]

    assert least_expressive(options, gain) == ["b"]
    assert asked == ["ab", "a", "b"]
    gains["b"] = 0.8
    assert least_expressive(options, gain) == ["a", "b"]
    gains["ab"] = -1.0
    assert least_expressive(options, gain) == ["a", "b"]


def test_after_a_first_period_of_all_fpf_trains_the_share_that_changed_most() -> None:
    model = build("llama")
    student = Student(model, build("llama"), [(b.path, b.path) for b in discover(model).stacks[0].blocks], "dense")
    names = [f"{path}.{name}" for path in student.paths for name, _ in model.get_submodule(path).named_parameters()]
    before = {name: model.get_parameter(name).detach() for name in names}
    weights = Weights(model, student.paths, names)
    layers = Layers(student, weights, before, quick("fpf"))
    layers.choose(0, text(2).ids)
    changed = names[3::7][:4]
    with torch.no_grad():
        for name in changed:
            weights.parameters[name].mul_(2)
    layers.choose(1, text(2).ids)
    assert len(layers.facts["chosen"]) == len(names) * 2 // 5
    assert set(changed) <= set(layers.facts["chosen"])
    layers.choose(2, text(2).ids)
    assert len(layers.facts["chosen"]) == len(names) * 2 // 5
