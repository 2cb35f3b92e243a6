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
    post-trained model back to their pretrained weights to win back diversity. It chooses the range on a proxy task of
    random characters; which blocks is here the caller's choice. Cost: none. InputError unless both models have the same
    parameters, and for anything but whole blocks.
    """
    _require_same(model, base)
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

    Source: LiNeS (arXiv 2410.17146), eq. 2. What lies before the blocks (embeddings) is scaled as the first block, all
    else outside of them (last norm, head) as the last; an embedding that is the head too, as the first. Each stack has
    a depth of its own. Cost: the weights once. InputError unless both models have the same parameters.
    """
    _require_same(model, base)
    depth: dict[str, float] = {}
    for stack in anatomy.stacks:
        for number, block in enumerate(stack.blocks):
            inside = [name for name, _ in model.get_submodule(block.path).named_parameters()]
            depth |= {f"{block.path}.{name}": number / max(len(stack.blocks) - 1, 1) for name in inside}
    embedding = f"{anatomy.embedding}." if anatomy.embedding else None
    tensors = {}
    for name, parameter in model.named_parameters():
        place = depth.get(name, 0.0 if _before(name, embedding) else 1.0)
        origin = base.get_parameter(name).detach().float()
        change = parameter.detach().float() - origin
        tensors[name] = (origin + (alpha + beta * place) * change).to(parameter.dtype)
    return Healing(tensors, (), {}, 0, 0)


def _before(name: str, embedding: str | None) -> bool:
    return (embedding is not None and name.startswith(embedding)) or "embed" in name.rpartition(".")[0]


def _require_same(model: nn.Module, base: nn.Module) -> None:
    ours, theirs = ({name: p.shape for name, p in m.named_parameters()} for m in (model, base))
    odd = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
    if odd:
        raise InputError(f"the base is another architecture: parameter {odd[0]} is not the same in both models")
