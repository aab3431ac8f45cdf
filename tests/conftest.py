"""One Ray for the whole session; settings that Ray, OpenMP and Triton read at import come first."""

import os

os.environ.update(RAY_AUTH_MODE="disabled", RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S="1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from trinity.config import setup_environment

setup_environment(auth="disabled")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # MegaBlocks' kernels run interpreted where there is no GPU
torch.set_num_threads(1)


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
