"""Monte Carlo tree search finds what is worth finding, asks little, and repeats exactly."""

from __future__ import annotations

import torch
from families import build

from billhook.anatomy import discover
from billhook.search.chains import Sample, find_chains
from billhook.search.tree import tree_search


def test_it_finds_the_one_good_leaf_and_asks_for_each_state_once() -> None:
    asked: list[str] = []

    def reward(word: str) -> float:
        asked.append(word)
        return sum(a == b for a, b in zip(word, "abba", strict=False)) / 4

    def moves(word: str) -> list[str]:
        return [word + letter for letter in "abc"] if len(word) < 4 else []

    found = tree_search("", moves, reward, simulations=120, seed=3)
    assert found[0] == ("abba", 1.0)
    assert len(asked) == len(set(asked)) <= 121
    assert found == tree_search("", moves, reward, simulations=120, seed=3)


def test_more_is_spent_where_the_reward_is() -> None:
    def moves(state: tuple[int, ...]) -> list[tuple[int, ...]]:
        return [(*state, i) for i in range(3)]

    found = tree_search((), moves, lambda s: 1.0 if s[:1] == (1,) else 0.0, simulations=200, exploration=0.3)
    good = sum(state[:1] == (1,) for state, _ in found)
    assert good > 2 * (len(found) - good)


def test_a_chain_that_answers_is_found_and_a_shorter_one_is_worth_more() -> None:
    model = build("llama")
    anatomy = discover(model)
    prompt = torch.tensor([5, 9, 33, 12])
    with torch.no_grad():
        answer = model(prompt[None]).logits[0, -1:].argmax(-1)
    found = find_chains(model, anatomy, [Sample(prompt, answer)], simulations=60, price=0.1)
    own = next(chain for chain in found if chain.visits == tuple(range(5)))
    assert own.correct == 1.0
    assert own.reward == 1.0 - 0.1
    assert found[0].correct == 1.0
    assert found[0].reward == 1.0 - 0.1 * len(found[0].visits) / 5
    assert found[0].reward > own.reward
    with found[0].policy.attach(model, anatomy), torch.no_grad():
        assert model(prompt[None]).logits[0, -1].argmax() == answer
