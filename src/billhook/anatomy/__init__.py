"""Where the parts of a model are. All knowledge about model families lives in this room."""

from billhook.anatomy.discover import discover
from billhook.anatomy.types import Anatomy, Block, Counter, Cut, Inner, Residual, Slice, Stack, Sublayer

__all__ = ["Anatomy", "Block", "Counter", "Cut", "Inner", "Residual", "Slice", "Stack", "Sublayer", "discover"]
