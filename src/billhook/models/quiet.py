"""Keeping transformers' bars and notices off the terminal while Billhook reports for itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import utils as hub
from transformers.utils import logging


@contextmanager
def quiet() -> Iterator[None]:
    """Within it transformers logs errors only and draws no bars; both settings are put back on leaving.

    The bars of a hub download stay: they are the only sign of life in minutes.
    """
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    hub_bars_off = hub.are_progress_bars_disabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if not hub_bars_off:
        hub.enable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
        if hub_bars_off:
            hub.disable_progress_bars()
