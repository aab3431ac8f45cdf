"""`trinity train CONFIG`: the job under Ray Train, until its last step, SIGTERM or Ctrl-C; or its stages, one by one."""

import argparse
from collections.abc import Callable
from contextlib import ExitStack
from math import nan
from pathlib import Path
from typing import Any

from serving.addresses import Door, doors
from serving.fitting import fitted
from trinity import __version__
from trinity.checkpoint import latest_checkpoint
from trinity.checkpoint.export import card_of, export
from trinity.config import Config, TrainConfig, merged, setup_environment
from trinity.errors import GateClosed
from trinity.launch import check_out_dir, load, rewound, train
from trinity.observability.run_history import note_export, write_stages
from trinity.observability.scores import Score, of_rows, table
from trinity.observability.tracking.run import told_of, tracked
from trinity.observability.train_log import read_rows
from trinity.preparing import prepare_stages
from trinity.rl.kinds import check
from trinity.stages import Stage, read_stages
from trinity.utils.machine import commit
from trinity.utils.terminal import say

Served = Callable[[str, str], None] | None


def run(arguments: argparse.Namespace, flags: list[str]) -> int:
    flags = [*flags, *(["--serve.weights", "live"] if arguments.serve else [])]
    served = announced if arguments.serve else None
    path = Path(arguments.config)
    if path.is_file() and "stages" in (tree := merged(path, flags)):
        return _run_stages(read_stages(tree), arguments, served)
    config = load(arguments.config, [*flags, *(["--train.resume", "true"] if arguments.resume else [])])
    if arguments.dry_run:
        print(config.to_yaml(), end="")
        return 0
    check(config)
    goes_on = config.train.resume and config.train.resume_from is None
    told = tracked(config.track, Path(config.train.out_dir), told_of([("", config)]), goes_on)
    with told, ExitStack() as cluster:
        result = _trained(fitted(config) if served else config, served, cluster)
    return 130 if result is not None and result["stopped"] else 0


def _trained(config: Config, served: Served, cluster: ExitStack, num_workers: int = 0) -> dict[str, Any] | None:
    """Train a run to its end; -> its result, None where it had got there before. What it joins is left with `cluster`, and has
    room for `num_workers`."""
    point = check_out_dir(config)
    if point is not None and not rewound(config, point):
        return None
    _join(config, cluster, num_workers)
    from actors import pool as pools
    from actors.sync import placement_watcher

    try:
        return train(config, served)
    finally:
        placement_watcher.stop_all()
        if not config.placement.keep:
            pools.destroy(config.placement.pool, config.cluster.namespace, config.placement.memory_dir)


def _join(config: Config, cluster: ExitStack, num_workers: int) -> None:
    """Join a run's cluster, unless this process has, with room for so many workers; it is left with `cluster`."""
    setup_environment(config.cluster.auth, is_local=config.cluster.address == "local")
    from actors.cluster import is_joined, joined

    if not is_joined():
        say("starting Ray" if config.cluster.address == "local" else f"joining {config.cluster.address}")
    most = max(num_workers, config.train.num_workers)
    cluster.enter_context(joined(config.cluster, config.train.model_copy(update={"num_workers": most})))


def _run_stages(stages: tuple[Stage, ...], arguments: argparse.Namespace, served: Served) -> int:
    """Each that is not done yet; with --resume the one that was under way goes on."""
    if arguments.dry_run:
        for stage in stages:
            print(f"# stage {stage.name}\n{stage.config.to_yaml()}", end="---\n")
        return 0
    for stage in stages:
        check(stage.config)
    first, root = stages[0].config, Path(stages[0].config.train.out_dir).parent
    write_stages(root, [_noted(stage) for stage in stages])
    told = tracked(first.track, root, told_of([(stage.name, stage.config) for stage in stages]), arguments.resume)
    with told, ExitStack() as cluster:
        return _go_through(stages, arguments, served, root, cluster)


def _noted(stage: Stage) -> tuple[str, Path, int, float]:
    settings = stage.config.train
    return stage.name, Path(settings.out_dir), settings.steps, _num_tokens(settings) / settings.steps


def _num_tokens(settings: TrainConfig) -> int:
    """Number of tokens of all steps, of sequences that are full."""
    return settings.num_sequences(settings.steps) * settings.seq_len


def _go_through(
    stages: tuple[Stage, ...], arguments: argparse.Namespace, served: Served, root: Path, cluster: ExitStack
) -> int:
    done, is_first = 0, not arguments.resume
    most = max(stage.config.train.num_workers for stage in stages)
    say("preparing the data of all stages")
    for _ in prepare_stages(stages, join=lambda: _join(stages[0].config, cluster, most)):
        pass
    for number, stage in enumerate(stages, 1):
        found = latest_checkpoint(stage.config.train.out_dir)
        before = " (done before)" if stage.checkpoint == found else ""
        say(f"stage {number} of {len(stages)}, {stage.name}: {stage.config.train.steps} steps{before}")
        config = stage.config.replace(train={"resume": arguments.resume and found is not None})
        is_done = config.train.resume and stage.checkpoint == found
        result = None if is_done else _trained(fitted(config) if served else config, served, cluster, most)
        if result is not None and result["stopped"]:
            return 130
        _require_gates(stage)
        if stage.export is not None and not (result is None and stage.export.exists()):
            card = card_of(stage.export.name, _facts(stage), table(_scores(stage)))
            print(f"export {export(stage.checkpoint, stage.export, card)}")
        done += stage.config.train.steps
        if stage.export is not None:
            note_export(root, done, stage.export.name, is_first)
            is_first = False
    return 0


def _require_gates(stage: Stage) -> None:
    """Raise GateClosed where the weights at the stage's end are below one: they are not exported, and no stage follows."""
    if below := [score for score in _scores(stage) if not score.passes]:
        raise GateClosed(
            f"stage {stage.name} ends with {'; '.join(score.sentence for score in below)}. It is not exported, and the stages "
            "after it are not begun: train it longer (train.steps, with --resume), or lower evaluate.tasks' at_least"
        )


def _scores(stage: Stage) -> list[Score]:
    """Those of the weights that it ends with."""
    settings = stage.config.train
    rows = [row for row in _rows(stage) if row["step"] == settings.steps and "scores" in row]
    return of_rows(rows[-1]["scores"]) if rows else []


def _rows(stage: Stage) -> list[dict[str, Any]]:
    return read_rows(Path(stage.config.train.out_dir, "metrics.jsonl"))


def _facts(stage: Stage) -> dict[str, object]:
    settings, data = stage.config.train, stage.config.data
    tokens, is_packed = _num_tokens(settings), data.format in ("text", "chats")
    sizes = " to ".join(f"{size:,}" for size in dict.fromkeys((settings.batch_sizes[0], settings.batch_sizes[-1])))
    size = (
        f"{settings.seq_len:,} tokens, {tokens:,} in all" if is_packed else f"rows of up to {settings.seq_len:,} tokens"
    )
    rows = _rows(stage)
    last = {name: _last(rows, name) for name in ("loss", "val_loss")}
    return {
        "stage": stage.name,
        "begun from": settings.init_from or "the seed",
        "data": stage.config.data.described,
        "steps": f"{settings.steps:,} of {sizes} x {size}",
        "loss": f"{last['loss']:.4f}",
        "validation loss": f"{last['val_loss']:.4f}",
        "code": f"trinity-moe {__version__}, {commit()}",
    }


def _last(rows: list[dict[str, Any]], name: str) -> float:
    """The last number of that name; nan without any."""
    return next((float(row[name]) for row in reversed(rows) if row.get(name) is not None), nan)


def announced(http_url: str, grpc_address: str) -> None:
    found = [Door(http_url, grpc_address, node="")]
    say(f"{doors(found)}\nanswers come from the weights as they are trained")
