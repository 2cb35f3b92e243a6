"""Two models of one architecture, a base and one trained on from it: parts of the way back."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from billhook.anatomy.types import Anatomy
from billhook.heal.healing import Healing
from billhook.plan.address import Address
from billhook.plan.errors import InputError


def restore(model: nn.Module, anatomy: Anatomy, base: nn.Module, blocks: Iterable[Address]) -> Healing:
    """The parameters of these blocks as they are in ``base``.

    Source: selective layer restoration ("Not All Layers Need Tuning"), which puts a contiguous range of layers of a
    post-trained model back to their pretrained weights to win back diversity. Which blocks is here the caller's choice;
    ``search.restored_span`` finds a range. Cost: none. InputError unless both models have the same parameters, and for
    anything but whole blocks.
    """
    require_same(model, base)
    tensors: dict[str, Tensor] = {}
    for address in sorted(set(blocks)):
        if address.sublayer is not None or address.block >= len(anatomy.stack(address.stack).blocks):
            raise InputError(f"{address} cannot be restored: name whole blocks of the model")
        path = anatomy.block(address).path
        tensors |= {
            f"{path}.{name}": base.get_parameter(f"{path}.{name}").detach().clone()
            for name, _ in model.get_submodule(path).named_parameters()
        }
    return Healing(tensors, (), {}, 0, 0)


def scale_updates(
    model: nn.Module, anatomy: Anatomy, base: nn.Module, alpha: float = 0.0, beta: float = 1.0
) -> Healing:
    """What training changed, scaled by depth: W = W_base + s (W - W_base), with s = alpha + beta l / (L - 1) in block
    l of L, so that early blocks stay near the base and late ones keep what they learned.

    Source: LiNeS (arXiv 2410.17146), eq. 2. Embeddings (of tokens, positions, patches) are scaled as the first block,
    all else outside of the blocks (last norm, head) as the last; an embedding that is the head too, as the first. Each
    stack has a depth of its own. Cost: the weights once. InputError unless both models have the same parameters.
    """
    require_same(model, base)
    share: dict[str, float] = {}
    for address, kept in shares(anatomy, alpha, beta).items():
        path = anatomy.block(address).path
        share |= {f"{path}.{name}": kept for name, _ in model.get_submodule(path).named_parameters()}
    tensors = {}
    for name, parameter in model.named_parameters():
        kept = share.get(name, alpha if _embeds(model, name) else alpha + beta)
        origin = base.get_parameter(name).detach().float()
        change = parameter.detach().float() - origin
        tensors[name] = (origin + kept * change).to(parameter.dtype)
    return Healing(tensors, (), {}, 0, 0)


def shares(anatomy: Anatomy, alpha: float = 0.0, beta: float = 1.0) -> dict[Address, float]:
    """What ``scale_updates`` keeps of the change in each block."""
    return {
        block.address: alpha + beta * number / max(len(stack.blocks) - 1, 1)
        for stack in anatomy.stacks
        for number, block in enumerate(stack.blocks)
    }


def _embeds(model: nn.Module, name: str) -> bool:
    path = name.rpartition(".")[0]
    return isinstance(model.get_submodule(path), nn.Embedding) or "embed" in path


def require_same(model: nn.Module, base: nn.Module) -> None:
    """InputError unless both models have parameters of the same names and shapes."""
    ours, theirs = ({name: p.shape for name, p in m.named_parameters()} for m in (model, base))
    odd = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
    if odd:
        raise InputError(f"the base is another architecture: parameter {odd[0]} is not the same in both models")
