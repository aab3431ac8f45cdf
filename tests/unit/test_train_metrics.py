"""A training job's /metrics: what it says, to whom, and what a port that is taken costs."""

import logging
import socket
import threading
import urllib.error
import urllib.request
from contextlib import ExitStack

import pytest
from prometheus_client.parser import text_string_to_metric_families

from actors.train_metrics import CALLER, MOST_CALLERS, TrainExporter, check_listener, exported
from tests.unit.fuzzed_port import eventually
from trinity.config import Config
from trinity.errors import ConfigError
from trinity.observability.prometheus import TRAINING_METRICS
from trinity.observability.train_log import StepMetrics


def metrics(step, **changed):
    values = {"loss": 4.5, "z_loss": 0.0, "balance_loss": 0.0, "grad_norm": 0.8, "tokens": 1000, "seconds": 0.5}
    values |= {"max_vio": 1.0, "counts_LE": [[1, 1, 4, 2], [3, 3, 3, 3]], "lrs": {"muon": 1e-3}}
    return StepMetrics(step=step, **(values | changed))


def config(**changed):
    serve = {"api_key": changed.pop("key", None), "clients": changed.pop("clients", {})}
    return Config.from_tree({"model": "tiny", "train": {"metrics_port": 0} | changed, "serve": serve})


def scrape(port, key=None, **headers):
    """-> {name: {labels: value}}"""
    headers |= {"Authorization": f"Bearer {key}"} if key else {}
    request = urllib.request.Request(f"http://127.0.0.1:{port}/metrics", headers=headers)
    with urllib.request.urlopen(request, timeout=10) as answer:
        text = answer.read().decode()
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, {})[tuple(sample.labels.values())] = sample.value
    return found


def test_every_declared_metric_is_served(tmp_path):
    exporter = TrainExporter(layers=(1, 3))
    with exported(exporter, config()) as port:
        assert scrape(port)["trinity_train_retries_total"][("deadline",)] == 0
        exporter.retry("deadline")
        assert scrape(port)["trinity_train_retries_total"][("deadline",)] == 1, "before the step has succeeded"
        exporter.retry("deadline")
        exporter.step(metrics(1, retries={"deadline": 2}, phases_s={"begin": 0.01, "prepare": 0.2}))
        assert not [name for name in scrape(port) if "mfu" in name or "gpu" in name], "without GPUs absent, not 0"
        gpus = {"mfu": 0.25, "tokens_per_s_per_gpu": 500.0}
        exporter.step(
            metrics(2, skipped=1, checkpoint_s=3.0, phases_s={"begin": 0.02}, source_tokens={"web": 750}, **gpus)
        )
        exporter.validation(2, 4.25, {"web": 4.5})
        exporter.scores(2, [{"task": "niah", "mean": 0.75, "passes": False}, {"task": "quiz", "mean": 0.5}])
        found = scrape(port)
    assert {name: found[f"trinity_train_{name}"][()] for name in ("step", "loss", "grad_norm", "validation_loss")} == {
        "step": 2, "loss": 4.5, "grad_norm": 0.8, "validation_loss": 4.25
    }  # fmt: skip
    assert found["trinity_train_score"] == {("niah",): 0.75, ("quiz",): 0.5}
    assert found["trinity_train_gate_open"] == {("niah",): 0}
    assert (found["trinity_train_mfu"], found["trinity_train_tokens_per_second_per_gpu"]) == ({(): 0.25}, {(): 500})
    assert found["trinity_train_tokens_total"] == {(): 2000}
    assert found["trinity_train_tokens_per_second"] == {(): 2000}
    assert found["trinity_train_source_tokens_total"] == {("web",): 750}
    assert found["trinity_train_source_validation_loss"] == {("web",): 4.5}
    assert found["trinity_train_retries_total"][("deadline",)] == 2
    assert found["trinity_train_skipped_total"] == {(): 1}
    assert found["trinity_train_phase_seconds_count"] == {("begin",): 2, ("prepare",): 1}
    assert found["trinity_train_phase_seconds_sum"][("begin",)] == pytest.approx(0.03)
    assert (found["trinity_train_checkpoint_seconds_count"], found["trinity_train_checkpoint_seconds_sum"]) == (
        {(): 1},
        {(): 3.0},
    )
    assert found["trinity_train_max_vio"] == {("1",): pytest.approx(1.0), ("3",): 0}
    for metric in TRAINING_METRICS:
        assert metric.name in found or f"{metric.name}_count" in found, f"{metric.name} is declared and never served"


def test_a_step_without_expert_counts_says_nothing_of_them():
    exporter = TrainExporter(layers=())
    exporter.step(metrics(1, counts_LE=[], loss=float("nan")))
    with exported(exporter, config()) as port:
        assert "trinity_train_max_vio" not in scrape(port)


def test_a_key_that_is_set_is_asked_for():
    with exported(TrainExporter(()), config(key="s3cret")) as port:
        assert "trinity_train_step" in scrape(port, "s3cret")
        for wrong in (None, "other", "s3cre"):
            with pytest.raises(urllib.error.HTTPError) as refused:
                scrape(port, wrong)
            assert refused.value.code == 401
            refused.value.close()


def test_it_listens_over_ipv6_too():
    with exported(TrainExporter(()), config(metrics_host="::1")) as port:
        if port is None:
            pytest.skip("no IPv6 loopback here")
        with urllib.request.urlopen(f"http://[::1]:{port}/metrics", timeout=10) as answer:
            assert b"trinity_train_step" in answer.read()


def test_a_clients_own_key_opens_it_too():
    with exported(TrainExporter(()), config(clients={"one": {"key": "1st"}, "other": {"key": "2nd"}})) as port:
        assert "trinity_train_step" in scrape(port, "2nd")
        with pytest.raises(urllib.error.HTTPError, match="401"):
            scrape(port)


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "[", "localhost.evil.example"])
def test_without_a_key_it_answers_to_its_own_names(host):
    with exported(TrainExporter(()), config()) as port:
        scrape(port, Host="localhost:1")
        with pytest.raises(urllib.error.HTTPError, match="400"):
            scrape(port, Host=host)


def callers():
    """Threads that answer one caller each; other tests' servers have theirs in this process, too."""
    return sum(thread.name == CALLER for thread in threading.enumerate())


def test_a_crowd_takes_few_threads_and_keeps_nobody_out():
    with ExitStack() as stack:
        port = stack.enter_context(exported(TrainExporter(()), config()))
        crowd = [stack.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in range(10 * MOST_CALLERS)]
        scrape(port)
        for sock in crowd[:-MOST_CALLERS]:
            assert sock.recv(1) == b"", "who came first was sent away"
        assert eventually(lambda: callers() <= MOST_CALLERS)
        for sock in crowd[-MOST_CALLERS:]:
            sock.close()
        assert eventually(lambda: not callers())


def test_it_listens_on_loopback_and_elsewhere_only_with_a_key():
    assert Config.from_tree({"model": "tiny"}).train.metrics_port is None
    check_listener(config())
    check_listener(config(metrics_host="0.0.0.0", key="s3cret"))
    check_listener(config(metrics_host="0.0.0.0", clients={"one": {"key": "1st"}}))
    check_listener(config(metrics_host="0.0.0.0", metrics_port=None))
    with pytest.raises(ConfigError, match=r"metrics_host 0.0.0.0 is reachable by others: set serve.api_key"):
        check_listener(config(metrics_host="0.0.0.0"))


def test_a_port_that_is_taken_costs_the_metrics_and_not_the_run(caplog):
    with socket.socket() as taken, caplog.at_level(logging.WARNING):
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with exported(TrainExporter(()), config(metrics_port=taken.getsockname()[1])) as port:
            assert port is None
    assert "choose another train.metrics_port" in caplog.text


def test_the_port_is_free_again_afterwards():
    with exported(TrainExporter(()), config()) as port:
        scrape(port)
    with exported(TrainExporter(()), config(metrics_port=port)) as again:
        assert again == port
        scrape(again)


def test_no_port_no_listener():
    with exported(TrainExporter(()), config(metrics_port=None)) as port:
        assert port is None
