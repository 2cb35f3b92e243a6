"""Getting models in and out: loading, saving, naming."""

from billhook.models.atomic import building, check_out
from billhook.models.fingerprint import fingerprint
from billhook.models.load import Loaded, load, locate
from billhook.models.precision import dtype_of, emulated, stored_as
from billhook.models.save import copy_extras, save

__all__ = [
    "Loaded",
    "building",
    "check_out",
    "copy_extras",
    "dtype_of",
    "emulated",
    "fingerprint",
    "load",
    "locate",
    "save",
    "stored_as",
]
