"""Each criterion on statistics made by hand, and on a small model."""

from __future__ import annotations

import pytest
import torch
from families import build

from billhook.anatomy import discover
from billhook.data import Windows
from billhook.measure.ablation import Ablator, ablation
from billhook.measure.sums import Angles, Mean, Trace
from billhook.measure.trace import trace
from billhook.models import load
from billhook.plan.address import Address
from billhook.plan.check import units
from billhook.plan.errors import InputError
from billhook.scores import SCORES, named

ANATOMY = discover(build("llama"))
WINDOWS = Windows.of(torch.randint(3, 90, (4, 10), generator=torch.Generator().manual_seed(3)), "test")


def unit(text: str) -> Address:
    return Address.parse(text)


def by_hand() -> Trace:
    """Five blocks whose streams stand at 0, 10, 12, 13, 20 and 50 hundredths of a half turn."""
    place = torch.tensor([0, 10, 12, 13, 20, 50], dtype=torch.float64) / 100
    total = (place[None] - place[:, None]).abs() * 4
    cosines = {unit("decoder.0"): Mean(1.0, 4), unit("decoder.0.mlp"): Mean(3.0, 4), unit("decoder.1"): Mean(-2.0, 4)}
    return Trace({"cosine": cosines}, {"decoder": Angles(total, 4)})


def test_block_influence() -> None:
    assert named("block-influence")(by_hand(), ANATOMY) == {unit("decoder.0"): 0.75, unit("decoder.1"): 1.5}
    assert named("block-influence")(by_hand(), ANATOMY, unit="mlp") == {unit("decoder.0.mlp"): 0.25}
    assert named("block-influence")(by_hand(), ANATOMY, unit="sublayer") == {unit("decoder.0.mlp"): 0.25}
    assert named("block-influence")(by_hand(), ANATOMY, unit="attention") == {}


def test_angular() -> None:
    single = named("angular")(by_hand(), ANATOMY)
    assert list(single.values()) == pytest.approx([0.1, 0.02, 0.01, 0.07, 0.3])
    double = named("angular")(by_hand(), ANATOMY, span=2)
    assert list(double.values()) == pytest.approx([0.12, 0.03, 0.03, 0.08, 0.37])
    assert list(double) == [unit(f"decoder.{i}") for i in range(5)]


def test_a_span_that_does_not_fit() -> None:
    with pytest.raises(InputError, match="span of 6 blocks does not fit decoder, which has 5"):
        named("angular")(by_hand(), ANATOMY, span=6)


@pytest.mark.parametrize(
    "name", sorted(name for name, score in SCORES.items() if not score.wide and score.needs != "stream")
)
def test_high_is_important(name: str) -> None:
    """A block that writes nothing is the least important by every criterion, and all units have a score."""
    model = build("llama")
    with torch.no_grad():
        for projection in (model.model.layers[3].mlp.down_proj, model.model.layers[3].self_attn.o_proj):
            projection.weight.zero_()
    anatomy = discover(model)
    chosen = named(name)
    seen = trace(model, anatomy, WINDOWS, chosen.statistics() or ["block"])
    if chosen.needs == "damage":
        rises = ablation(Ablator(model, anatomy, WINDOWS), units(anatomy.outline, "block"))
        seen += Trace.of_damage("kl", rises, WINDOWS.tokens)
    scores = chosen(seen, anatomy)
    assert list(scores) == units(anatomy.outline, "block")
    assert min(scores, key=lambda a: scores[a]) == unit("decoder.3")
    assert scores[unit("decoder.3")] == pytest.approx(0, abs=1e-6)
    assert all(scores[a] > 1e-3 for a in scores if a != unit("decoder.3"))


@pytest.mark.parametrize("name", ["block-influence", "update-norm"])
@pytest.mark.parametrize("kind", ["attention", "mlp", "sublayer"])
def test_sublayers(name: str, kind: str) -> None:
    model = build("llama")
    anatomy = discover(model)
    seen = trace(model, anatomy, WINDOWS, named(name).statistics(unit=kind))
    assert list(named(name)(seen, anatomy, unit=kind)) == units(anatomy.outline, kind)


def test_update_norm_relative_to_the_output() -> None:
    model = build("llama")
    seen = trace(model, ANATOMY, WINDOWS, ["block"])
    assert named("update-norm")(seen, ANATOMY, relative_to="output") == seen.means("update_share")
    assert named("update-norm")(seen, ANATOMY) == seen.means("update")


def test_of_units_that_hurt_alike_the_deeper_one_is_less_important() -> None:
    alike = Trace.of_damage("kl", {unit(f"decoder.{i}"): 1.0 for i in range(5)}, 4)
    scores = named("position-weighted")(alike, ANATOMY)
    assert list(scores.values()) == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])
    sublayers = Trace.of_damage("stream", {unit("decoder.1.mlp"): 1.0, unit("decoder.4.attention"): 3.0}, 4)
    scores = named("position-weighted")(sublayers, ANATOMY, unit="sublayer", of="stream")
    assert list(scores.values()) == pytest.approx([0.8, 0.6])
    with pytest.raises(InputError, match="parameter of of score position-weighted"):
        named("position-weighted")(alike, ANATOMY, of="loss")


def test_order_of_windows_does_not_matter() -> None:
    model = build("llama")
    turned = Windows.of(WINDOWS.ids.flip(0), "test")
    for name in ("block-influence", "update-norm", "angular"):
        chosen = named(name)
        one, other = (chosen(trace(model, ANATOMY, w, chosen.statistics()), ANATOMY) for w in (WINDOWS, turned))
        assert one == pytest.approx(other, abs=1e-6)


def test_unreached_units_are_unknown() -> None:
    """No score at all, rather than a low one."""
    model = build("gemma3_image")
    anatomy = discover(model)
    scores = named("block-influence")(trace(model, anatomy, WINDOWS, ["block"]), anatomy)
    assert {a.stack for a in scores} == {"decoder"}


def test_wrong_words() -> None:
    with pytest.raises(InputError, match=r"no score 'blockinfluence'; there are activation, angular, block-influence"):
        named("blockinfluence")
    with pytest.raises(InputError, match="score angular has no parameter units; it has span"):
        named("angular")(by_hand(), ANATOMY, units="block")
    with pytest.raises(InputError, match=r"parameter unit of score block-influence: .*'block'"):
        named("block-influence")(by_hand(), ANATOMY, unit="head")
    with pytest.raises(InputError, match="parameter span of score angular"):
        named("angular").statistics(span=0)
    with pytest.raises(InputError, match="the trace has no kl; it has cosine"):
        named("divergence")(by_hand(), ANATOMY)


@pytest.mark.slow
def test_demo_model(demo_folder, shared_data) -> None:
    """Block influence of the real model: the first block matters most, one in the middle least."""
    import gzip

    loaded = load(str(demo_folder))
    with gzip.open(shared_data / "wiki_calib.txt.gz", "rt", encoding="utf-8") as file:
        ids = torch.tensor([loaded.tokenizer(file.read(4000)).input_ids[:256]])
    anatomy = discover(loaded.model)
    scores = named("block-influence")(trace(loaded.model, anatomy, Windows.of(ids, "wiki"), ["block"]), anatomy)
    ranked = sorted(scores, key=lambda a: scores[a])
    assert len(ranked) == 30
    assert ranked[-1] == unit("decoder.0")
    assert 10 <= ranked[0].block < 20
