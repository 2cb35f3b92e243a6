"""Writing results in forms that other software loads."""

from billhook.export.huggingface import save, save_checkpoint, write_checkpoint

__all__ = ["save", "save_checkpoint", "write_checkpoint"]
