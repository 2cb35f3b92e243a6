"""What ``generate`` has prepared for a decoding loop, and what the loop gives back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig, PreTrainedModel
from transformers.generation import GenerateDecoderOnlyOutput

from billhook.plan.errors import InputError


@dataclass(frozen=True)
class Request:
    """One prompt ``ids`` (1, tokens): what acts on scores, what ends the text, who reads along, further model inputs.

    Raises InputError for what a speculating loop cannot do: several rows, beams, outputs of single steps.
    """

    model: PreTrainedModel
    ids: Tensor
    processors: Any
    criteria: Any
    config: GenerationConfig
    streamer: Any
    inputs: dict[str, Any]

    def __post_init__(self) -> None:
        config = self.config
        if self.ids.shape[0] != 1:
            raise InputError(
                f"self-speculation decodes one sequence at a time, greedy or sampled; these are {self.ids.shape[0]} "
                f"(batch x beams x returned sequences)"
            )
        if not isinstance(self.inputs.get("cache"), Cache):
            raise InputError("self-speculation needs a KV cache: leave use_cache on")
        if config.return_dict_in_generate and (config.output_attentions or config.output_hidden_states):
            raise InputError("self-speculation computes several tokens at once: no attentions or hidden states a token")
        if (config.guidance_scale or 1) != 1:
            raise InputError("self-speculation cannot run a guidance_scale, which keeps a cache of its own")

    @property
    def cache(self) -> Cache:
        found: Cache = self.inputs["cache"]
        return found

    def prefill(self) -> Tensor:
        """Logits (1, vocabulary) after the prompt, of which a cache that the caller brought may hold a part."""
        seen = int(self.cache.get_seq_length())
        if seen >= self.ids.shape[1]:
            raise InputError("the cache already holds the whole prompt: at least its last token has to be new")
        new = self.ids.shape[1] - seen if seen else None
        given = self.model.prepare_inputs_for_generation(
            self.ids, next_sequence_length=new, is_first_iteration=True, **self.inputs
        )
        return self._logits(given, 1)

    def forward(self, ids: Tensor, cache: Cache, new: int) -> Tensor:
        """Logits (new, vocabulary) after each of the last ``new`` of ``ids``; those before them are in ``cache``."""
        inputs = _extended(self.inputs, ids.shape[1]) | {"cache": cache}
        given = self.model.prepare_inputs_for_generation(ids, next_sequence_length=new, **inputs)
        if "logits_to_keep" in given:
            given["logits_to_keep"] = new
        return self._logits(given, new)

    def _logits(self, given: dict[str, Any], new: int) -> Tensor:
        logits: Tensor = self.model(**given, return_dict=True).logits[0, -new:]
        return logits.to(dtype=torch.float32, device=self.ids.device)

    def scores(self, ids: Tensor, logits: Tensor) -> Tensor:
        """The logits (n, vocabulary) after the last n of ``ids`` as the processors leave them; each row is given the
        tokens before it."""
        if not self.processors:
            return logits
        first = ids.shape[1] - len(logits) + 1
        return torch.cat([self.processors(ids[:, : first + i], row[None].clone()) for i, row in enumerate(logits)])


class Written:
    """The text so far: shown to the streamer and asked about its end token by token, as in plain decoding."""

    def __init__(self, request: Request) -> None:
        self.ids, self.done, self._request = request.ids, False, request
        config = request.config
        self._scores: tuple[Tensor, ...] | None = (
            () if config.return_dict_in_generate and config.output_scores else None
        )
        self._logits: tuple[Tensor, ...] | None = (
            () if config.return_dict_in_generate and config.output_logits else None
        )

    @property
    def count(self) -> int:
        """New tokens."""
        return self.ids.shape[1] - self._request.ids.shape[1]

    def add(self, tokens: list[int], logits: Tensor, scores: Tensor) -> None:
        """Tokens in order until one of them ends the text; the rest is dropped. One row of scores a token."""
        for token, raw, score in zip(tokens, logits, scores, strict=False):
            self.ids = joined(self.ids, [token])
            if self._scores is not None:
                self._scores += (score[None],)
            if self._logits is not None:
                self._logits += (raw[None],)
            if self._request.streamer is not None:
                self._request.streamer.put(self.ids[:, -1].cpu())
            if bool(self._request.criteria(self.ids, self._scores).all()):
                self.done = True
                return

    def result(self) -> Tensor | GenerateDecoderOnlyOutput:
        if self._request.streamer is not None:
            self._request.streamer.end()
        if not self._request.config.return_dict_in_generate:
            return self.ids
        return GenerateDecoderOnlyOutput(
            sequences=self.ids, scores=self._scores, logits=self._logits, cache=self._request.cache
        )


def joined(ids: Tensor, tokens: list[int]) -> Tensor:
    return torch.cat([ids, ids.new_tensor([tokens])], dim=-1) if tokens else ids


def _extended(inputs: dict[str, Any], length: int) -> dict[str, Any]:
    """The inputs that have one entry a token, lengthened for generated ones: seen, in order, and plain text."""
    longer = dict(inputs)
    for name, value in inputs.items():
        more = length - value.shape[-1] if isinstance(value, Tensor) and value.ndim else 0
        if name == "attention_mask" and value is not None:
            longer[name] = torch.cat([value, value.new_ones(1, more)], dim=-1)
        elif name == "position_ids" and value is not None:
            steps = torch.arange(1, more + 1, dtype=value.dtype, device=value.device)
            longer[name] = torch.cat([value, value[..., -1:] + steps], dim=-1)
        elif name in ("token_type_ids", "mm_token_type_ids") and value is not None:
            longer[name] = torch.cat([value, value.new_zeros(1, more)], dim=-1)
    return longer
