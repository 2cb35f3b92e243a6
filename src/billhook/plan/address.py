"""Stable names for the parts of a model: ``decoder.12``, ``decoder.12.attention``."""

from __future__ import annotations

import re
from dataclasses import dataclass

from billhook.plan.errors import InputError

SUBLAYERS = ("attention", "cross_attention", "mlp")
# One spelling for each address: no leading zeros, no digits of other scripts.
_PATTERN = re.compile(r"(?P<stack>[a-z][a-z_]*)\.(?P<block>0|[1-9][0-9]{0,5})(?:\.(?P<sublayer>[a-z_]+))?")


@dataclass(frozen=True)
class Address:
    """A block (``sublayer`` is None) or one sublayer of it, always numbered as in the *original* model.

    Addresses order by stack, then block number, then sublayer; a block comes before its sublayers.
    Ties between scores break in this order, so runs repeat exactly.
    """

    stack: str
    block: int
    sublayer: str | None = None

    @classmethod
    def parse(cls, text: str) -> Address:
        """Read ``stack.block`` or ``stack.block.sublayer``; raises InputError on anything else."""
        found = _PATTERN.fullmatch(text)
        if not found or found["sublayer"] not in (None, *SUBLAYERS):
            raise InputError(
                f"address {text!r} is not of the form STACK.BLOCK or STACK.BLOCK.SUBLAYER "
                f"(such as decoder.12 or decoder.12.attention; sublayers: {', '.join(SUBLAYERS)})"
            )
        return cls(found["stack"], int(found["block"]), found["sublayer"])

    @property
    def parent(self) -> Address:
        """The block that this unit is, or lies in."""
        return Address(self.stack, self.block)

    def _key(self) -> tuple[str, int, str]:
        return self.stack, self.block, self.sublayer or ""

    def __lt__(self, other: Address) -> bool:
        return self._key() < other._key()

    def __str__(self) -> str:
        return f"{self.stack}.{self.block}" + (f".{self.sublayer}" if self.sublayer else "")
