"""The one mechanism behind ``simulate`` and ``apply``: cutting a live model in place, with a way back."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from billhook.anatomy import Anatomy, Stack
from billhook.anatomy.config import owners, resolve, shortened
from billhook.plan.address import Address
from billhook.plan.check import check, normalise, survivors
from billhook.plan.plan import Keep, Plan
from billhook.plan.widths import narrowing
from billhook.surgery.narrow import narrow, state
from billhook.surgery.slots import assign_slots
from billhook.surgery.stubs import STUBS

_NOTHING: Any = object()
_HOOKED = "_output_capturing_hooks_installed"  # how transformers marks a model that has its hooks


class Undo:
    """What was changed, and how to change it back in reverse order."""

    def __init__(self) -> None:
        self._steps: list[Callable[[], None]] = []

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Change an attribute, or give the owner one."""
        old = getattr(owner, name, _NOTHING)
        setattr(owner, name, value)
        self._steps.append(lambda: delattr(owner, name) if old is _NOTHING else setattr(owner, name, old))

    def swap(self, model: nn.Module, path: str, module: nn.Module) -> None:
        """Put another module in the place of a submodule."""
        parent, _, name = path.rpartition(".")
        modules = model.get_submodule(parent)._modules
        old = modules[name]
        modules[name] = module
        self._steps.append(lambda: modules.__setitem__(name, old))

    def guard_hooks(self, model: nn.Module) -> None:
        """Take away the hooks that transformers puts on a model the first time it is asked for hidden states. It never
        looks again, so hooks put on a shortened model would miss the other blocks for ever."""
        before = {module: set(module._forward_hooks) for module in model.modules()}
        unmarked = [module for module in before if _HOOKED not in vars(module)]

        def unhook() -> None:
            if not any(_HOOKED in vars(module) for module in unmarked):
                return
            for module in unmarked:
                vars(module).pop(_HOOKED, None)
            for module, known in before.items():
                for key, hook in list(module._forward_hooks.items()):
                    if key not in known and getattr(hook, "__name__", "") == "output_capturing_hook":
                        del module._forward_hooks[key]

        self._steps.append(unhook)

    def restore(self) -> None:
        while self._steps:
            self._steps.pop()()


def drops_of(plan: Plan | Iterable[Address], anatomy: Anatomy) -> frozenset[Address]:
    """The units that a plan drops, checked against the model and in shortest form."""
    if not isinstance(plan, Plan):
        plan = Plan.of(plan)
    check(plan, anatomy.outline)
    return normalise(plan.drops, anatomy.outline)


def keeps_of(plan: Plan | Iterable[Address], anatomy: Anatomy) -> tuple[Keep, ...]:
    """The keeps of a (checked) plan that remove anything."""
    return narrowing(plan.keeps, anatomy.outline) if isinstance(plan, Plan) else ()


def cut(model: nn.Module, anatomy: Anatomy, drops: frozenset[Address], keeps: tuple[Keep, ...], undo: Undo) -> None:
    """Carry out a whole plan in place. Afterwards the model is what its stock class would build from the new config,
    but for the stubs and for widths that differ from block to block."""
    state(model, anatomy, keeps, drops, undo.set)
    narrow(model, anatomy, keeps, undo.set)
    drop(model, anatomy, drops, undo)


def drop(model: nn.Module, anatomy: Anatomy, drops: frozenset[Address], undo: Undo) -> None:
    """Drop units in place: stubs for sublayers, shorter lists for blocks, then configs and cache slots that fit.

    No weight is copied or changed.
    """
    for address in sorted(a for a in drops if a.sublayer is not None):
        for cut in anatomy.sublayer(address).cuts:
            undo.swap(model, cut.path, STUBS[cut.stub]())
    for stack in anatomy.stacks:
        if any(a.stack == stack.name for a in drops):
            _shorten(model, stack, survivors(drops, anatomy.outline, stack.name), undo)
            assign_slots(model, stack, drops, undo.set)


def _shorten(model: nn.Module, stack: Stack, kept: list[int], undo: Undo) -> None:
    if len(kept) == len(stack.blocks):
        return
    blocks = [model.get_submodule(stack.blocks[i].path) for i in kept]
    undo.swap(model, stack.path, nn.ModuleList(blocks))
    for path, keys in owners(stack).items():
        config = resolve(model, path)
        for key, value in shortened(config, keys, kept, len(stack.blocks)).items():
            undo.set(config, key, value)
