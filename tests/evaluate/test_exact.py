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


def mixed(model, count=10, begin=()):
    """Answers that greedy decoding writes, and the same with one token changed: the first, a middle one or the last;
    of several lengths, all after the same beginning. Returns them with what is right."""
    draw = random.Random(0)
    asked, right = [], []
    for number in range(count):
        prompt = [*begin, *(draw.randrange(3, 90) for _ in range(draw.choice((4, 5))))]
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


@pytest.mark.parametrize("name", CAUSAL)
def test_what_all_begin_with_is_read_once_and_changes_nothing(name):
    model = build(name)
    asked, right = mixed(model, begin=(7, 40, 12, 33, 8, 9))
    tokens = []
    embedding = model.get_input_embeddings()
    hook = embedding.register_forward_pre_hook(lambda _module, args: tokens.append(args[0].numel()))
    assert exact(model, asked) == right
    hook.remove()
    assert tokens == [6, len(asked) * (max(len(one.ids) for one in asked) - 1 - 6)]


def test_shorter_ones_are_filled_up_behind_and_no_batch_is_larger_than_it_may_be():
    model = build("llama")
    seen = []
    hook = model.get_input_embeddings().register_forward_pre_hook(lambda _module, args: seen.append(args[0].clone()))
    asked = [Expected(tuple(range(3, 3 + length)), 2) for length in (8, 5) for _ in range(BATCH + 3)]
    ticks = []
    exact(model, asked, ticks.append)
    hook.remove()
    first, *rest = seen
    assert first.tolist() == [[3, 4]]
    assert [tuple(ids.shape) for ids in rest] == [(BATCH, 2), (BATCH, 5), (6, 5)]
    assert {tuple(row.tolist()) for row in rest[1]} == {(5, 6, 7, 7, 7), (5, 6, 7, 8, 9)}
    assert ticks == [BATCH, BATCH, 6]


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
