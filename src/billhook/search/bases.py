"""What each linear puts out, and which directions of it carry most: the bases that low ranks are cut from."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn

from billhook.anatomy.low_rank import matrix
from billhook.anatomy.types import Anatomy, Block
from billhook.data import Windows
from billhook.heal.refit.places import at_once
from billhook.heal.refit.stepping import Stepper
from billhook.measure.batches import Batch, batches_of
from billhook.measure.spectrum import Spectrum, spectrum
from billhook.plan.address import Address
from billhook.plan.errors import InputError

Progress = Callable[[str, int, int], None]
Inputs = Literal["none", "channels", "moments"]
Linear = tuple[Address, str]  # (sublayer, path within the block)


def bases(
    model: nn.Module,
    anatomy: Anatomy,
    source: Windows | Iterable[Batch],
    inputs: Inputs,
    *,
    stack: str = "decoder",
    progress: Progress | None = None,
) -> dict[Linear, Spectrum]:
    """The spectrum of each linear W [outputs, inputs] of a stack that can be taken apart.

    With C the matrix of second moments of what W is given (sum of x x' over tokens), the matrix of rank r that is
    nearest to W on those inputs, minimising |(W - B) C^(1/2)|^2, is B = U U'W, where the columns of U are the first r
    eigenvectors of W C W' (Eckart-Young: U are the left singular vectors of W C^(1/2), and U'W C^(1/2) C^(-1/2) is
    U'W). So a basis of the *outputs* says all, whatever the inputs are weighed by, and no matrix need be inverted.
    The eigenvalues are the energies that are lost with a direction. ``inputs`` names C:

    - ``none``: C = 1, the plain singular value decomposition; no data;
    - ``channels``: diag(mean |x|), each input channel weighed by its mean size to the power 1/2 (ASVD, arXiv
      2312.05821, section 3.2, with alpha 0.5);
    - ``moments``: all of C, as whitening does (SVD-LLM, arXiv 2403.07378, section 3.1).

    One block at a time, on the dense stream: memory is the streams [tokens, hidden], the moments of one block, and the
    bases, about half the size of what can be taken apart. Cost: one forward pass, and for each linear an eigenvalue
    decomposition of its smaller side, in float64. Raises InputError where nothing can be taken apart, and for values
    that are not finite.
    """
    place = anatomy.stack(stack)
    outlines = dict(anatomy.outline.sublayers())
    found: dict[Linear, Spectrum] = {}
    stepper = Stepper(model, place, list(batches_of(source, model))) if inputs != "none" else None
    streams = [stepper.enter(i) for i in range(len(stepper.batches))] if stepper else []
    for number, block in enumerate(place.blocks):
        linears = {
            (s.address, path): outline.useful
            for s in block.sublayers
            for path, outline in outlines[s.address].linears.items()
            if outline.useful
        }
        moments: dict[Linear, Tensor] = {}
        if stepper is not None:
            streams, moments = _seen(model, stepper, block, linears, streams, inputs)
        for linear, useful in linears.items():
            if stepper is None or linear in moments:  # one that the calibration never reached stays as it is
                found[linear] = spectrum(matrix(_module(model, block, linear[1])), moments.get(linear), useful)
        if progress is not None:
            progress("bases", number + 1, len(place.blocks))
    if not found:
        raise InputError(f"no linear of stack {stack} of this {anatomy.family} model can be taken apart")
    return found


def _seen(
    model: nn.Module,
    stepper: Stepper,
    block: Block,
    linears: Iterable[Linear],
    streams: list[Tensor],
    inputs: Inputs,
) -> tuple[list[Tensor], dict[Linear, Tensor]]:
    """The streams after a block, and C of its linears; those that are given the same share it."""
    sums: dict[Linear, Tensor] = {}
    after = []
    for batch, stream in enumerate(streams):
        given: dict[Linear, Tensor] = {}
        hooks = [(_module(model, block, linear[1]), partial(_keep, given, linear)) for linear in linears]
        after.append(stepper.run(batch, at_once(block), stream, (), hooks))
        real = stepper.real(batch, stream)
        same: dict[tuple[int, ...], Tensor] = {}
        for linear, x in given.items():
            if x.numel() // x.shape[-1] != real.numel():
                continue  # reads another stream, or a choice of the tokens
            key = (x.data_ptr(), x.shape[-1])
            if key not in same:
                rows = x.reshape(real.numel(), -1)[real.reshape(-1)].float()
                same[key] = rows.T @ rows if inputs == "moments" else rows.abs().sum(0)
            sums[linear] = sums[linear] + same[key] if linear in sums else same[key]
    return after, sums


def _keep(given: dict[Linear, Tensor], linear: Linear, module: Any, args: Any, kwargs: Any, output: Any) -> None:
    given[linear] = args[0]


def _module(model: nn.Module, block: Block, path: str) -> nn.Module:
    return model.get_submodule(f"{block.path}.{path}")
