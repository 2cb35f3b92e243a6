"""Greedy continuations, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from statistics import fmean
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

from billhook.evaluate.causal import positions
from billhook.evaluate.repetition import repeated
from billhook.measure.patch import observing
from billhook.plan.errors import InputError
from billhook.plan.record import Generation

PROMPTS = (
    "Why is the sky blue?",
    "Write one sentence about a hedge in winter.",
    "Name three things one can do with an old bicycle.",
)

#: Asked all at once of every result of a comparison, to see how much it repeats itself.
OPENINGS = (
    *PROMPTS,
    "Tell me a short story about a lighthouse.",
    "How does one make bread?",
    "Describe the city of Rome to a child.",
    "What should I read this summer, and why?",
    "Explain what a fraction is.",
)

#: Against what a checkpoint may have stored to spoil plain greedy decoding.
GREEDY: dict[str, Any] = {
    "do_sample": False,
    "num_beams": 1,
    "temperature": 1.0,
    "top_p": 1.0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
}


def generations(
    dense: PreTrainedModel,
    compressed: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    prompts: Sequence[str] = PROMPTS,
    *,
    max_new_tokens: int = 40,
) -> tuple[Generation, ...]:
    """What each model writes after each prompt, and how much that repeats itself; arguments and errors as in
    ``generate``."""
    found = []
    for prompt in prompts:
        before, after = (_written(model, tokenizer, prompt, max_new_tokens) for model in (dense, compressed))
        found.append(
            Generation(
                prompt=prompt,
                dense=_text(tokenizer, before),
                compressed=_text(tokenizer, after),
                repeated_dense=repeated(before),
                repeated_compressed=repeated(after),
            )
        )
    return tuple(found)


def repetition(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    prompts: Sequence[str] = OPENINGS,
    *,
    max_new_tokens: int,
) -> float:
    """The share of 4-grams that came before in the same greedy continuation (see ``repeated``), as the mean over the
    prompts, which are written on in one batch, padded on the left; a text ends before its end-of-sequence token.

    A model that ends at once repeats nothing, so read this beside what it is said to answer. Cost: ``max_new_tokens``
    steps of generation. InputError as in ``prepared``.
    """
    rows = [prepared(model, tokenizer, prompt, max_new_tokens)["input_ids"][0] for prompt in prompts]
    assert tokenizer is not None
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    ids, mask = (
        pad_sequence(padded, batch_first=True, padding_value=value, padding_side="left")
        for padded, value in ((rows, pad), ([torch.ones_like(row) for row in rows], 0))
    )
    with observing(model):
        output = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, pad_token_id=pad, **GREEDY
        )
    ends = model.generation_config.eos_token_id
    ends = set(ends) if isinstance(ends, list) else {ends}
    texts = (takewhile(lambda token: token not in ends, row) for row in output[:, ids.shape[1] :].tolist())
    return fmean(repeated(list(text)) for text in texts)


def generate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, prompt: str, max_new_tokens: int = 40
) -> str:
    """The greedy answer (chat template) or continuation (tokenizer without one), without the prompt.

    Ends at the end-of-sequence token or after ``max_new_tokens``. Raises InputError as ``prepared`` does.
    """
    return _text(tokenizer, _written(model, tokenizer, prompt, max_new_tokens))


def _written(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, prompt: str, max_new_tokens: int
) -> list[int]:
    """The tokens after the prompt."""
    inputs = prepared(model, tokenizer, prompt, max_new_tokens)
    assert tokenizer is not None
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    with observing(model):
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, pad_token_id=pad, **GREEDY)[0]
    taken = 0 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
    tokens: list[int] = output[taken:].tolist()
    return tokens


def _text(tokenizer: PreTrainedTokenizerBase | None, tokens: list[int]) -> str:
    assert tokenizer is not None  # or nothing would have been written
    text: str = tokenizer.decode(tokens, skip_special_tokens=True)
    return text


def prepared(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, prompt: str, max_new_tokens: int
) -> BatchEncoding:
    """The tokens of a prompt on the model's device. Raises InputError for a model that cannot generate, a missing
    tokenizer, a prompt of no tokens, a length below 1, or one that with the prompt exceeds the model's positions."""
    if not model.can_generate():
        raise InputError(f"{type(model).__name__} cannot generate text; a model with a language head can")
    if tokenizer is None:
        raise InputError("generating text needs a tokenizer; the model's folder has none")
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    inputs = _encode(tokenizer, prompt).to(model.device)
    length = inputs["input_ids"].shape[1]
    if length == 0:
        raise InputError(f"prompt {prompt!r} has no tokens; it must have at least one")
    limit, taken = positions(model), 0 if model.config.is_encoder_decoder else length
    if limit is not None and taken + max_new_tokens > limit:
        raise InputError(
            f"max_new_tokens is {max_new_tokens}, but {type(model).__name__} has {limit} positions, of which the "
            f"prompt takes {taken}; at most {max(limit - taken, 0)} fit"
        )
    return inputs


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: str) -> BatchEncoding:
    if tokenizer.chat_template is None:
        return tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
