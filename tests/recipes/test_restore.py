"""A trained model, part of the way back to its base: from the YAML to a checkpoint of the same shape."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cli.terminal import billhook, fake_recipe
from families import FAMILIES, VOCABULARY, build
from transformers import AutoModelForCausalLM

from billhook.anatomy import discover
from billhook.heal import restore
from billhook.measure.characters import Question, answered, spellings
from billhook.plan.errors import InputError
from billhook.plan.record import Run
from billhook.recipes import restore as walk
from billhook.recipes.catalogue import load as recipe
from billhook.recipes.compare import compare
from billhook.recipes.compress import compress
from billhook.recipes.restore import restore as take_back
from billhook.recipes.schema import Recipe
from billhook.report.headline import verdict
from billhook.search.restored_span import restored_span

CAUSAL = [name for name in FAMILIES if build(name).can_generate() and not build(name).config.is_encoder_decoder]
SPELT = torch.full((VOCABULARY,), -1)
SPELT[10:20] = torch.arange(10)


@pytest.fixture(scope="module")
def tuned(tiny_lm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, with every weight a little off."""
    folder = tmp_path_factory.mktemp("models") / "tuned"
    loaded = walk.opened(tiny_lm, dtype=None, device="cpu", trust_remote_code=False)
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            parameter.add_(0.3 * parameter.std() * torch.randn(parameter.shape, generator=draw))
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    return folder


def test_answers_are_read_from_the_probabilities(tiny_tokenizer: Any) -> None:
    """By hand: a third on each of two spellings of one character and on one of another; nothing else is valid."""
    spelt = spellings(tiny_tokenizer, 320, [Question("?", "abc")])[0]
    ids = tiny_tokenizer(["a", " a", "b", "d"], add_special_tokens=False).input_ids
    assert [spelt[i[-1]].item() for i in ids] == [0, 0, 1, -1] and (spelt[len(tiny_tokenizer) :] == -1).all()
    numbers = torch.tensor([0, 0, 1, -1])
    shares = torch.tensor([0.3, 0.3, 0.3, 0.1]).log()[None]
    found = answered(shares, [numbers])
    assert found.validity == pytest.approx(0.9)
    assert found.diversity == pytest.approx(0.9182958)  # H(2/3, 1/3) in bits, of 1 that two characters can have
    even = answered(torch.zeros(1, 4), [torch.tensor([0, 1, 2, -1])])
    assert (even.validity, even.diversity) == pytest.approx((0.75, 1.0))
    with pytest.raises(InputError, match="no tokens for single characters such as αβ"):
        spellings(tiny_tokenizer, 320, [Question("?", "αβ")])


@pytest.mark.parametrize("name", CAUSAL)
def test_the_run_is_the_most_diverse_of_those_that_stay_valid(name: str) -> None:
    """Against every run, put into the model for good, by its own forward on each question alone."""
    model, base = build(name), build(name)
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=draw) * parameter.std(correction=0))
    anatomy = discover(model)
    ids = [torch.randint(3, VOCABULARY, (length,), generator=draw) for length in (6, 9)]
    asked = {
        "input_ids": torch.nn.utils.rnn.pad_sequence(ids, batch_first=True),
        "attention_mask": torch.nn.utils.rnn.pad_sequence([torch.ones_like(i) for i in ids], batch_first=True),
    }
    blocks = [block.address for block in anatomy.stack("decoder").blocks]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    plain, other = {}, build(name)
    for start in range(len(blocks)):
        for end in range(start + 1, len(blocks) + 1):
            other.load_state_dict(before)
            changed = restore(model, anatomy, base, blocks[start:end]).tensors
            other.load_state_dict(changed, strict=False)
            with torch.no_grad():
                last = torch.stack([other(input_ids=i[None]).logits[0, -1] for i in ids])
            plain[start, end] = answered(last, [SPELT, SPELT])
    with torch.no_grad():
        now = answered(torch.stack([model(input_ids=i[None]).logits[0, -1] for i in ids]), [SPELT, SPELT])
    more = [run for run in plain if plain[run].diversity > now.diversity + 1e-6]
    if not more:
        with pytest.raises(InputError, match="no run of blocks of the base makes the answers more diverse"):
            restored_span(model, anatomy, base, asked, [SPELT, SPELT], validity=1e-9)
        return
    middle = 0.999 * sorted(plain[run].validity for run in more)[len(more) // 2] / now.validity
    found = restored_span(model, anatomy, base, asked, [SPELT, SPELT], validity=middle)
    assert found.evaluations == len(plain)
    valid = [run for run in more if plain[run].validity >= middle * now.validity]
    best = max(valid, key=lambda run: plain[run].diversity)
    assert found.blocks == tuple(blocks[slice(*best)])
    assert found.after.diversity == pytest.approx(plain[best].diversity, rel=1e-4)
    assert found.after.diversity > found.before.diversity
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_no_run_may_be_good_enough() -> None:
    model = build("llama")
    asked = {"input_ids": torch.full((1, 4), 5), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    with pytest.raises(InputError, match="no run of blocks of the base makes the answers more diverse"):
        restored_span(model, discover(model), build("llama"), asked, [SPELT], validity=1.0)


@pytest.mark.parametrize("name", ["restore-layers", "lines"])
def test_from_the_recipe_to_a_checkpoint(
    name: str, tuned: Path, tiny_lm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("billhook.recipes.proof.EVALUATION_TOKENS", 1024)
    monkeypatch.setattr(walk, "probes", lambda *rest, **more: ())
    out = tmp_path / "out"
    run = take_back(tuned, base=tiny_lm, out=out, recipe=name, max_new_tokens=4)
    assert run.returned is not None and run.plan.empty and run.healing is None and not run.realised
    assert Run.model_validate_json((out / "billhook.json").read_text()).returned == run.returned
    result, old, base = (AutoModelForCausalLM.from_pretrained(f).state_dict() for f in (out, tuned, tiny_lm))
    assert {key: value.shape for key, value in result.items()} == {key: value.shape for key, value in old.items()}
    kept = [run.returned.kept[f"decoder.{block}"] for block in range(5)]
    for block, share in enumerate(kept):
        key = f"model.layers.{block}.self_attn.q_proj.weight"
        torch.testing.assert_close(result[key], base[key] + share * (old[key] - base[key]), atol=1e-6, rtol=1e-5)
    if name == "lines":
        assert kept == [0.0, 0.25, 0.5, 0.75, 1.0]
        assert "With 0.0% (first block) to 100.0% (last) of what training changed" in (out / "README.md").read_text()
    else:
        back = [block for block, share in enumerate(kept) if share == 0]
        assert set(kept) <= {0.0, 1.0} and back == list(range(back[0], back[-1] + 1))
        assert run.returned.diversity is not None and run.returned.diversity[1] > run.returned.diversity[0]
        assert run.search is not None and run.search.work > 0 and run.search.evaluations == 15
    page, card = (out / "report.html").read_text(), (out / "README.md").read_text()
    assert "Nothing was cut; what is called dense below is the model as it was" in page
    assert "what was cut" not in page and "pruned" not in card
    command = f"billhook restore {tuned} --base {tiny_lm} --recipe {name} --seed 0 --out DIR"
    assert command in card and command in page
    fake_recipe(monkeypatch, "restore", run)
    shown = " ".join(billhook("restore", tuned, "--base", tiny_lm, "--out", out).stdout.split())
    assert verdict(run).partition(",")[0] in shown, "the terminal says what was put back too"


def test_the_words_go_together() -> None:
    good: dict[str, Any] = {"name": "mine", "title": "Mine", "unit": "block"}
    graded = {"word": "graded", "first": 0.5, "last": 1.0}
    assert Recipe.model_validate({**good, "choice": graded, "act": "scale"}).returns
    scale = {"act": "scale"}
    for wrong in ({"act": "restore"}, {"act": "drop"}, {**scale, "unit": "mlp"}, {**scale, "heal": "bias"}):
        with pytest.raises(ValueError, match="act"):
            Recipe.model_validate({**good, "choice": graded, **wrong})
    with pytest.raises(ValueError, match="act restore goes with"):
        Recipe.model_validate({**good, "choice": {"word": "first"}, "act": "scale"})


def test_what_is_refused(tuned: Path, tiny_lm: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(InputError, match="recipe lines takes a model back to its base and cuts nothing"):
        compress(tuned, budget="params=0.8", out=out, recipe="lines")
    with pytest.raises(InputError, match="stands in no comparison: use billhook restore MODEL --base BASE"):
        compare(tuned, budgets="params=0.8", out=out, recipes=["restore-layers"])
    with pytest.raises(InputError, match="recipe block-influence cuts and takes no base"):
        take_back(tuned, base=tiny_lm, out=out, recipe="block-influence")
    with pytest.raises(InputError, match="have the same weights: there is nothing to take back"):
        take_back(tiny_lm, base=tiny_lm, out=out)
    shorter = AutoModelForCausalLM.from_pretrained(tiny_lm, num_hidden_layers=4)
    shorter.save_pretrained(tmp_path / "shorter")
    with pytest.raises(InputError, match=r"the base is another architecture: parameter model\.layers\.4"):
        take_back(tuned, base=tmp_path / "shorter", out=out)
    assert not out.exists() and recipe("lines").returns
