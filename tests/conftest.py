"""One Ray for the files that want it; settings that Ray, OpenMP and Triton read at import; long files before short ones."""

import functools
import gc
import os
from pathlib import Path

gc.disable()  # until all is imported (trinity/utils/garbage.py)
os.environ.update(RAY_AUTH_MODE="disabled", RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S="1")
# what Ray tells of itself is read by nobody here, and what it looks at ten times a second takes a share of two cores
os.environ.update(
    RAY_enable_metrics_collection="0", RAY_task_events_report_interval_ms="0", REPORTER_UPDATE_INTERVAL_MS="3600000"
)
os.environ.update(LOG_NAME_UPDATE_INTERVAL_S="3600", RAY_SERVE_CONTROL_LOOP_INTERVAL_S="0.4")
os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"  # a process for each run, and no node of ours is taken away
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from trinity.config import setup_environment

setup_environment(auth="disabled", is_local=False)

import pytest
import torch
from httpx._transports import default as transports

from tests.hang import pytest_timeout_set_timer  # noqa: F401  a hook of the suite

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # MegaBlocks' kernels run interpreted where there is no GPU
torch.set_num_threads(1)
# a thousand clients here would each read all of certifi's certificates, 20 ms of a core, to ask a server of ours without TLS
transports.create_ssl_context = functools.cache(transports.create_ssl_context)

LONGEST = (  # by `pytest --durations=0` of each; where two sides share the files, none of these may be the last to begin
    "ray/test_durable.py",
    "ray/test_commands.py",
    "ray/test_moves.py",
    "ray/test_bench.py",
    "ray/test_families.py",
    "ray/test_train.py",
    "ray/test_chaos.py",
    "ray/test_pool.py",
    "serve/test_adoption.py",
    "serve/test_app.py",
    "serve/test_real.py",
    "chaos/test_serving.py",
    "unit/test_netns.py",
    "unit/test_bench_experts.py",
    "unit/test_trainer.py",
    "unit/test_parts.py",
    "parity/test_generate.py",
    "unit/test_backends.py",
    "gpu/test_scripts.py",
    "unit/test_bench_train_decode.py",
    "unit/test_planner.py",
    "serve/test_bad_input.py",
    "unit/test_checkpoint_faults.py",
    "parity/test_invariance.py",
    "unit/test_bench_dispatch.py",
    "gpu/test_compile.py",
    "serve/test_dashboard.py",
    "serve/test_chat_page.py",
)


def pytest_xdist_make_scheduler(config, log):
    """Files go out one by one; those that want Ray to one side, which waits for processes while the other computes."""
    from xdist.scheduler import LoadFileScheduling

    class Files(LoadFileScheduling):
        def _split_scope(self, nodeid):
            file = super()._split_scope(nodeid)
            return "ray" if "ray_session" in (config.rootpath / file).read_text() else file

    return Files(config, log)


WANT_RAY = pytest.StashKey[set[Path]]()


def pytest_collection_modifyitems(config, items):
    """What Ray is in first, so that it can end; of these and of the others long files first. What runs by hand only, and
    lasts, has more time than the two minutes of a hang."""
    for item in items:
        if item.get_closest_marker("chaos") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(300))
    config.stash[WANT_RAY] = want_ray = {item.path for item in items if "ray_session" in item.fixturenames}
    place = {name: at for at, name in enumerate(LONGEST)}

    def order(item):
        name = "/".join(item.path.parts[-2:])
        return item.path not in want_ray and item.path.parent.name != "ray", place.get(name, len(LONGEST))

    items.sort(key=order)


def pytest_collection_finish(session):
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="module")
def ray_session():
    """A private single-node Ray with four CPUs. It goes on until a file follows that does not want it."""
    import ray
    from ray.serve._private import client

    client.CLIENT_POLLING_INTERVAL_S = 0.1  # whether an application is there, or gone: Ray looks once a second
    if not ray.is_initialized():
        ray.init(
            address="local",
            namespace="trinity",
            num_cpus=4,
            resources={"train_slot": 4, "expert_shard": 1},
            include_dashboard=False,
            object_store_memory=512 << 20,
            log_to_driver=False,
            logging_level="ERROR",
        )
    return ray


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item, nextitem):
    """Ends Ray where nobody will want it soon: idle, it takes a tenth of a core."""
    torn_down = yield
    if item.path in item.config.stash[WANT_RAY] and (
        nextitem is None or nextitem.path not in item.config.stash[WANT_RAY]
    ):
        end_ray()
    return torn_down


def end_ray():
    import ray

    from actors.sync.placement_watcher import stop_all

    stop_all()
    ray.shutdown()


def pytest_unconfigure(config):
    gc.unfreeze()
