from types import SimpleNamespace

import pytest
import torch
import transformers
from families import FAMILIES, build
from transformers import LlamaConfig, LlamaForCausalLM

from billhook.anatomy import discover
from billhook.data.decoding import cache_name
from billhook.evaluate import DEFAULT, bench, memory
from billhook.evaluate.bench import engine
from billhook.evaluate.memory import memory_of, tensor_bytes
from billhook.evaluate.workload import decode, fitting, prefill, prompt_ids, ready
from billhook.measure import latency
from billhook.plan.errors import InputError
from billhook.plan.plan import Plan
from billhook.plan.record import Workload
from billhook.surgery import apply

PREFILL = Workload(name="prefill", batch=2, prompt_tokens=7, new_tokens=0)
DECODE = Workload(name="decode", batch=2, prompt_tokens=5, new_tokens=4)
CAUSAL = [name for name, family in FAMILIES.items() if family.generates and list(family.stacks) == ["decoder"]]


def cut(model, *units):
    plan = Plan.of(units)
    return apply(model, discover(model), plan), plan


@pytest.fixture
def dense():
    return build("llama")


@pytest.fixture
def work(monkeypatch):
    """A clock that counts work: a block takes 1, everything outside the blocks of one forward takes 2."""
    done = [0.0]
    monkeypatch.setattr(latency, "now", lambda: done[0])

    def hook(amount):
        return lambda *_: done.__setitem__(0, done[0] + amount)

    def watch(*models):
        for model in models:
            model.register_forward_hook(hook(2.0))
            for block in model.get_submodule("model.layers"):
                block.register_forward_hook(hook(1.0))

    return watch


def test_speedup_tokens_and_ideal(dense, work):
    compressed, plan = cut(dense, "decoder.1", "decoder.3")
    work(dense, compressed)
    prefilled, decoded = bench(dense, compressed, workloads=[PREFILL, DECODE], rounds=3, plan=plan)
    for timing in (prefilled, decoded):
        assert timing.speedup.model_dump() == {"value": 7 / 5, "low": 7 / 5, "high": 7 / 5}
        assert timing.ideal_speedup == pytest.approx(7 / 5)
        assert timing.rounds == 3
    assert prefilled.dense_tokens_per_second == 2 * 7 / 7
    assert prefilled.compressed_tokens_per_second == 2 * 7 / 5
    assert decoded.dense_tokens_per_second == 2 * 4 / (4 * 7)  # the prefill is not in it


def test_ideal_only_for_whole_blocks_of_a_known_plan(dense):
    compressed, plan = cut(dense, "decoder.1", "decoder.3.mlp")
    for known in (plan, None):
        (timing,) = bench(dense, compressed, workloads=[PREFILL], rounds=1, plan=known)
        assert timing.ideal_speedup is None


def test_the_dense_model_is_whole_again_after_measuring_outside_its_blocks(dense):
    compressed, plan = cut(dense, "decoder.1")
    dense.train()
    ids = torch.arange(5)[None]
    before = dense(ids).logits
    bench(dense, compressed, workloads=[PREFILL], rounds=1, plan=plan)
    assert torch.equal(dense(ids).logits, before)
    assert all(module.training for module in dense.modules())


def test_end_of_sequence_ends_nothing(dense):
    """A model that always says it is at the end does all its steps."""
    dense.config.eos_token_id = dense.generation_config.eos_token_id = 2
    dense.get_output_embeddings().weight = torch.nn.Parameter(torch.zeros(101, 36))
    head = dense.get_output_embeddings()
    head.register_forward_hook(lambda _m, _a, out: out.index_fill(-1, torch.tensor(2), 9.0))
    calls = []
    dense.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        cache, token = prefill(dense, torch.arange(5)[None])
        tokens = decode(dense, cache, token, 6)
    assert tokens.tolist() == [[2] * 6]
    assert len(calls) == 7


@pytest.mark.parametrize("name", [*CAUSAL, "gemma3_image"])
@torch.no_grad()
def test_decode_is_greedy_generation(name):
    """Steps on the cache give what the model gives without one, one token at a time, in every family."""
    model = build(name)
    ids = prompt_ids(DECODE, model)
    cache, token = prefill(model, ids)
    got = torch.cat([token, decode(model, cache, token, 4)], 1)
    expected = ids
    for _ in range(5):
        expected = torch.cat([expected, model(expected, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(got, expected[:, 5:])


@torch.no_grad()
def test_a_decode_step_reads_one_token_and_a_filled_cache(dense):
    cache, token = prefill(dense, prompt_ids(DECODE, dense))
    seen = []
    dense.register_forward_pre_hook(
        lambda _m, _a, kw: seen.append((tuple(kw["input_ids"].shape), kw[cache_name(dense)].get_seq_length())),
        with_kwargs=True,
    )
    decode(dense, cache, token, 4)
    assert seen == [((2, 1), 5), ((2, 1), 6), ((2, 1), 7), ((2, 1), 8)]


@torch.no_grad()
def test_every_round_starts_on_the_same_cache(dense):
    prepare = ready(dense, DECODE, prompt_ids(DECODE, dense))
    assert torch.equal(prepare()(), prepare()())


@torch.no_grad()
def test_decode_time_grows_with_context():
    """On the real clock, with a context 100 times as long: about ten times the time."""
    config = LlamaConfig(
        vocab_size=50, hidden_size=256, intermediate_size=16, num_hidden_layers=2, num_attention_heads=8,
        max_position_embeddings=8192,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    works = [Workload(name="decode", batch=2, prompt_tokens=n, new_tokens=8) for n in (32, 3200)]
    times = latency.interleaved({str(w.prompt_tokens): ready(model, w, prompt_ids(w, model)) for w in works}, rounds=5)
    assert min(times["3200"]) > 1.5 * min(times["32"])


def test_cache_bytes_are_those_of_the_real_cache(dense):
    compressed, _ = cut(dense, "decoder.1", "decoder.3.attention")
    prefilled, decoded = bench(dense, compressed, workloads=[PREFILL, DECODE], rounds=1)
    a_token = 2 * 3 * 10 * 4  # keys and values, 3 heads of 10, float32
    assert prefilled.dense_cache_bytes == 5 * a_token * 2 * 7
    assert prefilled.compressed_cache_bytes == 3 * a_token * 2 * 7
    assert decoded.dense_cache_bytes == 5 * a_token * 2 * (5 + 4)
    assert decoded.compressed_cache_bytes == 3 * a_token * 2 * (5 + 4)


def test_shared_storage_counts_once():
    whole = torch.zeros(10, dtype=torch.int64)
    assert tensor_bytes({"a": [whole, whole[2:4]], "b": (torch.zeros(3),)}) == 80 + 12


@torch.no_grad()
def test_peak_is_not_made_up(dense):
    peak, cache = memory_of(dense, DECODE, prompt_ids(DECODE, dense))
    assert peak is None
    assert cache > 0


@torch.no_grad()
def test_peak_is_summed_over_all_devices_of_the_model(monkeypatch):
    """Two devices that only say they are: each with 100 bytes of others' before, 107 and 109 at the highest."""
    devices = [torch.device("cuda", i) for i in range(2)]
    fake = SimpleNamespace(
        parameters=lambda: iter([SimpleNamespace(device=d) for d in (*devices, devices[0])]), buffers=list, device="cpu"
    )
    reset = []
    monkeypatch.setattr(memory, "prefill", lambda *_: ((), None))
    monkeypatch.setattr(memory, "tensor_bytes", lambda _: 1000)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset.append)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 100)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 107 + 2 * device.index)
    assert memory_of(fake, PREFILL, torch.zeros(1, 2))[0] == 7 + 9 + 1000
    assert set(reset) == set(devices)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@torch.no_grad()
def test_peak_on_cuda_is_that_of_one_model(dense):
    dense = dense.cuda()
    ids = prompt_ids(DECODE, dense)
    alone, cache = memory_of(dense, DECODE, ids)
    beside = torch.zeros(10**8, device="cuda")
    assert memory_of(dense, DECODE, ids)[0] == pytest.approx(alone, rel=0.05)
    assert alone >= tensor_bytes(list(dense.parameters())) + cache
    assert len(beside)


def test_engine_is_named(dense, monkeypatch):
    (timing,) = bench(dense, dense, workloads=[PREFILL], rounds=1)
    for words in (transformers.__version__, torch.__version__, "CPU", "float32"):
        assert words in timing.engine
    for count, words in ((1, "CPU with 1 thread,"), (2, "CPU with 2 threads,")):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=count: count)
        assert words in engine(dense)


def test_three_workloads_by_default():
    assert [(w.batch, w.new_tokens > 0) for w in DEFAULT] == [(1, False), (1, True), (8, True)]


def test_progress(dense):
    calls = []
    bench(dense, dense, workloads=[PREFILL, DECODE], rounds=2, progress=lambda *call: calls.append(call))
    assert [done for _, done, _ in calls] == [1, 2, 3, 4, 5, 6]
    assert {total for _, _, total in calls} == {6}
    assert calls[0][0] == "bench: prefill"


def test_refusals(dense):
    with pytest.raises(InputError, match="workload prefill takes 512 tokens, but LlamaForCausalLM has 64 positions"):
        bench(dense, dense, workloads=[DEFAULT[0]])
    with pytest.raises(InputError, match="bench needs at least 1 round, not 0"):
        bench(dense, dense, workloads=[PREFILL], rounds=0)
    with pytest.raises(InputError, match="bench needs a causal language model: BertForMaskedLM"):
        bench(build("bert"), dense, workloads=[PREFILL])
    nothing = Workload(name="nothing", batch=0, prompt_tokens=3, new_tokens=0)
    with pytest.raises(InputError, match="workload nothing needs at least one sequence"):
        bench(dense, dense, workloads=[nothing])


def test_default_workloads_fit_short_positions():
    model = build("llama")
    positions = model.config.max_position_embeddings
    assert positions < max(w.prompt_tokens for w in DEFAULT)
    fitted = fitting(model)
    assert all(w.prompt_tokens + w.new_tokens <= positions for w in fitted)
    assert [w.new_tokens for w in fitted] == [w.new_tokens for w in DEFAULT]
    assert [t.workload for t in bench(model, model, rounds=1)] == list(fitted)
