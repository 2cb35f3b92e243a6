"""The matrices of a sublayer: what single weights can be taken out of."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from billhook.anatomy.low_rank import is_conv
from billhook.anatomy.types import Sublayer


@dataclass(frozen=True)
class Linear:
    """One weight of a sublayer: ``name`` in the live model, ``inside`` its block, and the axis of its inputs. Stacked
    experts [experts, ., .] are one linear."""

    name: str
    inside: str
    axis: int

    def rows(self, weight: Tensor) -> Tensor:
        """As [outputs, inputs], those of stacked experts one below the other: a view, or a copy where it must be."""
        moved = weight.movedim(self.axis, -1)
        return moved.reshape(-1, moved.shape[-1])

    def whole(self, rows: Tensor, like: Tensor) -> Tensor:
        """The way back from ``rows``, into the shape of ``like``."""
        return rows.reshape(like.movedim(self.axis, -1).shape).movedim(-1, self.axis).contiguous()


def linears(model: nn.Module, sublayer: Sublayer, block: str) -> tuple[Linear, ...]:
    """Every linear of a sublayer, those between its own parts included (the second step of a low-rank query), in the
    order of the model. Left out: routers, embeddings of positions, norms. ``block`` is the path of the block."""
    found = {}
    for cut in sublayer.cuts:
        for path, module in model.get_submodule(cut.path).named_modules(prefix=cut.path):
            for leaf, weight in module.named_parameters(recurse=False):
                axis = _inputs(module, path, weight)
                if axis is not None:
                    name = f"{path}.{leaf}"
                    found[name] = Linear(name, name.removeprefix(f"{block}."), axis)
    return tuple(found.values())


def _inputs(module: nn.Module, path: str, weight: Tensor) -> int | None:
    """The axis of the inputs; None for what is no linear."""
    if isinstance(module, nn.Linear) and weight.ndim == 2:
        return 1
    if is_conv(module) and weight.ndim == 2:
        return 0
    if path.rpartition(".")[2] == "experts" and weight.ndim == 3:
        return 1 if getattr(module, "is_transposed", False) else 2
    return None
