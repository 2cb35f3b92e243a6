"""Narrower image classifiers: slopes and binary search of the entropy, the bi-mask, and the few lines a user writes."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, build

import billhook
from billhook.anatomy import discover
from billhook.measure.class_slopes import class_slopes, entropy
from billhook.measure.cost import CostModel
from billhook.measure.width import units_of
from billhook.plan.address import Address
from billhook.plan.budget import Budget
from billhook.plan.check import check
from billhook.plan.errors import InputError
from billhook.plan.plan import Keep
from billhook.plan.target import Target
from billhook.recipes.classifier import narrow_classifier
from billhook.search.bimask import bimask
from billhook.search.entropy_widths import entropy_widths
from billhook.search.width import pose_width


def images(count: int = 5) -> torch.Tensor:
    return FAMILIES["vit"].inputs(build("vit"), count, None)["pixel_values"]


@pytest.mark.parametrize(
    "recipe", ["amp", "ofb", "flap", "peak-magnitude-neurons", "random-width", "evenly-spaced-width"]
)
def test_the_budget_is_met_and_the_model_runs(recipe: str) -> None:
    model = build("vit")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    plan = narrow_classifier(model, images(), budget="flops=0.8", recipe=recipe, unit="width")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(not m._forward_pre_hooks and not m._forward_hooks for m in model.modules())
    anatomy = discover(model)
    check(plan, anatomy.outline)
    costs = CostModel(anatomy.outline, prompt_tokens=17, new_tokens=0)  # 4 x 4 patches and the class token
    assert costs.of((), plan.keeps)["flops"] <= 0.8 * costs.dense["flops"]
    assert plan.provenance.recipe == recipe and plan.budget == "flops=0.8"
    smaller = billhook.apply(model, anatomy, plan)
    with torch.no_grad():
        assert smaller(images()).logits.shape == (5, 3)
    assert narrow_classifier(build("vit"), images(), budget="flops=0.8", recipe=recipe, unit="width") == plan


def test_slopes_are_those_of_gates() -> None:
    """h dL/dh summed over an image is the slope of its entropy for a gate on the unit: against finite differences."""
    model = build("vit").double()
    anatomy = discover(model)
    unit = Address("encoder", 2, "mlp")
    units = units_of(anatomy, "neuron", [unit])
    pictures = images().double()
    slopes = class_slopes(model, anatomy, units, [{"pixel_values": pictures}])[unit]
    (piece,) = (s for s in units[unit].slices if s.writes)
    linear = model.get_submodule(piece.parameter.removesuffix(".weight"))
    for neuron in (0, 7):
        found = []
        for gate in (1 - 1e-4, 1 + 1e-4):
            scale = torch.ones(units[unit].count, dtype=torch.float64)
            scale[neuron] = gate
            handle = linear.register_forward_pre_hook(lambda m, args, scale=scale: (args[0] * scale,))
            with torch.no_grad():
                log_p = model(pictures).logits.log_softmax(-1)
            found.append(-(log_p.exp() * log_p).sum(-1))
            handle.remove()
        difference = (found[1] - found[0]) / 2e-4
        assert slopes.total[neuron].item() == pytest.approx(difference.sum().item(), rel=1e-2, abs=1e-4)
        assert slopes.texts[neuron].item() == pytest.approx(difference.abs().sum().item(), rel=1e-2, abs=1e-4)


def test_a_sublayer_becomes_as_narrow_as_the_entropy_allows() -> None:
    """The entropy of a made-up model rises by 0.1 for each unit that goes, three times as fast in the second MLP."""
    anatomy = discover(build("vit"))
    problem = pose_width(anatomy.outline, Budget.parse("params=0.9"), "neuron", Target.REMOTE)
    rates = {space.address: 0.3 if i == 1 else 0.1 for i, space in enumerate(problem.spaces)}
    looks = []

    def rise(keeps: tuple[Keep, ...]) -> float:
        looks.append(keeps)
        return sum(rates[keep.unit] * (48 - len(keep.indices)) for keep in keeps)

    scores = {space.address: torch.arange(48.0).flip(0) for space in problem.spaces}
    keeps = entropy_widths(problem.spaces, scores, rise, 1.0001)
    assert [48 - len(keep.indices) for keep in keeps] == [10, 3, 10, 10]
    assert all(keep.indices == tuple(range(len(keep.indices))) for keep in keeps)  # the last ones matter least
    assert len(looks) <= 4 * 8
    assert entropy_widths(problem.spaces, scores, rise, 0.0) == ()


def test_tolerance_is_kept_on_the_images() -> None:
    model = build("vit")
    with torch.no_grad():
        dense = entropy(model(images()).logits).mean()
        plan = narrow_classifier(model, images(), tolerance=0.02, unit="neuron")
        after = entropy(billhook.apply(model, discover(model), plan)(images()).logits).mean()
    assert plan.keeps and plan.budget is None
    assert abs(after - dense) <= 4 * 0.02 + 1e-6


def test_a_bimask_finds_what_is_not_needed() -> None:
    """An MLP that writes nothing is let go first; of another the neurons that write nothing."""
    model = build("vit")
    anatomy = discover(model)
    with torch.no_grad():
        weights = [
            model.get_parameter(
                next(s.parameter for s in anatomy.inner[Address("encoder", i, "mlp")][0].slices if s.writes)
            )
            for i in range(4)
        ]
        weights[1].zero_()
        weights[2][:, :24] = 0
    problem = pose_width(anatomy.outline, Budget.parse("params=0.8"), "neuron", Target.REMOTE)
    units = units_of(anatomy, "neuron", [space.address for space in problem.spaces])
    figures, passes = bimask(model, problem, units, [{"pixel_values": images()}], steps=40)
    assert passes == 160
    means = {a.block: f.mean().item() for a, f in figures.items()}
    assert min(means, key=means.__getitem__) == 1
    assert figures[Address("encoder", 2, "mlp")][:24].mean() < figures[Address("encoder", 2, "mlp")][24:].mean()


def test_what_is_refused() -> None:
    model = build("vit")
    for words, settings in (
        ("either a budget or a tolerance", {}),
        ("either a budget or a tolerance", {"budget": "flops=0.8", "tolerance": 0.1}),
        ("does not narrow", {"budget": "flops=0.8", "recipe": "random"}),
        ("does not narrow", {"budget": "flops=0.8", "recipe": "m-smoe"}),
        ("no score", {"tolerance": 0.1, "recipe": "ofb"}),
        ("shares by how", {"budget": "flops=0.8", "recipe": "cfsp"}),
        ("the next tokens of a language model", {"budget": "flops=0.8", "recipe": "evopress-widths"}),
        ("the next tokens of a language model", {"budget": "flops=0.8", "recipe": "hesso"}),
        ("asks for the next token", {"budget": "flops=0.8", "recipe": "fisher-width"}),
        ("is below 0", {"tolerance": -1.0}),
    ):
        with pytest.raises(InputError, match=words):
            narrow_classifier(model, images(1), **settings)
    with pytest.raises(InputError, match="is no classifier"):
        narrow_classifier(build("dinov2"), images(1), budget="flops=0.9", unit="neuron")
