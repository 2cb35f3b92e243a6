"""One file a strategy; the objective they ask; the ledger that survives a crash."""

from billhook.search.bandit import bandit
from billhook.search.baselines import at_random, evenly_kept, evenly_spaced, first, last, span
from billhook.search.evolve import Stage, evolve
from billhook.search.gates import gates
from billhook.search.greedy import greedy
from billhook.search.knapsack import knapsack
from billhook.search.ledger import Ledger, Memo
from billhook.search.objective import Objective
from billhook.search.one_shot import one_shot
from billhook.search.path import Found
from billhook.search.problem import Problem, pose
from billhook.search.sampled import sampled
from billhook.search.share import share
from billhook.search.until_cliff import greedy_until_cliff, ranked_until_cliff

__all__ = [
    "Found",
    "Ledger",
    "Memo",
    "Objective",
    "Problem",
    "Stage",
    "at_random",
    "bandit",
    "evenly_kept",
    "evenly_spaced",
    "evolve",
    "first",
    "gates",
    "greedy",
    "greedy_until_cliff",
    "knapsack",
    "last",
    "one_shot",
    "pose",
    "ranked_until_cliff",
    "sampled",
    "share",
    "span",
]
