"""`trinity bench WHAT`: measure a path against what a user would pick instead, and leave a table, JSON and a picture.

Each bench is a module of trinity/bench/ with `flags(parser)` and `measure(arguments) -> Report`; nothing heavy is imported
before `measure`, so that `--help` stays quick. Ratios are between alternating rounds of one run: machines are shared and noisy.
"""

import argparse
import importlib

BENCHES = {
    "attention": "attention in exact mode over long contexts, against torch's with a mask",
    "dispatch": "a row's way to an expert and back: direct transport, raw socket, Ray call",
    "experts": "the expert layer, forward and backward, backends side by side",
    "train": "training tokens per second: one process, shard actors, transformers",
    "lora": "a training step of adapters, and its memory, against one of all weights",
    "durable": "a training step whose state outlives its processes: what that costs, and what a kill costs then",
    "load": "a checkpoint's way into memory: seconds and bytes, against transformers and the disk",
    "decode": "decode tokens per second: one process, shard actors, transformers",
    "formats": "what a model loses with its weights in 8 or 4 bits: divergence, perplexity, likeliest tokens",
    "grammar": "what structured output adds to a decode step, at Nano's shape",
    "packing": "how unlike the micro-batches of a step are: documents end to end, and a buffer of them",
    "placement": "the planner against EPLB: balance, slots moved, milliseconds, over loads that drift",
    "priority": "urgent requests beside a flood of others: their first token against that of an idle server",
    "reading": "packed batches on one core: tokens per second, how full they are, what an order of sequences costs",
    "rivals": "the same model and loads in other people's engines for CPUs: vLLM and llama.cpp",
    "serve": "an open-loop load on a running server: TTFT, inter-token latency, goodput; or beside training",
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    subs = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    for name, text in BENCHES.items():
        sub = subs.add_parser(name, help=text, description=text)
        sub.add_argument("--out", default="runs/bench", help="folder for NAME.json and NAME.png (default: %(default)s)")
        sub.add_argument("--quick", action="store_true", help="few rounds of the smallest sizes: does it work at all?")
        importlib.import_module(f"trinity.bench.{name}").flags(sub)


def run(arguments: argparse.Namespace, flags: list[str]) -> int:
    report = importlib.import_module(f"trinity.bench.{arguments.what}").measure(arguments)
    report.write(arguments.out)
    return 0
