"""Text in, batches of tokens out."""

from billhook.data.calibrate import calibration, evaluation, windows
from billhook.data.overlap import check_overlap, overlap
from billhook.data.text import Text
from billhook.data.windows import Windows, check_tokenizer

__all__ = ["Text", "Windows", "calibration", "check_overlap", "check_tokenizer", "evaluation", "overlap", "windows"]
