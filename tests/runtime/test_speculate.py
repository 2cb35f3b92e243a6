"""Self-speculation writes what the model writes alone, and leaves no trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from drafting import DECODERS, EAGER, SOME, dense, few, mild, prompt, skips, untouched, write
from families import FAMILIES, build, tokens
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers.generation import StoppingCriteria, StoppingCriteriaList

from billhook.anatomy import discover
from billhook.heal import closed_form, healed
from billhook.plan.address import Address
from billhook.plan.errors import InputError
from billhook.plan.plan import Plan
from billhook.runtime.draft_search import SkipSearch
from billhook.runtime.self_speculation import SelfSpeculation
from billhook.runtime.speculate import Speculating, speculate
from billhook.surgery import apply


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("name", DECODERS)
@given(data=st.data())
@few
def test_greedy_is_plain_greedy(name: str, data: st.DataObject) -> None:
    model, anatomy = dense(name)
    chosen = data.draw(skips(anatomy))
    given = FAMILIES[name].prompt(model)
    plain = model.generate(**given, max_new_tokens=12, do_sample=False)
    with speculate(model, anatomy, chosen, confidence=EAGER) as speculating:
        assert torch.equal(model.generate(**given, max_new_tokens=12, do_sample=False), plain)
    assert speculating.reports[0].drafted > 0
    assert untouched(model)


def test_no_verified_token_is_computed_twice() -> None:
    model, anatomy = mild()
    seen: list[int] = []
    hook = model.get_input_embeddings().register_forward_hook(lambda m, args, out: seen.append(args[0].shape[1]))
    try:
        with speculate(model, anatomy, SOME, confidence=EAGER, give_up=False) as speculating:
            write(model, prompt(9), max_new_tokens=40)
    finally:
        hook.remove()
    (report,) = speculating.reports
    assert seen[0] == 9
    # after the prompt: plain steps of one token; in a round the drafted tokens, then these and one more in the check
    assert sum(seen[1:]) == report.plain_tokens + report.drafted + (report.drafted + report.rounds)
    assert 0 < report.accepted < report.drafted
    assert 1 + report.plain_tokens + report.tokens == 40
    assert report.tokens == report.accepted + report.rounds


SETTINGS: dict[str, dict[str, Any]] = {
    "one token": {"max_new_tokens": 1},
    "few tokens": {"max_new_tokens": 5},
    "static cache": {"cache_implementation": "static"},
    "processors": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "minimum length": {"min_new_tokens": 12, "eos_token_id": list(range(50)), "pad_token_id": 0},
    "several ends": {"eos_token_id": list(range(0, 100, 5)), "pad_token_id": 0},
    "padding": {"attention_mask": torch.tensor([[0, 0] + [1] * 7])},
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_settings_of_generate(name: str, seed: int) -> None:
    model, anatomy = mild()
    plain = write(model, prompt(seed=seed), **SETTINGS[name])
    with speculate(model, anatomy, SOME, confidence=EAGER, give_up=False):
        assert torch.equal(write(model, prompt(seed=seed), **SETTINGS[name]), plain)


class Reader:
    """A streamer that keeps what it is shown."""

    def __init__(self) -> None:
        self.shown: list[list[int]] = []

    def put(self, value: Tensor) -> None:
        self.shown.append(value.flatten().tolist())

    def end(self) -> None:
        self.shown.append([])


class Until(StoppingCriteria):
    """Ends the text when its tokens add up to a multiple of seven."""

    def __call__(self, ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return (ids.sum(-1) % 7 == 0) & (ids.shape[1] > 16)


def test_streamers_criteria_scores_and_caches() -> None:
    model, anatomy = mild()
    wanted = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    results = []
    for attach in (False, True):
        reader = Reader()
        settings = wanted | {
            "streamer": reader,
            "stopping_criteria": StoppingCriteriaList([Until()]),
            "max_new_tokens": 40,
        }
        with speculate(model, anatomy, SOME, confidence=EAGER) if attach else nullcontext():
            result = write(model, prompt(), **settings)
            longer = torch.cat([result.sequences, prompt(3, 5)], dim=-1)
            results.append((result, reader.shown, write(model, longer, cache=result.cache)))
    (plain, shown, further), (ours, also_shown, also_further) = results
    assert torch.equal(ours.sequences, plain.sequences) and also_shown == shown
    assert torch.equal(also_further, further)  # the cache is one to go on from
    for one, other in ((ours.scores, plain.scores), (ours.logits, plain.logits)):
        torch.testing.assert_close(torch.cat(one), torch.cat(other), atol=1e-4, rtol=0)


def test_a_draft_that_is_always_right_is_always_accepted() -> None:
    """What is skipped writes nothing anyway: every token but one a round comes from the draft."""
    model = build("llama")
    anatomy = discover(model)
    block = anatomy.stack("decoder").blocks[2]
    for name in (w for s in block.sublayers for w in s.writes):
        model.get_parameter(name).zero_()
    with speculate(model, anatomy, ["decoder.2"], confidence=EAGER, give_up=False) as speculating:
        text = write(model, prompt(), max_new_tokens=1 + 3 + 4 * 5)  # three plain steps, four rounds
    assert torch.equal(text, write(model, prompt(), max_new_tokens=24))
    (report,) = speculating.reports
    assert (report.rounds, report.drafted, report.accepted) == (4, 16, 16)
    assert (report.acceptance, report.tokens_per_verify) == (1.0, 5.0)


def test_each_prompt_starts_afresh() -> None:
    """Two prompts one after the other, each as if it were the only one, sampled too."""
    model, anatomy = mild()

    def sampled(ids: Tensor) -> Tensor:
        torch.manual_seed(0)
        return write(model, ids, do_sample=True, top_k=20)

    alone = []
    for seed in (1, 2):
        with speculate(model, anatomy, SOME, give_up=False) as speculating:
            alone.append((sampled(prompt(seed=seed)), speculating.reports[0].drafted))
    with speculate(model, anatomy, SOME, give_up=False) as speculating:
        together = [sampled(prompt(seed=seed)) for seed in (1, 2)]
    assert all(torch.equal(text, by_itself) for text, (by_itself, _) in zip(together, alone, strict=True))
    assert [r.drafted for r in speculating.reports] == [drafted for _, drafted in alone]


class Broken(Exception):
    pass


@pytest.mark.parametrize("where", ["draft", "verify", "streamer"])
def test_an_exception_restores_the_model(where: str) -> None:
    model, anatomy = mild()
    calls = 0

    def fail(module: Any, args: Any) -> None:
        nonlocal calls
        calls += 1
        drafting = "forward" in vars(model.get_submodule(anatomy.stack("decoder").blocks[2].path))
        if calls > 5 and drafting == (where == "draft"):
            raise Broken

    class Rude(Reader):
        def put(self, value: Tensor) -> None:
            super().put(value)
            if len(self.shown) > 6:
                raise Broken

    plain = write(model, prompt())
    hook = model.get_input_embeddings().register_forward_pre_hook(fail) if where != "streamer" else None
    with pytest.raises(Broken), speculate(model, anatomy, SOME):
        write(model, prompt(), streamer=Rude() if where == "streamer" else None)
    if hook:
        hook.remove()
    assert untouched(model) and torch.equal(write(model, prompt()), plain)


def test_the_search_finds_what_writes_nothing() -> None:
    """Two MLPs and two attentions write nothing: the search settles on skipping them, and the text stays the same."""
    model = build("llama")
    anatomy = discover(model)
    silent = [
        anatomy.sublayer(Address.parse(f"decoder.{i}.{k}")) for i, k in ((1, "mlp"), (2, "attention"), (3, "mlp"))
    ]
    for name in (w for s in silent for w in s.writes):
        model.get_parameter(name).zero_()
    search = SkipSearch(anatomy, 0.5, window=8, target=1.0, trials=60)
    plain = write(model, prompt(), max_new_tokens=100)
    with speculate(model, anatomy, search, confidence=EAGER, give_up=False) as speculating:
        assert torch.equal(write(model, prompt(), max_new_tokens=100), plain)
        assert torch.equal(write(model, prompt(), max_new_tokens=100), plain)
    assert search.matchness == 1.0 and search.best == {s.address for s in silent}
    assert set(speculating.reports[1].skips) == search.best
    assert speculating.reports[1].acceptance == 1.0 > speculating.reports[0].acceptance
    assert speculating.reports[0].search_seconds > 0 == speculating.reports[1].search_seconds


@pytest.mark.parametrize("heal", [False, True])
def test_a_cut_model_is_an_ordinary_assistant(heal: bool) -> None:
    model, anatomy = mild()
    plan = Plan.of(["decoder.1.attention", "decoder.2"])
    healing = closed_form(model, anatomy, plan, [tokens(model, 4, None, length=24)]) if heal else None
    with healed(model, healing) if healing else nullcontext():
        smaller = apply(model, anatomy, plan)
    plain = write(model, prompt(), max_new_tokens=30)
    assert torch.equal(write(model, prompt(), max_new_tokens=30, assistant_model=smaller), plain)
    with speculate(model, anatomy, plan):
        assert torch.equal(write(model, prompt(), max_new_tokens=30), plain)


@pytest.mark.parametrize("parameters", [{"units": "decoder.1.attention + decoder.2"}, {"share": 0.5, "give_up": False}])
def test_the_policy(parameters: dict[str, Any]) -> None:
    model, _ = mild()
    plain = write(model, prompt(), max_new_tokens=60)
    with SelfSpeculation.of(parameters).attach(model) as attached:
        assert isinstance(attached, Speculating)
        assert torch.equal(write(model, prompt(), max_new_tokens=60), plain)
    assert attached.reports[0].skips == tuple(sorted(attached.reports[0].skips)) != ()
    assert untouched(model)
    with pytest.raises(InputError, match="share"):
        SelfSpeculation.of({"share": 2})
