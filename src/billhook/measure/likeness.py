"""How alike the stream is at different depths, and at neighbouring tokens."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from billhook.measure.affine import Ridge, energy
from billhook.measure.replay import Progress, Replay
from billhook.measure.stitching import tokens_at
from billhook.plan.audit import Matrix, Row

GAPS = (1, 4, 16, 64)


def depth_maps(
    fit: Replay, held: Replay, depths: tuple[int, ...], progress: Progress | None = None
) -> tuple[Matrix, Matrix]:
    """For the stream at every pair of depths: held-out R^2 of the best affine map, [from][to], and linear CKA.

    Every token is first brought to length 1, since that is how sublayers behind a norm read it; otherwise the few
    tokens with huge streams would be all that is seen. With centred streams X and Y [tokens, hidden]:

        CKA = |X'Y|^2 / (|X'X| |Y'Y|), Frobenius, over the fitted text (Kornblith et al. 2019, arXiv 1905.00414, eq. 5),
        R^2 = 1 - |Y - map(X)|^2 / |Y - mean|^2 over the held text, the map fitted on the other one by ridge regression.

    Source of the maps: arXiv 2505.13898, section on linear maps, which joins two models; here both ends are depths of
    one. Cost: no block; 2 tokens hidden^2 multiplications for each pair and hidden^3 for each depth. Memory: a few
    hidden^2 and tokens x hidden, beside the streams of the replays. No token is compared with another.
    """
    r2, cross_norms, norms = [], [], []
    for number, start in enumerate(depths):
        x = normalize(tokens_at(fit, start).float(), dim=-1)
        mean = x.mean(0)
        ridge = Ridge(x - mean)
        inputs = normalize(tokens_at(held, start).float(), dim=-1) - mean
        norms.append(ridge.norm)
        row, crosses = [], []
        for end in depths:
            y, goal = (normalize(tokens_at(replay, end).float(), dim=-1) for replay in (fit, held))
            offset = y.mean(0)
            targets = y - offset
            cross = ridge.cross(targets)
            rest = energy(goal - offset - inputs @ ridge.solve(cross, energy(targets)))
            whole = energy(goal - goal.mean(0))
            row.append(1 - rest / whole if whole else None)
            crosses.append(cross.square().sum().item())
        r2.append(tuple(row))
        cross_norms.append(crosses)
        if progress is not None:
            progress("maps between depths", number + 1, len(depths))
    cka = tuple(
        tuple(c / (a * b) if a * b else None for c, b in zip(row, norms, strict=True))
        for row, a in zip(cross_norms, norms, strict=True)
    )
    return tuple(r2), cka


def neighbours(replay: Replay, depths: tuple[int, ...]) -> dict[int, Row]:
    """The mean cosine between the streams of tokens of one text that are 1, 4, 16 and 64 apart, at each depth, less the
    mean stream of that depth (which all tokens share). Source: the token-wise analysis of "Skip to the Good Part"; its
    abstract leaves the distances and the centring open. None where no text is that long."""
    found: dict[int, list[float | None]] = {gap: [] for gap in GAPS}
    for depth in depths:
        mean = tokens_at(replay, depth).mean(0, dtype=torch.float32)
        units = [normalize(replay.streams(i)[depth].float() - mean, dim=-1) for i in range(len(replay.batches))]
        for gap, row in found.items():
            row.append(_mean_product(units, replay.real, gap))
    return {gap: tuple(row) for gap, row in found.items()}


def _mean_product(units: list[Tensor], real: list[Tensor], gap: int) -> float | None:
    total, count = 0.0, 0
    for unit, mask in zip(units, real, strict=True):
        both = mask[:, gap:] & mask[:, : mask.shape[1] - gap] if gap < mask.shape[1] else mask[:, :0]
        if both.any():
            products = (unit[:, gap:] * unit[:, : unit.shape[1] - gap]).sum(-1)
            total += products[both].sum(dtype=torch.float64).item()
            count += int(both.sum())
    return total / count if count else None
