"""Words to the person at the terminal, beside what a command prints as its result."""

import sys


def say(text: str) -> None:
    """Print a line to stderr at once."""
    print(text, file=sys.stderr, flush=True)
