"""Does self-speculation pay? What its parts cost here, what a draft has to get right, and what it gets right.

    python benchmarks/self_speculation.py [MODEL] [DTYPE] [CONTEXT] [PROMPTS] [TOKENS]   (default: demo float32 64 3 48)

Drafts: block influence, with a tenth, a fifth, a third and half of the blocks skipped. The cost model, timed in turns
after CONTEXT tokens: T one plain token, D one drafted token, V(k) the verification of k of them. A round of k drafted
tokens costs k D + V(k); where each is right with chance a, it gives (1 - a^(k+1)) / (1 - a) tokens, k + 1 at best.
Agreement is how often a draft's likeliest next token is the full model's, on WikiText-2 and on Python. Then prompts
answered greedily, plainly and speculating in turns, with the first two drafts. ``silent`` is the same model with what
half of its blocks write set to zero, and a draft that skips them: never wrong, so what it gains is the most that
skipping half can gain here.
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
from torch import Tensor
from transformers import DynamicCache

from billhook.data import windows
from billhook.plan.budget import Budget
from billhook.recipes import catalogue
from billhook.recipes.measures import watch
from billhook.recipes.opened import Opened, opened
from billhook.runtime.draft import Draft, shapes
from billhook.runtime.draft_length import Confidence
from billhook.runtime.draft_report import Report
from billhook.runtime.speculate import speculate
from billhook.scores import named
from billhook.search import one_shot, pose

SHARES = (0.1, 0.2, 1 / 3, 0.5)
DRAFTED = (1, 2, 4, 6)
ROUNDS = 7
AIM = 1.3
RULES = {"4 tokens": Confidence(longest=4, threshold=0.0, step=0.0), "confident": Confidence()}


def main(source: str, dtype: str, context: int, prompts: int, tokens: int) -> None:
    model = opened(source, dtype=dtype, device="cpu", trust_remote_code=False)
    print(f"{source}, {dtype}, {torch.get_num_threads()} threads, a context of {context} tokens", flush=True)
    drafts = dict(_drafts(model))
    cost = _costs(model, drafts, max(context, 16))
    for name, ids in _texts(model):
        print(f"agreement on {len(ids[0])} tokens of {name}: ", end="")
        print(", ".join(f"{share} {right:.2f}" for share, right in _agreement(model, drafts, ids)), flush=True)
    if not prompts:
        return
    asked = list(_prompts(model, prompts))
    print(f"{prompts} prompts, up to {tokens} tokens each")
    print(f"{'skipped':<10} {'drafting':<10} {'accepted':>8} {'a round':>8} {'predicted':>9} {'measured':>9}")
    for name, draft in list(drafts.items())[:2]:
        for rule in RULES:
            _measure(model, draft, name, rule, asked, tokens, cost)
    name, draft = list(drafts.items())[-1]
    _silence(model, draft)
    _measure(model, draft, "silent", "4 tokens", asked, tokens, cost | {"silent": cost[name]})


def _drafts(model: Opened) -> Iterator[tuple[str, Draft]]:
    recipe = catalogue.load("block-influence")
    text = windows(DATA / "wiki_calib.txt.gz", model.tokenizer, tokens=512, length=256)
    scores = named("block-influence")(watch(model, text, None), model.anatomy, **recipe.score_parameters)
    count = len(model.anatomy.stack("decoder").blocks)
    for share in SHARES:
        gone = max(round(share * count), 1)
        problem = pose(model.anatomy.outline, Budget.parse(f"blocks={count - gone}"), recipe.unit)
        drops = one_shot(problem, scores, per="unit", work=0).drops
        yield f"{gone} of {count}", Draft(model.model, model.anatomy, drops)


def _costs(model: Opened, drafts: dict[str, Draft], context: int) -> dict[Any, float]:
    """Median seconds of a plain token ("plain"), of V(k) (k), and of a token of each draft (its name)."""
    live, seen = model.model, DynamicCache(config=model.model.config)
    ids = torch.randint(100, live.config.vocab_size, (1, context), generator=torch.Generator().manual_seed(0))
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
    print(f"T {1e3 * plain:.0f} ms; V(k)/T: " + ", ".join(f"{k} {cost[k] / plain:.2f}" for k in DRAFTED))
    print(f"D/T; with k drafted: agreement to break even, agreement for {AIM}, speed if always right")
    print("last: the least agreement for that if any number of tokens were verified in the time of one")
    for name in drafts:
        cells = []
        for k in DRAFTED:
            needed = (k * cost[name] + cost[k]) / plain
            cells.append(f"{k}: {_chance(needed, k)} {_chance(AIM * needed, k)} {(k + 1) / needed:.2f}")
        free = (_chance(AIM * (k * cost[name] / plain + 1), k) for k in DRAFTED)
        cells.append(min(free, key=lambda cell: (cell == "-", cell)))
        print(f"{name:<10} {cost[name] / plain:.2f}   " + "   ".join(cells), flush=True)
    return cost


def _chance(tokens: float, k: int) -> str:
    """The chance of being right at which a round of k drafted tokens gives so many; "-" if none is enough."""
    if tokens > k + 1:
        return "-"
    return f"{brentq(lambda a: sum(a**i for i in range(k + 1)) - tokens, 0, 1) if tokens > 1 else 0:.2f}"


def _texts(model: Opened) -> Iterator[tuple[str, Tensor]]:
    yield "WikiText-2", windows(DATA / "wikitext2_raw_test.txt.gz", model.tokenizer, tokens=256, length=256).ids
    text = "".join(row["prompt"] + row["canonical_solution"] for row in _rows("humaneval.jsonl.gz", 3))
    yield "Python", model.tokenizer(text, return_tensors="pt").input_ids[:, :256]


def _agreement(model: Opened, drafts: dict[str, Draft], ids: Tensor) -> Iterator[tuple[str, float]]:
    with torch.inference_mode():
        with shapes(next(iter(drafts.values())).stack) as shaped:
            wanted = model.model(ids, use_cache=False).logits.argmax(-1)
        for name, draft in drafts.items():
            with draft.skipping(shaped):
                yield name, float((model.model(ids, use_cache=False).logits.argmax(-1) == wanted).float().mean())


def _prompts(model: Opened, count: int) -> Iterator[Tensor]:
    """Instructions and Python functions to be written, in turns."""
    code = [f"Complete this function.\n{row['prompt']}" for row in _rows("humaneval.jsonl.gz", count)]
    asked = [f"{row['instruction']}\n{row['input']}".strip() for row in _rows("instructions_2000.jsonl.gz", count)]
    for _, texts in zip(range(count), (pair for both in zip(asked, code, strict=True) for pair in both), strict=False):
        chat = [{"role": "user", "content": texts}]
        text = model.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        yield model.tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids


def _rows(file: str, count: int) -> list[dict[str, str]]:
    with gzip.open(DATA / file, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line, _ in zip(lines, range(count), strict=False)]


def _measure(
    model: Opened, draft: Draft, name: str, rule: str, asked: list[Tensor], tokens: int, cost: dict[Any, float]
) -> None:
    seconds, reports = {"plain": 0.0, "ours": 0.0}, list[Report]()
    length = {"max_new_tokens": tokens, "min_new_tokens": tokens}  # a silenced model may end at once
    same = True
    for ids in asked:
        began = time.perf_counter()
        plain = model.model.generate(input_ids=ids, **length, do_sample=False)
        between = time.perf_counter()
        with speculate(model.model, model.anatomy, draft.drops, confidence=RULES[rule], give_up=False) as speculating:
            ours = model.model.generate(input_ids=ids, **length, do_sample=False)
        seconds["plain"] += between - began
        seconds["ours"] += time.perf_counter() - between
        reports += speculating.reports
        same &= torch.equal(plain, ours)
    rounds, drafted = sum(r.rounds for r in reports), sum(r.drafted for r in reports)
    accepted, given = sum(r.accepted for r in reports) / drafted, sum(r.tokens for r in reports) / rounds
    near = min(DRAFTED, key=lambda k: abs(k - drafted / rounds))
    predicted = given * cost["plain"] / (drafted / rounds * cost[name] + cost[near])
    print(f"{name:<10} {rule:<10} {accepted:>8.2f} {given:>8.2f} {predicted:>9.2f} ", end="")
    print(f"{seconds['plain'] / seconds['ours']:>9.2f}" + ("" if same else "  the texts differ"), flush=True)


def _silence(model: Opened, draft: Draft) -> None:
    for address in draft.drops:
        for name in (write for sub in model.anatomy.block(address).sublayers for write in sub.writes):
            model.model.get_parameter(name).data.zero_()


if __name__ == "__main__":
    given = [*sys.argv[1:], *("demo", "float32", "64", "3", "48")[len(sys.argv) - 1 :]]
    main(given[0], given[1], *map(int, given[2:]))
