"""Peak memory of closed-form healing as a model gets deeper: what it needs beside the model stays the same.

    python benchmarks/heal_memory.py [DEPTHS] [GAP]      (default: 8,16,32 1)

Llama models with random weights (hidden 128, 4 heads, 512 neurons, 512 tokens in the vocabulary, float32), GAP blocks
gone from the third on, healed on 2,048 tokens, each in a process of its own. Printed: the model, one block, the highest
memory of its own that the process had over what it was before the healing (Linux: anonymous pages; new weights lie in
files), and that as a multiple of one block and of one stream [tokens, hidden]. A minute on two idle cores.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from billhook.anatomy import discover
from billhook.data import Windows
from billhook.heal import closed_form
from billhook.plan.address import Address

HIDDEN, NEURONS, VOCABULARY, ROWS, LENGTH = 128, 512, 512, 16, 128
MB = 1e6


@dataclass(frozen=True)
class Peak:
    model: float
    block: float
    healed: float
    beside: float


def resident() -> int:
    """Bytes in memory now that are this process's own and in no file (Linux)."""
    (line,) = (row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def measured(depth: int, gap: int) -> Peak:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=NEURONS,
        num_hidden_layers=depth,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=VOCABULARY,
    )
    model = LlamaForCausalLM(config).eval()
    anatomy = discover(model)
    windows = Windows.of(torch.randint(0, VOCABULARY, (ROWS, LENGTH)), "random")
    with torch.no_grad():
        model(windows.ids[:8])
    before, highest, done = resident(), 0, threading.Event()

    def watch() -> None:
        nonlocal highest
        while not done.is_set():
            highest = max(highest, resident())
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    healing = closed_form(model, anatomy, [Address("decoder", 2 + i) for i in range(gap)], windows)
    done.set()
    watcher.join()
    bytes_of = [sum(p.numel() * 4 for p in module.parameters()) for module in (model, model.model.layers[0])]
    healed = sum(tensor.numel() * 4 for tensor in healing.tensors.values())
    return Peak(bytes_of[0], bytes_of[1], healed, highest - before)


def main(depths: str = "8,16,32", gap: str = "1") -> int:
    stream = ROWS * LENGTH * HIDDEN * 4
    names = ("blocks", "model MB", "block MB", "new MB", "beside MB", "in blocks", "in streams")
    print(" ".join(f"{name:>10}" for name in names))
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # what is freed leaves the process at once
    found = []
    for depth in map(int, depths.split(",")):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            peak = pool.apply(measured, (depth, int(gap)))
        found.append(peak.beside)
        sizes = [size / MB for size in (peak.model, peak.block, peak.healed, peak.beside)]
        figures = [*sizes, peak.beside / peak.block, peak.beside / stream]
        print(f"{depth:>10} " + " ".join(f"{figure:>10.1f}" for figure in figures), flush=True)
    growth = found[-1] / found[0]
    print(f"deepest over shallowest, beside the model: {growth:.2f}")
    return 0 if growth < 1.25 else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:3]))
