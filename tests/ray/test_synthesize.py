"""Synthetic data by workers of Ray Data: the same bytes as from one process."""

import pytest

from actors.jobs.synthesize import made_by_workers
from tests.unit.model_server import ModelServer
from tests.unit.synthesis_runs import config_of, content, inputs, synthesized, tokenizer  # noqa: F401  fixtures
from trinity.errors import Unavailable
from trinity.synthesis.run import Run


def by_workers(config):
    run = Run(config)
    with run.owned("backwards"):
        run.synthesize(lambda shards: made_by_workers(config, config.server.url, None, "backwards", shards))
    return run


def test_workers_make_what_one_process_makes(ray_session, inputs, tokenizer, tmp_path):  # noqa: F811
    with ModelServer(faults={3: 503}) as server:
        here = synthesized(config_of(inputs, tokenizer, server.url, tmp_path / "here"))
        config = config_of(inputs, tokenizer, server.url, tmp_path / "there", workers=2)
        assert content(by_workers(config)) == content(here)


def test_what_ends_a_worker_is_named(ray_session, inputs, tokenizer, tmp_path):  # noqa: F811
    with ModelServer(faults={"all": 401}) as server:
        config = config_of(inputs, tokenizer, server.url, tmp_path / "out", workers=1)
        with pytest.raises(Unavailable, match="refuses the key"):
            by_workers(config)
