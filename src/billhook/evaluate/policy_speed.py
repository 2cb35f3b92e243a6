"""The model with a policy on it against itself without, timed in turns."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from torch import Tensor
from transformers import PreTrainedModel

from billhook.anatomy import Anatomy
from billhook.data import Windows
from billhook.evaluate.bench import engine
from billhook.evaluate.causal import positions
from billhook.evaluate.intervals import quartiles
from billhook.evaluate.workload import DECODE_1, PREFILL, ready
from billhook.measure.latency import Timed, interleaved
from billhook.measure.patch import observing
from billhook.plan.errors import InputError
from billhook.plan.record import Timing, Workload
from billhook.runtime.attached import Attached
from billhook.runtime.policy import Policy

Progress = Callable[[str, int, int], None]
ROUNDS = 7


def policy_speed(
    model: PreTrainedModel,
    anatomy: Anatomy,
    policy: Policy,
    text: Windows,
    *,
    workloads: Sequence[Workload] = (PREFILL, DECODE_1),
    rounds: int = ROUNDS,
    progress: Progress | None = None,
) -> tuple[Timing, ...]:
    """Time one model with and without the policy on each workload, interleaved, on prompts from the text: what a policy
    decides depends on it. Putting the policy on and off is not timed; everything that it does while it runs is.

    A decode starts on a cache that was filled under the policy. Speed-up is the median over rounds of plain / policy
    seconds, with quartiles; "compressed" in the record is the policy. InputError where the text is too short.
    """
    with observing(model):
        return tuple(
            _time(model, anatomy, policy, _fitting(workload, model), text, rounds, progress) for workload in workloads
        )


def _time(
    model: PreTrainedModel,
    anatomy: Anatomy,
    policy: Policy,
    workload: Workload,
    text: Windows,
    rounds: int,
    progress: Progress | None,
) -> Timing:
    ids = _prompt(workload, text)
    runs = {"plain": ready(model, workload, ids)}
    with policy.attach(model, anatomy):
        runs["policy"] = ready(model, workload, ids)
    on: list[Attached] = []

    def plain() -> Timed:
        while on:
            on.pop().detach()
        return runs["plain"]()

    def under() -> Timed:
        if not on:
            on.append(policy.attach(model, anatomy))
        return runs["policy"]()

    done = iter(range(1, rounds + 2))
    tick = (lambda: progress(f"bench: {workload.name}", next(done), rounds + 1)) if progress is not None else None
    try:
        times = interleaved({"plain": plain, "policy": under}, rounds, tick=tick)
    finally:
        while on:
            on.pop().detach()
    tokens = workload.batch * (workload.new_tokens or workload.prompt_tokens)
    return Timing(
        workload=workload,
        engine=engine(model),
        rounds=rounds,
        dense_tokens_per_second=tokens / statistics.median(times["plain"]),
        compressed_tokens_per_second=tokens / statistics.median(times["policy"]),
        speedup=quartiles([a / b for a, b in zip(times["plain"], times["policy"], strict=True)]),
    )


def _fitting(workload: Workload, model: PreTrainedModel) -> Workload:
    limit = positions(model)
    if limit is None:
        return workload
    if limit <= workload.new_tokens:
        raise InputError(f"the model has {limit} positions: too few to time {workload.new_tokens} new tokens")
    return workload.model_copy(update={"prompt_tokens": min(workload.prompt_tokens, limit - workload.new_tokens)})


def _prompt(workload: Workload, text: Windows) -> Tensor:
    flat, wanted = text.ids.flatten(), workload.batch * workload.prompt_tokens
    if len(flat) < wanted:
        raise InputError(f"text {text.name} has {len(flat)} tokens, workload {workload.name} reads {wanted}")
    return flat[:wanted].reshape(workload.batch, workload.prompt_tokens)
