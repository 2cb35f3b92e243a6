"""How much each unit matters: one function a criterion, high is important.

A unit that the calibration never reached has no score: it is unknown, and nothing may drop it for that.
"""

from billhook.scores.activation import activation
from billhook.scores.angular import angular
from billhook.scores.block_influence import block_influence
from billhook.scores.condition import condition
from billhook.scores.divergence import divergence
from billhook.scores.feature_merging import feature_merging
from billhook.scores.fluctuation import fluctuation
from billhook.scores.knockout import knockout
from billhook.scores.lora_importance import lora_importance
from billhook.scores.magnitude import magnitude
from billhook.scores.parameter_statistics import parameter_statistics
from billhook.scores.peak_magnitude import peak_magnitude, peak_magnitude_activation
from billhook.scores.position_weighted import position_weighted
from billhook.scores.registry import SCORES, InnerUnit, Score, Unit, named, score
from billhook.scores.routing_frequency import routing_frequency
from billhook.scores.stream import stream_activation, stream_reads
from billhook.scores.taylor import fisher, taylor
from billhook.scores.update_norm import update_norm
from billhook.scores.wanda import wanda_structured

__all__ = [
    "SCORES",
    "InnerUnit",
    "Score",
    "Unit",
    "activation",
    "angular",
    "block_influence",
    "condition",
    "divergence",
    "feature_merging",
    "fisher",
    "fluctuation",
    "knockout",
    "lora_importance",
    "magnitude",
    "named",
    "parameter_statistics",
    "peak_magnitude",
    "peak_magnitude_activation",
    "position_weighted",
    "routing_frequency",
    "score",
    "stream_activation",
    "stream_reads",
    "taylor",
    "update_norm",
    "wanda_structured",
]
