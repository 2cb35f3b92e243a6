"""New weights, where they came from, and a way to put them on a model and take them off again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from billhook.anatomy import Anatomy
from billhook.anatomy.bridge import BRIDGE, build_bridge, require_no_bridges
from billhook.anatomy.undo import Undo
from billhook.models.adapter import Paths, attach
from billhook.plan.errors import InputError
from billhook.plan.plan import Plan
from billhook.plan.record import Graft, Refit
from billhook.surgery import apply


@dataclass(frozen=True)
class Healing:
    """``tensors`` are new weights by parameter name in the *original* model, in its dtype and on its device;
    ``left_alone`` names the write linears that were not tried, with the reason. ``work`` counts block-token forwards: a
    block that is run in parts counts once for the dense stream, for the healed one, and for its reads. (What it takes
    to find out how a linear or a norm reaches the stream, two more runs of the first batch, is left out, and so are the
    three runs of the held-back windows that judge the whole.) New weights that come with a choice have none: its search
    counts them.

    ``cut`` and ``healed`` are the distances of the cut and of the healed model from the dense one on the windows that
    no fit saw (see ``divergence``); None where nothing was refitted. A healing that made the model no better is
    ``refused``: its refits are on record, its tensors are gone. ``paths`` of low rank stand beside linears of what is
    left, which keeps their names; ``bridges`` behind blocks are among the tensors."""

    tensors: Mapping[str, Tensor]
    refits: tuple[Refit, ...]
    left_alone: Mapping[str, str]
    tokens: int
    work: int
    grafts: tuple[Graft, ...] = ()
    cut: float | None = None
    healed: float | None = None
    paths: Paths = field(default_factory=dict)

    @property
    def taken(self) -> int:
        return 0 if self.refused else sum(refit.taken for refit in self.refits)

    @property
    def refused(self) -> bool:
        return self.cut is not None and self.healed is not None and not self.healed < self.cut

    @property
    def bridges(self) -> dict[str, int]:
        """The path of each block that gets a bridge, and its rank."""
        return {name.removesuffix(_FIRST): len(a) for name, a in self.tensors.items() if name.endswith(_FIRST)}

    @property
    def beside(self) -> int:
        """Parameters that come in addition to those that the plan leaves."""
        added = [tensor for name, tensor in self.tensors.items() if f".{BRIDGE}." in name]
        return sum(tensor.numel() for tensor in (*added, *(t for pair in self.paths.values() for t in pair)))

    def judged(self, cut: float, healed: float) -> Healing:
        """With its distances from the dense model; without its tensors where it is no nearer."""
        found = replace(self, cut=cut, healed=healed)
        return replace(found, tensors={}) if found.refused else found


_FIRST = f".{BRIDGE}.reduce.weight"
UNTOUCHED = Healing({}, (), {}, 0, 0)


@contextmanager
def healed(model: nn.Module, healing: Healing) -> Iterator[nn.Module]:
    """Inside the context the original ``model`` has the new weights; leaving it, also by an exception, puts the very
    same old parameters back.

    Goes around the surgery: ``with healed(model, healing), simulate(model, anatomy, plan)`` is the cut and healed
    model; ``apply`` inside the context gives one that keeps the new weights for good.
    """
    undo = Undo()
    try:
        before = dict(model.named_parameters(remove_duplicate=False))
        if healing.bridges:
            require_no_bridges(model)
        for path, rank in healing.bridges.items():
            block = model.get_submodule(path)
            undo.then(build_bridge(block, healing.tensors[f"{path}{_FIRST}"].shape[1], rank).remove)
            undo.then(partial(delattr, block, BRIDGE))
        for name, tensor in healing.tensors.items():
            put(model, name, tensor, undo)
        new = {id(before[name]): model.get_parameter(name) for name in healing.tensors if name in before}
        for name, old in before.items():  # an embedding may be the head too
            if id(old) in new:
                path, _, leaf = name.rpartition(".")
                undo.set(model.get_submodule(path), leaf, new[id(old)])
        yield model
    finally:
        undo.restore()


def carried_out(model: Any, anatomy: Anatomy, plan: Plan, healing: Healing) -> Any:
    """What ``plan`` leaves of ``model``, with all that a healing brings; the model stays as it is."""
    with healed(model, healing):
        small = apply(model, anatomy, plan)
    attach(small, healing.paths)
    return small


def require_no_masks(plan: object, what: str) -> None:
    """InputError for a plan that sets single weights to zero: what finds new weights here knows nothing of masks."""
    if isinstance(plan, Plan) and plan.sparsities:
        raise InputError(
            f"{what} would count on weights of {plan.sparsities[0].unit} that the plan sets to zero; it takes plans "
            f"without masks (sparsegpt corrects the weights that stay itself)"
        )


def require_no_channels(plan: object, what: str) -> None:
    """InputError for a plan that cuts hidden channels: two streams of one width are what is walked here."""
    if isinstance(plan, Plan) and plan.channels:
        raise InputError(
            f"{what} takes plans that leave the stream as wide as it is; hidden channels go by closed-form"
        )


def put(model: nn.Module, name: str, tensor: Tensor, undo: Undo) -> None:
    """Exchange one parameter for another that holds ``tensor``, or give a linear the bias that it lacks."""
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    old = getattr(owner, leaf, None)
    like = owner.get_parameter("weight") if old is None else owner.get_parameter(leaf)
    undo.set(owner, leaf, nn.Parameter(tensor, requires_grad=like.requires_grad))
