"""`trinity rl CONFIG`: a run that draws answers to prompts from its own weights and learns from their rewards."""

import argparse

from trinity.commands import train


def run(arguments: argparse.Namespace, flags: list[str]) -> int:
    """Train with data.format prompts; everything else is as with any run."""
    return train.run(arguments, ["--data.format", "prompts", *flags])
