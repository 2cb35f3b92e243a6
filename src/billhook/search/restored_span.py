"""Which run of blocks to put back to a base model, by how the model then answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from billhook.anatomy.types import Anatomy
from billhook.heal import Healing, healed, restore
from billhook.measure.batches import Batch
from billhook.measure.characters import Answered, answered
from billhook.measure.replay import Replay
from billhook.plan.address import Address
from billhook.plan.errors import InputError

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Restored:
    """The ``blocks`` to put back, the answers of the model ``before`` and ``after`` that, and what it took to find
    them: block-token forwards, and runs of blocks looked at."""

    blocks: tuple[Address, ...]
    before: Answered
    after: Answered
    work: int
    evaluations: int


def restored_span(
    model: nn.Module,
    anatomy: Anatomy,
    base: nn.Module,
    questions: Batch,
    spelt: Sequence[Tensor],
    validity: float,
    progress: Progress | None = None,
) -> Restored:
    """The run of adjacent blocks that makes the answers most diverse once it is as in ``base``, of those that leave
    ``validity`` of the valid answers (a share of what the model has before).

    ``questions``: one batch of token ids and attention mask [questions, tokens], padded on the right, each asking for
    one random character; ``spelt``: the valid answers (see ``measure.characters``). All L (L + 1) / 2 runs are looked
    at; among equals the shorter one wins, then the earlier one. Cost: about L^3 / 3 forwards of a block over the
    questions, and as many heads as runs, on one token a question.

    Source: "Not All Layers Need Tuning: Selective Layer Restoration Recovers Diversity" (arXiv 2602.06665), of which
    only the abstract was read: contiguous ranges, chosen on constrained random characters by validity and diversity.
    The questions, reading the answer from next-token probabilities instead of from samples, and the rule for choosing
    are ours. InputError where no run makes the answers more diverse.
    """
    replay = Replay(model, anatomy, [questions])
    ends = replay.real[0].sum(-1) - 1
    rows = torch.arange(len(ends), device=ends.device)
    ids = replay.batches[0]["input_ids"][rows, ends]

    def answers(streams: list[Tensor]) -> Answered:
        return answered(replay.logits(ids, streams[0][rows, ends]), spelt)

    blocks = [block.address for block in replay.stack.blocks]
    parts = [restore(model, anatomy, base, [block]).tensors for block in blocks]
    before = answers(replay.final)
    best: tuple[Answered, range] | None = None
    runs = [range(start, start + size) for size in range(1, len(blocks) + 1) for start in range(len(blocks) - size + 1)]
    for number, run in enumerate(runs, start=1):
        tensors = {name: tensor for block in run for name, tensor in parts[block].items()}
        with healed(model, Healing(tensors, (), {}, 0, 0)):
            now = answers(replay.again(run.start))
        enough = now.validity >= validity * before.validity
        if enough and now.diversity > (best[0] if best else before).diversity:
            best = now, run
        if progress is not None:
            progress("runs of blocks", number, len(runs))
    if best is None:
        raise InputError(
            f"no run of blocks of the base makes the answers more diverse and leaves {validity:.0%} of the valid ones: "
            f"nothing to restore"
        )
    return Restored(tuple(blocks[i] for i in best[1]), before, best[0], replay.work, len(runs))
