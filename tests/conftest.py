"""One Ray for the session; settings that Ray, OpenMP and Triton read at import come first; long files before short ones."""

import os

os.environ.update(RAY_AUTH_MODE="disabled", RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S="1")
# what Ray tells of itself is read by nobody here, and what it looks at ten times a second takes a share of two cores
os.environ.update(
    RAY_enable_metrics_collection="0", RAY_task_events_report_interval_ms="0", REPORTER_UPDATE_INTERVAL_MS="3600000"
)
os.environ.update(LOG_NAME_UPDATE_INTERVAL_S="3600", RAY_SERVE_CONTROL_LOOP_INTERVAL_S="0.4")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from trinity.config import setup_environment

setup_environment(auth="disabled")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # MegaBlocks' kernels run interpreted where there is no GPU
torch.set_num_threads(1)

LONGEST = (  # by `pytest --durations=0` of each; where two sides share the files, none of these may be the last to begin
    "ray/test_durable.py",
    "ray/test_commands.py",
    "ray/test_moves.py",
    "ray/test_bench.py",
    "ray/test_train.py",
    "ray/test_chaos.py",
    "ray/test_pool.py",
    "serve/test_real.py",
    "serve/test_app.py",
    "ray/test_rollout.py",
    "serve/test_dashboard.py",
    "unit/test_bench_experts.py",
    "parity/test_generate.py",
    "unit/test_backends.py",
    "serve/test_http.py",
    "unit/test_trainer.py",
    "unit/test_bench_dispatch.py",
    "unit/test_bench_train_decode.py",
)


def pytest_collection_modifyitems(items):
    """Long files first; what runs by hand only, and lasts, has more time than the two minutes of a hang."""
    for item in items:
        if item.get_closest_marker("chaos") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(300))
    place = {name: at for at, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get("/".join(item.path.parts[-2:]), len(LONGEST)))


@pytest.fixture(scope="session")
def ray_session(tmp_path_factory):
    """A private single-node Ray with two CPUs, shut down at the end of the session."""
    import ray

    ray.init(
        address="local",
        namespace="trinity",
        num_cpus=4,
        resources={"train_slot": 4},
        include_dashboard=False,
        object_store_memory=512 << 20,
        log_to_driver=False,
        logging_level="ERROR",
    )
    yield ray
    from actors.sync.placement_watcher import stop_all

    stop_all()
    ray.shutdown()
