"""What training gives back after closed form: WikiText-2 and C4 perplexity of SmolLM2-135M at 80% of the parameters.

    python benchmarks/train_figures.py [METHOD] [TOKENS] [TEXT] [RECIPE] [KEY=VALUE ...]
    (default: distill 20000 self block-influence)

RECIPE makes the cut. TEXT is a file of the test data (wiki_calib.txt.gz), or self: text that the dense model writes.
KEY=VALUE replaces a number of the method (rate=2e-3 rank=64 rows=2 features=none). Written text and closed form are
kept in out/train_figures, so that a second run begins at once; an interrupted training goes on.
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
from billhook.heal import Healing, closed_form, healed
from billhook.heal.train import train
from billhook.heal.training import METHODS, Training
from billhook.plan.plan import Plan

KEPT = Path("out") / "train_figures"
WINDOW = 512
CALIBRATION = "wiki_calib.txt.gz"


def main(
    method: str = "distill",
    tokens: str = "20000",
    text: str = "self",
    recipe: str = "block-influence",
    *changes: str,
) -> int:
    b = bed()
    training = changed(METHODS[method], changes)
    plan = by_recipe(b, recipe, CALIBRATION)
    c4 = windows_of(DATA / "c4_docs.jsonl.gz", b.model.tokenizer, tokens=4 * LENGTH, length=LENGTH)
    start = refitted(b, plan, recipe)
    windows = read(b, text, int(tokens))
    print(f"{method} {training}")
    before = figures(b, plan, start, c4)
    print(f"{'closed form':<28} WikiText-2 {before[0]:.2f}  C4 {before[1]:.2f}", flush=True)
    begun = time.perf_counter()
    state = KEPT / f"{'-'.join([method, tokens, text, recipe, *changes]).replace('/', '-')}.safetensors"

    def progress(label: str, done: int, total: int) -> None:
        if done % 10 == 0:
            print(f"  {label} {done}/{total} {time.perf_counter() - begun:.0f} s", flush=True)

    healing, record = train(
        b.live, b.anatomy, plan, start, windows, training, tokens=int(tokens), state=state, progress=progress
    )
    seconds = time.perf_counter() - begun
    after = figures(b, plan, healing, c4)
    print("held back: " + " ".join(f"{look.step}:{look.held:.4f}" for look in record.curve), f"best {record.best}")
    print(
        f"{method} on {record.tokens} tokens of {text}: WikiText-2 {after[0]:.2f}  C4 {after[1]:.2f}  {seconds:.0f} s"
    )
    state.unlink(missing_ok=True)
    return 1 if after[0] > before[0] or after[1] > before[1] else 0


def changed(training: Training, changes: tuple[str, ...]) -> Training:
    kinds = {field.name: type(getattr(training, field.name)) for field in fields(training)}
    pairs = (change.partition("=") for change in changes)
    return replace(training, **{key: kinds[key](value) for key, _, value in pairs})


def refitted(b: Bed, plan: Plan, recipe: str) -> Healing:
    path = KEPT / f"closed-form-{recipe}.safetensors"
    if not path.exists():
        found = closed_form(b.live, b.anatomy, plan, b.calibrated(24576, LENGTH))
        KEPT.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in found.tensors.items()}, path)
    return Healing(load_file(path), (), {}, 0, 0)


def read(b: Bed, text: str, tokens: int) -> Windows:
    """Enough for the training, and to hold back."""
    wanted = tokens * 8 // 7 + 2 * WINDOW
    if text != "self":
        return windows_of(DATA / text, b.model.tokenizer, tokens=wanted, length=WINDOW, skip=4 * LENGTH // WINDOW)
    path = KEPT / f"self-{wanted}.safetensors"
    if not path.exists():
        begun = time.perf_counter()
        written = windows_of_source("self", b.model.tokenizer, tokens=wanted, length=WINDOW, model=b.live)
        print(f"{written.tokens} tokens written in {time.perf_counter() - begun:.0f} s", flush=True)
        save_file({"ids": written.ids}, path)
    return Windows.of(load_file(path)["ids"], "self")


def figures(b: Bed, plan: Plan, healing: Healing, c4: Windows) -> tuple[float, float]:
    with healed(b.live, healing):
        return b.perplexity(plan), b.perplexity(plan, c4)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
