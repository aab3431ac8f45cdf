"""Jobs of commands, benches and chaos: a training job under Ray Train, its progress on this terminal, pictures at its end.

The composition root of training: the one place beside the commands that knows trinity, actors and serving together.
"""

import math
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from os.path import expanduser
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trinity.config import (
    NEW_IN_STAGE,
    RUN_SETTINGS,
    Config,
    TrainConfig,
    merged,
    preset_names,
    read_yaml,
)
from trinity.errors import ConfigError, TrinityError
from trinity.utils.niceness import IDLE, USUAL
from trinity.utils.terminal import say

if TYPE_CHECKING:
    from actors.pool import RayPool


def save_settings(config: Config) -> None:
    """Note in the run's folder how it runs, for `trinity serve` to find its pool. Without what concerns serving: keys."""
    import yaml

    tree = config.model_dump(mode="json", exclude={"serve"})
    Path(config.train.out_dir, RUN_SETTINGS).write_text(yaml.safe_dump(tree, sort_keys=False))


def load(source: str, flags: list[str]) -> Config:
    """A YAML file, a preset's name or a model's on the Hub, with flags over it. Without a `model` it is that of
    `train.init_from`."""
    is_preset = source in preset_names() and not Path(source).exists()
    tree = merged(None, flags, model=source) if is_preset else merged(*_named(source, flags))
    return Config.from_tree(_with_model(_with_commits(tree)))


def _named(source: str, flags: list[str]) -> tuple[str | None, list[str]]:
    """A file of settings with its flags; or, where `source` names a model on the Hub, flags alone: to train on from there."""
    from trinity.checkpoint import hub_name

    is_file = Path(source).exists() or source.endswith((".yaml", ".yml")) or hub_name(source) is None
    return (source, flags) if is_file else (None, [f"--train.init_from={source}", *flags])


def _with_commits(tree: dict[str, Any]) -> dict[str, Any]:
    """The tree with each model of the Hub at a commit, so that all processes read the same: for a run that goes on the one
    that it began with, unless another is asked for."""
    from trinity.checkpoint import hub_name, located

    begun = _begun_with(tree)
    for section, key in (("train", "init_from"), ("data", "tokenizer")):
        value, before = (_setting(each, section, key) for each in (tree, begun))
        if value is None or Path(value).exists() or not hub_name(value):
            continue
        is_same = before is not None and before.partition("@")[0] == value
        tree[section] = {**tree[section], key: before if is_same else located(value)}
    return tree


def _begun_with(tree: dict[str, Any]) -> dict[str, Any]:
    """The settings of the run that goes on in train.out_dir; none where none does."""
    from trinity.checkpoint import latest_checkpoint

    out_dir = Path(expanduser(_setting(tree, "train", "out_dir") or TrainConfig().out_dir))
    noted = out_dir / RUN_SETTINGS
    return read_yaml(noted) if noted.is_file() and latest_checkpoint(out_dir) else {}


def _setting(tree: dict[str, Any], section: str, key: str) -> str | None:
    """A setting of a tree that nobody has checked, where it is a text."""
    value = tree[section].get(key) if isinstance(tree.get(section), dict) else None
    return value if isinstance(value, str) else None


def _with_model(tree: dict[str, Any]) -> dict[str, Any]:
    """The tree with the model of `train.init_from`, where it says none, or only some fields of it."""
    weights, given = _setting(tree, "train", "init_from"), tree.get("model", {})
    if weights and isinstance(given, dict) and "preset" not in given:
        from trinity.checkpoint import open_checkpoint

        tree["model"] = {**open_checkpoint(weights).config.model_dump(), **given}
    return tree


def check_out_dir(config: Config) -> Path | None:
    """Refuse tasks that cannot be asked, to mix two runs in one folder, and to start from another architecture or a damaged
    checkpoint; -> the checkpoint that the run goes on from, None for a new run."""
    from trinity.checkpoint import resume_point
    from trinity.evaluate.tasks import check

    check(config.evaluate, config.train.seq_len, config.model.max_position_embeddings)
    settings = config.train
    found = resume_point(settings.out_dir, settings.resume_from)
    if found is None and settings.resume:
        raise ConfigError(f"{settings.out_dir} holds no checkpoint to resume from; leave --resume out to begin")
    if found is not None and not settings.resume and settings.resume_from is None:
        raise ConfigError(
            f"{settings.out_dir} already holds {found.name}; continue it with --resume, or choose another --train.out_dir"
        )
    _check_writable(Path(settings.out_dir))
    if found is None:
        _check_same(settings.init_from, config, but=NEW_IN_STAGE)
    else:
        _check_same(str(found), config, but=("dtype",))
    _check_source(config, found)
    return found


def _check_source(config: Config, found: Path | None) -> None:
    """Refuse a damaged checkpoint, an adapter of another shape than the run's, or of another base than train.init_from."""
    from trinity.checkpoint import check_adapter, open_checkpoint

    begun = config.train.init_from
    source = open_checkpoint(path) if (path := found or begun) else None
    check_adapter(source, config.optim, is_own=found is not None)
    if source is not None and (found or source.adapter is not None):
        source.verify()
    if source is not None and source.adapter is not None and begun:
        source.adapter.check_base(open_checkpoint(begun).base)


def rewound(config: Config, point: Path) -> bool:
    """Make `point` the newest checkpoint of the run, unless it has taken all its steps; -> whether there are steps to take."""
    from trinity.checkpoint import rewind, step_of

    if (done := step_of(point)) >= config.train.steps:
        say(f"{config.train.out_dir} is at step {done} already; raise --train.steps to go on")
        return False
    if aside := rewind(config.train.out_dir, point):
        say(f"checkpoints after step {done} are in {aside} now; delete them if nobody wants them")
    return True


def _check_same(checkpoint: str | None, config: Config, but: Sequence[str]) -> None:
    from trinity.checkpoint import open_checkpoint

    if checkpoint is None:
        return
    if differs := config.model.differs_from(open_checkpoint(checkpoint).config, but):
        raise ConfigError(f"{checkpoint} is of another architecture than this configuration: {', '.join(differs)}")


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".writable").touch()
        (folder / ".writable").unlink()
    except OSError as error:
        raise ConfigError(f"cannot write to train.out_dir {folder}: {error.strerror}; choose another") from None


def steps_done(config: Config) -> int:
    """The step of the run's last checkpoint; 0 without one."""
    from trinity.checkpoint import latest_checkpoint, step_of

    found = latest_checkpoint(config.train.out_dir)
    return step_of(found) if found else 0


def train(
    config: Config,
    served: Callable[[str, str], None] | None = None,
    beside: "Callable[[RayPool], AbstractContextManager[Any]]" = nullcontext,
    loop: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Run the job in the cluster this process has joined, showing its progress; -> its result. The pool stays.

    The job runs inside `beside(pool)`, and each worker `loop`, where another is wanted than actors/train.py's.

    With `served` the pool is served meanwhile, from its first weights to the end of training; it is told the HTTP and gRPC
    addresses, on a thread of its own. SIGTERM or Ctrl-C ends it after the running step, with a checkpoint; a second Ctrl-C
    at once.
    """
    from actors import pool as pools
    from actors.train import STOP, fit
    from trinity.checkpoint import open_checkpoint
    from trinity.observability.run_history import stages_after
    from trinity.pool.pool import describe
    from trinity.preparing import prepared
    from trinity.rl.kinds import check
    from trinity.train.progress import Progress, shown
    from trinity.train.recovery import rates_changed

    check(config)
    if config.placement.niceness is None:
        config = config.replace(placement={"niceness": USUAL if served is None else IDLE})
    out_dir, done = Path(config.train.out_dir), steps_done(config)
    if changed := rates_changed(config):
        say(changed)
    if (
        config.train.init_from and not done and config.cluster.address == "local"
    ):  # elsewhere each node fetches its part
        open_checkpoint(config.train.init_from).fetch()
    say("preparing the data")
    prepared(config)
    save_settings(config)
    say(f"starting {config.placement.num_shards} shards")
    state_dir = config.placement.state_dir or str(out_dir.resolve() / "placement")
    pool = pools.provide(config.placement, config.cluster.namespace, config.model, config.optim, state_dir)
    say(describe(pool.status(), config.model))
    say(f"continuing from step {done}" if done else f"starting {config.train.num_workers} workers")
    is_packed = config.data.format in ("text", "chats")
    tokens_each = config.train.seq_len if is_packed else 0
    stage, later = stages_after(out_dir)
    tokens_after = round(sum((each.steps or 0) * each.tokens_per_step for each in later))
    progress = Progress(
        *(config.train.steps, tokens_each, sys.stderr, done),
        stage=stage.words,
        tokens_after=tokens_after,
        num_before=config.train.num_sequences,
    )
    meanwhile = serving(config, pool, served) if served else nullcontext()
    with shown(out_dir / "metrics.jsonl", progress), meanwhile, beside(pool):
        result = stoppable(lambda: fit(config, loop), out_dir / STOP)
    val_loss = f", validation loss {result['val_loss']:.4f}" if math.isfinite(result["val_loss"]) else ""
    print(f"loss {result['loss']:.4f}{val_loss} after {result['position']} steps")
    print(f"checkpoint {result['checkpoint']}")
    print("pictures " + ", ".join(map(str, _draw(out_dir))))
    if result["stopped"]:
        say(f"stopped at step {result['position']} of {config.train.steps}; continue with --resume")
    return result


@contextmanager
def serving(config: Config, pool: "RayPool", served: Callable[[str, str], None]) -> Iterator[None]:
    """Serve the pool's live weights inside the block, as soon as it has any."""
    from serving import app

    app.check_ports(config.serve)
    source, servers, ended = str(Path(config.train.out_dir).resolve()), [], threading.Event()

    def serve() -> None:
        while pool.decided() is None:
            if ended.wait(0.2):
                return
        try:
            servers.append(app.start(config, source))
        except TrinityError as error:  # the edge of this thread; training goes on
            say(f"not served: {error.message}")
            return
        for door in servers[0].doors[1:]:
            say(f"another gateway\n{door.text}")
        addresses = servers[0].http_url, servers[0].grpc_address
        threading.Thread(target=served, args=addresses, name="trinity-served", daemon=True).start()

    thread = threading.Thread(target=serve, name="trinity-serve", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(config.placement.ready_timeout_s)
        for server in servers:
            server.stop()


def stoppable(work: Callable[[], dict[str, Any]], stop_file: Path) -> dict[str, Any]:
    """Run `work` on a thread while this one minds signals: the first makes `stop_file`, a second Ctrl-C interrupts.

    (On the main thread Ray Train would put its own handler in place, which ends the run without a checkpoint.)
    """
    outcome: list[dict[str, Any] | BaseException] = []

    def run() -> None:
        try:
            outcome.append(work())
        except BaseException as error:
            outcome.append(error)

    def stop(number: int, frame: object) -> None:
        say("stopping after this step, with a checkpoint; Ctrl-C again to leave at once")
        stop_file.touch()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    stop_file.unlink(missing_ok=True)
    thread = threading.Thread(target=run, name="trinity-fit", daemon=True)
    thread.start()
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        while thread.is_alive():
            thread.join(0.2)
    finally:
        stop_file.unlink(missing_ok=True)
        for number, handler in before.items():
            signal.signal(number, handler)
    (found,) = outcome
    if isinstance(found, BaseException):
        raise found
    return found


def _draw(out_dir: Path) -> list[Path]:
    from trinity.observability.run_history import stages_after
    from trinity.observability.train_log import read_rows
    from trinity.train.plots import expert_load_png, loss_curve_png, run_png

    pictures = [loss_curve_png(out_dir / "metrics.jsonl", out_dir / "loss.png")]
    if any(row["counts_LE"] for row in read_rows(out_dir / "expert_load.jsonl")):
        pictures.append(expert_load_png(out_dir / "expert_load.jsonl", out_dir / "expert_load.png"))
    stage, _ = stages_after(out_dir)
    root = out_dir.parent if stage.is_one_of_many else out_dir
    return [*pictures, run_png(root, root / "run.png")]
