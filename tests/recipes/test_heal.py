"""The healing of a walk: on what text, of which models, and what is put on record."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import build, randomise

from billhook.data import Windows
from billhook.data.builtin import builtin
from billhook.heal import UNTOUCHED
from billhook.plan.address import Address
from billhook.plan.errors import InputError
from billhook.plan.plan import Plan
from billhook.plan.record import HealStep
from billhook.recipes import compress as walk
from billhook.recipes.heal import applied, new_weights, record_of
from billhook.recipes.opened import opened
from billhook.recipes.settings import HEALING_TOKENS
from billhook.recipes.texts import healing_text
from billhook.recipes.workplace import workplace


def test_as_much_text_as_there_is_and_at_least_two_windows(tiny_lm: Path, tmp_path: Path) -> None:
    model = opened(tiny_lm, dtype=None, device="cpu", trust_remote_code=False)
    length = model.length(1024)
    assert healing_text(model, "builtin", 0, None).tokens == HEALING_TOKENS
    ids = model.tokenizer(builtin().content[:40_000], add_special_tokens=False).input_ids
    text = tmp_path / "short.txt"
    text.write_text(model.tokenizer.decode(ids[: 4 * length]))  # 80% of them hold three windows
    assert healing_text(model, str(text), 0, None).tokens == 3 * length
    text.write_text(model.tokenizer.decode(ids[: 2 * length]))
    with pytest.raises(InputError, match=r"2 windows of 512"):
        healing_text(model, str(text), 0, None)


def test_the_record_says_on_what_and_the_dense_model_stays(tiny_lm: Path, tmp_path: Path) -> None:
    model = opened(tiny_lm, dtype=None, device="cpu", trust_remote_code=False)
    before = {name: weight.clone() for name, weight in model.model.state_dict().items()}
    windows = healing_text(model, "builtin", 0, None)
    plan = Plan.of([Address("decoder", 2)])
    healing = new_weights(model, plan, "closed-form", windows, None)
    steps = [HealStep(method=method, text="builtin", seed=0) for method in ("distill", "closed-form")]
    compressed, record = applied(model, plan, healing), record_of(healing, *steps)
    assert (record.method, record.tokens) == ("closed-form", windows.tokens)
    assert record.work > 0
    assert all(torch.equal(weight, before[name]) for name, weight in model.model.state_dict().items())
    old = {weight.data_ptr() for weight in model.model.parameters()}
    fresh = [weight for weight in compressed.parameters() if weight.data_ptr() not in old]
    taken = sum(refit.taken for refit in record.refits)
    assert 0 < taken <= len(fresh) <= taken + 4 * len(record.grafts), "a graft brings reads and a write"


def test_a_model_that_cannot_be_healed_is_refused_before_the_search(
    tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build("gemma4")
    model.resize_token_embeddings(len(tiny_tokenizer))
    randomise(model)
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(walk, "find", None)
    with pytest.raises(InputError, match=r"cannot be healed: .*; --heal none leaves it as cut") as refused:
        walk.compress(tmp_path / "model", budget="params=0.8", out=tmp_path / "out")
    assert "\n" not in str(refused.value)
    assert not workplace(tmp_path / "out").exists() and not (tmp_path / "out").exists()


def test_what_a_training_begins_with_is_chosen_on_text_that_the_refit_did_not_read(
    tiny_lm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from billhook.recipes import training

    model = opened(tiny_lm, dtype=None, device="cpu", trust_remote_code=False)
    judged: list[torch.Tensor] = []
    monkeypatch.setattr(training, "better", lambda _, __, before, ___, held: judged.append(held) or before)
    monkeypatch.setattr(training, "train", lambda *_, **__: 1 / 0)
    text, lessons = (
        Windows.of(torch.randint(3, 290, (rows, 32), generator=torch.Generator().manual_seed(rows)), "text")
        for rows in (4, 24)
    )
    step = HealStep(method="distill", text="text", seed=0, tokens=64)
    with pytest.raises(ZeroDivisionError):
        training.taught(model, Plan.of([Address("decoder", 2)]), step, UNTOUCHED, text, lessons, 64, tmp_path, None)
    assert len(judged) == 1 and torch.equal(judged[0], text.ids[-1:])
