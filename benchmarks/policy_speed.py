"""Does leaving work out while the model runs save the time that the work is worth?

For decode at batch 1, three runs in turns: the plain model; the model under a policy; and the model from which the same
work was cut for good, with no policy on it, which shows what the work is worth. Prints the times of a token, the lower
quartile over rounds since a busy machine only ever adds to them, and the time that the policy saves over the time that
the cut saves, which has to be at least 0.85, with the 95% interval of a bootstrap over rounds:

- ffn-skip set to leave out exactly a quarter of the MLPs of every generated token, its cosines computed all the same,
  against a cut of as many MLPs;
- even-skip of a fifth of the blocks, against the same blocks cut;
- neuron-experts of half of the neurons of every MLP, four experts and a router that are drawn, against a cut of as many
  neurons.

Time is wall time, and with one thread (OMP_NUM_THREADS=1) the processor time of this process, which other programs
disturb far less. A few minutes on two idle CPU cores.

    python benchmarks/policy_speed.py [MODEL] [DTYPE] [ROUNDS]      (default: the demo model, bfloat16, 61)

DTYPE float32 is for processors that only emulate bfloat16: there its conversions are most of what a decode costs.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import numpy as np
import torch

from billhook.anatomy import Anatomy, discover
from billhook.anatomy.types import Inner
from billhook.data import windows
from billhook.evaluate.bench import engine
from billhook.evaluate.workload import ready
from billhook.measure.latency import Timed, interleaved
from billhook.measure.patch import observing
from billhook.models import Loaded, load
from billhook.plan.address import Address
from billhook.plan.plan import Keep, Plan
from billhook.plan.record import Workload
from billhook.runtime.even_skip import EvenSkip
from billhook.runtime.fewer_neurons import neurons_of
from billhook.runtime.ffn_skip import FfnSkip
from billhook.runtime.neuron_experts import NeuronExperts
from billhook.runtime.policy import Policy
from billhook.surgery import apply

REQUIRED = 0.85
DRAWS = 2000
DECODE = Workload(name="decode, batch 1", batch=1, prompt_tokens=128, new_tokens=8)


def main(source: str = "demo", dtype: str = "bfloat16", rounds: str = "61") -> int:
    loaded = load(source, dtype=getattr(torch, dtype))
    anatomy = discover(loaded.model)
    count = len(anatomy.stack("decoder").blocks)
    # everything is saturated, so every second MLP of the middle half of the blocks is left out
    middle = 2 * round(count / 4)
    first = (count - middle) // 2
    ffn = FfnSkip(threshold=-1, span=1, first=first, last=count - middle - first, warmup=0)
    mlps = [Address("decoder", first + 1 + 2 * i, "mlp") for i in range(middle // 2)]
    even = EvenSkip(speedup=1.25)
    blocks = [Address("decoder", i) for i in range(count) if i not in even.kept(count)]
    print(engine(loaded.model), flush=True)
    neurons = neurons_of(anatomy)
    halves = [Keep(unit=a, inner="neuron", indices=tuple(range(inner.count // 2))) for a, inner in neurons.items()]
    half, experts = Plan.of((), keeps=halves), drawn_experts(anatomy, neurons)
    worst = min(
        measured(loaded, anatomy, f"{len(mlps)} of {count} MLPs by ffn-skip", ffn, Plan.of(mlps), int(rounds)),
        measured(loaded, anatomy, f"{len(blocks)} of {count} blocks by even-skip", even, Plan.of(blocks), int(rounds)),
        measured(loaded, anatomy, "half of the neurons by neuron-experts", experts, half, int(rounds)),
    )
    print(f"at least {REQUIRED} of what the work is worth everywhere: {'yes' if worst >= REQUIRED else 'no'}")
    return 0 if worst >= REQUIRED else 1


def drawn_experts(anatomy: Anatomy, neurons: dict[Address, Inner]) -> Policy:
    """What they are does not change what they cost."""
    draw, hidden = torch.Generator().manual_seed(0), anatomy.outline.stack("decoder").hidden_size
    worth = {f"{address}.worth": torch.rand(4, inner.count, generator=draw) for address, inner in neurons.items()}
    router = {"router.weight": torch.randn(4, hidden, generator=draw), "router.bias": torch.zeros(4)}
    return NeuronExperts(keep=0.5).with_tensors(router | worth)


def measured(loaded: Loaded, anatomy: Anatomy, what: str, policy: Policy, plan: Plan, rounds: int) -> float:
    """Time saved by the policy over time saved by the cut of a plan, from interleaved rounds: processor time with one
    thread, else wall time."""
    model = loaded.model
    cut = apply(model, anatomy, plan)
    text = windows("builtin", loaded.tokenizer, tokens=DECODE.prompt_tokens, length=DECODE.prompt_tokens)
    with observing(model), observing(cut):
        plain, worth = ready(model, DECODE, text.ids), ready(cut, DECODE, text.ids)
        with policy.attach(model, anatomy):
            under = ready(model, DECODE, text.ids)
        busy: dict[str, list[float]] = {"plain": [], "policy": [], "cut": []}
        runs = {"plain": plain, "policy": attached(model, anatomy, policy, under), "cut": worth}
        turns = {name: counted(run, busy[name]) for name, run in runs.items()}
        clocks = {"wall": interleaved(turns, rounds), "processor": {name: spent[1:] for name, spent in busy.items()}}
    if torch.get_num_threads() > 1:
        del clocks["processor"]
    for clock, times in clocks.items():
        table = np.array([times[name] for name in runs])
        seconds, share = np.quantile(table, 0.25, axis=1), worth_of(table)
        draws = np.random.default_rng(0).integers(rounds, size=(DRAWS, rounds))
        low, high = np.quantile([worth_of(table[:, draw]) for draw in draws], (0.025, 0.975))
        each = " ".join(f"{name} {1000 * s / DECODE.new_tokens:.2f}" for name, s in zip(runs, seconds, strict=True))
        print(f"{what}, {clock} ms a token: {each}; the policy saves {share:.3f} ({low:.3f} to {high:.3f})", flush=True)
    return share


def worth_of(times: np.ndarray) -> float:
    """What the policy saves over what the cut saves, of times [plain, policy, cut; rounds]."""
    plain, policy, cut = np.quantile(times, 0.25, axis=1)
    return float((plain - policy) / (plain - cut))


def counted(prepare: Callable[[], Timed], spent: list[float]) -> Callable[[], Timed]:
    """The same run, with its processor time noted."""

    def prepared() -> Timed:
        run = prepare()

        def timed() -> object:
            began = time.process_time()
            try:
                return run()
            finally:
                spent.append(time.process_time() - began)

        return timed

    return prepared


def attached(
    model: torch.nn.Module, anatomy: Anatomy, policy: Policy, prepare: Callable[[], Timed]
) -> Callable[[], Timed]:
    """The same run under the policy, which is put on untimed and taken off right after the run, in its time."""

    def prepared() -> Timed:
        run, running = prepare(), policy.attach(model, anatomy)

        def under() -> object:
            try:
                return run()
            finally:
                running.detach()

        return under

    return prepared


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
