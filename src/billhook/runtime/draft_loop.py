"""The decoding loop of self-speculation: draft, verify in one forward pass, keep what the full model would say."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig

from billhook.plan.errors import InputError
from billhook.runtime.clock import now
from billhook.runtime.draft import Draft, shapes
from billhook.runtime.draft_length import Confidence
from billhook.runtime.draft_report import Report
from billhook.runtime.draft_request import Request, Written, joined
from billhook.runtime.draft_search import SkipSearch
from billhook.runtime.draft_verify import greedy, sampled


def decode(
    request: Request, draft: Draft, confidence: Confidence, search: SkipSearch | None, give_up: bool, report: Report
) -> Any:
    """Continue one prompt; returns what ``generate`` returns. ``report`` is filled on the way, ``search`` goes on."""
    config, cache = request.config, request.cache
    with shapes(draft.stack) as shaped:
        logits = request.prefill()
    if not cache.is_croppable:
        raise InputError(f"a {type(cache).__name__} cannot take tokens back, as self-speculation has to")
    if search is not None and (type(cache) is not DynamicCache or any(cache.is_sliding)):
        raise InputError("the search for skips goes back in the cache: it needs a dynamic one without sliding windows")
    cache.activate_past_recording()  # sliding windows keep what a rejection may bring back

    written = Written(request)
    scores = request.scores(request.ids, logits)
    written.add(_chosen(config, [], [], scores), logits, scores)
    while not written.done:
        if search is not None and not search.done and written.count > search.window:
            began = now()
            draft = _searched(request, written.ids, draft, search, shaped)
            report.search_seconds += now() - began

        ids, began = written.ids, now()
        plain = report.stopped is not None or report.wants_plain
        room = 0 if plain else min(config.max_length - ids.shape[1] - 1, confidence.longest)
        drafted, drafts = _drafted(request, ids, draft, confidence, room, shaped) if room > 0 else ([], [])
        between = now()
        reach = joined(ids, drafted)
        logits = request.forward(reach, cache, len(drafted) + 1)
        scores = request.scores(reach, logits)
        tokens = _chosen(config, drafted, drafts, scores)
        ended = now()
        written.add(tokens, logits, scores)
        cache.crop(written.ids.shape[1] - reach.shape[1] - 1)  # all but the last written token is in the cache

        if drafted:
            kept = written.ids.shape[1] - ids.shape[1]  # less than accepted where the text ends among them
            report.round(len(drafted), kept - 1, between - began, ended - between)
            confidence.update(len(drafted), len(tokens) - 1)
        else:
            report.plain(ended - began)
            if report.slower() and give_up and report.stopped is None:
                report.stopped = written.count
    report.skips = tuple(sorted(draft.drops))
    return written.result()


def _searched(request: Request, ids: Tensor, draft: Draft, search: SkipSearch, shaped: dict[nn.Module, int]) -> Draft:
    """One candidate judged on the last tokens; the better draft of the two."""
    candidate = Draft(request.model, draft.anatomy, search.propose())
    score = _matchness(request, ids, candidate, search.window, shaped)
    best = search.matchness
    if score > best > 0:  # windows differ: the best so far has to be beaten on this one
        best = _matchness(request, ids, draft, search.window, shaped)
    search.observe(score, best)
    return candidate if score > best else draft


def _matchness(request: Request, ids: Tensor, draft: Draft, window: int, shaped: dict[nn.Module, int]) -> float:
    """Share of the last ``window`` tokens that the draft, given those before each, finds likeliest. One pass, and the
    verified cache stays as it is."""
    with draft.skipping(shaped):
        logits = request.forward(ids[:, :-1], draft.fork(request.cache, back=window), window)
    return float((logits.argmax(-1) == ids[0, -window:]).float().mean())


def _drafted(
    request: Request, ids: Tensor, draft: Draft, confidence: Confidence, room: int, shaped: dict[nn.Module, int]
) -> tuple[list[int], list[Tensor]]:
    """At most ``room`` tokens of the draft, and what each was drawn from."""
    tokens: list[int] = []
    drafts: list[Tensor] = []
    cache = draft.fork(request.cache)
    with draft.skipping(shaped):
        while len(tokens) < room:
            reach = joined(ids, tokens)
            scores = request.scores(reach, request.forward(reach, cache, 1))[0]
            q = scores.softmax(-1)
            tokens.append(int(torch.multinomial(q, 1) if request.config.do_sample else scores.argmax()))
            drafts.append(q)
            if confidence.enough(len(tokens), float(q.max())):
                break
    return tokens, drafts


def _chosen(config: GenerationConfig, drafted: list[int], drafts: list[Tensor], scores: Tensor) -> list[int]:
    return sampled(drafted, drafts, scores.softmax(-1)) if config.do_sample else greedy(drafted, scores)
