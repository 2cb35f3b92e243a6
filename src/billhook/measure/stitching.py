"""One depth joined to another by an affine map, and the model run on from there."""

from __future__ import annotations

import torch
from scipy.stats import spearmanr
from torch import Tensor
from torch.nn.functional import cosine_similarity

from billhook.measure.affine import affine
from billhook.measure.outcome import Outcome
from billhook.measure.replay import Progress, Replay
from billhook.plan.audit import Matrix, Stitches, Tokenwise


def tokens_at(replay: Replay, depth: int) -> Tensor:
    """The stream at a depth, over all tokens that are no padding: [tokens, hidden]."""
    return torch.cat([replay.streams(i)[depth][real] for i, real in enumerate(replay.real)])


def tokenwise(
    fit: Replay, held: Replay, outcome: Outcome | None, progress: Progress | None = None
) -> tuple[Tokenwise, ...]:
    """Each block's update split into a tokenwise part and the rest.

    With x before and y behind a block and f the affine map fitted to take x to y (see ``affine``), the tokenwise part
    of the update y - x is f(x) - x and the rest y - f(x). Energies are taken relative to that of y.

    Source: "On the Geometric Structure of Layer Updates in Deep Language Models" (arXiv 2604.02459), whose restricted
    tokenwise maps are fitted anew in the neighbourhood of every token; one map for all is coarser, needs no search for
    neighbours, and can be run in the place of the block. Cost: n (n - 1) / 2 block forwards over the held text and n
    looks at the output; without an ``outcome`` none.
    """
    found = []
    for block in range(len(fit.stack.blocks)):
        map_ = affine(tokens_at(fit, block), tokens_at(fit, block + 1))
        x, y = tokens_at(held, block).float(), tokens_at(held, block + 1).float()
        guess = map_(x)
        update, part, rest = y - x, guess - x, y - guess
        weight = 1 / y.square().sum(-1, keepdim=True).clamp(min=1e-12)
        left = (weight * rest.square()).sum(dtype=torch.float64) / (weight * update.square()).sum(dtype=torch.float64)
        output = None
        if outcome is not None:
            output = _run_on(held, outcome, block + 1, [map_(stream) for stream in _at(held, block)])
        found.append(
            Tokenwise(
                explained=1 - left.item(),
                cosine_tokenwise=cosine_similarity(update, part, -1).mean(dtype=torch.float64).item(),
                cosine_rest=cosine_similarity(update, rest, -1).mean(dtype=torch.float64).item(),
                output=output,
            )
        )
        if progress is not None:
            progress("tokenwise maps", block + 1, len(fit.stack.blocks))
    return tuple(found)


def correlation(rows: tuple[Tokenwise, ...]) -> float | None:
    """Spearman's rank correlation between the share that is not tokenwise and the change of the output; None for fewer
    than three blocks, without outputs, and where either is the same for all."""
    pairs = [(1 - row.explained, row.output) for row in rows if row.output is not None]
    shares, outputs = {share for share, _ in pairs}, {output for _, output in pairs}
    if len(pairs) < 3 or len(shares) == 1 or len(outputs) == 1:
        return None
    return float(spearmanr(*zip(*pairs, strict=True)).statistic)


def stitches(
    fit: Replay, held: Replay, outcome: Outcome, depths: tuple[int, ...], progress: Progress | None = None
) -> Stitches:
    """Give each of the depths the affine image of the stream at each other one, and see what becomes of the output.

    Direct matching: the map is fitted to the stream that it replaces, not to the task, which would invent streams that
    no layer has ever seen and find very distant layers alike ("How not to Stitch Representations to Measure
    Similarity", the abstract). Cost: for each ordered pair the blocks behind the second depth over the held text.
    """
    pairs = [(a, b) for a in depths for b in depths if a != b]
    found: dict[tuple[int, int], float] = {}
    for number, (a, b) in enumerate(pairs):
        map_ = affine(tokens_at(fit, a), tokens_at(fit, b))
        found[a, b] = _run_on(held, outcome, b, [map_(stream) for stream in _at(held, a)])
        if progress is not None:
            progress("stitches", number + 1, len(pairs))
    output: Matrix = tuple(tuple(found.get((a, b), 0.0) for b in depths) for a in depths)
    return Stitches(depths=depths, output=output)


def _at(replay: Replay, depth: int) -> list[Tensor]:
    return [replay.streams(i)[depth] for i in range(len(replay.batches))]


def _run_on(replay: Replay, outcome: Outcome, depth: int, given: list[Tensor]) -> float:
    """The mean change of the output with these streams at a depth, padding included, one tensor a batch."""
    finals = [[stream, *replay.onward(i, depth, stream)][-1] for i, stream in enumerate(given)]
    return outcome(finals).mean().item()
