"""What is left after a cut, made good again: new weights for parts that stay, in the architecture as it is."""

from billhook.heal.closed_form import closed_form, require_healable
from billhook.heal.healing import UNTOUCHED, Healing, healed

__all__ = ["UNTOUCHED", "Healing", "closed_form", "healed", "require_healable"]
