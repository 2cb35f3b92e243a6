"""What is left after a cut, made good again: new weights for parts that stay, in the architecture as it is."""

from billhook.heal.combining.average import average, refill
from billhook.heal.combining.flatten import flatten
from billhook.heal.combining.fuse import fuse
from billhook.heal.combining.gains import branch_gains
from billhook.heal.combining.merge import merge
from billhook.heal.combining.restore import restore, scale_updates
from billhook.heal.healing import UNTOUCHED, Healing, healed
from billhook.heal.refit.closed_form import bridge, closed_form, require_healable
from billhook.heal.refit.mask_tuning import mask_tuning

__all__ = [
    "UNTOUCHED",
    "Healing",
    "average",
    "branch_gains",
    "bridge",
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
