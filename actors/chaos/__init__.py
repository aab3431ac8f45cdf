"""Faults on purpose, where Ray runs things."""
