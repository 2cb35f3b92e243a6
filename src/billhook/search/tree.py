"""Monte Carlo tree search over anything that has moves and a reward."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

State = TypeVar("State", bound=Hashable)


@dataclass
class _Node(Generic[State]):
    state: State
    parent: _Node[State] | None
    untried: list[State]
    children: list[_Node[State]] = field(default_factory=list)
    visits: int = 0
    total: float = 0.0

    def bound(self, exploration: float) -> float:
        """The upper confidence bound UCB1 (Auer et al. 2002): mean + c sqrt(ln(parent's visits) / visits)."""
        assert self.parent is not None
        return self.total / self.visits + exploration * math.sqrt(math.log(self.parent.visits) / self.visits)


def tree_search(
    root: State,
    moves: Callable[[State], Sequence[State]],
    reward: Callable[[State], float],
    *,
    simulations: int,
    exploration: float = 0.5,
    seed: int = 0,
) -> list[tuple[State, float]]:
    """All states looked at with their rewards, best first; of equal ones the one found first.

    Each simulation goes down from the root by UCT (Kocsis and Szepesvari 2006) to a node with moves untried, tries one
    of them at random, and hands its reward up. There is no rollout: a state's own reward is known, so nothing is played
    out at random. A state reached along two ways is two nodes but asked for its reward once, which is what costs: at
    most ``simulations`` + 1 rewards. The same seed gives the same search. Rewards should lie between 0 and 1, which is
    what ``exploration`` (c) is scaled for.
    """
    draw = random.Random(seed)
    known: dict[State, float] = {}

    def looked(state: State) -> float:
        if state not in known:
            known[state] = reward(state)
        return known[state]

    def node(state: State, parent: _Node[State] | None) -> _Node[State]:
        untried = list(moves(state))
        draw.shuffle(untried)
        return _Node(state, parent, untried)

    top = node(root, None)
    _hand_up(top, looked(root))
    for _ in range(simulations):
        here = top
        while not here.untried and here.children:
            here = max(here.children, key=lambda child: child.bound(exploration))
        if here.untried:
            here.children.append(node(here.untried.pop(), here))
            here = here.children[-1]
        _hand_up(here, looked(here.state))
    return sorted(known.items(), key=lambda pair: -pair[1])


def _hand_up(node: _Node[State] | None, reward: float) -> None:
    while node is not None:
        node.visits += 1
        node.total += reward
        node = node.parent
