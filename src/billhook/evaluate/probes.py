"""Dense and compressed model before the same questions: damage that likelihood alone does not show."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from billhook.data import check_tokenizer
from billhook.data.questions import ITEMS, questions
from billhook.evaluate.causal import positions, require_causal
from billhook.evaluate.exact import Expected, exact, expected
from billhook.evaluate.intervals import mean_interval
from billhook.plan.errors import InputError
from billhook.plan.record import ProbeEvidence

Progress = Callable[[str, int, int], None]
Probes = dict[str, list[Expected]]
Answers = dict[str, list[bool]]


def probes(
    dense: PreTrainedModel, compressed: PreTrainedModel, tokenizer: Any, *, progress: Progress | None = None
) -> tuple[ProbeEvidence, ...]:
    """Ask both models the same questions (see ``questions``; the same in every run) and count the exact answers.

    An answer is right if greedy decoding writes it and ends the line (see ``exact``). Accuracies are shares of the
    items. The difference is compressed - dense with the 95% Student t interval of the paired mean, cut to [-1, 1]; it
    has no width where all items changed alike, which bounds nothing beyond these items.

    Cost: about 200 sequences of 20 tokens for each model, after 8 beginnings of 60. Raises InputError as ``posed`` and
    ``answers`` do.
    """
    asked = posed(dense, tokenizer)
    require_causal(compressed, "probes")
    total = 2 * sum(map(len, asked.values()))
    of_dense = answers(dense, asked, _from(progress, 0, total))
    return paired(of_dense, answers(compressed, asked, _from(progress, total // 2, total)))


def posed(model: PreTrainedModel, tokenizer: Any, items: int = ITEMS) -> Probes:
    """The questions of every probe in tokens, ``items`` of each. Raises InputError for a model that is no causal
    language model, a missing tokenizer or one that does not fit, and where a question has more tokens than the model
    has positions."""
    require_causal(model, "probes")
    if tokenizer is None:
        raise InputError("probes need a tokenizer; the model's folder has none")
    check_tokenizer(tokenizer, model.get_input_embeddings().num_embeddings)
    asked = {
        name: [expected(tokenizer, one.prompt, one.answer) for one in of_probe]
        for name, of_probe in questions(items=items).items()
    }
    longest, limit = max(len(one.ids) for of_probe in asked.values() for one in of_probe), positions(model)
    if limit is not None and longest > limit:
        raise InputError(f"probes take up to {longest} tokens, but {type(model).__name__} has {limit} positions")
    return asked


def answers(model: PreTrainedModel, asked: Probes, progress: Progress | None = None) -> Answers:
    """For each probe and item whether the model answers exactly; errors as in ``exact``."""
    total, done = sum(map(len, asked.values())), 0

    def tick(more: int) -> None:
        nonlocal done
        done += more
        if progress is not None:
            progress("probes", done, total)

    return {name: exact(model, items, tick) for name, items in asked.items()}  # one by one: a probe's share examples


def paired(dense: Answers, compressed: Answers) -> tuple[ProbeEvidence, ...]:
    """The evidence, from the answers of both models to the same items."""
    found = []
    for name, before in dense.items():
        a, b = (np.asarray(right, dtype=np.float64) for right in (before, compressed[name]))
        found.append(
            ProbeEvidence(
                name=name,
                items=len(a),
                dense=float(a.mean()),
                compressed=float(b.mean()),
                difference=mean_interval(b - a, low=-1.0, high=1.0),
            )
        )
    return tuple(found)


def _from(progress: Progress | None, start: int, total: int) -> Progress | None:
    """The same progress as a part of a longer one."""
    if progress is None:
        return None
    return lambda label, done, _: progress(label, start + done, total)
