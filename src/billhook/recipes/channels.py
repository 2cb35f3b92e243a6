"""From the words of a recipe to the hidden channels that stay."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from billhook.data import Windows
from billhook.measure.stream import StreamTrace, stream_trace
from billhook.plan.budget import realised
from billhook.plan.plan import HiddenChannels
from billhook.plan.record import SearchRecord, Step
from billhook.recipes.choices import Thinned
from billhook.recipes.once import Once
from billhook.recipes.opened import Opened
from billhook.recipes.schema import Recipe
from billhook.scores import named
from billhook.search.channels import ChannelProblem, even_channels, most_important, random_channels

Progress = Callable[[str, int, int], None]


def choose_channels(
    recipe: Recipe,
    model: Opened,
    problem: ChannelProblem,
    windows: Windows,
    once: Once,
    *,
    seed: int,
    progress: Progress | None,
) -> tuple[HiddenChannels, SearchRecord, dict[str, dict[str, float]]]:
    """What stays and its record. A channel runs through all blocks, so there is no importance of a block.
    Statistics that ``once`` knows already cost nothing."""
    objective, work = "none", 0
    if isinstance(recipe.choice, Thinned):
        score = named(recipe.score.word if recipe.score else "")
        trace, work = once("stream", partial(_measured, model, windows, progress))
        scores = score.function(trace, model.anatomy, **score.check(recipe.score_parameters))
        edit, objective = most_important(problem, scores[problem.stack]), score.name
    elif recipe.choice.word == "random":
        edit = random_channels(problem, seed)
    else:
        edit = even_channels(problem)
    done = realised(problem.costs, problem.dense)
    step = Step(units=(f"{problem.stack} channels",), score=None, objective=None, realised=done, work=work)
    return edit, SearchRecord(recipe=recipe.name, objective=objective, steps=(step,), work=work, evaluations=0), {}


def _measured(model: Opened, windows: Windows, progress: Progress | None) -> tuple[StreamTrace, int]:
    trace = stream_trace(model.model, model.anatomy, windows, progress)
    return trace, trace.work
