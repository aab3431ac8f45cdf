"""Joining a Ray cluster, or starting a private one on this machine."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray
from ray.exceptions import AuthenticationError

from actors.sync import placement_watcher
from trinity.config import PACKAGES, ClusterConfig, TrainConfig, setup_environment
from trinity.errors import ConfigError, Unauthenticated, Unavailable
from trinity.utils.private import private_folder
from trinity.utils.processes import below, command_of, end_those_left

log = logging.getLogger(__name__)
ROOT = Path(__file__).parents[1]  # where our packages lie
LEAVE_S = 5.0  # for processes of a private Ray to end by themselves
LOCAL_OBJECT_STORE_BYTES = 512 << 20  # control messages and single layers' rows; /dev/shm is small in containers


@contextmanager
def joined(cluster: ClusterConfig, train: TrainConfig | None = None) -> Iterator[None]:
    """Be connected inside the block. `train_slot` is what Ray Train counts workers by, so that it leaves alone the
    CPUs and GPUs that shards hold; a local cluster gets as many as `train` wants, another one must have the fewest of them."""
    if is_joined():  # an embedding program or a test has its own
        yield
        return
    start(cluster, train)
    try:
        yield
    finally:
        placement_watcher.stop_all()
        workers = private_workers() if cluster.address == "local" else {}
        ray.shutdown()
        if left := end_those_left(workers, LEAVE_S):
            log.info("%d processes of the private Ray did not end by themselves", len(left))


def is_joined() -> bool:
    """Say whether this process is connected to a cluster."""
    return bool(ray.is_initialized())


def private_workers() -> dict[int, str]:
    """Processes below the Ray node that this one has started. At its end some wait for their own threads for ever, with 400 MB
    and the cluster's token."""
    nodes = [pid for pid in below(os.getpid()) if command_of(pid).endswith("/raylet")]
    return {pid: start for node in nodes for pid, start in below(node).items()}


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


def _start_private(cluster: ClusterConfig, num_slots: int) -> None:
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
