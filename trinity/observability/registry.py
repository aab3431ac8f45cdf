"""Declared metrics as objects of the client library, in a registry of their own: nothing global."""

from typing import Any

import prometheus_client as prometheus

from trinity.observability.prometheus import Metric


def registered(metric: Metric, registry: prometheus.CollectorRegistry) -> Any:
    """The counter, gauge or histogram that a declaration asks for; `labels(...)` first where it has labels."""
    if metric.kind == "histogram":
        buckets = metric.buckets or prometheus.Histogram.DEFAULT_BUCKETS
        return prometheus.Histogram(metric.name, metric.help, metric.labels, registry=registry, buckets=buckets)
    kind = prometheus.Counter if metric.kind == "counter" else prometheus.Gauge
    return kind(metric.name, metric.help, metric.labels, registry=registry)
