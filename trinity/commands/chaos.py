"""`trinity chaos train|serve`: the usual command under faults that strike as a seed says, and a report of how it came through.

Each is a module of trinity/chaos/ with its `FAULTS`, `flags(parser)` and `run(arguments, flags)`; nothing heavy is imported
before `run`, so that `--help` stays quick.
"""

import argparse
import importlib
from collections.abc import Callable
from pathlib import Path

from actors.chaos.plan import OF_HOSTS, Fault
from trinity.errors import ConfigError

KINDS = {
    "train": "train while shards, workers, the placement service and messages are lost: is a step lost, do weights differ?",
    "serve": "serve while shards die, hang and experts move: does a request fail, is a text another?",
}
EPILOG = "Any setting: --section.key value, for example --placement.num_shards 4 --cluster.address auto"


def add_flags(parser: argparse.ArgumentParser) -> None:
    subs = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    for name, text in KINDS.items():
        sub = subs.add_parser(name, help=text, description=text, epilog=EPILOG)
        module = importlib.import_module(f"trinity.chaos.{name}")
        module.flags(sub)
        names = ",".join(fault.value for fault in module.FAULTS)
        known = (*module.FAULTS, *OF_HOSTS)
        of_hosts = ", ".join(fault.value for fault in OF_HOSTS)
        what = f"(default: {names}; of --hosts: {of_hosts})"
        sub.add_argument("--faults", type=_some_of(known), default=module.FAULTS, help=what)
        what = "Unix socket of a program that cuts, slows, powers off hosts and shifts their clocks (docs/training.md)"
        sub.add_argument("--hosts", type=Path, metavar="SOCKET", help=what)
        sub.add_argument("--seed", type=int, default=0, help="of what strikes when, and whom")
        sub.add_argument("--every", type=_positive, default=10.0, metavar="S", help="mean seconds between two faults")


def run(arguments: argparse.Namespace, flags: list[str]) -> int:
    asked = [fault.value for fault in arguments.faults if fault in OF_HOSTS]
    if asked and not arguments.hosts:
        raise ConfigError(f"{asked[0]} needs somebody who has the hosts: --hosts SOCKET")
    code: int = importlib.import_module(f"trinity.chaos.{arguments.what}").run(arguments, flags)
    return code


def _some_of(faults: tuple[Fault, ...]) -> Callable[[str], tuple[Fault, ...]]:
    known = {fault.value: fault for fault in faults}

    def parsed(text: str) -> tuple[Fault, ...]:
        if unknown := [name for name in text.split(",") if name not in known]:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not one of {', '.join(known)}")
        return tuple(known[name] for name in text.split(","))

    return parsed


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds above 0")
    return value
