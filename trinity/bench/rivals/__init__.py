"""`trinity bench rivals decode | prefixes`: the same model and loads in other people's engines for CPUs, vLLM and llama.cpp.

They live in an environment of their own (`make interop-rivals`), and each turn of an arm is a process of its own.
"""

import argparse

from trinity.bench.models import filled, numbers
from trinity.bench.report import Report

PROGRAMS = ("vLLM", "llama.cpp")


def flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("load", choices=["decode", "prefixes"], help="steps of decoding; or prompts that begin alike, on vLLM alone")
    add("--preset", help="model (default: bench; with --quick tiny)")
    add("--rounds", type=int, help="turns that each arm takes (default: 3)")
    add("--threads", type=int, help="of each process (default: all cores)")
    add("--requests", type=numbers, metavar="N,…", help="of decode: so many at once (default: 1,32)")
    add("--prompt-len", type=int, help="of decode: tokens of a prompt (default: 64; of large models 16)")
    add("--new-tokens", type=int, help="of decode: tokens to generate for each (default: 49; of large models 17)")
    add("--block-size", type=int, help="of vLLM's cache, a multiple of 32 tokens (default: its own, 128)")
    add("--without", action="append", default=[], choices=PROGRAMS, help="leave these arms out")
    add("--rivals", default=".venv-rivals", metavar="FOLDER", help="their environment (default: %(default)s)")


def measure(arguments: argparse.Namespace) -> Report:
    from trinity.bench.rivals import alike, decoding

    if arguments.load == "prefixes":
        return alike.measure(filled(arguments, alike.USUAL, alike.QUICK))
    usual = decoding.LARGE if arguments.preset and decoding.is_large(arguments.preset) else decoding.USUAL
    return decoding.measure(filled(arguments, usual, decoding.QUICK))
