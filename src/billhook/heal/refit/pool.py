"""The neurons of two MLPs of the same shape, laid side by side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from billhook.anatomy.low_rank import is_conv, matrix
from billhook.heal.refit.writes import Write


def rows(linear: nn.Module) -> dict[str, Tensor]:
    """The parameters of a linear by their names in it, one output a row (a transposed weight turned round)."""
    bias: Any = getattr(linear, "bias", None)
    found = {"weight": matrix(linear)}
    return found if bias is None else found | {"bias": bias.detach()}


@dataclass(frozen=True)
class Pool:
    """``reads`` holds, by the names of an MLP's parameters, one row a neuron: first its own n, then those of another.
    ``columns`` [2 n, o] is what they write, ``transposed`` names the weights that are kept the other way round."""

    reads: Mapping[str, Tensor]
    columns: Tensor
    transposed: frozenset[str]

    @staticmethod
    def of(
        own: Mapping[str, nn.Module],
        other: Mapping[str, nn.Module],
        changed: Mapping[str, Tensor],
        write: Write,
        source: nn.Module,
    ) -> Pool:
        """``changed`` are weights to be taken for those that ``other`` has, by name; ``source`` is the other write."""
        found: dict[str, Tensor] = {}
        turned = {name for name, linear in own.items() if is_conv(linear)}
        for (name, mine), (there, theirs) in zip(own.items(), other.items(), strict=True):
            lent = rows(theirs)
            if there in changed:
                lent["weight"] = changed[there].T if name in turned else changed[there]
            for leaf, tensor in rows(mine).items():
                found[f"{name.removesuffix('weight')}{leaf}"] = torch.cat([tensor, lent[leaf]])
        columns = torch.cat([rows(write.linear)["weight"].T, rows(source)["weight"].T])
        return Pool(found, columns, frozenset(turned | ({write.weight} if write.transposed else set())))

    def chosen(self, neurons: Tensor) -> dict[str, Tensor]:
        """The parameters of the reads for these neurons."""
        return {
            name: (tensor[neurons].T if name in self.transposed else tensor[neurons]).contiguous()
            for name, tensor in self.reads.items()
        }

    def writing(self, neurons: Tensor, write: Write) -> dict[str, Tensor]:
        """The weight of the write for these neurons."""
        columns = self.columns[neurons]
        return {write.weight: (columns if write.transposed else columns.T).contiguous()}
