"""Stable names for the parts of a model: ``decoder.12``, ``decoder.12.attention``, ``decoder.12.mlp.neuron.511``."""

from __future__ import annotations

import re
from dataclasses import dataclass

from billhook.plan.errors import InputError

SUBLAYERS = ("attention", "cross_attention", "mlp")
#: What lies between the reads and the writes of a sublayer, and in which sublayers.
INNER = {"neuron": ("mlp",), "expert": ("mlp",), "group": ("attention", "cross_attention")}
# One spelling for each address: no leading zeros, no digits of other scripts.
_PATTERN = re.compile(
    r"(?P<stack>[a-z][a-z_]*)\.(?P<block>0|[1-9][0-9]{0,5})"
    r"(?:\.(?P<sublayer>[a-z_]+)(?:\.(?P<inner>[a-z]+)\.(?P<number>0|[1-9][0-9]{0,6}))?)?"
)


@dataclass(frozen=True)
class Address:
    """A block (``sublayer`` is None), one sublayer of it, or one inner unit of that (a neuron, a KV group, an expert),
    always numbered as in the *original* model.

    Addresses order by stack, then block number, then sublayer, then kind and number of the inner unit; what contains
    another unit comes before it. Ties between scores break in this order, so runs repeat exactly.
    """

    stack: str
    block: int
    sublayer: str | None = None
    inner: str | None = None
    number: int | None = None

    @classmethod
    def parse(cls, text: str) -> Address:
        """Read ``stack.block``, ``stack.block.sublayer`` or ``stack.block.sublayer.inner.number``; raises InputError on
        anything else."""
        found = _PATTERN.fullmatch(text)
        if not found or found["sublayer"] not in (None, *SUBLAYERS):
            raise InputError(
                f"address {text!r} is not of the form STACK.BLOCK or STACK.BLOCK.SUBLAYER "
                f"(such as decoder.12 or decoder.12.attention; sublayers: {', '.join(SUBLAYERS)})"
            )
        inner = found["inner"]
        if inner is not None and found["sublayer"] not in INNER.get(inner, ()):
            raise InputError(
                f"address {text!r}: an inner unit is an mlp.neuron, mlp.expert or attention.group with its number "
                "(such as decoder.12.mlp.neuron.511)"
            )
        number = None if inner is None else int(found["number"])
        return cls(found["stack"], int(found["block"]), found["sublayer"], inner, number)

    @property
    def parent(self) -> Address:
        """The block that this unit is, or lies in."""
        return Address(self.stack, self.block)

    @property
    def outer(self) -> Address:
        """The sublayer that an inner unit lies in; otherwise the unit itself."""
        return Address(self.stack, self.block, self.sublayer)

    def _key(self) -> tuple[str, int, str, str, int]:
        return self.stack, self.block, self.sublayer or "", self.inner or "", -1 if self.number is None else self.number

    def __lt__(self, other: Address) -> bool:
        return self._key() < other._key()

    def __str__(self) -> str:
        outer = f"{self.stack}.{self.block}" + (f".{self.sublayer}" if self.sublayer else "")
        return outer + (f".{self.inner}.{self.number}" if self.inner else "")
