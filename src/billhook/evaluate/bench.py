"""Speed and memory of the compressed model against the dense one, in one process."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from itertools import count

import torch
import transformers
from transformers import PreTrainedModel

from billhook.evaluate.causal import positions, require_causal
from billhook.evaluate.ideal import kept_share, without_blocks
from billhook.evaluate.intervals import quartiles
from billhook.evaluate.memory import memory_of
from billhook.evaluate.semi_structured import semi_structured
from billhook.evaluate.workload import fitting, prompt_ids, ready
from billhook.measure.latency import interleaved
from billhook.measure.patch import observing
from billhook.plan.errors import InputError
from billhook.plan.plan import Plan
from billhook.plan.record import Timing, Workload

Progress = Callable[[str, int, int], None]

ROUNDS = 5


def bench(
    dense: PreTrainedModel,
    compressed: PreTrainedModel,
    *,
    workloads: Sequence[Workload] | None = None,
    rounds: int = ROUNDS,
    plan: Plan | None = None,
    progress: Progress | None = None,
) -> tuple[Timing, ...]:
    """Time two causal language models on each workload, interleaved: dense, compressed, compressed, dense, ...

    Without ``workloads`` those are ``workload.fitting``. A prefill reads batch × prompt_tokens at once; a decode is
    new_tokens single-token steps on a real cache of prompt_tokens, its length forced. Speed-up is the median over
    rounds of dense / compressed seconds with quartiles; tokens per second come from the median times and count prompt
    tokens in a prefill, new tokens in a decode.

    Where ``plan`` is what was done to the compressed model and drops whole blocks only, ``ideal_speedup`` is the median
    of t / (t_outside + (t - t_outside) × share of blocks kept), with t the dense time and t_outside that of the dense
    model without its blocks in the same round; it takes the blocks to cost the same.

    Weights of the compressed model that are 2:4 sparse go through torch's semi-structured kernels where a GPU has them
    (see ``semi_structured``); ``engine`` then says in how many linears.

    Cache bytes are those of the real cache at the end of the workload. Peak bytes are known on CUDA alone (None
    elsewhere): the highest allocation during one run above what was there before, over all devices of the model, plus
    the model's own weights. Cost: (rounds + 2) runs of every workload by both models, and of the dense one without its
    blocks. Raises InputError for other models, rounds below 1, or a workload longer than the model's positions.
    """
    for model in (dense, compressed):
        require_causal(model, "bench")
    workloads = fitting(dense) if workloads is None else workloads
    for model in (dense, compressed):
        for workload in workloads:
            _check(workload, model)
    if rounds < 1:
        raise InputError(f"bench needs at least 1 round, not {rounds}")
    share = None if plan is None else kept_share(dense, plan)
    total = len(workloads) * (rounds + 1)
    done = count(1)
    with observing(dense), observing(compressed), semi_structured(compressed) as sparse:
        where = engine(dense) + (f", 2:4 kernels in {sparse} linears of the compressed model" if sparse else "")
        return tuple(
            _time(dense, compressed, workload, rounds, share, where, _tick(progress, workload, done, total))
            for workload in workloads
        )


def _time(
    dense: PreTrainedModel,
    compressed: PreTrainedModel,
    workload: Workload,
    rounds: int,
    share: float | None,
    where: str,
    tick: Callable[[], None],
) -> Timing:
    ids = prompt_ids(workload, dense)
    dense_peak, dense_cache = memory_of(dense, workload, ids)
    compressed_peak, compressed_cache = memory_of(compressed, workload, ids)

    runs = {"dense": ready(dense, workload, ids), "compressed": ready(compressed, workload, ids)}
    if share is not None:
        runs["outside"] = without_blocks(dense, runs["dense"])
    times = interleaved(runs, rounds, tick=tick)

    seconds = {name: statistics.median(values) for name, values in times.items()}
    ideal = None
    if share is not None:
        both = zip(times["dense"], times["outside"], strict=True)
        ideal = statistics.median(whole / (outside + (whole - outside) * share) for whole, outside in both)
    tokens = workload.batch * (workload.new_tokens or workload.prompt_tokens)
    return Timing(
        workload=workload,
        engine=where,
        rounds=rounds,
        dense_tokens_per_second=tokens / seconds["dense"],
        compressed_tokens_per_second=tokens / seconds["compressed"],
        speedup=quartiles([d / c for d, c in zip(times["dense"], times["compressed"], strict=True)]),
        ideal_speedup=ideal,
        dense_peak_bytes=dense_peak,
        compressed_peak_bytes=compressed_peak,
        dense_cache_bytes=dense_cache,
        compressed_cache_bytes=compressed_cache,
    )


def engine(model: PreTrainedModel) -> str:
    """What the model runs on, in words: a gain measured in one engine says little about another."""
    device: torch.device = model.device
    threads = torch.get_num_threads()
    where = f"CPU with {threads} thread{'s' if threads > 1 else ''}" if device.type == "cpu" else device.type.upper()
    if device.type == "cuda":
        where = torch.cuda.get_device_name(device)
    dtype = str(model.dtype).removeprefix("torch.")
    return f"transformers {transformers.__version__}, torch {torch.__version__}, {where}, {dtype}"


def _tick(progress: Progress | None, workload: Workload, done: Iterator[int], total: int) -> Callable[[], None]:
    def tick() -> None:
        if progress is not None:
            progress(f"bench: {workload.name}", next(done), total)

    return tick


def _check(workload: Workload, model: PreTrainedModel) -> None:
    needed = workload.prompt_tokens + workload.new_tokens
    limit = positions(model)
    if workload.batch < 1 or workload.prompt_tokens < 1 or workload.new_tokens < 0:
        raise InputError(f"workload {workload.name} needs at least one sequence of one prompt token")
    if limit is not None and needed > limit:
        raise InputError(
            f"workload {workload.name} takes {needed} tokens, but {type(model).__name__} has {limit} positions; "
            "a shorter workload would fit"
        )
