"""Each criterion of width against its formula, written out for one sublayer of a small model."""

from __future__ import annotations

import pytest
import torch
from families import build

from billhook.anatomy import discover
from billhook.data import Windows
from billhook.measure.channels import channels
from billhook.measure.sensitivity import sensitivity
from billhook.measure.width import WidthTrace, units_of
from billhook.plan.address import Address
from billhook.plan.errors import InputError
from billhook.scores import SCORES, named

WINDOWS = Windows.of(torch.randint(3, 90, (4, 10), generator=torch.Generator().manual_seed(3)), "test")
MLP, ATTENTION = Address("decoder", 2, "mlp"), Address("decoder", 2, "attention")
#: All but the one of neurons alone (see tests/measure/test_features.py).
WIDE = sorted(
    name
    for name, score in SCORES.items()
    if score.needs in ("weights", "channels", "slopes") and name != "feature-merging"
)


def watched(model, answer: str = "loss") -> tuple[WidthTrace, object]:
    anatomy = discover(model)
    units = units_of(anatomy, "width", [a for a, _ in anatomy.outline.sublayers()])
    slopes = sensitivity(model, anatomy, units, WINDOWS, answer)
    return WidthTrace.of(model, units, channels(model, anatomy, WINDOWS), slopes), anatomy


@pytest.fixture(scope="module")
def llama():
    model = build("llama")
    trace, anatomy = watched(model)
    return model.model.layers[2], trace, anatomy


@pytest.fixture(scope="module")
def given():
    """What down and o are given, by hand: [tokens, channels], float64."""
    seen = {}
    model = build("llama")
    here = model.model.layers[2]
    here.mlp.down_proj.register_forward_hook(lambda m, args, output: seen.update(mlp=args[0]))
    here.self_attn.o_proj.register_forward_hook(lambda m, args, output: seen.update(attention=args[0]))
    with torch.no_grad():
        model(WINDOWS.ids)
    return {kind: x.flatten(0, 1).double() for kind, x in seen.items()}


def test_magnitude(llama) -> None:
    layer, trace, anatomy = llama
    down, gate = layer.mlp.down_proj.weight.double(), layer.mlp.gate_proj.weight.double()
    up, o = layer.mlp.up_proj.weight.double(), layer.self_attn.o_proj.weight.double()
    close(named("magnitude")(trace, anatomy)[MLP], down.square().sum(0).sqrt())
    everything = down.abs().sum(0) + gate.abs().sum(1) + up.abs().sum(1)
    close(named("magnitude")(trace, anatomy, norm="l1", of="all")[MLP], everything)
    groups = o.square().sum(0).sqrt().reshape(trace.units[ATTENTION].count, -1).sum(1)
    close(named("magnitude")(trace, anatomy)[ATTENTION], groups)


def test_peak_magnitude(llama, given) -> None:
    layer, trace, anatomy = llama
    down, gate, up = (getattr(layer.mlp, f"{n}_proj").weight.double() for n in ("down", "gate", "up"))
    reach = [w.max(1).values + w.min(1).values.abs() for w in (gate, up, down.T)]
    close(named("peak-magnitude")(trace, anatomy)[MLP], reach[0] + reach[1])
    relative = sum(r / r.max() for r in reach)
    close(named("peak-magnitude-activation")(trace, anatomy)[MLP], relative * given["mlp"].square().mean(0).sqrt())


def test_parameter_statistics(llama) -> None:
    """By the matrix of correlations; of units that read alike the stronger one stays."""
    layer, trace, anatomy = llama
    rows = torch.cat([layer.mlp.up_proj.weight, layer.mlp.gate_proj.weight], 1).double()
    variance, alike = rows.var(1, correction=0), rows.corrcoef().square()
    shared = [
        max([float(alike[u, v]) for v in range(len(rows)) if variance[v] > variance[u]] + [0.0]) for u in range(48)
    ]
    close(
        named("parameter-statistics")(trace, anatomy)[MLP], variance * (1 - torch.tensor(shared, dtype=torch.float64))
    )
    model = build("llama")
    with torch.no_grad():
        for linear in (model.model.layers[2].mlp.gate_proj, model.model.layers[2].mlp.up_proj):
            linear.weight[3] = -2 * linear.weight[7]
    found = named("parameter-statistics")(WidthTrace.of(model, trace.units), anatomy)[MLP]
    assert found[7] < 1e-5 * found.median() and found[3] > found.median()


def test_wanda_and_activation(llama, given) -> None:
    layer, trace, anatomy = llama
    for address, linear in ((MLP, layer.mlp.down_proj), (ATTENTION, layer.self_attn.o_proj)):
        x, count = given[address.sublayer], trace.units[address].count
        figures = linear.weight.double().abs().mean(0) * x.square().mean(0).sqrt()
        close(named("wanda-structured")(trace, anatomy)[address], figures.reshape(count, -1).sum(1))
        strength = x.square().reshape(len(x), count, -1).sum(-1).mean(0).sqrt()
        close(named("activation")(trace, anatomy)[address], strength)


def test_condition(llama, given) -> None:
    """By the singular values of the matrix itself: of down, which is wide, and of o, which is square."""
    layer, trace, anatomy = llama
    for address, linear in ((MLP, layer.mlp.down_proj), (ATTENTION, layer.self_attn.o_proj)):
        a = linear.weight.detach().double() * given[address.sublayer].square().mean(0).sqrt()
        values = torch.linalg.svdvals(a)
        kept = values[values > 1e-5 * values[0]]
        parts = a.reshape(len(a), trace.units[address].count, -1).movedim(1, 0).flatten(1).norm(dim=1)
        found = named("condition")(trace, anatomy)[address]
        torch.testing.assert_close(found, kept[0] / kept[-1] * parts / values[0], rtol=1e-3, atol=1e-7)


def test_fluctuation(llama, given) -> None:
    layer, trace, anatomy = llama
    for address, linear in ((MLP, layer.mlp.down_proj), (ATTENTION, layer.self_attn.o_proj)):
        x, count = given[address.sublayer], trace.units[address].count
        figures = x.var(0, correction=0) * linear.weight.double().square().sum(0)
        raw = figures.reshape(count, -1).mean(1)
        close(named("fluctuation")(trace, anatomy, standardise=False)[address], raw)
        close(named("fluctuation")(trace, anatomy)[address], (raw - figures.mean()) / figures.std())


def test_taylor_and_fisher(llama) -> None:
    _, trace, anatomy = llama
    slopes = trace.slopes[MLP]
    close(named("taylor")(trace, anatomy)[MLP], slopes.total.abs() / slopes.count)
    close(named("taylor")(trace, anatomy, within="text")[MLP], slopes.texts / slopes.count)
    close(named("taylor")(trace, anatomy, within="token")[MLP], slopes.absolute / slopes.count)
    close(named("fisher")(trace, anatomy)[MLP], slopes.squares / slopes.count / 2)


@pytest.mark.parametrize("name", WIDE)
def test_a_silent_unit_is_the_least_important(name: str) -> None:
    """A neuron and a group with no weights at all come last by every criterion."""
    model = build("llama")
    anatomy = discover(model)
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for address in (MLP, ATTENTION):
            (inner,) = anatomy.inner[address]
            for s in inner.slices:
                weights[s.parameter].narrow(s.axis, s.start + s.width, s.width).zero_()
    trace, anatomy = watched(model)
    scores = named(name)(trace, anatomy)
    assert scores[MLP].argmin() == 1
    assert scores[ATTENTION].argmin() == 1


@pytest.mark.parametrize("name", ["gpt2", "phi3", "falcon", "gpt_neox", "bloom", "gemma2", "opt"])
def test_other_families(name: str) -> None:
    """Fused, transposed and interleaved projections: a finite score for every unit."""
    model = build(name)
    trace, anatomy = watched(model)
    for score in WIDE:
        for address, figures in named(score)(trace, anatomy).items():
            assert figures.shape == (trace.units[address].count,)
            assert figures.isfinite().all()


def test_unreached_is_an_error() -> None:
    model = build("llama")
    anatomy = discover(model)
    trace = WidthTrace.of(model, units_of(anatomy, "neuron", [MLP]))
    with pytest.raises(InputError, match="tells nothing of"):
        named("wanda-structured")(trace, anatomy)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected.detach(), rtol=1e-4, atol=1e-7)
