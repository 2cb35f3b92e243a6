"""Self-speculation writes what the model writes alone, and leaves no trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from functools import cache
from typing import Any

import pytest
import torch
from families import FAMILIES, build, params, tokens
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.generation import StoppingCriteria, StoppingCriteriaList

from billhook.anatomy import Anatomy, discover
from billhook.heal import closed_form, healed
from billhook.plan.address import Address
from billhook.plan.check import normalise, units, unsound
from billhook.plan.errors import InputError
from billhook.plan.plan import Plan
from billhook.runtime.draft import Draft, shapes
from billhook.runtime.draft_length import Confidence
from billhook.runtime.draft_report import Report
from billhook.runtime.draft_search import SkipSearch
from billhook.runtime.self_speculation import SelfSpeculation
from billhook.runtime.speculate import Speculating, speculate
from billhook.surgery import apply, simulate

DECODERS = [n for n in params if FAMILIES[n].stacks.get("decoder") and "encoder" not in FAMILIES[n].stacks]
few = settings(max_examples=2, deadline=None, derandomize=True, database=None, phases=[Phase.explicit, Phase.generate])
EAGER = Confidence(longest=4, threshold=0.0, step=0.0)
SOME = ("decoder.1.attention", "decoder.2", "decoder.3.mlp")


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@cache
def dense(name: str) -> tuple[PreTrainedModel, Anatomy]:
    """One model a family for the whole file: every test has to leave it as it was."""
    model = build(name)
    return model, discover(model)


@cache
def mild() -> tuple[PreTrainedModel, Anatomy]:
    """A model that a draft without ``SOME`` often agrees with: what they write is small. Some tokens are rejected."""
    model = build("llama")
    anatomy = discover(model)
    for block in anatomy.stack("decoder").blocks[1:4]:
        for write in (w for s in block.sublayers for w in s.writes):
            model.get_parameter(write).mul_(0.3)
    return model, anatomy


@st.composite
def skips(draw: st.DrawFn, anatomy: Anatomy) -> list[Address]:
    outline = anatomy.outline
    candidates = [a for kind in ("block", "sublayer") for a in units(outline, kind) if a.stack == "decoder"]
    chosen: list[Address] = []
    for unit in draw(st.lists(st.sampled_from(candidates), min_size=1, max_size=6, unique=True)):
        if unsound([*chosen, unit], outline) is None:
            chosen.append(unit)
    return chosen


def prompt(length: int = 9, seed: int = 1) -> Tensor:
    return torch.randint(3, 90, (1, length), generator=torch.Generator().manual_seed(seed))


def write(model: PreTrainedModel, ids: Tensor, **settings: Any) -> Any:
    return model.generate(input_ids=ids, **{"max_new_tokens": 24, "do_sample": False} | settings)


def untouched(model: PreTrainedModel) -> bool:
    inside = [name for module in model.modules() for name in vars(module) if name in ("forward", "generate")]
    return (
        not inside
        and not any(module._forward_hooks for module in model.modules())
        and vars(model).get("billhook_policy") is None
    )


@pytest.mark.parametrize("name", DECODERS)
@given(data=st.data())
@few
def test_greedy_is_plain_greedy(name: str, data: st.DataObject) -> None:
    model, anatomy = dense(name)
    chosen = data.draw(skips(anatomy))
    given = FAMILIES[name].prompt(model)
    plain = model.generate(**given, max_new_tokens=16, do_sample=False)
    with speculate(model, anatomy, chosen, confidence=EAGER) as speculating:
        assert torch.equal(model.generate(**given, max_new_tokens=16, do_sample=False), plain)
    assert speculating.reports[0].drafted > 0
    assert untouched(model)


@pytest.mark.parametrize("name", DECODERS)
@given(data=st.data())
@few
def test_the_draft_is_the_simulated_plan(name: str, data: st.DataObject) -> None:
    """To the bit, with nothing verified before: on an empty cache its keys and values are all its own."""
    model, anatomy = dense(name)
    chosen = data.draw(skips(anatomy))
    draft = Draft(model, anatomy, chosen)
    inputs = FAMILIES[name].inputs(model, 1, None)
    with shapes(draft.stack) as shaped:
        model(**inputs)
    with simulate(model, anatomy, normalise(chosen, anatomy.outline)):
        expected = model(**inputs, use_cache=False).logits
    with draft.skipping(shaped):
        assert torch.equal(model(**inputs, use_cache=False).logits, expected)
    assert untouched(model)


@pytest.mark.parametrize(
    ("name", "static"),
    [("llama", False), ("gemma2", False), ("mistral", False), ("bloom", False), ("llama", True), ("bloom", True)],
)
def test_a_fork_leaves_the_verified_cache_alone(name: str, static: bool) -> None:
    """Its verified entries, whatever the draft writes; and the fork counts on where it stopped."""
    model, anatomy = dense(name)
    ids = prompt(7)
    verified = StaticCache(model.config, 16) if static else DynamicCache(config=model.config)
    draft = Draft(model, anatomy, ["decoder.0.attention", "decoder.2"])
    with shapes(draft.stack) as shaped:
        model(ids, cache=verified)
    verified.activate_past_recording()
    before = [(layer.keys.clone(), layer.values.clone()) for layer in verified.layers]
    with draft.skipping(shaped):
        fork = draft.fork(verified)
        for step in range(3):
            assert int(fork.get_seq_length()) == 7 + step
            model(ids[:, :1], cache=fork)
    assert [int(layer.get_seq_length()) for layer in verified.layers] == [7] * len(verified.layers)
    if not any(verified.is_sliding):
        assert int(draft.fork(verified, back=2).get_seq_length()) == 5
        assert int(verified.get_seq_length()) == 7
    for layer, (keys, values) in zip(verified.layers, before, strict=True):
        end = min(7, keys.shape[-2])
        assert torch.equal(layer.keys[..., :end, :], keys[..., :end, :])
        assert torch.equal(layer.values[..., :end, :], values[..., :end, :])


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


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.6, "top_k": 3}, {"top_p": 0.7, "temperature": 1.5}])
def test_sampling_keeps_the_distribution(settings: dict[str, Any]) -> None:
    """A model that looks at the last token alone writes a Markov chain: its steps are counted in one long text and
    compared with its own probabilities, as processed; the draft has quite other ones."""
    model, anatomy, vocabulary = chain()
    torch.manual_seed(0)
    with speculate(model, anatomy, ["decoder.1.mlp"], confidence=EAGER, give_up=False) as speculating:
        text = write(model, torch.tensor([[1]]), max_new_tokens=700, do_sample=True, eos_token_id=None, **settings)[0]
    (report,) = speculating.reports
    assert 0.05 < report.acceptance < 0.95
    states = torch.arange(vocabulary)[:, None]
    seen = torch.zeros(vocabulary, vocabulary)
    for a, b in zip(text[:-1].tolist(), text[1:].tolist(), strict=True):
        seen[a, b] += 1
    expected = processed(model(states).logits[:, 0], settings) * seen.sum(-1, keepdim=True)
    assert not seen[expected == 0].any()
    likely = expected > 5
    rest = seen[~likely].sum(), expected[~likely].sum()
    counts, wanted = [*seen[likely].tolist(), float(rest[0])], [*expected[likely].tolist(), float(rest[1])]
    pairs = [(c, w) for c, w in zip(counts, wanted, strict=True) if w > 0]
    assert chisquare(*zip(*pairs, strict=True), sum_check=False).pvalue > 0.01


def processed(logits: Tensor, settings: dict[str, Any]) -> Tensor:
    """Temperature, top-k and top-p worked out by hand."""
    logits = logits / settings.get("temperature", 1.0)
    if k := settings.get("top_k"):
        logits = logits.masked_fill(logits < logits.topk(k).values[:, -1:], -torch.inf)
    p = logits.softmax(-1)
    if (top := settings.get("top_p")) is not None:
        ordered, places = p.sort(descending=True)
        kept = ordered.cumsum(-1) - ordered < top
        p = torch.zeros_like(p).scatter(-1, places, ordered * kept)
    return p / p.sum(-1, keepdim=True)


@cache
def chain() -> tuple[PreTrainedModel, Anatomy, int]:
    from families import _decoder, randomise

    model = _decoder("LlamaForCausalLM", blocks=3, vocab_size=7).build()
    randomise(model, seed=3)
    anatomy = discover(model)
    for block in anatomy.stack("decoder").blocks:
        for write_ in block.sublayers[0].writes:
            model.get_parameter(write_).zero_()
    model.generation_config.top_k = None
    return model, anatomy, 7


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


def test_it_stops_when_it_is_slower() -> None:
    report = Report()
    for _ in range(3):
        assert report.wants_plain
        report.plain(1.0)
        assert not report.slower()
    for window in range(2):
        for _ in range(8):
            assert not report.wants_plain
            report.round(4, 1, draft_seconds=1.5, verify_seconds=1.0)  # two tokens in 2.5 seconds
        assert report.wants_plain
        report.plain(1.0)
        assert report.slower() == (window == 1)
    assert report.speedup == pytest.approx(0.8)
    assert report.acceptance == 0.25 and report.tokens_per_verify == 2


def test_one_slow_window_does_not_stop_it() -> None:
    report = Report()
    for _ in range(3):
        report.plain(1.0)
    for seconds in (2.5, 1.5, 2.5, 1.5):
        for _ in range(8):
            report.round(4, 1, draft_seconds=seconds, verify_seconds=0.0)
        report.plain(1.0)
        assert not report.slower()


def test_it_decodes_plainly_once_it_has_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    model, anatomy = mild()
    plain = write(model, prompt(), max_new_tokens=40)
    monkeypatch.setattr(Report, "slower", lambda self: self.rounds > 0)
    with speculate(model, anatomy, SOME, confidence=EAGER) as speculating:
        assert torch.equal(write(model, prompt(), max_new_tokens=40), plain)
    (report,) = speculating.reports
    assert report.stopped is not None and report.rounds == 8
    assert report.plain_tokens == 40 - 1 - report.tokens


def test_confidence() -> None:
    rule = Confidence(longest=3, threshold=0.5, target=0.8, step=0.1)
    assert [rule.enough(1, 0.6), rule.enough(1, 0.4), rule.enough(3, 0.9)] == [False, True, True]
    rule.update(4, 4)
    assert rule.threshold == pytest.approx(0.4)  # all accepted: draft on at less confidence
    rule.update(4, 0)
    assert rule.threshold == pytest.approx(0.5)


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


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "batch": ({"input_ids": prompt().repeat(2, 1)}, "one sequence at a time"),
    "beams": ({"num_beams": 2}, "one sequence at a time"),
    "no cache": ({"use_cache": False}, "needs a KV cache"),
    "hidden states": (
        {"return_dict_in_generate": True, "output_hidden_states": True},
        "no attentions or hidden states",
    ),
    "assistant": ({"assistant_model": "another"}, "says how to decode"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_cannot_do_is_refused(name: str) -> None:
    model, anatomy = mild()
    settings, message = REFUSED[name]
    with speculate(model, anatomy, SOME), pytest.raises(InputError, match=message):
        model.generate(**{"input_ids": prompt(), "max_new_tokens": 8, "do_sample": False} | settings)


def test_drafts_and_models_that_it_cannot_use() -> None:
    model, anatomy = mild()
    with pytest.raises(InputError, match="the model itself"):
        speculate(model, anatomy, [])
    with pytest.raises(InputError, match=r"decoder\.9 is not in"):
        speculate(model, anatomy, ["decoder.9"])
    with speculate(model, anatomy, SOME), pytest.raises(InputError, match="attached"):
        speculate(model, anatomy, SOME)
    assert untouched(model)
    for name in ("t5", "bart", "bert", "vit"):
        other = build(name)
        with pytest.raises(InputError, match="needs a decoder language model"):
            speculate(other, discover(other), ["encoder.1"])
    sliding, its_anatomy = dense("mistral")
    with (
        speculate(sliding, its_anatomy, SkipSearch(its_anatomy, 0.5)),
        pytest.raises(InputError, match="without sliding windows"),
    ):
        write(sliding, prompt())


def test_a_sliding_static_cache_is_refused_once_it_is_full() -> None:
    model, anatomy = dense("mistral")
    with speculate(model, anatomy, SOME), pytest.raises(InputError, match="cannot take tokens back"):
        write(model, prompt(), cache_implementation="static")


def test_detach_twice_and_reports() -> None:
    model, anatomy = mild()
    speculating = speculate(model, anatomy, SOME)
    assert isinstance(speculating, Speculating) and not untouched(model)
    write(model, prompt())
    write(model, prompt())
    assert len(speculating.reports) == 2
    speculating.detach()
    speculating.detach()
    assert untouched(model)


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
