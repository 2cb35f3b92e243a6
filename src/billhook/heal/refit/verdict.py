"""Whether new weights are kept: only if the whole model is nearer to the dense one on text that no fit saw."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from billhook.anatomy.types import Anatomy
from billhook.heal.healing import Healing, healed
from billhook.heal.refit.divergence import divergence
from billhook.heal.refit.peers import ALONE, Peers
from billhook.heal.refit.stepping import Stepper
from billhook.plan.plan import Plan
from billhook.surgery.simulate import simulate


def judged(
    model: nn.Module,
    anatomy: Anatomy,
    stepper: Stepper,
    held: list[Tensor],
    plan: Plan,
    healing: Healing,
    peers: Peers = ALONE,
) -> Healing:
    """The same healing with its distance from the dense model, and that of the cut alone, on the rows that were
    ``held`` back (bool a batch) of a stepper that has walked the stack, and of those of its ``peers``; without its
    tensors where it is no nearer.

    Cost: three runs of the batches that hold such rows."""
    if not healing.tensors:
        return healing
    changes = [simulate(model, anatomy, plan), healed_and_cut(model, anatomy, plan, healing)]
    return healing.judged(*divergence(stepper, anatomy, held, changes, peers))


@contextmanager
def healed_and_cut(model: nn.Module, anatomy: Anatomy, plan: Plan, healing: Healing) -> Iterator[None]:
    """Inside the context the model is cut, with the tensors of a healing."""
    with healed(model, healing), simulate(model, anatomy, plan):
        yield
