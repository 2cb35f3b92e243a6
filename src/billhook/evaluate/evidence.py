"""Dense and compressed model on the same text: perplexity, divergence, agreement."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from billhook.data import Windows
from billhook.evaluate.causal import require_causal, vocabulary
from billhook.evaluate.intervals import exponential, mean_interval
from billhook.evaluate.logits import logits_by_slice
from billhook.measure.patch import observing
from billhook.plan.errors import InputError
from billhook.plan.record import TextEvidence

Progress = Callable[[str, int, int], None]
Domain = Literal["calibration", "other"]
Remembered = dict[str, list[Callable[[slice], Tensor]]]  # by the fingerprint of a text, for each of its windows

SLICE_VALUES = 2**23  # of one slice: 32 MiB in float32; about six such tensors are alive at once


def evidence(
    dense: PreTrainedModel,
    compressed: PreTrainedModel,
    texts: Sequence[tuple[Domain, Windows]],
    *,
    progress: Progress | None = None,
) -> tuple[TextEvidence, ...]:
    """Compare two causal language models with one vocabulary, window by window, on each text.

    Both models see one window at a time, so that padding, batch layout and the order of sums are the same. Of each
    window [T] the T - 1 tokens after the first are predicted. Perplexity is exp of the mean negative log-likelihood in
    nats per token; KL(dense || compressed) is summed over the whole vocabulary; top-1 is the share of predictions where
    the largest logit is the same. Logits are the model's own in its dtype; everything after them is float32, sums over
    tokens are float64.

    The 95% intervals are Student t intervals over the per-window means (see ``mean_interval``), for perplexities in
    the log domain; that of the ratio is over per-window differences, hence paired: most windows are hard or easy
    for both models alike, and that cancels. Windows are taken as independent samples of the text.

    Cost: one forward of each model per window and about 200 MB beside the activations, whatever the vocabulary.
    Raises InputError for models that are not causal language models or differ in vocabulary, for fewer than two
    windows (they have no interval), and where a model returns NaN.
    """
    return evidence_of_each(dense, [compressed], texts, progress=progress)[0]


def evidence_of_each(
    dense: PreTrainedModel,
    candidates: Sequence[PreTrainedModel],
    texts: Sequence[tuple[Domain, Windows]],
    *,
    of_dense: Remembered | None = None,
    progress: Progress | None = None,
) -> list[tuple[TextEvidence, ...]]:
    """As ``evidence``, of several compressed models: the dense one runs once for all of them, or not again where it is
    ``remembered`` over these texts."""
    for model in (dense, *candidates):
        require_causal(model, "evidence on text")
        if vocabulary(dense) != vocabulary(model):
            raise InputError(
                f"the models have {vocabulary(dense)} and {vocabulary(model)} tokens in their vocabularies; "
                "evidence needs a compressed model with the dense model's own"
            )
    for _, windows in texts:
        _check(windows, vocabulary(dense))
    with ExitStack() as watched:
        for model in (dense, *candidates):
            watched.enter_context(observing(model))
        found = [_on_text(dense, candidates, domain, windows, of_dense, progress) for domain, windows in texts]
    return list(zip(*found, strict=True))


def remembered(dense: PreTrainedModel, texts: Sequence[tuple[Domain, Windows]]) -> Remembered:
    """The dense model's trunk over the windows of ``texts``, for several calls of ``evidence_of_each``.

    Cost: one trunk over the texts. Memory: their last hidden states. Wrong once the model is changed."""
    with observing(dense):
        return {
            windows.fingerprint: [logits_by_slice(dense, ids[None].to(dense.device)) for ids in windows.ids]
            for _, windows in texts
        }


def _on_text(
    dense: PreTrainedModel,
    candidates: Sequence[PreTrainedModel],
    domain: Domain,
    windows: Windows,
    remembered: Remembered | None,
    progress: Progress | None,
) -> list[TextEvidence]:
    """One for each candidate."""
    rows = []
    for index, ids in enumerate(windows.ids):
        if remembered is not None:
            of_dense = remembered[windows.fingerprint][index]
        else:
            of_dense = logits_by_slice(dense, ids[None].to(dense.device))
        row = _on_window(dense, of_dense, candidates, ids[None])
        for who, column in (("dense", 0), ("compressed", 1)):
            damaged = row[~np.isfinite(row[:, column]), column]
            if damaged.size:
                raise InputError(
                    f"the {who} model's log-likelihood of window {index} of {windows.name} is {damaged[0]}; "
                    "its weights must be finite and its dtype must hold its activations"
                )
        rows.append(row)
        if progress is not None:
            progress(f"evidence on {windows.name}", index + 1, len(windows.ids))
    return [_summary(dense, domain, windows, figures) for figures in np.stack(rows, axis=1)]


def _summary(dense: PreTrainedModel, domain: Domain, windows: Windows, figures: NDArray[np.float64]) -> TextEvidence:
    """Of one candidate, from its figures [windows, 4]."""
    count, length = windows.ids.shape
    loss_dense, loss_compressed, kl, top1 = figures.T
    return TextEvidence(
        name=windows.name,
        domain=domain,
        windows=count,
        tokens=count * (length - 1),
        protocol=protocol(windows, _bos(dense)),
        perplexity_dense=exponential(mean_interval(loss_dense)),
        perplexity_compressed=exponential(mean_interval(loss_compressed)),
        perplexity_ratio=exponential(mean_interval(loss_compressed - loss_dense)),
        kl=mean_interval(kl, low=0.0),
        top1=mean_interval(top1, low=0.0, high=1.0),
    )


def _on_window(
    dense: PreTrainedModel, of_dense: Callable[[slice], Tensor], candidates: Sequence[PreTrainedModel], ids: Tensor
) -> NDArray[np.float64]:
    """Means over the predicted tokens of ids [1, T], for each candidate [c, 4]: dense loss, compressed loss, KL, share
    of equal top-1."""
    predicted = ids.shape[1] - 1
    of_each = [logits_by_slice(model, ids.to(model.device)) for model in candidates]
    step = max(1, SLICE_VALUES // vocabulary(dense))
    sums = np.zeros((len(candidates), 4))
    for start in range(0, predicted, step):
        here = slice(start, min(start + step, predicted))
        wanted = ids[0, here.start + 1 : here.stop + 1].to(dense.device)
        sums += _sums(of_dense(here)[0], (of_one(here)[0].to(dense.device) for of_one in of_each), wanted)
    return sums / predicted


def _sums(dense: Tensor, compressed: Iterable[Tensor], wanted: Tensor) -> NDArray[np.float64]:
    """Sums over tokens for each candidate [c, 4], from logits [t, V] and the tokens that came [t]."""
    best, p = dense.argmax(-1), dense.float().log_softmax(-1)
    chances, loss = p.exp(), _loss(p, wanted)
    rows = []
    for logits in compressed:
        same = best == logits.argmax(-1)
        q = logits.float().log_softmax(-1)
        kl = (chances * (p - q)).sum(-1)
        rows.append(torch.stack([loss, _loss(q, wanted), *(x.sum(dtype=torch.float64) for x in (kl, same))]))
    return torch.stack(rows).cpu().numpy()


def _loss(log_chances: Tensor, wanted: Tensor) -> Tensor:
    return -log_chances.gather(-1, wanted[:, None]).sum(dtype=torch.float64)


def protocol(windows: Windows, bos: int | None) -> str:
    """How perplexity was taken, in a sentence, from what the windows really hold."""
    length = windows.ids.shape[1]
    begun = bos is not None and bool((windows.ids[:, 0] == bos).all())
    return (
        f"per token (nats, exponentiated); context {length} tokens, stride {length - begun} (windows do not overlap, "
        f"the first token of each is not predicted); {'each window begins with BOS' if begun else 'no BOS added'}"
    )


def _bos(model: PreTrainedModel) -> int | None:
    found: int | None = getattr(model.config.get_text_config(), "bos_token_id", None)
    return found


def _check(windows: Windows, entries: int) -> None:
    count, length = windows.ids.shape
    if count < 2 or length < 2:
        raise InputError(
            f"{windows.name} gives {count} windows of {length} tokens; evidence with a confidence interval "
            "needs at least 2 windows of at least 2 tokens (a longer text or shorter windows)"
        )
    if int(windows.ids.max()) >= entries:
        raise InputError(
            f"{windows.name} has token {int(windows.ids.max())}, but the model knows only {entries} tokens; "
            "it was cut with the tokenizer of another model"
        )
