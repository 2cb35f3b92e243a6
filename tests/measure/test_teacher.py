"""The compact dense statistics against the exact figures."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, build
from torch.nn.functional import cross_entropy, log_softmax

from billhook.anatomy import discover
from billhook.data import Windows
from billhook.measure.replay import Replay
from billhook.measure.teacher import Teacher
from billhook.models import load
from billhook.plan.address import Address
from billhook.plan.errors import InputError
from billhook.surgery import simulate

UNIT = Address("decoder", 2, "mlp")
IDS = torch.randint(3, 90, (3, 12), generator=torch.Generator().manual_seed(2))


def exact(dense: torch.Tensor, now: torch.Tensor, ids: torch.Tensor) -> tuple[float, float, float]:
    p, q = log_softmax(dense[:, :-1].double(), -1), log_softmax(now[:, :-1].double(), -1)
    kl = (p.exp() * (p - q)).sum(-1).mean().item()
    loss = cross_entropy(now[:, :-1].flatten(0, 1).double(), ids[:, 1:].flatten()).item()
    return kl, loss, (p.argmax(-1) == q.argmax(-1)).double().mean().item()


def logits_of(model, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize("name", ["llama", "gemma2", "granite", "opt", "falcon"])
def test_all_tokens_kept_is_exact(name: str) -> None:
    model = build(name)
    anatomy = discover(model)
    replay = Replay(model, anatomy, Windows.of(IDS, "test"))
    teacher = Teacher(replay, k=1000, chunk=5)
    damage = teacher.damage(replay.without(UNIT))
    with simulate(model, anatomy, [UNIT]):
        now = logits_of(model, IDS)
    kl, loss, top1 = exact(logits_of(model, IDS), now, IDS)
    assert damage.kl == pytest.approx(kl, rel=1e-4)
    assert damage.loss == pytest.approx(loss, rel=1e-5)
    assert damage.top1 == pytest.approx(top1)


def test_dense_is_exactly_undamaged() -> None:
    model = build("llama")
    replay = Replay(model, discover(model), Windows.of(IDS, "test"))
    damage = Teacher(replay, k=4).damage(replay.final)
    assert (damage.kl, damage.top1) == (0.0, 1.0)


def test_fewer_tokens_are_a_lower_bound() -> None:
    model = build("llama")
    replay = Replay(model, discover(model), Windows.of(IDS, "test"))
    bounds = [Teacher(replay, k=k).damage(replay.without(UNIT)).kl for k in (1, 4, 16, 64, 200)]
    assert bounds == sorted(bounds)
    assert 0 < bounds[0] < bounds[-1]


@pytest.mark.slow
def test_close_on_a_real_vocabulary(demo_folder) -> None:
    loaded = load(str(demo_folder))
    ids = loaded.tokenizer("The hedge is cut in winter, when the sap is down and the birds have left their nests.")
    ids = torch.tensor([ids.input_ids])
    anatomy = discover(loaded.model)
    replay = Replay(loaded.model, anatomy, Windows.of(ids, "test"))
    for unit in ("decoder.15", "decoder.20.attention", "decoder.8.mlp"):
        damage = Teacher(replay).damage(replay.without(Address.parse(unit)))
        with simulate(loaded.model, anatomy, [Address.parse(unit)]):
            now = logits_of(loaded.model, ids)
        kl, loss, _ = exact(logits_of(loaded.model, ids), now, ids)
        assert 0.85 * kl < damage.kl <= kl + 1e-5
        assert damage.loss == pytest.approx(loss, rel=1e-2)


def test_padding_predicts_nothing() -> None:
    """Rows of different length, padded: the mean over their real tokens."""
    model = build("llama")
    anatomy = discover(model)
    inputs = FAMILIES["llama"].inputs(model, 3, "right")
    padded = Replay(model, anatomy, [inputs])
    lengths = inputs["attention_mask"].sum(1).tolist()
    kl = loss = 0.0
    for row, length in enumerate(lengths):
        alone = Replay(model, anatomy, Windows.of(inputs["input_ids"][row : row + 1, :length], "test"))
        damage = Teacher(alone).damage(alone.without(UNIT))
        kl, loss = kl + damage.kl * (length - 1), loss + damage.loss * (length - 1)
    damage = Teacher(padded).damage(padded.without(UNIT))
    predicted = sum(lengths) - len(lengths)
    assert damage.kl == pytest.approx(kl / predicted, rel=1e-4)
    assert damage.loss == pytest.approx(loss / predicted, rel=1e-4)


def test_overflow_is_infinite_damage() -> None:
    model = build("llama")
    replay = Replay(model, discover(model), Windows.of(IDS, "test"))
    damage = Teacher(replay).damage([torch.full_like(s, float("nan")) for s in replay.final])
    assert (damage.kl, damage.loss, damage.top1) == (float("inf"), float("inf"), 0.0)


@pytest.mark.parametrize("name", ["bert", "t5", "vit"])
def test_other_models_are_refused(name: str) -> None:
    model = build(name)
    replay = Replay(model, discover(model), [FAMILIES[name].inputs(model, 2, None)])
    with pytest.raises(InputError, match="decoder-only language model"):
        Teacher(replay)


def test_single_tokens_predict_nothing() -> None:
    model = build("llama")
    replay = Replay(model, discover(model), Windows.of(IDS[:, :1], "test"))
    with pytest.raises(InputError, match="at least 2 tokens"):
        Teacher(replay)
