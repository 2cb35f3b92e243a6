"""Does self-speculation pay? What its parts cost on this machine, what it would have to accept, and what it accepts.

    python benchmarks/self_speculation.py [MODEL] [DTYPE] [CONTEXT] [PROMPTS] [TOKENS]   (default: demo float32 0 4 48)

Drafts: block influence with a tenth, a fifth, a third and half of the blocks skipped. First the cost model, timed
interleaved after a prompt of CONTEXT tokens (at least 64): T a plain token, D a drafted one, V(k) the verification of k
drafted tokens. A round of k drafted tokens pays if it gives more than (k D + V(k)) / T tokens; where each is accepted
with chance a, it gives (1 - a^(k+1)) / (1 - a). Then instructions answered greedily, plainly and speculating in turns,
in the same words. On two idle cores five minutes for the demo model.
"""

from __future__ import annotations

import gzip
import json
import statistics
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from protocol import DATA
from scipy.optimize import brentq
from transformers import DynamicCache

from billhook.data import windows
from billhook.plan.budget import Budget
from billhook.recipes import catalogue
from billhook.recipes.measures import watch
from billhook.recipes.opened import Opened, opened
from billhook.runtime.draft import Draft, shapes
from billhook.runtime.draft_length import Confidence
from billhook.runtime.speculate import speculate
from billhook.scores import named
from billhook.search import one_shot, pose

DRAFTED = (1, 2, 4, 6)
ROUNDS = 7
REGIME = 1.3


def main(source: str, dtype: str, context: int, prompts: int, tokens: int) -> None:
    model = opened(source, dtype=dtype, device="cpu", trust_remote_code=False)
    print(f"{source} in {dtype}, {torch.get_num_threads()} threads, context {context}", flush=True)
    drafts = dict(_drafts(model))
    if not tokens:
        return
    cost = _costs(model, drafts, max(context, 64))
    asked = list(_instructions(model, prompts, context))
    print(f"{len(asked)} prompts, {tokens} tokens each at most, greedy")
    print(f"{'skipped blocks':<16} {'drafting':<12} {'accepted':>8} {'a round':>8} {'predicted':>9} {'measured':>9}")
    for name, draft in drafts.items():
        for label, rule in (("4", Confidence(longest=4, threshold=0.0, step=0.0)), ("confident", Confidence())):
            _measure(model, draft, name, label, rule, asked, tokens, cost)


def _drafts(model: Opened) -> Iterator[tuple[str, Draft]]:
    recipe = catalogue.load("block-influence")
    text = windows(DATA / "wiki_calib.txt.gz", model.tokenizer, tokens=1024, length=512)
    scores = named("block-influence")(watch(model, text, None), model.anatomy, **recipe.score_parameters)
    count = len(model.anatomy.stack("decoder").blocks)
    for share in (0.1, 0.2, 1 / 3, 0.5):
        kept = count - round(share * count)
        problem = pose(model.anatomy.outline, Budget.parse(f"blocks={kept}"), recipe.unit)
        drops = one_shot(problem, scores, per="unit", work=0).drops
        yield f"{count - kept} of {count}", Draft(model.model, model.anatomy, drops)


def _costs(model: Opened, drafts: dict[str, Draft], context: int) -> dict[Any, float]:
    """Median seconds of a plain token ("plain"), of V(k) (k) and of a drafted token (the draft's name)."""
    live, seen = model.model, DynamicCache(config=model.model.config)
    ids = torch.randint(100, 10_000, (1, context), generator=torch.Generator().manual_seed(0))
    times: dict[Any, list[float]] = {}

    def timed(key: Any, count: int, cache: Any) -> None:
        began = time.perf_counter()
        live(ids[:, :count], cache=cache)
        times.setdefault(key, []).append(time.perf_counter() - began)

    with torch.inference_mode():
        with shapes(next(iter(drafts.values())).stack) as shaped:
            live(ids, cache=seen, logits_to_keep=1)
        for _ in range(ROUNDS):
            for key, count in (("plain", 1), *((k, k + 1) for k in DRAFTED)):
                timed(key, count, seen)
                seen.crop(-count)
            for name, draft in drafts.items():
                with draft.skipping(shaped):
                    timed(name, 1, draft.fork(seen))
    cost = {key: statistics.median(seconds) for key, seconds in times.items()}
    plain = cost["plain"]
    print(f"a plain token {1e3 * plain:.1f} ms; V(k)/T " + ", ".join(f"{k}: {cost[k] / plain:.2f}" for k in DRAFTED))
    print(f"{'skipped blocks':<16} {'D/T':>6}   at k: chance of acceptance to break even, for {REGIME}, and speed at 1")
    for name in drafts:
        cells = []
        for k in DRAFTED:
            needed = (k * cost[name] + cost[k]) / plain
            cells.append(f"{k}: {_chance(needed, k)} {_chance(REGIME * needed, k)} {(k + 1) / needed:.2f}")
        print(f"{name:<16} {cost[name] / plain:>6.2f}   " + "   ".join(cells), flush=True)
    return cost


def _chance(tokens: float, k: int) -> str:
    """The chance of acceptance at which a round of k drafted tokens gives so many; "-" if none is enough."""
    if tokens > k + 1:
        return "-"
    return f"{brentq(lambda a: sum(a**i for i in range(k + 1)) - tokens, 0, 1) if tokens > 1 else 0:.2f}"


def _instructions(model: Opened, prompts: int, context: int) -> Iterator[torch.Tensor]:
    with gzip.open(DATA / "instructions_2000.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line, _ in zip(lines, range(prompts), strict=False)]
    filler = windows(
        DATA / "wikitext2_raw_test.txt.gz", model.tokenizer, tokens=max(context, 64), length=max(context, 64)
    )
    for row in rows:
        chat = [{"role": "user", "content": f"{row['instruction']}\n{row['input']}".strip()}]
        text = model.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        ids = model.tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
        yield torch.cat([filler.ids[:1, : max(context - ids.shape[1], 0)], ids], dim=-1)


def _measure(
    model: Opened,
    draft: Draft,
    name: str,
    label: str,
    rule: Confidence,
    asked: list[torch.Tensor],
    tokens: int,
    cost: Any,
) -> None:
    live, seconds, reports = model.model, {"plain": 0.0, "ours": 0.0}, []
    texts: dict[str, list[torch.Tensor]] = {"plain": [], "ours": []}
    wanted = {"max_new_tokens": tokens, "do_sample": False}
    first = {"max_new_tokens": 1, "do_sample": False}
    for ids in asked:
        for way in ("plain", "ours"):
            began = time.perf_counter()
            live.generate(input_ids=ids, **first)
            prefill = time.perf_counter() - began
            began = time.perf_counter()
            if way == "plain":
                texts[way].append(live.generate(input_ids=ids, **wanted))
            else:
                with speculate(live, model.anatomy, draft.drops, confidence=rule, give_up=False) as speculating:
                    texts[way].append(live.generate(input_ids=ids, **wanted))
                reports += speculating.reports
            seconds[way] += time.perf_counter() - began - prefill
    rounds, drafted = sum(r.rounds for r in reports), sum(r.drafted for r in reports)
    given, accepted = sum(r.tokens for r in reports) / rounds, sum(r.accepted for r in reports) / drafted
    near = min(DRAFTED, key=lambda k: abs(k - drafted / rounds))
    predicted = given * cost["plain"] / (drafted / rounds * cost[name] + cost[near])
    measured = seconds["plain"] / seconds["ours"]
    same = all(torch.equal(a, b) for a, b in zip(texts["plain"], texts["ours"], strict=True))
    print(
        f"{name:<16} {label:<12} {accepted:>8.2f} {given:>8.2f} {predicted:>9.2f} {measured:>9.2f}"
        + ("" if same else "  the texts differ"),
        flush=True,
    )


if __name__ == "__main__":
    given = [*sys.argv[1:], *("demo", "float32", "0", "4", "48")[len(sys.argv) - 1 :]]
    main(given[0], given[1], *map(int, given[2:]))
