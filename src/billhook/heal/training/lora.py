"""Low-rank adapters on the linears that stay, by ``peft``, wider where a block lost more."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from billhook.anatomy.low_rank import is_conv
from billhook.anatomy.types import Block
from billhook.heal.training.as_saved import merged_from, saved

LEAST = 4  # rank of a block that lost nothing
_NAME = "default"  # how peft calls an adapter


class Adapters:
    """LoRA (Hu et al., arXiv 2106.09685) on linears of a model, in place: W x becomes W x + 2 B A x with A [r, in],
    B [out, r] in float32; B begins at zero. ``parameters`` are A and B by name."""

    def __init__(
        self,
        model: nn.Module,
        paths: Sequence[str],
        ranks: dict[str, int],
        seed: int,
        shard: Callable[[str], None] | None = None,
    ) -> None:
        """``paths`` of all blocks of a stack; ``ranks``: module path of a linear in them -> its rank. ``shard`` is
        called for each block when it has its adapters.

        Only the list of blocks is shown to peft: where it sees the config of a whole model it knows, it has ideas of
        its own about which modules are meant."""
        self.model = model
        self.paths = list(paths)
        self.ranks = ranks
        blocks = paths[0].rpartition(".")[0]
        names = {path.removeprefix(f"{blocks}."): rank for path, rank in ranks.items()}
        pattern = {f"^{re.escape(name)}": rank for name, rank in names.items()}
        config = LoraConfig(
            r=LEAST,
            lora_alpha=2 * LEAST,
            target_modules=list(names),
            rank_pattern=pattern,
            alpha_pattern={key: 2 * rank for key, rank in pattern.items()},
            fan_in_fan_out=any(is_conv(model.get_submodule(path)) for path in ranks),
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            inject_adapter_in_model(config, model.get_submodule(blocks))
        adapters = [name for name, _ in model.named_parameters() if ".lora_" in name]
        model.requires_grad_(False)
        for name in adapters:
            parameter = model.get_parameter(name)
            parameter.data = parameter.data.float()
            parameter.requires_grad = True
        if shard is not None:
            for path in paths:
                shard(path)
        self.names = adapters
        self.parameters = {name: model.get_parameter(name) for name in adapters}

    def merged_in(self, path: str) -> dict[str, Tensor]:
        """The weights of a block with their adapters added, by name in the model without adapters."""
        new = {}
        for linear in (linear for linear in self.ranks if linear.startswith(f"{path}.")):
            layer: Any = self.model.get_submodule(linear)
            old = layer.get_base_layer().weight
            new[f"{linear}.weight"] = (old.float() + layer.get_delta_weight(_NAME).float()).to(old.dtype)
        return new

    def place(self, name: str) -> str:
        linear, _, leaf = name.rpartition(".")
        return f"{linear}.base_layer.{leaf}"

    def snapshot(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    def outcome(self, snapshot: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return merged_from(self, snapshot)

    @contextmanager
    def saved(self) -> Iterator[None]:
        """Inside the context the model computes with the merged weights, exactly as it will be saved."""
        layers: list[Any] = [self.model.get_submodule(linear) for linear in self.ranks]
        try:
            for layer in layers:
                layer.enable_adapters(False)
            with saved(self):
                yield
        finally:
            for layer in layers:
                layer.enable_adapters(True)


def ranks_by_loss(lost: Sequence[float], mean: int) -> list[int]:
    """A rank for each block, in proportion to what it lost, ``mean`` on average and ``LEAST`` at least.

    As CFSP (arXiv 2409.13199) gives more training capacity to blocks that matter more; what a block lost is here the
    relative error of the stream after it, which those behind a gap share. (Demo model, six blocks gone, ``distill`` on
    24,576 tokens, once each: perplexity on WikiText-2 and C4 37.26 and 53.59 so, 37.38 and 53.63 with ranks all alike,
    38.28 and 53.23 by how much the error rises in the block.) All alike where nothing was lost.
    """
    total = sum(lost)
    if total <= 0:
        return [mean] * len(lost)
    spare = max(0, mean - LEAST) * len(lost)
    exact = [spare * loss / total for loss in lost]
    ranks = [int(share) for share in exact]
    left = spare - sum(ranks)
    for i in sorted(range(len(lost)), key=lambda i: (ranks[i] - exact[i], i))[:left]:
        ranks[i] += 1
    return [min(LEAST, mean) + rank for rank in ranks]


def linears(model: nn.Module, block: Block, old: str, new: str) -> list[str]:
    """Paths of the linears of a block through which its sublayers read and write, as far as they are still there:
    ``old`` is the path of the block in the original model, ``new`` in this one. Fused experts are none."""
    found = []
    for sublayer in block.sublayers:
        for name in (*sublayer.reads, *sublayer.writes):
            path = new + name.removeprefix(old).removesuffix(".weight")
            try:
                module = model.get_submodule(path)
            except AttributeError:
                continue  # the sublayer is gone, or the name is that of a tensor of experts
            if isinstance(module, nn.Linear) or is_conv(module):
                found.append(path)
    return found
