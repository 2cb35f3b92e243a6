"""The parts of a mixture of experts that compute: the router, the experts, and the neurons of one expert."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import linear

from billhook.anatomy.types import Inner
from billhook.anatomy.vocabulary import DOWN, GATE_UP, UP
from billhook.plan.errors import InputError


@dataclass(frozen=True)
class Mixture:
    """Module paths. ``experts`` is called with tokens [n, hidden], the indices of the experts picked for each [n, k]
    and their weights [n, k]; ``router`` gives logits [n, experts], weights [n, k] and indices [n, k]. ``tensors`` are
    the parameters of the experts, entry e of each being expert e's; ``rows`` those of the router."""

    experts: str
    router: str
    tensors: tuple[str, ...]
    rows: tuple[str, ...]


def mixture_of(inner: Inner) -> Mixture:
    """Where a mixture is, by its inner units (of kind ``expert``)."""
    experts = next(s.parameter for s in inner.slices if s.writes).rpartition(".")[0]
    names = tuple(dict.fromkeys(s.parameter for s in inner.slices))
    tensors = tuple(n for n in names if n.startswith(f"{experts}."))
    rows = tuple(n for n in names if n not in tensors)
    return Mixture(experts, rows[0].rpartition(".")[0], tensors, rows)


def neuron_axes(model: nn.Module, mixture: Mixture) -> dict[str, tuple[int, int]]:
    """For each tensor of the experts: along which axis of one expert's entry its neurons lie, and in how many equal
    runs (2 where gate lies above up). InputError for experts laid out in another way."""
    module: Any = model.get_submodule(mixture.experts)
    plain = not getattr(module, "is_transposed", False) and getattr(module, "is_concatenated", True)
    known = {GATE_UP: (0, 2), UP: (0, 1), DOWN: (1, 1)}
    leaves = {name: name.rpartition(".")[2] for name in mixture.tensors}
    unknown = sorted(set(leaves.values()) - set(known))
    if not plain or unknown:
        reason = f"parameter {unknown[0]}" if unknown else "an interleaved or transposed layout"
        raise InputError(f"the neurons of {mixture.experts} are not known: it has {reason}")
    return {name: known[leaf] for name, leaf in leaves.items()}


def is_usual(experts: nn.Module) -> bool:
    """Whether gate lies above up and act(gate) * up is what goes to the write: transformers' own way, which a few
    classes replace."""
    module: Any = experts
    layout = getattr(module, "is_concatenated", False) and not getattr(module, "is_transposed", True)
    return bool(layout) and type(module)._apply_gate.__module__ == "transformers.integrations.moe"


def neuron_values(experts: nn.Module, number: int, tokens: Tensor) -> Tensor:
    """What the neurons of one expert hand to its write, for tokens [n, hidden]: [n, neurons]. For the layouts that
    ``neuron_axes`` knows."""
    module: Any = experts
    if hasattr(module, GATE_UP):
        values: Tensor = module._apply_gate(linear(tokens, getattr(module, GATE_UP)[number]))
        return values
    found: Tensor = module.act_fn(linear(tokens, getattr(module, UP)[number]))
    return found


def gated(experts: nn.Module) -> tuple[nn.Parameter, nn.Parameter]:
    """Gate above up [experts, 2 neurons, hidden] and down [experts, hidden, neurons], of experts whose gate
    ``is_usual``."""
    return experts.get_parameter(GATE_UP), experts.get_parameter(DOWN)
