"""The environment: the only place that reads it, and what it must hold before Ray and OpenMP start."""

import os
import secrets

from trinity.utils.origins import LOOPBACK

PACKAGES = ("trinity", "actors", "serving", "protos")


def api_key() -> str | None:
    """The key from the environment, for servers and clients."""
    return os.environ.get("TRINITY_API_KEY")


def admin_key() -> str | None:
    """The operators' key from the environment, for servers and clients."""
    return os.environ.get("TRINITY_ADMIN_KEY")


def native_is_wanted() -> bool:
    """Say whether the extension in C++ may be used, where it is built (trinity/native.py)."""
    return os.environ.get("TRINITY_NATIVE", "1") != "0"


# OpenMP's threads spin at the end of each parallel region. With fewer cores than threads (a trainer, shards and an engine on
# one small machine) each then burns the time slice of the one it waits for: an expert layer took 1,400 ms instead of 23.
THREADS = {"GOMP_SPINCOUNT": "1000"}


def ray_node_pid() -> int:
    """The process of the Ray node that started this worker process."""
    return int(os.environ["RAY_RAYLET_PID"])


def num_cpus() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def setup_threads() -> None:
    """Let threads that wait soon sleep, unless the environment says otherwise. Call it before `import torch`."""
    for key, value in THREADS.items():
        os.environ.setdefault(key, value)


PROXIES = ("http_proxy", "https_proxy", "all_proxy", "grpc_proxy")
EXCEPTIONS = ("no_proxy", "NO_PROXY")
GRPC_EXCEPTIONS = "no_grpc_proxy"  # counts before no_proxy where it is there
ANY_ADDRESS = ("0.0.0.0/0", "::/0")  # but none that is asked for by a name


def setup_proxies() -> None:
    """Have nobody ask a proxy for this machine itself: where there are proxies, loopback is added to their exceptions."""
    if any(os.environ.get(name) or os.environ.get(name.upper()) for name in PROXIES):
        excepted = _excepted()
        for name in EXCEPTIONS:
            os.environ[name] = ",".join(dict.fromkeys((*excepted, *LOOPBACK)))


def setup_grpc() -> None:
    """Have processes of one pool, which know each other by address, talk without a proxy over gRPC, as Ray's own do."""
    own = os.environ.get(GRPC_EXCEPTIONS)
    excepted = _excepted() if own is None else own.split(",")
    os.environ[GRPC_EXCEPTIONS] = ",".join(dict.fromkeys((*excepted, *LOOPBACK, *ANY_ADDRESS)))


def _excepted() -> list[str]:
    """Names in no_proxy, in either spelling."""
    both = (os.environ.get(name, "") for name in EXCEPTIONS)
    return [name.strip() for value in both for name in value.split(",") if name.strip()]


def setup_environment(auth: str, is_local: bool = True) -> None:
    """Variables that Ray's processes must see before `import ray`; sets those that are missing.

    A local cluster gets a token of its own, which only its processes inherit and no file keeps, and is on loopback only.
    """
    setup_proxies()
    setup_grpc()
    wanted = {
        **THREADS,
        "RAY_worker_niceness": "0",  # Ray's 15 lets the driver's own threads starve a shard that it waits for
        "RAY_ENABLE_AUTO_CONNECT": "0",  # a thread that asks while its process ends would start another Ray
        "RAY_AUTH_MODE": auth,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DEDUP_LOGS": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_SERVE_LOG_TO_STDERR": "0",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
        "RAY_CHDIR_TO_TRIAL_DIR": "0",
        "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
        "OMP_NUM_THREADS": "1",
    }
    if is_local:
        # Named for systems where it is the default: the node's address is then 127.0.0.1, and all of Ray listens there.
        wanted["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        # The head would remember its last 100,000 tasks, 60 MB an hour at first, for `ray list tasks`, which is not there.
        wanted["RAY_task_events_report_interval_ms"] = "0"
        # Ray Train would have a process for each run that looks whether a cloud takes a node away.
        wanted["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"
        # Below `uv run`, Ray would pack the working directory for its workers, checkpoints and all.
        wanted["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"
        # Workers look into the working directory first: what is called as our packages there would be taken for them.
        wanted["RAY_preload_python_modules"] = ",".join(PACKAGES)
    if auth == "token" and is_local:
        wanted["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    for key, value in wanted.items():
        os.environ.setdefault(key, value)
