"""What training holds beside the model: a few blocks at a time (lisa, ist, fpf) against all at once.

    python benchmarks/train_memory.py [MODEL] [METHOD,...]      (default: random all,lisa,ist,fpf,distill)

MODEL is demo, or a Llama model with random weights in bfloat16 (random). Two blocks go, and what is left is trained for
24 steps of one window of 128 random tokens, with looks after 8 and 16; a turn lasts two steps, so that nearly every
block has had one. all is lisa with as many blocks at once as there are. Each method in a process of its own. Printed:
what the tensors that are alive after a step take beside those of the model, at most, in float32 (copies, gradients,
moments) and in the model's dtype (what came of earlier turns, and the best state); that in bytes a parameter of the
blocks; and the highest memory of its own that the process had over what it was before (Linux, see heal_memory.py).
Two minutes of one core; with demo and all,lisa,ist,distill six.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from heal_memory import HIDDEN, MB, NEURONS, VOCABULARY, resident
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from billhook.anatomy import discover
from billhook.data import Windows
from billhook.heal import UNTOUCHED
from billhook.heal.training.methods import METHODS, Training
from billhook.heal.training.train import train
from billhook.plan.plan import Plan
from billhook.recipes.opened import opened

STEPS, LENGTH = 24, 128
PLAN = Plan.of(["decoder.3", "decoder.4"])


@dataclass(frozen=True)
class Held:
    single: int
    stored: int
    a_parameter: float
    peak: int


def main(source: str = "random", methods: str = "all,lisa,ist,fpf,distill") -> int:
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # what is freed leaves the process at once
    print(f"{'':>10} " + " ".join(f"{name:>12}" for name in ("float32 MB", "dtype MB", "a parameter", "peak MB")))
    found: dict[str, Held] = {}
    for method in methods.split(","):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            held = found[method] = pool.apply(measured, (source, method))
        figures = (held.single / MB, held.stored / MB, held.a_parameter, held.peak / MB)
        print(f"{method:>10} " + " ".join(f"{figure:>12.1f}" for figure in figures), flush=True)
    return int("all" in found and "lisa" in found and found["lisa"].single > found["all"].single / 2)


def measured(source: str, method: str) -> Held:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = _model(source)
    anatomy = discover(model)
    blocks = [model.get_submodule(block.path) for block in anatomy.stacks[0].blocks]
    inside = sum(p.numel() for block in blocks for p in block.parameters()) * (len(blocks) - 2) // len(blocks)
    windows = Windows.of(torch.randint(0, model.config.vocab_size, (STEPS + 4, LENGTH)), "random")
    with torch.no_grad():
        model(windows.ids[:1])
    known = set(_alive())
    most = {torch.float32: 0, model.dtype: 0}
    total = 0

    def count(*_: Any) -> None:
        nonlocal total
        new = [found for storage, found in _alive().items() if storage not in known]
        total = max(total, sum(size for _, size in new))
        for dtype in most:
            most[dtype] = max(most[dtype], sum(size for kind, size in new if kind == dtype))

    before, highest, done = resident(), 0, threading.Event()

    def watch() -> None:
        nonlocal highest
        while not done.is_set():
            highest = max(highest, resident())
            time.sleep(0.002)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    with tempfile.TemporaryDirectory() as place:
        train(
            model, anatomy, PLAN, UNTOUCHED, windows, _training(method, len(blocks)), tokens=STEPS * LENGTH,
            state=Path(place) / "state", progress=count,
        )  # fmt: skip
    done.set()
    watcher.join()
    return Held(most[torch.float32], most[model.dtype], total / inside, highest - before)


def _training(method: str, blocks: int) -> Training:
    training = replace(METHODS["lisa" if method == "all" else method], rows=1, period=2, checks=3)
    return replace(training, blocks=blocks) if method == "all" else training


def _model(source: str) -> Any:
    if source == "demo":
        return opened("demo", dtype="bfloat16", device="cpu", trust_remote_code=False).model
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=NEURONS,
        num_hidden_layers=32,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=VOCABULARY,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def _alive() -> dict[int, tuple[torch.dtype, int]]:
    """Dtype and bytes of everything that tensors lie in, gradients included."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor)]
    tensors += [p.grad for p in tensors if isinstance(p, nn.Parameter) and p.grad is not None]
    return {t.untyped_storage().data_ptr(): (t.dtype, t.untyped_storage().nbytes()) for t in tensors}


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:3]))
