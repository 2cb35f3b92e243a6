"""What an MLP did to the stream, seen from outside."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from billhook.anatomy import Block
from billhook.anatomy.undo import Undo
from billhook.runtime.silence import Forward, place, stream_in, stream_out


class Watched:
    """The MLP of one block: the stream that it reads and what it writes, kept until they are taken.

    In a parallel block the stream after it is that before it with what it wrote; else it is what the block hands on.
    """

    def __init__(self, model: nn.Module, block: Block, undo: Undo) -> None:
        self.before: Tensor | None = None
        self._written: Tensor | None = None
        self._parallel = block.parallel
        mlp = next((sub for sub in block.sublayers if sub.kind == "mlp"), None)
        if mlp is None:
            return
        entry = mlp.norms[0] if mlp.norms and mlp.norms[0] != mlp.output else mlp.module
        place(model.get_submodule(entry), self._entering(model.get_submodule(entry).forward), undo)
        if block.parallel:
            place(model.get_submodule(mlp.output), self._leaving(model.get_submodule(mlp.output).forward), undo)

    def _entering(self, original: Forward) -> Forward:
        def forward(*args: Any, **kwargs: Any) -> Any:
            self.before = stream_in(*args, **kwargs)
            return original(*args, **kwargs)

        return forward

    def _leaving(self, original: Forward) -> Forward:
        def forward(*args: Any, **kwargs: Any) -> Any:
            output = original(*args, **kwargs)
            self._written = stream_out(output)
            return output

        return forward

    def taken(self, into: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
        """The stream before and after the MLP [batch, tokens, hidden]; forgets them."""
        before = into if self._parallel or self.before is None else self.before.reshape(out.shape)
        after = before + self._written.reshape(out.shape) if self._written is not None else out
        self.before = self._written = None
        return before, after
