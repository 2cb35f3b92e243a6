"""Billhook finds what a pretrained transformer does not need, cuts it, heals what is left, and proves the result."""
