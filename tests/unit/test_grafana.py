"""The Grafana dashboard asks for metrics that exist, by their exposed names and labels."""

import json
import re
from pathlib import Path

import pytest
import yaml

from trinity.observability.prometheus import ALL_METRICS, TRAINING_METRICS

FOLDER = Path(__file__).parents[2] / "clusters"
NAME = re.compile(r"\btrinity_[a-z0-9_]+")
SUFFIXES = {"histogram": ("_bucket", "_sum", "_count"), "counter": ("",), "gauge": ("",)}
EXPOSED = {metric.name + suffix: metric for metric in ALL_METRICS for suffix in SUFFIXES[metric.kind]}
LABELS = {"le"}


def panels():
    tree = json.loads((FOLDER / "grafana.json").read_text())
    inner = [each for panel in tree["panels"] for each in (panel, *panel.get("panels", []))]
    return [panel for panel in inner if panel.get("targets")]


ALL = [(panel["title"], target["expr"]) for panel in panels() for target in panel["targets"]]
RAYS = {"ray_node_cpu_utilization", "ray_node_mem_used", "ray_node_mem_total", "ray_node_gpus_utilization"}
QUERIES = [pair for pair in ALL if NAME.search(pair[1])]


@pytest.mark.parametrize(("title", "query"), QUERIES, ids=lambda value: value[:40])
def test_a_query_asks_for_what_is_exposed(title, query):
    names = NAME.findall(query)
    assert names, f"{title} shows nothing of ours"
    for name in names:
        assert name in EXPOSED, f"{title}: {name} is not exposed"
    known = LABELS.union(*(EXPOSED[name].labels for name in names))
    for group in re.findall(r"by \(([^)]*)\)", query):
        assert {label.strip() for label in group.split(",")} <= known, f"{title}: by ({group}) of {names}"
    for label in re.findall(r"[{,]\s*([a-z_]+)\s*(?:=~|!~|!=|=)", query):
        assert label in known, f"{title}: no label {label} on {names}"
    assert query.count("(") == query.count(")")


def test_other_queries_are_for_rays_own_metrics():
    found = {name for pair in ALL if pair not in QUERIES for name in re.findall(r"\bray_\w+", pair[1])}
    assert found <= RAYS
    assert all(NAME.search(query) or "ray_" in query for _, query in ALL)


def test_counters_are_shown_as_rates():
    for title, query in QUERIES:
        for name in NAME.findall(query):
            if EXPOSED[name].kind != "gauge":
                assert re.search(r"(rate|increase)\(" + name, query), f"{title}: {name} only ever grows"


def test_weights_are_shown():
    shown = {name for _, query in QUERIES for name in NAME.findall(query)}
    wanted = ("version", "versions_held", "switch_seconds", "quarantined_total")
    assert {f"trinity_weights_{name}" for name in wanted} <= shown


def test_placement_is_shown():
    shown = {name for _, query in QUERIES for name in NAME.findall(query)}
    wanted = ("epoch", "imbalance", "shards", "changes_total", "recoveries_total", "copied_bytes_total")
    assert {f"trinity_placement_{name}" for name in wanted} <= shown
    assert "trinity_dispatch_seconds_bucket" in shown


def test_training_is_shown():
    shown = {name for _, query in QUERIES for name in NAME.findall(query)}
    titles = {panel["title"] for panel in json.loads((FOLDER / "grafana.json").read_text())["panels"]}
    assert "Training" in titles, "a row of its own"
    for metric in TRAINING_METRICS:
        names = {metric.name + suffix for suffix in SUFFIXES[metric.kind]}
        assert names & shown or metric.name == "trinity_train_step", f"{metric.name} is in no panel"


def test_panels_do_not_lie_over_one_another():
    taken = set()
    for panel in json.loads((FOLDER / "grafana.json").read_text())["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells


def test_prometheus_scrapes_what_the_dashboard_shows():
    jobs = {job["job_name"]: job for job in yaml.safe_load((FOLDER / "prometheus.yml").read_text())["scrape_configs"]}
    assert jobs["trinity"]["metrics_path"] == "/metrics"
    assert jobs["trinity"]["static_configs"][0]["targets"] == ["127.0.0.1:8000"]
    assert jobs["trinity-train"]["static_configs"][0]["targets"] == ["127.0.0.1:8001"]
