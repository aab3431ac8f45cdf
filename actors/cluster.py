"""Joining a Ray cluster, or starting a private one on this machine."""

import logging
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Event, Thread

import ray
from ray.exceptions import AuthenticationError

from actors.sync import placement_watcher, shm_folders
from trinity.config import PACKAGES, ClusterConfig, TrainConfig, setup_environment
from trinity.errors import ConfigError, Unauthenticated, Unavailable
from trinity.utils.disk import shared_memory
from trinity.utils.private import private_folder
from trinity.utils.processes import below, command_of, end_those_left, those_left

log = logging.getLogger(__name__)
ROOT = Path(__file__).parents[1]  # where our packages lie
LEAVE_S = 5.0  # for processes of a private Ray to end by themselves
WATCH_S, LOST = 2.0, 1  # between two looks whether it is there; exit code where it is not
LOCAL_OBJECT_STORE_BYTES = 512 << 20  # control messages and single layers' rows; /dev/shm is small in containers


@contextmanager
def joined(cluster: ClusterConfig, train: TrainConfig | None = None) -> Iterator[None]:
    """Be connected inside the block. `train_slot` is what Ray Train counts workers by, so that it leaves alone the
    CPUs and GPUs that shards hold; a local cluster gets as many as `train` wants, another one must have the fewest of them."""
    if is_joined():  # an embedding program or a test has its own
        yield
        return
    start(cluster, train)
    watch = _watch() if cluster.address == "local" else Event()
    try:
        yield
    finally:
        placement_watcher.stop_all()
        workers = private_workers() if cluster.address == "local" else {}
        watch.set()
        ray.shutdown()
        if left := end_those_left(workers, LEAVE_S):
            log.info("%d processes of the private Ray did not end by themselves", len(left))


def is_joined() -> bool:
    """Say whether this process is connected to a cluster."""
    return bool(ray.is_initialized())


def private_workers() -> dict[int, str]:
    """Processes below the Ray node that this one has started. At its end some wait for their own threads for ever, with 400 MB
    and the cluster's token."""
    return {pid: start for node in _private_processes("/raylet") for pid, start in below(node).items()}


def _private_processes(*programs: str) -> dict[int, str]:
    return {pid: start for pid, start in below(os.getpid()).items() if command_of(pid).endswith(programs)}


def _watch() -> Event:
    """Leave at once, until that is set, where the private Ray ends under this process: a service manager stops all processes of
    a service, or one has no memory left. Ray itself would look for its head for a minute, and then abort."""
    is_over, ray_itself = Event(), _private_processes("/raylet", "/gcs_server")
    Thread(target=leave_with, args=(ray_itself, is_over), name="trinity-ray", daemon=True).start()
    return is_over


def leave_with(processes: Mapping[int, str], is_over: Event) -> None:
    """Wait until that is set, or one of these has ended: then end this process and what is left of them."""
    workers = private_workers()
    while not is_over.wait(WATCH_S):
        workers = private_workers() or workers  # none are below a node that has ended
        if len(those_left(processes)) < len(processes) and not is_over.is_set():
            log.error(
                "the private Ray of this command has ended, and all that ran in it: was it stopped or killed with it?"
            )
            end_those_left({**processes, **workers}, after_s=0)
            shm_folders.sweep(shared_memory(None))
            os._exit(LOST)


def check_names(folder: str | Path = ".") -> None:
    """Raise ConfigError where workers of a cluster that others have started would take a file or a package of this folder, the
    working directory, for one of ours: they look there first. A private cluster's have ours already."""
    for name in PACKAGES:
        found = [path for path in (Path(folder, f"{name}.py"), Path(folder, name, "__init__.py")) if path.is_file()]
        if found and not found[0].samefile(ROOT / name / "__init__.py"):
            raise ConfigError(
                f"workers of the cluster would take {found[0]} for Trinity's own {name!r}; start the command in another "
                "folder, or rename it"
            )


def start(cluster: ClusterConfig, train: TrainConfig | None = None) -> None:
    setup_environment(cluster.auth, is_local=cluster.address == "local")
    wanted, fewest = (train.num_workers, train.fewest_workers) if train else (0, 0)
    if cluster.address == "local":
        _start_private(cluster, wanted)
        return
    check_names()
    try:
        ray.init(address=cluster.address, namespace=cluster.namespace, log_to_driver=False, logging_level="ERROR")
    except AuthenticationError:
        raise Unauthenticated(
            f"there is no token here that the cluster at {cluster.address!r} takes; set RAY_AUTH_TOKEN to the cluster's "
            "(`ray get-auth-token`), or --cluster.auth disabled if it has none"
        ) from None
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise Unavailable(
            f"no Ray cluster at {cluster.address!r} ({error}); start one or use --cluster.address local"
        ) from None
    have = ray.cluster_resources().get("train_slot", 0)
    if have < fewest:
        raise ConfigError(
            f"training takes at least {fewest} workers, the cluster offers {have:.0f} train_slot; "
            "start its nodes with --resources '{\"train_slot\": N}'"
        )


def _leave_our_group() -> None:
    """Have Ray's own processes be started in groups of their own, as Ray does on Windows and for its workers. What is sent to
    all of this command's group (by `timeout`, supervisors, Ctrl-C) would end its Ray first: no request could be drained, and it
    would wait a minute for Ray's head. Linux ends them with this process even so; elsewhere Ray has only the group for that.
    """
    if sys.platform == "linux":
        from ray._private import services

        services.ConsolePopen = partial(subprocess.Popen, process_group=0)


def _start_private(cluster: ClusterConfig, num_slots: int) -> None:
    _leave_our_group()
    folder = private_folder(is_short=True) / "ray"  # its logs and sockets are nobody else's business
    try:
        ray.init(
            address="local",
            _temp_dir=str(folder),
            namespace=cluster.namespace,
            num_cpus=cluster.num_cpus,
            resources={"train_slot": num_slots} if num_slots else None,
            include_dashboard=False,
            object_store_memory=LOCAL_OBJECT_STORE_BYTES,
            log_to_driver=False,
            logging_level="ERROR",
        )
    except Exception as error:  # Ray raises no other kind where its processes do not come up
        raise Unavailable(
            f"Ray did not start on this machine ({str(error).partition('.')[0]}); it may lack processor time, memory or room "
            f"on its disk, see {folder}/session_latest/logs"
        ) from error
