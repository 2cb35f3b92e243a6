"""Cutting: a plan simulated on the live model, applied to it, or applied to a checkpoint on disk."""

from billhook.surgery.apply import apply
from billhook.surgery.simulate import simulate

__all__ = ["apply", "simulate"]
