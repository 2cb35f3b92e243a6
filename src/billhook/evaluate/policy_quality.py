"""What a run-time policy costs in quality, and what it saves, while text is generated."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from billhook.anatomy import Anatomy
from billhook.data import Windows
from billhook.data.calibrate import Domain
from billhook.data.decoding import forward
from billhook.evaluate.causal import require_causal
from billhook.evaluate.intervals import exponential, mean_interval
from billhook.measure.cost import CostModel
from billhook.measure.patch import observing
from billhook.plan.errors import InputError
from billhook.plan.policy_record import Savings
from billhook.plan.record import TextEvidence
from billhook.runtime.counts import Counts
from billhook.runtime.policy import Policy
from billhook.runtime.silence import idle_params, key_value_params

Progress = Callable[[str, int, int], None]

ROWS = 8


class Judge:
    """One model on one text, against which policies are held.

    Policies tell reading from generating, so each window [T] is taken as in generation: its first ``prompt`` tokens are
    read at once, the others one by one with the cache, the text's own token coming next whatever the model would have
    said. All T - 1 predictions count. The plain model runs in the same way, once, and its logits are kept:
    windows x T x vocabulary values in the model's dtype.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        anatomy: Anatomy,
        windows: Windows,
        *,
        prompt: int | None = None,
        domain: Domain = "calibration",
        progress: Progress | None = None,
    ) -> None:
        """``prompt`` is half a window unless told. InputError for a model that does not predict the next token, or
        fewer than two windows of four tokens."""
        require_causal(model, "judging a policy")
        count, length = windows.ids.shape
        self.prompt = length // 2 if prompt is None else prompt
        if count < 2 or length < 4 or not 1 <= self.prompt < length:
            raise InputError(f"a policy is judged on 2 or more windows of 4 or more tokens, not {count} of {length}")
        self.model, self.anatomy, self.windows, self.domain = model, anatomy, windows, domain
        self.progress = progress
        self._groups = [windows.ids[i : i + ROWS].to(model.device) for i in range(0, count, ROWS)]
        self._plain = [list(self._run(ids, None)) for ids in self._counted("plain model")]

    def __call__(self, policy: Policy) -> tuple[TextEvidence, Savings]:
        """Quality of the model under the policy against the plain model, and the work of its generated tokens."""
        with policy.attach(self.model, self.anatomy) as attached:
            rows = [
                self._compare(ids, plain, self._run(ids, attached.counts))
                for ids, plain in zip(self._counted(f"policy {policy.name}"), self._plain, strict=True)
            ]
            saved = savings(attached.counts, self.model, self.anatomy, self.windows.ids.shape[1])
        return self._evidence(np.concatenate(rows)), saved

    def _counted(self, what: str) -> Iterator[Tensor]:
        for index, ids in enumerate(self._groups):
            yield ids
            if self.progress is not None:
                self.progress(what, index + 1, len(self._groups))

    def _run(self, ids: Tensor, counts: Counts | None) -> Iterator[Tensor]:
        """Logits [rows, t, vocabulary], for the prompt and then token by token; the work of the prompt is not
        counted."""
        before = [dict(table) for table in counts.tables] if counts else None
        with observing(self.model):
            logits, cache = forward(self.model, ids[:, : self.prompt])
            if counts is not None and before is not None:
                for table, old in zip(counts.tables, before, strict=True):
                    table.clear()
                    table.update(old)
            yield logits
            for place in range(self.prompt, ids.shape[1] - 1):
                logits, cache = forward(self.model, ids[:, place : place + 1], cache)
                yield logits

    def _compare(self, ids: Tensor, plain: list[Tensor], pieces: Iterator[Tensor]) -> np.ndarray:
        """Means over the predictions of each row [rows, 4]: plain loss, loss under the policy, KL, equal top-1."""
        sums, place = torch.zeros(len(ids), 4, dtype=torch.float64), 0
        for right, other in zip(plain, pieces, strict=True):
            wanted = ids[:, place + 1 : place + 1 + right.shape[1], None]
            p, q = (x.float().log_softmax(-1) for x in (right, other))
            figures = [-x.gather(-1, wanted)[..., 0] for x in (p, q)]
            figures += [(p.exp() * (p - q)).sum(-1), (right.argmax(-1) == other.argmax(-1)).float()]
            sums += torch.stack([f.sum(-1, dtype=torch.float64) for f in figures], dim=-1).cpu()
            place += right.shape[1]
        return (sums / place).numpy()

    def _evidence(self, figures: np.ndarray) -> TextEvidence:
        plain, other, kl, top1 = figures.T
        count, length = self.windows.ids.shape
        if not np.isfinite(figures).all():
            raise InputError(f"the log-likelihood of {self.windows.name} is not finite under the policy")
        return TextEvidence(
            name=self.windows.name,
            domain=self.domain,
            windows=count,
            tokens=count * (length - 1),
            protocol=(
                f"per token (nats, exponentiated); windows of {length} tokens that do not overlap, the first "
                f"{self.prompt} read at once and the others one by one with the cache"
            ),
            perplexity_dense=exponential(mean_interval(plain)),
            perplexity_compressed=exponential(mean_interval(other)),
            perplexity_ratio=exponential(mean_interval(other - plain)),
            kl=mean_interval(kl, low=0.0),
            top1=mean_interval(top1, low=0.0, high=1.0),
        )


def savings(counts: Counts, model: PreTrainedModel, anatomy: Anatomy, tokens: int) -> Savings:
    """The work of a token from what was counted, priced by the cost model for so many tokens generated in a row."""
    outline = anatomy.outline
    costs = CostModel(outline, prompt_tokens=1, new_tokens=tokens)
    flops, kv = costs.dense["flops"], costs.dense["kv_bytes"]
    runs: dict[str, float] = {}
    for unit, _ in outline.sublayers():
        whole = costs.saving(unit)
        ran, projected = counts.share_run(unit), counts.share_projected(unit)
        if counts.left_out[unit]:
            ran -= counts.share_left_out(unit) * outline.inner_share(unit)
        flops += (ran - 1) * whole["flops"]
        if projected:
            flops += projected * (whole["flops"] - 2 * idle_params(model, anatomy.sublayer(unit)) * tokens)
        if unit in counts.borrowing:
            flops -= 2 * key_value_params(model, anatomy.sublayer(unit)) * tokens
            kv -= whole["kv_bytes"]
        kv += (ran - 1 + projected) * whole["kv_bytes"]  # neither computed nor projected: no entry
        if ran != 1:
            runs[str(unit)] = ran
    blocks = len(outline.stack("decoder").blocks)
    return Savings(
        blocks=counts.blocks_run(outline),
        blocks_plain=blocks,
        flops=flops / costs.dense["flops"],
        kv_bytes=kv / costs.dense["kv_bytes"],
        sublayers=runs,
    )
