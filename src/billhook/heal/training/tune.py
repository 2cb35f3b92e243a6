"""The smallest parts of a model that can be trained: its biases, its norms, the scales of its linears."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from torch import nn

SUFFICES = 0.9  # of what the largest subset gains, a smaller one is taken for


def subsets(model: nn.Module, paths: Iterable[str], scales: Sequence[str] = ()) -> list[list[str]]:
    """Names of the vectors in the blocks at ``paths``, least expressive first: the biases of linears, the norms (and
    whatever else is a vector), both, and these with the ``scales`` (see ``scales_of``); a subset that is empty or
    equals another is left out.

    Source: PERP (arXiv 2312.15230), section 3: training biases and norms alone, well under 1% of the parameters,
    restores most of what pruning took.
    """
    vectors = {
        f"{path}.{name}": parameter.ndim == 1
        for path in paths
        for name, parameter in model.get_submodule(path).named_parameters()
    }
    names = [name for name, vector in vectors.items() if vector]
    biases = [name for name in names if name.endswith("bias") and f"{name.removesuffix('bias')}weight" not in names]
    norms = [name for name in names if name not in biases]
    found: list[list[str]] = []
    for subset in (biases, norms, names, [*names, *scales]):
        if subset and subset not in found:
            found.append(subset)
    return found


def least_expressive(found: Sequence[list[str]], gain: Callable[[list[str]], float]) -> list[str]:
    """The first subset that gains nearly as much as the last: 90% of it. ``gain`` trains a little with one."""
    if len(found) == 1:
        return found[0]
    whole = gain(found[-1])
    return next((subset for subset in found[:-1] if whole > 0 and gain(subset) >= SUFFICES * whole), found[-1])
