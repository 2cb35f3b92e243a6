"""What is left after a cut, made good again: new weights for parts that stay, in the architecture as it is."""

from billhook.heal.closed_form import closed_form
from billhook.heal.healing import Healing, Refit, healed

__all__ = ["Healing", "Refit", "closed_form", "healed"]
