"""How much each unit matters: one function a criterion, high is important.

A unit that the calibration never reached has no score: it is unknown, and nothing may drop it for that.
"""

from billhook.scores.angular import angular, best_span
from billhook.scores.block_influence import block_influence
from billhook.scores.divergence import divergence
from billhook.scores.position_weighted import position_weighted
from billhook.scores.registry import SCORES, Score, Unit, named, score
from billhook.scores.update_norm import update_norm

__all__ = [
    "SCORES",
    "Score",
    "Unit",
    "angular",
    "best_span",
    "block_influence",
    "divergence",
    "named",
    "position_weighted",
    "score",
    "update_norm",
]
