"""Experts made of an MLP's neurons, chosen for all blocks at once by a router that looks before the first of them."""

from __future__ import annotations

from typing import Annotated, ClassVar, Self

from pydantic import Field, PrivateAttr
from torch import Tensor
from transformers import PreTrainedModel

from billhook.anatomy import Anatomy, Block
from billhook.anatomy.types import Inner
from billhook.anatomy.undo import Undo
from billhook.data import Windows
from billhook.plan.address import Address
from billhook.plan.errors import InputError
from billhook.runtime.attached import Attached
from billhook.runtime.counts import Counts
from billhook.runtime.fewer_neurons import Route, neurons_of, run_fewer
from billhook.runtime.online import Online, Pass, Skip
from billhook.runtime.policy import Policy
from billhook.runtime.pre_gating import Experts, find_experts, left


class NeuronExperts(Policy):
    """Each token runs a share ``keep`` of the neurons of every MLP: those of its expert, one of ``experts`` that a
    router picks for all blocks at once, before the first of them.

    With x [hidden] the stream of a token into the first block over its root mean square, its expert is the one that is
    largest in W x + b, W being [experts, hidden]. ``fitted`` finds experts and router on text (see
    ``pre_gating.find_experts``). A ``keep`` of 1 leaves nothing out.

    Source: Read-ME, Cai et al. 2024 (arXiv 2410.19123): experts are the neurons that are most active on a domain of
    text, and one router, apart from the blocks, picks a token's expert before them, trained to foresee whose neurons
    the token will use. There the domains are given with the training data, the router is a small transformer that reads
    the tokens so far, and router and model are tuned in turns. Chosen here: experts that begin as clusters of tokens,
    since text comes without domains; a linear router, in closed form, that reads the token alone; and the model as it
    is, not tuned to its experts.

    Keys and values: never skipped, every attention runs. State: none. Cost beside the model's own: a small product a
    token, and memory for a copy of the neurons of each expert, ``experts`` times ``keep`` of all MLPs.
    """

    name: ClassVar[str] = "neuron-experts"
    paper: ClassVar[str] = "Cai et al. 2024, arXiv 2410.19123"
    kv: ClassVar[str] = "never skipped"
    dial: ClassVar[tuple[str, float, float]] = ("keep", 1.0, 0.0)
    wants_text: ClassVar[bool] = True
    appetite: ClassVar[int] = 8

    keep: Annotated[float, Field(ge=0.0, le=1.0)] = 0.75
    experts: Annotated[int, Field(ge=1, le=64)] = 4

    _found: Experts | None = PrivateAttr(default=None)

    def fitted(self, model: PreTrainedModel, anatomy: Anatomy, windows: Windows) -> Self:
        """With experts and their router found on the windows, unless it has them; as for a ``keep`` of 0.75 where it is
        larger, since experts that keep nearly everything are all alike."""
        if self._found is not None:
            return self
        neurons = _some(anatomy)
        return self._with(find_experts(model, anatomy, neurons, windows, count=self.experts, keep=min(self.keep, 0.75)))

    def turned(self, *values: float) -> Self:
        return super().turned(*values)._with(self._found)

    def tensors(self) -> dict[str, Tensor]:
        """The router, and for each MLP how much each expert uses its neurons."""
        return {} if self._found is None else self._found.tensors()

    def with_tensors(self, tensors: dict[str, Tensor]) -> Self:
        return self._with(Experts.of(tensors))

    def _with(self, found: Experts | None) -> Self:
        return self.model_copy()._holding(found)

    def _holding(self, found: Experts | None) -> Self:
        self._found = found
        return self

    def _attach(self, model: PreTrainedModel, anatomy: Anatomy) -> Attached:
        neurons, counts = _some(anatomy), Counts()
        if self._found is None and self.keep < 1:
            raise InputError(f"policy {self.name}: a keep below 1 needs experts found on text (tune-policy does)")
        if self._found is not None:
            _check(self._found, self.experts, neurons, anatomy.outline.stack("decoder").hidden_size)
        trigger = _PreGate(self._found, self.keep, neurons, counts)
        online = Online(model, anatomy, trigger, ["decoder"], counts, watched=())

        def fit(undo: Undo) -> None:
            online.fit(undo)
            trigger.fit(model, undo)

        return Attached(model, self, counts, fit)


class _PreGate:
    """Routes the tokens of a pass as it begins; the MLPs of all blocks look the route up."""

    def __init__(self, found: Experts | None, keep: float, neurons: dict[Address, Inner], counts: Counts) -> None:
        self._found, self._keep, self._neurons, self._counts = found, keep, neurons, counts
        self._route = Route()

    def fit(self, model: PreTrainedModel, undo: Undo) -> None:
        for address, inner in self._neurons.items():
            if self._found is not None and left(inner.count, self._keep) < inner.count:
                run_fewer(model, inner, self._found.kept(address, self._keep), self._route, undo)

    def begin(self, now: Pass) -> None:
        pass

    def decide(self, block: Block, stream: Tensor, now: Pass) -> Skip | None:
        if self._found is None:
            return None
        self._route.set(self._found.picked(stream))
        for address, inner in self._neurons.items():
            tokens = now.rows * now.tokens
            self._counts.picked[address] += tokens * inner.count
            self._counts.left_out[address] += tokens * (inner.count - left(inner.count, self._keep))
        return None

    def saw(self, block: Block, before: Tensor, after: Tensor, now: Pass) -> None:
        pass

    def saw_mlp(self, block: Block, before: Tensor, after: Tensor, now: Pass) -> None:
        pass


def _some(anatomy: Anatomy) -> dict[Address, Inner]:
    """The neurons of each MLP; InputError where there are none."""
    found = neurons_of(anatomy)
    if not found:
        raise InputError(f"policy neuron-experts: this {anatomy.family} model has no MLP whose neurons are understood")
    return found


def _check(found: Experts, count: int, neurons: dict[Address, Inner], hidden: int) -> None:
    """InputError where experts are not of this model, or not as many as the parameters say."""
    sizes = {address: inner.count for address, inner in neurons.items()}
    experts, width = found.weight.shape
    if (experts, width, found.sizes) != (count, hidden, sizes):
        raise InputError(
            f"policy neuron-experts: it has {experts} experts of {sum(found.sizes.values())} neurons, for a stream of "
            f"{width}; asked are {count}, and the decoder has {sum(sizes.values())} neurons and a stream of {hidden}"
        )
