"""The command line, and the composition root: the one place that may know model, actors and serving together.

Settings are `--section.key value` everywhere, merged over a YAML file or a preset's name; `--dry-run` prints the result.
A TrinityError ends a command with its sentence and exit code 2, and so does a full disk; anything else is a bug and shows its
traceback.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from trinity import __version__
from trinity.commands import bench, chaos
from trinity.errors import TrinityError
from trinity.utils.disk import refusal_of

COMMANDS = {
    "demo": "train small, serve, ask once over HTTP and once over gRPC, print what happened",
    "train": "train a model with its experts in Ray actors",
    "prepare": "tokenise what a run reads, on all nodes of the cluster, before it is trained",
    "rl": "train a model by the rewards of its own answers",
    "serve": "serve a checkpoint, or a run that trains, over HTTP and gRPC",
    "generate": "complete a prompt offline, with the same engine",
    "chat": "talk to a running server, or with --local to a checkpoint",
    "eval": "score a checkpoint or a running server: needles in a haystack (niah), tasks of lm-eval",
    "synthesize": "make documents or chats from documents, by prompts to a model, checked and with their provenance",
    "placement": "see experts, move them, scale their shards",
    "convert": "rewrite a checkpoint: type, 8 bits, file sizes, without training state",
    "chaos": "train or serve while shards, workers and messages are lost on purpose, and report how it came through",
    "bench": "measure dispatch, experts, training, decoding and serving, against what else there is",
    "doctor": "versions, devices, ports, memory, round trips between nodes: what to paste in a bug report",
}

CHECKPOINT = "a folder, or ORG/NAME[@REVISION] on the Hugging Face Hub"
OFFLINE = "Any setting of the engine: --engine.max_model_len 4096; of the experts: --placement.backend torch"
TAKE_SETTINGS = ("train", "prepare", "rl", "serve", "chaos", "generate", "chat", "synthesize")
PLACEMENT = {
    "show": "pools, shards, what they hold and compute",
    "plan": "what a better plan for the present load would move; changes nothing",
    "scale": "ask for so many shards",
    "drain": "move everything off a shard, then end it",
    "replicate": "ask for so many replicas of an expert",
    "rebalance": "plan and move now",
    "watch": "print each change, and the load as it shifts, until Ctrl-C",
    "rm": "end a pool",
}


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="trinity", description="Train and serve sparse mixture-of-experts models.")
    top.add_argument("--version", action="version", version=f"trinity {__version__}")
    subs = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    made = {name: subs.add_parser(name, help=text, description=text) for name, text in COMMANDS.items()}
    _settings(made["prepare"], required=True)
    for name in ("train", "rl"):
        _settings(made[name], required=True)
        made[name].add_argument("--resume", action="store_true", help="continue the run in train.out_dir")
        made[name].add_argument(
            "--serve", action="store_true", help="answer over HTTP and gRPC meanwhile, with the weights as they become"
        )
    made["serve"].add_argument(
        "source",
        help="a checkpoint's folder, or ORG/NAME[@REVISION] on the Hugging Face Hub; with live or pinned weights, a run's "
        "train.out_dir. `stop`: end the server of a cluster and its pool (a folder of that name is ./stop)",
    )
    made["serve"].add_argument(
        "--adopt",
        action="store_true",
        help="take over the server of this cluster, if it serves the same; else start one",
    )
    _settings(made["serve"], required=False)
    for flag in ("--host", "--http-port", "--grpc-port", "--weights", "--generation-config"):
        made["serve"].add_argument(flag, help=f"short for --serve.{flag[2:].replace('-', '_')}")
    _demo(made["demo"])
    _sampling(made["generate"])
    _chat(made["chat"])
    _eval(made["eval"])
    _synthesize(made["synthesize"])
    _convert(made["convert"])
    bench.add_flags(made["bench"])
    chaos.add_flags(made["chaos"])
    _placement(made["placement"])
    made["doctor"].add_argument("--address", help="of a Ray cluster: measure round trips between its nodes, too")
    made["doctor"].add_argument("--auth", default="token", choices=["token", "disabled"])
    return top


def _placement(sub: argparse.ArgumentParser) -> None:
    actions = sub.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, text in PLACEMENT.items():
        action = actions.add_parser(name, help=text, description=text)
        if name in ("show", "rm"):
            action.add_argument("pool", nargs="?" if name == "show" else None, help="a pool's name")
        else:
            action.add_argument("--pool", help="its name (default: the only one there is)")
        action.add_argument("--address", default="auto", help="of the Ray cluster (default: %(default)s)")
        action.add_argument("--auth", default="token", choices=["token", "disabled"])
        if name != "rm":
            action.add_argument("--server", metavar="HOST:PORT", help="ask a running server over gRPC instead of Ray")
        if name in ("scale", "drain", "replicate", "rebalance"):
            action.add_argument("--no-wait", action="store_true", help="do not wait for the change to be done")
        if name == "plan":
            action.add_argument("--shards", type=int, help="for so many shards (default: as many as there are)")
        if name == "scale":
            action.add_argument("num_shards", type=int)
        if name == "drain":
            action.add_argument("shard")
        if name == "replicate":
            for what in ("layer", "expert", "num_replicas"):
                action.add_argument(what, type=int)


def _settings(sub: argparse.ArgumentParser, required: bool) -> None:
    what = (
        "a YAML file, a preset such as tiny, nano or glm-4.5-air, or a model on the Hub to train on from"
        if required
        else "a YAML file"
    )
    sub.add_argument("config", nargs=None if required else "?", help=what)
    sub.add_argument("--dry-run", action="store_true", help="print the resolved settings and stop")
    sub.epilog = "Any setting: --section.key value, for example --train.steps 20 --placement.num_shards 4"


def _demo(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--keep", action="store_true", help="leave the server running until Ctrl-C")
    sub.add_argument("--steps", type=int, help="optimizer steps (default: the demo's own)")
    sub.add_argument("--out", default="runs/demo", help="folder for the run; emptied first (default: %(default)s)")


def _sampling(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("checkpoint", help=CHECKPOINT)
    sub.epilog = OFFLINE
    sub.add_argument("--prompt", required=True, action="append", help="repeat for several prompts in one batch")
    sub.add_argument("--max-tokens", type=int, default=128)
    sub.add_argument("--temperature", type=float, help="default: the checkpoint's, or 0: the likeliest token")
    sub.add_argument("--top-p", type=float, help="default: the checkpoint's, or 1: off")
    sub.add_argument("--top-k", type=int, help="default: the checkpoint's, or 0: off")
    sub.add_argument(
        "--generation-config",
        choices=["checkpoint", "none"],
        default="checkpoint",
        help="whether generation_config.json sets defaults (default: %(default)s)",
    )
    sub.add_argument("--seed", type=int)
    sub.add_argument("--stop", action="append", default=[])


def _chat(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("url", help="for example http://127.0.0.1:8000; with --local a checkpoint")
    sub.add_argument("--local", action="store_true", help="load the checkpoint into this process: no server is needed")
    sub.epilog = OFFLINE
    sub.add_argument("--model", help="default: the first that the server lists")
    sub.add_argument("--system", help="a system message to start with")
    sub.add_argument("--max-tokens", type=int, default=512)
    sub.add_argument("--temperature", type=float, default=0.7)
    sub.add_argument("--api-key-file", help="file that holds the key (default: TRINITY_API_KEY)")


def _eval(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("source", help="a checkpoint's folder, or a server: http://127.0.0.1:8000")
    sub.add_argument(
        "--tasks", default="", help="niah, and names of lm-eval's tasks, or of your own, with commas between"
    )
    sub.add_argument(
        "--rewards",
        nargs="+",
        help="functions of (answer, row), module:function or file.py:function, as rl.rewards has them",
    )
    sub.add_argument("--prompts", nargs="+", help="files of prompts, whose answers the rewards judge")
    sub.add_argument("--max-tokens", type=int, default=256, help="of an answer to these (default: %(default)s)")
    sub.add_argument("--temperature", type=float, default=0.0, help="of these answers (default: 0, the likeliest)")
    sub.add_argument(
        "--seed", type=int, default=0, help="of these answers, where they are drawn (default: %(default)s)"
    )
    sub.add_argument(
        "--lengths", help="of niah: tokens of a question, with commas between (default: all that is taken)"
    )
    sub.add_argument("--keys", type=int, default=1024, help="of niah: that there are (default: %(default)s)")
    sub.add_argument(
        "--questions", type=int, default=64, help="of niah: of each length; prompts for rewards (default: %(default)s)"
    )
    sub.add_argument("--include-path", help="a folder with tasks of your own (YAML)")
    sub.add_argument("--num-fewshot", type=int, help="examples before each question (default: the task's own)")
    sub.add_argument("--limit", type=int, help="the first so many questions of each task")
    sub.add_argument("--batch-size", type=int, default=8, help="prompts in one request (default: %(default)s)")
    sub.add_argument("--chat", action="store_true", help="ask /v1/chat/completions: tasks that are answered in words")
    sub.add_argument("--model", help="default: the first that the server lists")
    sub.add_argument("--output", help="file for everything that was found, each question with its answers (JSON)")
    sub.add_argument("--api-key-file", help="file that holds the key (default: TRINITY_API_KEY)")


def _synthesize(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("config", help="a YAML file")
    sub.add_argument("--dry-run", action="store_true", help="print some of the prompts and stop; nobody is asked")
    sub.epilog = (
        "Any setting: --section.key value, for example --server.url http://127.0.0.1:8000 --output.dir runs/synthetic"
    )


def _convert(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("source", help=CHECKPOINT)
    sub.add_argument("target", help="a folder that does not exist yet")
    sub.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: as in the source")
    sub.add_argument("--to", choices=["int8", "fp8"], help="quantise the matrices, in compressed-tensors' layouts")
    sub.add_argument("--max-file-gb", type=float, default=4.0)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; -> exit code."""
    arguments, flags = parser().parse_known_args(argv)
    from trinity.config import setup_proxies, setup_threads  # only here: `--help` is quick

    setup_threads()
    setup_proxies()
    if flags and arguments.command not in TAKE_SETTINGS:
        parser().error(f"unrecognized arguments: {' '.join(flags)}")
    try:
        return importlib.import_module(f"trinity.commands.{arguments.command}").run(arguments, flags) or 0
    except TrinityError as error:
        print(f"trinity {arguments.command}: {error.message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `trinity doctor | head`: nobody reads any more, and Python would say so at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if (refusal := refusal_of(error)) is None:
            raise
        print(f"trinity {arguments.command}: {refusal.message}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
