"""Healing by training: what is trained, towards what, and the loop that does it."""
