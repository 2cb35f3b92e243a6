"""``generate`` under a policy against plain ``generate``, timed in turns."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from billhook.anatomy import Anatomy
from billhook.data import Windows
from billhook.evaluate.bench import engine
from billhook.evaluate.causal import positions
from billhook.evaluate.generations import GREEDY
from billhook.evaluate.intervals import quartiles
from billhook.measure.latency import Timed, interleaved
from billhook.measure.patch import observing
from billhook.plan.errors import InputError
from billhook.plan.policy_record import Drafting
from billhook.plan.record import Timing, Workload
from billhook.runtime.attached import Attached
from billhook.runtime.draft_report import drafting
from billhook.runtime.policy import Policy
from billhook.runtime.self_speculation import SelfSpeculation
from billhook.runtime.speculate import Speculating

Progress = Callable[[str, int, int], None]

GENERATE = Workload(name="generate, batch 1", batch=1, prompt_tokens=64, new_tokens=64)
ROUNDS = 7


def generation_speed(
    model: PreTrainedModel,
    anatomy: Anatomy,
    policy: Policy,
    text: Windows,
    *,
    workload: Workload = GENERATE,
    rounds: int = ROUNDS,
    progress: Progress | None = None,
) -> tuple[Timing, Drafting | None]:
    """Time whole calls of ``generate``, greedy and of a fixed length, each on the beginning of another window.

    Seconds include reading the prompt and, where skips are searched for, the search, which goes on from one text to the
    next as it does for a user: self-speculation stays on the model, while any other policy is put on and taken off in
    turns, which is not timed. Speed-up is the median over rounds of plain / policy seconds on the same prompt, with
    quartiles; "compressed" in the record is the policy. Drafts, of self-speculation, are counted over the timed rounds,
    and texts are compared over these and the warm-up. Cost: 2 (rounds + 1) generations. InputError as ``attach`` raises
    it.
    """
    workload = _fitting(workload, model, text)
    prompts = [row[None, : workload.prompt_tokens].to(model.device) for row in text.ids[: rounds + 1]]
    texts: dict[str, list[Tensor]] = {"plain": [], "policy": []}

    def run(name: str, generate: Callable[..., Any]) -> Timed:
        def timed() -> None:
            ids = prompts[len(texts[name]) % len(prompts)]
            length = {"max_new_tokens": workload.new_tokens, "min_new_tokens": workload.new_tokens}
            mask = torch.ones_like(ids)
            texts[name].append(generate(input_ids=ids, attention_mask=mask, pad_token_id=0, **length, **GREEDY))

        return timed

    stays = isinstance(policy, SelfSpeculation)
    plainly = model.generate  # of the class, which self-speculation leaves alone
    on = [policy.attach(model, anatomy)] if stays else []

    def plain() -> Timed:
        if not stays:
            _take_off(on)
        return run("plain", plainly)

    def under() -> Timed:
        if not on:
            on.append(policy.attach(model, anatomy))
        return run("policy", model.generate)

    done = iter(range(1, rounds + 2))
    tick = (lambda: progress(f"bench: {workload.name}", next(done), rounds + 1)) if progress is not None else None
    try:
        with observing(model):
            times = interleaved({"plain": plain, "policy": under}, rounds, tick=tick)
        reports = on[0].reports[1:] if on and isinstance(on[0], Speculating) else None
    finally:
        _take_off(on)
    same = [torch.equal(a, b) for a, b in zip(texts["plain"], texts["policy"], strict=True)]
    timing = Timing(
        workload=workload,
        engine=engine(model),
        rounds=rounds,
        dense_tokens_per_second=workload.new_tokens / statistics.median(times["plain"]),
        compressed_tokens_per_second=workload.new_tokens / statistics.median(times["policy"]),
        speedup=quartiles([a / b for a, b in zip(times["plain"], times["policy"], strict=True)]),
    )
    return timing, None if reports is None else drafting(reports, same_text=sum(same) / len(same))


def _take_off(on: list[Attached]) -> None:
    while on:
        on.pop().detach()


def _fitting(workload: Workload, model: PreTrainedModel, text: Windows) -> Workload:
    """Its prompt cut to the positions that the model has, and to a window."""
    limit = positions(model)
    room = workload.prompt_tokens if limit is None else limit - workload.new_tokens
    if room < 1:
        raise InputError(f"the model has {limit} positions: too few to time {workload.new_tokens} new tokens")
    return workload.model_copy(update={"prompt_tokens": min(workload.prompt_tokens, room, text.ids.shape[1])})
