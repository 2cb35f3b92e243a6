"""What training gives back after closed form: WikiText-2 and C4 perplexity of SmolLM2-135M at 80% of the parameters,
and the exact answers of each probe: dense, cut, refitted and trained.

    python benchmarks/train_figures.py [METHOD,...] [TOKENS] [TEXT] [RECIPE] [KEY=VALUE ...]
    (default: distill 20000 self block-influence)

RECIPE makes the cut, from which each METHOD begins. TEXT is a file of the test data (wiki_calib.txt.gz), self: text
that the dense model writes, or self:FILE: what it writes from beginnings in that file. KEY=VALUE replaces a number of
the method (rate=2e-3 rank=64 rows=2 features=none); refit=N is how many tokens closed form reads (24576), laps=N how
often the training reads the text (once). Plan, written text and closed form are kept in out/train_figures, so that a
second run begins at once; an interrupted training goes on.
"""

from __future__ import annotations

import sys
import time
from dataclasses import fields, replace
from pathlib import Path

from heal_figures import by_recipe
from protocol import DATA, LENGTH, Bed, bed
from safetensors.torch import load_file, save_file

from billhook.data import Windows
from billhook.data import calibration as windows_of_source
from billhook.data import windows as windows_of
from billhook.evaluate.probes import Answers, Probes, answers, posed
from billhook.heal import UNTOUCHED, Healing, closed_form, healed
from billhook.heal.training.methods import METHODS, Training
from billhook.heal.training.train import train
from billhook.plan.plan import Plan
from billhook.surgery import apply

KEPT = Path("out") / "train_figures"
WINDOW = 512
CALIBRATION = "wiki_calib.txt.gz"


def main(
    methods: str = "distill",
    tokens: str = "20000",
    text: str = "self",
    recipe: str = "block-influence",
    *changes: str,
) -> int:
    numbers = dict(change.split("=", 1) for change in changes)
    refit, laps = numbers.pop("refit", "24576"), int(numbers.pop("laps", "1"))
    trainings = {method: changed(METHODS[method], numbers) for method in methods.split(",")}
    b = bed()
    plan = chosen(b, recipe)
    c4 = windows_of(DATA / "c4_docs.jsonl.gz", b.model.tokenizer, tokens=4 * LENGTH, length=LENGTH)
    begun = time.perf_counter()
    start = refitted(b, plan, recipe, int(refit))
    print(f"closed form on {refit} tokens in {time.perf_counter() - begun:.0f} s", flush=True)
    asked = posed(b.live, b.model.tokenizer)
    print(right("dense", answers(b.live, asked)), flush=True)
    show(b, "cut", plan, UNTOUCHED, c4, asked)
    before = show(b, "closed form", plan, start, c4, asked)
    windows = read(b, text, int(tokens))
    worse = False
    for method, training in trainings.items():
        print(f"{method} {training}", flush=True)
        name = "-".join([method, tokens, text, recipe, *changes]).translate({ord("/"): "-", ord(":"): "-"})
        healing, label = trained(b, plan, start, windows, training, laps * int(tokens), KEPT / f"{name}.safetensors")
        after = show(b, f"{method}, {label}", plan, healing, c4, asked)
        worse |= after[0] > before[0] or after[1] > before[1]
    return 1 if worse else 0


def trained(
    b: Bed, plan: Plan, start: Healing, windows: Windows, training: Training, tokens: int, state: Path
) -> tuple[Healing, str]:
    """What training makes of the refitted model, and what it cost."""
    begun = time.perf_counter()

    def progress(label: str, done: int, total: int) -> None:
        if done % 10 == 0:
            print(f"  {label} {done}/{total} {time.perf_counter() - begun:.0f} s", flush=True)

    healing, record = train(
        b.live, b.anatomy, plan, start, windows, training, tokens=tokens, state=state, progress=progress
    )
    seconds = time.perf_counter() - begun
    print("held back: " + " ".join(f"{look.step}:{look.held:.4f}" for look in record.curve), f"best {record.best}")
    print(f"{record.parameters} parameters trained")
    state.unlink(missing_ok=True)
    return healing, f"{record.tokens} tokens, {seconds:.0f} s"


def changed(training: Training, numbers: dict[str, str]) -> Training:
    kinds = {field.name: type(getattr(training, field.name)) for field in fields(training)}
    return replace(training, **{key: kinds[key](value) for key, value in numbers.items()})


def chosen(b: Bed, recipe: str) -> Plan:
    path = KEPT / f"plan-{recipe}.json"
    if not path.exists():
        KEPT.mkdir(parents=True, exist_ok=True)
        by_recipe(b, recipe, CALIBRATION).write(path)
    return Plan.read(path)


def refitted(b: Bed, plan: Plan, recipe: str, tokens: int) -> Healing:
    path = KEPT / f"closed-form-{recipe}-{tokens}.safetensors"
    if not path.exists():
        found = closed_form(b.live, b.anatomy, plan, b.calibrated(tokens, LENGTH))
        save_file({name: tensor.contiguous() for name, tensor in found.tensors.items()}, path)
    return Healing(load_file(path), (), {}, 0, 0)


def read(b: Bed, text: str, tokens: int) -> Windows:
    """Enough for the training, and to hold back."""
    wanted = tokens * 8 // 7 + 2 * WINDOW
    source, _, prompts = text.partition(":")
    if source != "self":
        return windows_of(DATA / text, b.model.tokenizer, tokens=wanted, length=WINDOW, skip=4 * LENGTH // WINDOW)
    path = KEPT / f"{text.replace(':', '-')}-{wanted}.safetensors"
    source += f":{DATA / prompts}" if prompts else ""
    if not path.exists():
        begun = time.perf_counter()
        written = windows_of_source(source, b.model.tokenizer, tokens=wanted, length=WINDOW, model=b.live)
        print(f"{written.tokens} tokens written in {time.perf_counter() - begun:.0f} s", flush=True)
        save_file({"ids": written.ids}, path)
    return Windows.of(load_file(path)["ids"], text)


def show(b: Bed, name: str, plan: Plan, healing: Healing, c4: Windows, asked: Probes) -> tuple[float, float]:
    with healed(b.live, healing):
        found = b.perplexity(plan), b.perplexity(plan, c4)
        given = answers(apply(b.live, b.anatomy, plan), asked)
    print(f"{name:<28} WikiText-2 {found[0]:.2f}  C4 {found[1]:.2f}")
    print(right(name, given), flush=True)
    return found


def right(name: str, given: Answers) -> str:
    return f"{name:<28} " + ", ".join(f"{probe} {sum(of_probe)}/{len(of_probe)}" for probe, of_probe in given.items())


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
