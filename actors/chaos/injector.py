"""Hurting a pool on purpose: its shards, its placement service, the training worker that uses it, the messages between them.

Decisions: a process is found through the pool only (its actors say where they are; the worker is who keeps the backbone of the
last decision), and signalled on its own node if it is still one of Ray's. What a training worker must do itself, lose messages
and note its attempts, is in `exposed_loop`, which takes the place of actors/train.py's `train_loop`; the two sides meet in a
folder of train.out_dir.
"""

import json
import logging
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import ray

from actors.chaos import outside
from actors.chaos.faulty_transport import FaultyTransport
from actors.chaos.plan import SHARE_LOST, Attempt, Fault, Planned, Struck
from actors.control.admin import PlacementOperator
from actors.names import PLACEMENT, ask, find, on_node
from actors.pool import RayPool
from actors.train import train_loop
from trinity.errors import TrinityError, Unavailable
from trinity.train.trainer import Trainer
from trinity.utils.trying import retrying, tried

log = logging.getLogger(__name__)
T = TypeVar("T")
FOLDER, ATTEMPTS, LOSE = ".chaos", "attempts.jsonl", "lose.json"
LOOK_S = 0.05  # how often a worker looks whether it is to lose messages
FIND_S, PAUSE_S = 60.0, 0.1  # so long a victim may be away already
WORKER = b"RayTrainWorker"


class Chaos:
    """Faults of one pool, of the job in `out_dir` that trains in it, and of hosts (see actors/chaos/outside.py). Raises
    Unavailable where the victim is not to be found within a minute."""

    def __init__(self, pool: RayPool, out_dir: str | Path | None = None, hosts: Path | None = None):
        self.pool, self.out_dir, self.hosts = pool, Path(out_dir) if out_dir is not None else None, hosts
        self._num_shards = self._wanted = len(pool.table.shards)
        self._survives = (0, 0)
        self._operator = PlacementOperator(pool.name, pool.namespace, pool.timeout_s)

    def strike(self, planned: Planned) -> str:
        """-> what was hit. Waits while it lasts."""
        shard = self._shard(planned.draw)
        match planned.fault:
            case Fault.KILL_SHARD:
                return self.kill(shard)
            case Fault.STOP_SHARD:
                return self.stop(shard, planned.for_s)
            case Fault.KILL_WORKER:
                return self.kill_worker()
            case Fault.KILL_SERVICE:
                return self.kill_service()
            case Fault.LOSE_MESSAGES:
                return self.lose_messages(SHARE_LOST, planned.for_s, seed=int(planned.draw * 2**32))
            case Fault.MOVE_EXPERTS:
                return self.move_experts()
            case _:
                assert self.hosts is not None, "nobody was named who has hosts"
                return outside.strike(self.hosts, planned)

    def where(self, shard: str) -> tuple[str, int]:
        """-> (node, process); waits while the shard is starting again."""
        who = f"shard {shard}"
        return _until_there(lambda: ask(self.pool.shards[shard].where.remote(), FIND_S, who))

    def kill(self, shard: str) -> str:
        _signal(*self.where(shard), signal.SIGKILL)
        return shard

    def stop(self, shard: str, for_s: float) -> str:
        """Stop it as a hanging machine would: it holds what it has, and answers nobody."""
        where = self.where(shard)
        _signal(*where, signal.SIGSTOP)
        try:
            time.sleep(for_s)
        finally:
            _signal(*where, signal.SIGCONT)
        return f"{shard} for {for_s:.1f} s"

    def kill_worker(self) -> str:
        """Worker 0 of the job: the one who decides."""
        decision = _until_there(self.pool.decided)
        if decision is None or not decision.notes["backbone"]:
            raise Unavailable("no worker keeps a backbone: nothing is decided yet, or placement.durable is false")
        node, folder = decision.notes["backbone"][0]
        pid = _on(node, _keeper, folder)
        _signal(node, pid, signal.SIGKILL)
        return f"worker 0, process {pid}"

    def kill_service(self) -> str:
        """It starts again, as after a crash."""
        ray.kill(find(self.pool.name, PLACEMENT, self.pool.namespace), no_restart=False)
        return "the placement service"

    def lose_messages(self, share: float, for_s: float, seed: int) -> str:
        """Lose that share of the workers' requests, and of the replies to them. Their job must run `exposed_loop`."""
        assert self.out_dir is not None, "only a training job can be told to lose messages"
        order = {"share": share, "for_s": for_s, "seed": seed}
        partial = self.out_dir / FOLDER / ".lose"
        partial.write_text(json.dumps(order))
        partial.rename(partial.with_name(LOSE))
        time.sleep(for_s)
        return f"{share:.0%} for {for_s:.1f} s"

    def move_experts(self) -> str:
        """One shard fewer than there were, or, the next time, as many again: experts move off it and on to a new one."""
        self._wanted = self._num_shards if self._wanted != self._num_shards else self._num_shards - 1 or 2
        _until_there(lambda: self._operator.scale(self._wanted, "chaos"))
        return f"to {self._wanted} shards"

    def is_whole(self) -> bool:
        """Say whether all is well: as many shards as wanted, nothing under way, as many losses survived as ever, and each
        shard says it holds what the table says."""
        both = tried(lambda: (self._operator.snapshot(), self.pool.status()), TrinityError)
        if isinstance(both, TrinityError):  # somebody is away
            return False
        seen, held = both[0], {status.shard: status.rows for status in both[1]}
        table, is_idle = seen.table, all(change.phase in ("done", "rolled back") for change in seen.changes)
        wanted = {shard: table.experts_of(shard) for shard in table.shards}
        self._survives = max(self._survives, seen.survives)
        return (
            is_idle
            and seen.survives == self._survives
            and len(wanted) == self._wanted
            and all(
                shard in held and set(experts) <= held[shard].get(layer, {}).keys()
                for shard, layers in wanted.items()
                for layer, experts in layers.items()
            )
        )

    def _shard(self, draw: float) -> str:
        return self.pool.table.shards[int(draw * len(self.pool.table.shards))]


@contextmanager
def raging(
    chaos: Chaos,
    plan: Iterable[Planned],
    has_begun: Callable[[], bool],
    recovered_s: Callable[[Struck], float | None],
    struck: list[Struck],
) -> Iterator[None]:
    """Strike as planned while the block runs, from `has_begun` on, one fault at a time, and note it in `struck`. `recovered_s`
    says how long it took to get over one, None before."""
    ended = threading.Event()

    def rage() -> None:
        _first(lambda: has_begun() or None, ended)
        for planned in plan:
            if ended.wait(planned.after_s):
                return
            struck.append(_struck(chaos, planned))
            struck[-1] = struck[-1]._replace(recovered_s=_first(lambda: recovered_s(struck[-1]), ended))

    thread = threading.Thread(target=rage, name="trinity-chaos", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(FIND_S)


def _first(what: Callable[[], T | None], ended: threading.Event) -> T | None:
    """Its first answer; None if there is none before the end."""
    while (found := what()) is None and not ended.wait(PAUSE_S):
        pass
    return found


def _struck(chaos: Chaos, planned: Planned) -> Struck:
    time_s = time.monotonic()
    found = tried(partial(chaos.strike, planned), TrinityError)  # the edge of this thread: the next one may be found
    if isinstance(found, TrinityError):
        return Struck(planned.fault, "", time_s, found.message)
    return Struck(planned.fault, found, time_s)


# -- on a node


def _on(node: str, function: Callable[..., T], *arguments: Any) -> T:
    """Its result, there."""
    if node == ray.get_runtime_context().get_node_id():
        return function(*arguments)
    there = ray.remote(num_cpus=0, max_retries=0)(function)
    return ask(on_node(there, node).remote(*arguments), FIND_S, f"node {node[:8]}")


def _signal(node: str, pid: int, number: int) -> None:
    _on(node, _send_signal, pid, int(number))


def _send_signal(pid: int, number: int) -> None:
    """Raises Unavailable for what is no process of Ray's (any more)."""
    try:
        if not _title(pid).startswith(b"ray::"):
            raise Unavailable(f"process {pid} is no actor of Ray's any more; it is left alone")
        os.kill(pid, number)
    except (FileNotFoundError, ProcessLookupError):
        raise Unavailable(f"process {pid} has ended by itself") from None


def _keeper(folder: str) -> int:
    """The training worker that has a tensor of that store mapped."""
    for path in Path("/proc").glob("[0-9]*/maps"):
        pid = int(path.parent.name)
        with suppress(OSError):  # it has ended, or is somebody else's
            if WORKER in _title(pid) and folder in path.read_text():
                return pid
    raise Unavailable(f"no training worker keeps {folder}; is it starting again?")


def _title(pid: int) -> bytes:
    return Path("/proc", str(pid), "cmdline").read_bytes()


def _until_there(find: Callable[[], T]) -> T:
    return retrying(find, time.monotonic() + FIND_S)


# -- in a training worker


def exposed_loop(settings: dict[str, Any]) -> dict[str, Any]:
    """The loop of each worker instead of `train_loop`: the same, open to chaos."""
    return train_loop(settings, expose)


def expose(trainer: Trainer) -> None:
    """Note the trainer's attempts, and lose its messages when told to."""
    folder = Path(trainer.config.train.out_dir) / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    control, rows = (
        FaultyTransport(each, random.Random()) for each in (trainer.pool.transport, trainer.dispatcher.transport)
    )
    trainer.pool.transport, trainer.dispatcher.transport = control, rows
    note, begin_attempt = (folder / ATTEMPTS).open("a", buffering=1), trainer.pool.begin_attempt

    def noted(version: int, num_updates: int) -> Any:
        note.write(f"{trainer.position}\n")
        return begin_attempt(version, num_updates)

    trainer.pool.begin_attempt = noted  # type: ignore[method-assign]
    order = (folder / LOSE, (control, rows), trainer.comm.rank)
    threading.Thread(target=_obey, args=order, name="trinity-chaos", daemon=True).start()


def _obey(file: Path, transports: tuple[FaultyTransport, ...], rank: int) -> None:
    def read() -> dict[str, Any]:
        return dict(json.loads(file.read_text())) if file.is_file() else {}

    known, until_s = read(), 0.0  # an order of before was another process's
    while True:
        if (order := read()) != known:
            known, until_s = order, time.monotonic() + order["for_s"]
        is_on = time.monotonic() < until_s
        for n, each in enumerate(transports):
            if is_on and not each.lose_request:
                each.rng = random.Random(f"{known['seed']} {rank} {n}")
            each.lose_request = each.lose_reply = known["share"] if is_on else 0.0
        time.sleep(LOOK_S)


class Watch:
    """Attempts of a job that runs, or ran, `exposed_loop` in `out_dir`, each with the time.monotonic() at which it was seen in
    this process: the job's hosts may have other clocks. Looks while its block runs."""

    def __init__(self, out_dir: str | Path):
        self._file, self._seen, self._ended = Path(out_dir) / FOLDER / ATTEMPTS, list[Attempt](), threading.Event()
        self._thread = threading.Thread(target=self._run, name="trinity-chaos-watch", daemon=True)

    def __call__(self) -> list[Attempt]:
        return list(self._seen)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(LOOK_S):
            self._look()
        self._look()

    def _look(self) -> None:
        lines = self._file.read_text().splitlines(keepends=True) if self._file.is_file() else []
        whole = [line for line in lines if line.endswith("\n")]
        self._seen += [Attempt(time.monotonic(), int(line)) for line in whole[len(self._seen) :]]
