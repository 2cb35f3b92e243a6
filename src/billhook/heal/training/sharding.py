"""A training that no device could hold alone: each process has a part of every block (FSDP2)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from billhook.plan.errors import InputError

Lent = list[tuple[nn.Module, str, nn.Module, str]]
"""A weight's owner and name in a block of the teacher, and in that of the student that has it."""


class Shards:
    """The blocks of a student and of its teacher on a ``mesh`` of one dimension: each process holds a part of every
    weight and gathers a block's for as long as it runs. What is outside of blocks is whole everywhere.

    A weight that student and teacher have in common is held once, by the block of the student; the block of the
    teacher has it gathered, borrows it, and gives it back.
    """

    def __init__(self, model: Any, teacher: Any | None, mesh: DeviceMesh) -> None:
        self._model, self._teacher, self._mesh = model, teacher, mesh

    def take(self, path: str, origin: str) -> None:
        """Shard a block of the student, and lend it to the teacher's at ``origin``. InputError for a weight without
        dimensions: there is nothing to share out."""
        block = self._model.get_submodule(path)
        lent = [] if self._teacher is None else _common(self._teacher.get_submodule(origin), block)
        self._shard(block, path)
        if lent:
            assert isinstance(block, FSDPModule)
            _lend(self._teacher.get_submodule(origin), block, lent)  # type: ignore[union-attr]

    def close(self, origins: Iterable[str]) -> None:
        """After all blocks of the student: those of the teacher, with what is their own, and the stacks around them."""
        sides = [self._model]
        if self._teacher is not None:
            sides.append(self._teacher)
            for path in origins:
                self._shard(self._teacher.get_submodule(path), path)
        for side in sides:
            trunk = side.get_decoder()
            fully_shard(trunk, mesh=self._mesh, ignored_params=set(trunk.parameters()))

    def _shard(self, block: nn.Module, path: str) -> None:
        for name, parameter in block.named_parameters():
            if parameter.ndim == 0:
                raise InputError(f"{path}.{name} is a single number, which cannot be shared out; train without fsdp")
        fully_shard(block, mesh=self._mesh, reshard_after_forward=True)


@contextmanager
def gathered(block: nn.Module) -> Iterator[None]:
    """Inside the context all weights of a block are whole."""
    if isinstance(block, FSDPModule):
        block.unshard()
    try:
        yield
    finally:
        if isinstance(block, FSDPModule):
            block.reshard()


def whole(tensor: Tensor) -> Tensor:
    """A tensor of which each process may have a part; all must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part(tensor: Tensor, like: Tensor) -> Tensor:
    """Of a whole tensor what goes with another, which may be shared out: on its device, in its way."""
    if isinstance(like, DTensor):
        placed = tensor.to(like.device)
        return distribute_tensor(placed, like.device_mesh, like.placements, src_data_rank=None)
    return tensor.to(like.device)


@contextmanager
def resting(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Inside the context these tensors lie in the memory of the host, so that devices have room for the shards."""
    places = [tensor.device for tensor in tensors]
    try:
        for tensor in tensors:
            tensor.data = tensor.data.cpu()
        yield
    finally:
        for tensor, device in zip(tensors, places, strict=True):
            tensor.data = tensor.data.to(device)


def _common(teacher: nn.Module, student: nn.Module) -> Lent:
    has = {id(parameter): (owner, name) for owner, name, parameter in _owned(student)}
    return [(owner, name, *has[id(parameter)]) for owner, name, parameter in _owned(teacher) if id(parameter) in has]


def _owned(block: nn.Module) -> list[tuple[nn.Module, str, nn.Parameter]]:
    return [(owner, name, p) for owner in block.modules() for name, p in owner.named_parameters(recurse=False)]


def _lend(teacher: nn.Module, student: FSDPModule, lent: Lent) -> None:
    def lack(*_: Any) -> None:
        for owner, name, _from, _as in lent:
            owner.register_parameter(name, None)
        student.reshard()

    def borrow(*_: Any) -> None:
        student.unshard()
        for owner, name, holder, its_name in lent:
            owner.register_parameter(name, holder.get_parameter(its_name))

    lack()
    teacher.register_forward_pre_hook(borrow)
    teacher.register_forward_hook(lack, always_call=True)
