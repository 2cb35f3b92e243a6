"""Healing without gradients: what is left is solved for, one place of the model after the other."""
