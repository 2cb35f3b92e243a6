"""What is left after a cut, made good again: new weights for parts that stay, in the architecture as it is."""

from billhook.heal.closed_form import closed_form, require_healable
from billhook.heal.gains import gains
from billhook.heal.healing import Healing, healed

__all__ = ["Healing", "closed_form", "gains", "healed", "require_healable"]
