"""What skipping one block does to all later ones and to the output: now, and at tokens yet to come."""

from __future__ import annotations

import torch
from torch import Tensor

from billhook.measure.outcome import Outcome
from billhook.measure.replay import Progress, Replay
from billhook.plan.audit import Skips

_SMALLEST = 1e-12


def skip_effects(replay: Replay, outcome: Outcome, progress: Progress | None = None) -> Skips:
    """Skip each block in turn for some tokens, let the model run on, and compare with the dense run.

    For the update u of a later block, with and without the skip, and a token: |u' - u| / |u|, averaged over tokens. In
    a causal stack the first half of each text skips the block, but for its first token, which many models use as a
    place to rest attention on. No token sees a later one, so one run shows both: the first half what skipping does
    now, the second half what it does to tokens that skip nothing themselves and only read what was left behind. In
    other stacks all tokens skip it.

    Source: "Do Language Models Use Their Depth Efficiently?" (arXiv 2505.13898), which takes the largest change over
    tokens and several places to divide a text, and the distance of the output's probabilities. Here it is the mean, one
    place, and the change of the output of ``Outcome``.

    Cost: n (n - 1) / 2 block forwards over the text, and n looks at the output.
    """
    blocks = len(replay.stack.blocks)
    masks = [_halves(real, replay.stack.causal) for real in replay.real]
    now: list[list[float | None]] = [[None] * blocks for _ in range(blocks)]
    future: list[list[float | None]] = [[None] * blocks for _ in range(blocks)]
    outputs: list[tuple[float | None, float | None]] = []
    first, second = (outcome.pick([pair[side] for pair in masks]) for side in (0, 1))
    for skipped in range(blocks):
        sums = torch.zeros(2, blocks, dtype=torch.float64)
        finals = []
        for batch, pair in enumerate(masks):
            streams = replay.streams(batch)
            start = torch.where(pair[0][..., None], streams[skipped], streams[skipped + 1])
            after = [start, *replay.onward(batch, skipped + 1, start)]
            finals.append(after[-1])
            for later in range(skipped + 1, blocks):
                dense = streams[later + 1].float() - streams[later].float()
                altered = after[later - skipped].float() - after[later - skipped - 1].float()
                change = (altered - dense).norm(dim=-1) / dense.norm(dim=-1).clamp(min=_SMALLEST)
                for side, mask in enumerate(pair):
                    sums[side, later] += change[mask].sum(dtype=torch.float64).cpu()
        for side, rows in enumerate((now, future)):
            count = sum(int(pair[side].sum()) for pair in masks)
            for later in range(skipped + 1, blocks) if count else ():
                rows[skipped][later] = sums[side, later].item() / count
        changed = outcome(finals)
        outputs.append((_mean(changed[first]), _mean(changed[second])))
        if progress is not None:
            progress("one block skipped", skipped + 1, blocks)
    causal = replay.stack.causal
    return Skips(
        now=tuple(map(tuple, now)),
        future=tuple(map(tuple, future)) if causal else (),
        output_now=tuple(value for value, _ in outputs),
        output_future=tuple(value for _, value in outputs) if causal else (),
    )


def _halves(real: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """Which tokens skip the block, and which come later and do not: bool [rows, tokens] each."""
    if not causal:
        return real, torch.zeros_like(real)
    place = real.cumsum(-1)
    half = place[:, -1:] // 2
    return real & (place > 1) & (place <= half), real & (place > half)


def _mean(values: Tensor) -> float | None:
    return values.mean().item() if len(values) else None
