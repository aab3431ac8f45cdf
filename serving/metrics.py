"""What the edges count, exported at /metrics. The declarations are trinity/metrics.py; only observing happens here.

A registry of its own for each Frontend: nothing global, so that tests and several servers in a process do not mix.
Probes reach one engine at a time, so the sums over engines are over those that answered within STALE_S.
"""

import time
from collections.abc import Mapping
from typing import Any

import prometheus_client as prometheus
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from trinity.engine.request import Delta
from trinity.metrics import SERVING_METRICS, Metric

STALE_S = 60.0
SUMS = {
    "num_running": "trinity_requests_running",
    "num_waiting": "trinity_requests_waiting",
    "num_free_blocks": "trinity_kv_blocks_free",
    "num_total_blocks": "trinity_kv_blocks",
}


def _make(metric: Metric, registry: prometheus.CollectorRegistry) -> Any:
    if metric.kind == "histogram":
        buckets = metric.buckets or prometheus.Histogram.DEFAULT_BUCKETS
        return prometheus.Histogram(metric.name, metric.help, metric.labels, registry=registry, buckets=buckets)
    kind = prometheus.Counter if metric.kind == "counter" else prometheus.Gauge
    return kind(metric.name, metric.help, metric.labels, registry=registry)


class Exporter:
    """Turns answers, Deltas and engine statistics into the declared metrics."""

    def __init__(self) -> None:
        self.registry = prometheus.CollectorRegistry()
        self._metrics = {metric.name: _make(metric, self.registry) for metric in SERVING_METRICS}
        self._engines: dict[str, tuple[float, Mapping[str, float]]] = {}

    def __getitem__(self, name: str) -> Any:
        return self._metrics[name]

    def answered(self, route: str, code: str, seconds: float) -> None:
        """One request of either edge has ended. `route` and `code` come from small fixed sets."""
        self["trinity_requests_total"].labels(route, code).inc()
        self["trinity_request_seconds"].labels(route).observe(seconds)

    def engine(self, engine_id: str, version: int, stats: Mapping[str, float]) -> None:
        """What one engine said of itself: gauges are summed over engines, its counters continue from its last answer."""
        now_s = time.monotonic()
        _, before = self._engines.get(engine_id, (now_s, {}))
        preemptions = stats.get("num_preemptions", 0) - before.get("num_preemptions", 0)
        self["trinity_preemptions_total"].inc(max(0, preemptions))
        self["trinity_weights_version"].set(version)
        self._engines[engine_id] = now_s, stats
        self._engines = {key: seen for key, seen in self._engines.items() if now_s - seen[0] < STALE_S}
        for field, name in SUMS.items():
            self[name].set(sum(found.get(field, 0) for _, found in self._engines.values()))

    def render(self) -> tuple[bytes, str]:
        """The exposition and its content type."""
        return prometheus.generate_latest(self.registry), CONTENT_TYPE_PLAIN_0_0_4


class TokenClock:
    """Times and counts the Deltas of one sequence, from now on."""

    def __init__(self, exporter: Exporter):
        self._exporter = exporter
        self._previous_s = time.perf_counter()
        self._seen = False

    def tick(self, delta: Delta) -> None:
        """A Delta of several tokens counts as so many equal intervals."""
        now_s, count = time.perf_counter(), len(delta.token_ids)
        elapsed_s, self._previous_s = now_s - self._previous_s, now_s
        if not self._seen:
            self._seen = True
            self._exporter["trinity_time_to_first_token_seconds"].observe(elapsed_s)
            self._exporter["trinity_prompt_tokens_total"].inc(delta.num_prompt_tokens)
        else:
            for _ in range(count):
                self._exporter["trinity_inter_token_seconds"].observe(elapsed_s / count)
        self._exporter["trinity_generated_tokens_total"].inc(count)
