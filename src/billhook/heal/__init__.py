"""What is left after a cut, made good again: new weights for parts that stay, in the architecture as it is."""

from billhook.heal.average import average, refill
from billhook.heal.closed_form import closed_form, require_healable
from billhook.heal.flatten import flatten
from billhook.heal.fuse import fuse
from billhook.heal.gains import branch_gains
from billhook.heal.healing import UNTOUCHED, Healing, healed
from billhook.heal.mask_tuning import mask_tuning
from billhook.heal.merge import merge
from billhook.heal.restore import restore, scale_updates

__all__ = [
    "UNTOUCHED",
    "Healing",
    "average",
    "branch_gains",
    "closed_form",
    "flatten",
    "fuse",
    "healed",
    "mask_tuning",
    "merge",
    "refill",
    "require_healable",
    "restore",
    "scale_updates",
]
