"""Changes to a live model, and the way back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

_NOTHING: Any = object()
_HOOKED = "_output_capturing_hooks_installed"  # how transformers marks a model that has its hooks


class Undo:
    """What was changed, and how to change it back in reverse order."""

    def __init__(self) -> None:
        self._steps: list[Callable[[], None]] = []

    def then(self, step: Callable[[], None]) -> None:
        """Note a way back of something that is done elsewhere."""
        self._steps.append(step)

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Change an attribute, or give the owner one."""
        old = getattr(owner, name, _NOTHING)
        setattr(owner, name, value)
        self._steps.append(lambda: delattr(owner, name) if old is _NOTHING else setattr(owner, name, old))

    def own(self, owner: Any, name: str, value: Any) -> None:
        """Give an instance an attribute of its own, where its class may have another."""
        old = vars(owner).get(name, _NOTHING)
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


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """In evaluation mode and without gradients for its weights; both are put back."""
    training = [module for module in model.modules() if module.training]
    wanting = [weight for weight in model.parameters() if weight.requires_grad]
    for module in training:
        module.training = False
    for weight in wanting:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in wanting:
            weight.requires_grad_(True)
        for module in training:
            module.training = True
