"""What scores of inner units look at: weights, what the write linears are given, slopes, what routers say."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from billhook.anatomy.types import Anatomy, Inner, Slice
from billhook.measure.channels import Channels
from billhook.measure.routing import Routing
from billhook.measure.sensitivity import Slopes
from billhook.plan.address import Address
from billhook.plan.errors import InputError


@dataclass(frozen=True)
class WidthTrace:
    """``units`` are the inner units that have a score, by sublayer; ``weights`` the live parameters by name, not
    copied; ``channels``, ``slopes``, ``routing`` and ``knockouts`` what was measured, empty where no score asks for
    it. ``work`` counts block-token forwards."""

    units: Mapping[Address, Inner]
    weights: Mapping[str, Tensor]
    channels: Mapping[str, Channels] = field(default_factory=dict)
    slopes: Mapping[Address, Slopes] = field(default_factory=dict)
    routing: Mapping[Address, Routing] = field(default_factory=dict)
    knockouts: Mapping[Address, Tensor] = field(default_factory=dict)
    work: int = 0

    @classmethod
    def of(
        cls,
        model: nn.Module,
        units: Mapping[Address, Inner],
        channels: Mapping[str, Channels] | None = None,
        slopes: Mapping[Address, Slopes] | None = None,
        routing: Mapping[Address, Routing] | None = None,
        knockouts: Mapping[Address, Tensor] | None = None,
        work: int = 0,
    ) -> WidthTrace:
        weights = dict(model.named_parameters(remove_duplicate=False))
        return cls(units, weights, channels or {}, slopes or {}, routing or {}, knockouts or {}, work)

    def reads(self, address: Address) -> list[Tensor]:
        """The weights through which the units of a sublayer read, one for each projection: float32 [units, width,
        inputs]. Biases and norms are no weights here."""
        slices = (s for s in self.units[address].slices if not s.writes and s.parameter in self.weights)
        return [self._own(s, self.units[address].count) for s in slices if self.weights[s.parameter].ndim == 2]

    def writes(self, address: Address) -> list[Tensor]:
        """The weights through which they write: float32 [units, width, outputs]."""
        inner = self.units[address]
        return [self._own(s, inner.count) for s in inner.slices if s.writes]

    def given(self, address: Address, figure: str) -> list[Tensor]:
        """A figure of what each write is given (``mean``, ``variance``, ``rms``), float64 [units, width]. InputError
        where the calibration never reached it or it was not watched."""
        inner = self.units[address]
        found = []
        for s in inner.slices:
            if s.writes:
                if s.parameter not in self.channels:
                    raise InputError(f"the calibration tells nothing of {s.parameter}, which {address} writes through")
                values: Tensor = getattr(self.channels[s.parameter], figure)
                found.append(values[s.start : s.start + inner.count * s.width].reshape(inner.count, s.width))
        return found

    def _own(self, slice: Slice, count: int) -> Tensor:
        weight = self.weights[slice.parameter].detach().movedim(slice.axis, 0)
        rows = weight[slice.start : slice.start + count * slice.width].float().cpu()
        return rows.reshape(count, slice.width, -1)


def units_of(anatomy: Anatomy, kind: str, addresses: Iterable[Address]) -> dict[Address, Inner]:
    """The inner units of these sublayers that are of a kind: ``neuron``, ``group``, ``expert``, or ``width`` for the
    first two."""
    kinds = ("neuron", "group") if kind == "width" else (kind,)
    found = {}
    for address in addresses:
        for inner in anatomy.inner.get(address, ()):
            if inner.kind in kinds:
                found[address] = inner
    return found
