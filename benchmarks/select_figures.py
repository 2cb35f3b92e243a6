"""What does it bring to choose the text of a training? WikiText-2, C4 and task perplexity of SmolLM2-135M without six
blocks, refitted and then trained on as much text from one mixed pool, chosen by each word of --select or at random.

    python benchmarks/select_figures.py [WORDS] [TOKENS] [METHOD] [KEY=VALUE ...]
    (default: closed-form,random:0,dsir:tasks,random:1,loss,gradient:tasks,paser,dsir:web,distinct,random:2,cut,dense
     12288 lora rows=1 checks=1)

The pool is half Wikipedia, a quarter web text and a quarter tasks (instructions with answers), four times what a
training reads and what it holds back, in windows of 512; a fifth of the windows stand in it twice, every other time
with one token in a hundred replaced. random:SEED reads from all of it; the words from what is left without
duplicates, as billhook heal does. A word may have a seed behind it as well (loss:1, dsir:tasks:1). Plan, closed form
and finished rows are kept in out, so that a second run goes on. All rows take about half an hour of one idle core,
closed form included. With WORDS none nothing is trained: what dsir and duplicates find, in a minute.
"""

from __future__ import annotations

import gzip
import json
import random
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean
from typing import get_args

import torch
from protocol import DATA, LENGTH, Bed, bed
from train_figures import changed, chosen, refitted

from billhook.data import Text, Windows, check_overlap
from billhook.data.duplicates import without_duplicates
from billhook.data.resampling import log_ratios, resampled
from billhook.data.source import read
from billhook.data.windows import spread
from billhook.heal import UNTOUCHED, Healing, healed
from billhook.heal.selecting.select import Selection, select
from billhook.heal.training.drawing import lap, lap_length
from billhook.heal.training.loop import split
from billhook.heal.training.methods import METHODS, Training
from billhook.heal.training.train import train
from billhook.plan.plan import Plan
from billhook.plan.record import Select

KEPT = Path("out") / "select_figures"
RECIPE, REFIT = "block-influence", 24576
WINDOW, TIMES = 512, 4
SHARES = {"wiki": 2, "web": 1, "tasks": 1}
COPIED, REPLACED = 5, 100  # every fifth window, every hundredth token
TARGET = 16  # windows
WORDS = "closed-form,random:0,dsir:tasks,random:1,loss,gradient:tasks,paser,dsir:web,distinct,random:2,cut,dense"
TITLES = {"wiki": "WikiText-2", "web": "C4", "tasks": "tasks"}


@dataclass(frozen=True)
class Pool:
    """Windows ``ids``, the kind of each, and a number and what sort of copy there is that two copies share."""

    ids: torch.Tensor
    kinds: list[str]
    twins: list[tuple[int, str]]

    def only(self, numbers: list[int]) -> Pool:
        return Pool(self.ids[numbers], [self.kinds[i] for i in numbers], [self.twins[i] for i in numbers])

    @property
    def windows(self) -> Windows:
        return Windows.of(self.ids, "pool")


@dataclass(frozen=True)
class Row:
    """Perplexities after a training, how many windows of each kind it read, how many of them not for the first time,
    and the seconds that choosing and training took."""

    word: str
    perplexity: dict[str, float]
    read: dict[str, int]
    again: int
    choosing: float
    training: float


@dataclass(frozen=True)
class Bench:
    """All that the rows share."""

    bed: Bed
    tests: dict[str, Windows]
    pool: Pool
    unique: Pool
    targets: dict[str, Windows]
    training: Training
    tokens: int


def main(words: str = WORDS, tokens: str = "12288", method: str = "lora", *changes: str) -> int:
    changes = changes or ("rows=1", "checks=1")
    b = bed()
    pool = mixed(b, int(tokens))
    bench = Bench(
        bed=b,
        tests={"wiki": b.test, "web": b.c4, "tasks": some(b, tasks(0), 4, LENGTH)},
        pool=pool,
        unique=deduplicated(b, pool),
        targets={"tasks": some(b, tasks(1), TARGET), "web": some(b, web(1), TARGET)},
        training=changed(METHODS[method], dict(change.split("=", 1) for change in changes)),
        tokens=int(tokens),
    )
    for test in bench.tests.values():
        for text in (pool.windows, *bench.targets.values()):
            check_overlap(test, text)
    finds(bench)
    if words == "none":
        return 0
    place = KEPT / "-".join([tokens, method, *changes])
    place.mkdir(parents=True, exist_ok=True)
    plan = chosen(b, RECIPE)
    start = refitted(b, plan, RECIPE, REFIT)
    rows: list[Row] = []
    for word in words.split(","):
        path = place / f"{word.replace(':', '-')}.json"
        if not path.exists():
            path.write_text(json.dumps(asdict(row(bench, plan, start, word, path.with_suffix(".safetensors")))))
        rows.append(Row(**json.loads(path.read_text())))
        print(f"  {rows[-1]}", flush=True)
    table(rows)
    return 0


def row(bench: Bench, plan: Plan, start: Healing, word: str, state: Path) -> Row:
    if word in ("dense", "cut", "closed-form"):
        healing = start if word == "closed-form" else UNTOUCHED
        return Row(word, judged(bench, Plan.of([]) if word == "dense" else plan, healing), {}, 0, 0, 0)
    name, *more = word.split(":")
    seed = int(more.pop()) if more and more[-1].isdigit() else 0
    known: Select | None = next((known for known in get_args(Select) if known == name), None)
    if known is None and name != "random":
        raise SystemExit(f"{word} is unknown; give {WORDS}")
    b, source, weights = bench.bed, bench.pool if known is None else bench.unique, None
    begun = time.perf_counter()
    if known is not None:
        repeated = len(bench.pool.ids) - len(source.ids)
        aim = bench.targets[more[0]] if more else None
        selection = Selection(known, source.windows, bench.tokens // WINDOW, len(bench.pool.ids), repeated, aim)
        weights, chosen_by = select(b.live, b.anatomy, plan, start, selection, bench.training.goal, seed)
        print(f"  {chosen_by}", flush=True)
    choosing, begun = time.perf_counter() - begun, time.perf_counter()
    healing, record = train(
        b.live,
        b.anatomy,
        plan,
        start,
        source.windows,
        replace(bench.training, seed=seed),
        tokens=bench.tokens,
        state=state,
        weights=weights,
    )
    seconds = time.perf_counter() - begun
    print(f"  {word} held back: " + " ".join(f"{look.step}:{look.held:.4f}" for look in record.curve), flush=True)
    numbers = taken(len(split(source.ids)[0]), weights, seed, bench.tokens // WINDOW)
    kinds = dict(Counter(source.kinds[i] for i in numbers))
    fresh = deduplicated(b, source.only(numbers))
    found = Row(word, judged(bench, plan, healing), kinds, len(numbers) - len(fresh.ids), choosing, seconds)
    state.unlink(missing_ok=True)
    return found


def judged(bench: Bench, plan: Plan, healing: Healing) -> dict[str, float]:
    with healed(bench.bed.live, healing):
        return {kind: bench.bed.perplexity(plan, test) for kind, test in bench.tests.items()}


def taken(count: int, weights: torch.Tensor | None, seed: int, many: int) -> list[int]:
    """The windows that a training reads."""
    numbers: list[int] = []
    for number in range(-(-many // lap_length(count, weights))):
        numbers += lap(count, weights, seed, number)
    return numbers[:many]


def finds(bench: Bench) -> None:
    """What can be said without any training."""
    pool, unique = bench.pool, bench.unique
    planted, left = Counter(pool.twins), Counter(unique.twins)
    for sort in ("exact", "near"):
        pairs = [twin for twin, times in planted.items() if times == 2 and twin[1] == sort]
        print(f"{sort} duplicates planted {len(pairs)}, found {sum(left[twin] == 1 for twin in pairs)}")
    print(f"windows {len(pool.ids)}, left out {len(pool.ids) - len(unique.ids)}, lost {len(planted) - len(left)}")
    ids = split(unique.ids)[0]
    kinds = Counter(unique.kinds[: len(ids)])
    print("to learn from: " + ", ".join(f"{kind} {kinds[kind]}" for kind in SHARES))
    for kind, target in bench.targets.items():
        for size in (1, 4, TARGET):
            best = resampled(log_ratios(ids, target.ids[:size]), bench.tokens // WINDOW, 0).tolist()
            got = Counter(unique.kinds[i] for i in best)
            print(f"dsir, {size} windows of {kind}: " + ", ".join(f"{kind} {got[kind]}" for kind in SHARES), flush=True)


def table(rows: list[Row]) -> None:
    """Each perplexity, and how much it is above the mean of what was read at random, in percent."""
    at_random = [row for row in rows if row.word.startswith("random")]
    print(f"{'':<18}" + "".join(f"{title:>20}" for title in TITLES.values()) + "   read   again  choosing  training")
    for row in rows:
        cells = ""
        for kind in TITLES:
            base = mean(other.perplexity[kind] for other in at_random) if at_random else row.perplexity[kind]
            cells += f"{row.perplexity[kind]:>11.2f} {100 * (row.perplexity[kind] / base - 1):>+7.2f}%"
        shares = "/".join(str(row.read.get(kind, 0)) for kind in SHARES)
        print(f"{row.word:<18}{cells}  {shares:>8} {row.again:>4} {row.choosing:>8.0f} s {row.training:>7.0f} s")


def mixed(b: Bed, tokens: int) -> Pool:
    """The windows in random order; those that are held back, at the end, have no copies."""
    chance = random.Random("select figures")
    whole = TIMES * tokens // WINDOW * 8 // 7 + 1
    sources = {"wiki": later("wiki_calib.txt.gz"), "web": web(*range(2, 10)), "tasks": tasks(*range(2, 10))}
    parts = {kind: some(b, text, whole * SHARES[kind] // sum(SHARES.values())) for kind, text in sources.items()}
    ids = torch.cat([windows.ids for windows in parts.values()])
    kinds = [kind for kind, windows in parts.items() for _ in windows.ids]
    order = list(range(len(ids)))
    chance.shuffle(order)
    sorts = {number: ("exact", "near")[i % 2] for i, number in enumerate(order[: len(ids) // COPIED])}
    back = order[-len(ids) // 5 :]
    rows = [(number, ids[number]) for number in order[: -len(back)]]
    rows += [(number, near(ids, number, chance) if sort == "near" else ids[number]) for number, sort in sorts.items()]
    chance.shuffle(rows)
    rows += [(number, ids[number]) for number in back]
    twins = [(number, sorts.get(number, "")) for number, _ in rows]
    return Pool(torch.stack([row for _, row in rows]), [kinds[number] for number, _ in rows], twins)


def near(ids: torch.Tensor, number: int, chance: random.Random) -> torch.Tensor:
    """A window with some of its tokens replaced by others of the pool."""
    row = ids[number].clone()
    for place in chance.sample(range(len(row)), len(row) // REPLACED):
        row[place] = ids[chance.randrange(len(ids)), chance.randrange(len(row))]
    return row


def deduplicated(b: Bed, pool: Pool) -> Pool:
    """What is left of the pool if each of its windows is taken for a part of a text."""
    parts = tuple(b.model.tokenizer.decode(row) for row in pool.ids)
    kept = iter(without_duplicates(Text("pool", parts))[0].parts)
    wanted, numbers = next(kept, None), []
    for number, part in enumerate(parts):
        if part == wanted:
            numbers.append(number)
            wanted = next(kept, None)
    return pool.only(numbers)


def some(b: Bed, text: Text, count: int, length: int = WINDOW) -> Windows:
    """So many windows, evenly from a text."""
    return spread(text, b.model.tokenizer, tokens=count * length, length=length)


def later(name: str) -> Text:
    """A text without its first tenth, which a test or the closed form reads."""
    text = read(DATA / name)
    return Text(name, text.parts[len(text.parts) // 10 :])


def web(*which: int) -> Text:
    """These of ten shares of the web documents."""
    text = later("c4_docs.jsonl.gz")
    return Text("web", tuple(part for number, part in enumerate(text.parts) if number % 10 in which))


def tasks(*which: int) -> Text:
    """These of ten shares of the instructions with their answers, each once."""
    with gzip.open(DATA / "instructions_2000.jsonl.gz", "rt", encoding="utf-8") as lines:
        asked = [json.loads(line) for line in lines]
    parts = ["\n".join(text for text in (one["instruction"], one["input"], one["output"]) if text) for one in asked]
    text, _ = without_duplicates(Text("tasks", tuple(f"{part}\n\n" for part in parts)))
    return Text("tasks", tuple(part for number, part in enumerate(text.parts) if number % 10 in which))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
