from __future__ import annotations

import math
import random

import pytest
import torch
from conftest import make_tokenizer
from families import FAMILIES, build

from billhook.evaluate.exact import BATCH, Expected, exact, expected
from billhook.plan.errors import InputError

CAUSAL = [name for name, family in FAMILIES.items() if family.generates and list(family.stacks) == ["decoder"]]


def greedy(model, prompt, steps):
    """Token by token, one sequence, no cache."""
    ids = torch.tensor([prompt])
    with torch.no_grad():
        for _ in range(steps):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    return ids[0, len(prompt) :].tolist()


def mixed(model, count=10):
    """Answers that greedy decoding writes, and the same with one token changed: the first, a middle one or the last;
    of several lengths. Returns them with what is right."""
    draw = random.Random(0)
    asked, right = [], []
    for number in range(count):
        prompt = [draw.randrange(3, 90) for _ in range(draw.choice((4, 5)))]
        answer = greedy(model, prompt, 3 - number % 2)
        changed = draw.randrange(-1, len(answer))
        if changed >= 0:
            answer[changed] = 3 + (answer[changed] + 1) % 80
        asked.append(Expected((*prompt, *answer), len(answer)))
        right.append(changed < 0)
    assert 0 < sum(right) < count
    return asked, right


@pytest.mark.parametrize("name", CAUSAL)
def test_right_is_what_greedy_decoding_writes(name):
    model = build(name)
    asked, right = mixed(model)
    assert exact(model, asked) == right
    assert [exact(model, [one])[0] for one in asked] == right  # alone as in company


def test_nothing_is_padded_and_no_batch_is_larger_than_it_may_be():
    model = build("llama")
    seen = []
    hook = model.get_decoder().register_forward_pre_hook(
        lambda _m, args, kwargs: seen.append((args[0] if args else kwargs["input_ids"]).clone()), with_kwargs=True
    )
    asked = [Expected(tuple(range(3, 3 + length)), 2) for length in (5, 8) for _ in range(BATCH + 3)]
    ticks = []
    exact(model, asked, ticks.append)
    hook.remove()
    assert {ids.shape[1] for ids in seen} == {4, 7}
    assert max(ids.shape[0] for ids in seen) == BATCH
    assert all(set(row.tolist()) == set(range(3, 3 + ids.shape[1])) for ids in seen for row in ids)
    assert ticks == [BATCH, 3, BATCH, 3]


@pytest.mark.parametrize("add_bos", [False, True])
def test_answers_begin_where_the_prompt_ends(add_bos):
    tokenizer = make_tokenizer(add_bos)
    found = expected(tokenizer, "12 + 3 =", " 15\n")
    assert tokenizer.decode(found.ids[-found.answer :]) == " 15\n"
    assert tokenizer.decode(found.ids, skip_special_tokens=True) == "12 + 3 = 15\n"
    assert found.ids.count(1) == (found.ids[0] == 1) == add_bos


def test_a_token_that_reaches_over_the_border_belongs_to_the_answer():
    class Pairs:
        """Two letters a token."""

        def __call__(self, text, add_special_tokens=True):
            return type("Encoding", (), {"input_ids": [hash(text[i : i + 2]) for i in range(0, len(text), 2)]})

    assert expected(Pairs(), "abc", "def").answer == 2  # ab | cd ef
    assert expected(Pairs(), "abcd", "ef").answer == 1


def test_an_answer_without_tokens_is_refused(tiny_tokenizer):
    with pytest.raises(InputError, match="no tokens for the answer '' after 'a'"):
        expected(tiny_tokenizer, "a", "")


def test_nan_is_no_answer():
    model = build("llama")
    model.get_output_embeddings().weight.data[5] = math.nan
    with pytest.raises(InputError, match="a logit of LlamaForCausalLM is nan"):
        exact(model, [Expected((3, 4, 5), 1)])


def test_flags_are_left_as_they_were():
    model = build("llama").train()
    exact(model, [Expected((3, 4, 5), 1)])
    assert all(module.training for module in model.modules())
