"""Answers that follow a grammar: what a client may ask for, its compilation elsewhere, and where each answer stands in it."""
