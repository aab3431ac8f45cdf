"""Counts of the edges, exported at /metrics. The declarations are trinity/observability/; only observing happens here.

A registry of its own for each Frontend: nothing global, so that tests and several servers in a process do not mix.
Sums over engines are over those that answered when they were last asked; what others have counted is known for STALE_S more, as
they may answer again. A server without a pool has no placement metrics: zeros would say that all is even and nothing there.
"""

import asyncio
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, Protocol

import prometheus_client as prometheus
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from serving.vllm_names import VllmNames
from trinity.engine.request import Delta
from trinity.observability.prometheus import (
    DISPATCH_METRICS,
    DISPATCH_PHASES,
    DISPATCH_S,
    DISPATCH_SECONDS,
    PLACEMENT_METRICS,
    SERVING_METRICS,
    Metric,
)
from trinity.observability.registry import registered
from trinity.placement.snapshot import Snapshot

STALE_S = 60.0
KV = ("free", "total")
SUMS = {
    "num_running": "trinity_requests_running",
    "num_waiting": "trinity_requests_waiting",
    "num_free_blocks": "trinity_kv_blocks_free",
    "num_total_blocks": "trinity_kv_blocks",
    "num_idle_blocks": "trinity_kv_blocks_cached",
    "num_versions_held": "trinity_weights_versions_held",
}
COUNTERS = {
    "num_preemptions": "trinity_preemptions_total",
    "num_computed_tokens": "trinity_computed_tokens_total",
    "num_prefix_queries": "trinity_prefix_queries_total",
    "num_prefix_hits": "trinity_prefix_hits_total",
    "num_tier_hits": "trinity_kv_tier_hits_total",
    "num_tier_written": "trinity_kv_tier_written_total",
    "num_tier_evicted": "trinity_kv_tier_evicted_total",
    "num_dispatch_retries": "trinity_dispatch_retries_total",
    "num_quarantined": "trinity_weights_quarantined_total",
    "num_repeats": "trinity_passes_repeated_total",
    "num_drafted": "trinity_draft_tokens_total",
    "num_accepted": "trinity_accepted_draft_tokens_total",
}
EACH = {
    "num_running": "trinity_engine_requests_running",
    "num_waiting": "trinity_engine_requests_waiting",
    "num_prefix_queries": "trinity_engine_prefix_queries",
    "num_prefix_hits": "trinity_engine_prefix_hits",
}
# Shown to those who share a server with other keys: of others nothing but how busy they keep it. By times, hits and counts of
# computed tokens they would learn which beginnings others have cached.
LOAD = (
    *("trinity_requests_running", "trinity_requests_waiting", "trinity_gateways", "trinity_client_requests"),
    *("trinity_engine_requests_running", "trinity_engine_requests_waiting", "trinity_kv_blocks", "trinity_kv_usage"),
    *("trinity_weights_version", "trinity_longest_pass_seconds"),
)
GROWS = {*COUNTERS, "dispatch_seconds"}  # of an engine's statistics
STATES = ("starting", "ready", "draining", "away")
SURVIVES = ("shards", "nodes")
RESULTS = {"done": "done", "rolled back": "rolled_back"}  # phases in which a change has ended


class Info(Protocol):
    """Facts that an engine says of itself (serving/frontend.py, EngineInfo)."""

    @property
    def engine_id(self) -> str: ...

    @property
    def version(self) -> int: ...

    @property
    def role(self) -> str: ...

    @property
    def stats(self) -> Mapping[str, Any]: ...


class Exporter:
    """Turns answers, Deltas and engine statistics into the declared metrics."""

    def __init__(self, model: str = "") -> None:
        self.registry = prometheus.CollectorRegistry()
        self._metrics: dict[str, Any] = {}
        self._declare(SERVING_METRICS + tuple(metric for metric in DISPATCH_METRICS if metric is not DISPATCH_SECONDS))
        self._dispatch = DispatchSeconds()
        self.registry.register(self._dispatch)
        self.registry.register(VllmNames(self, model))
        self._engines: dict[str, tuple[float, Mapping[str, Any]]] = {}
        self._changes: Changes | None = None

    def _declare(self, metrics: Iterable[Metric]) -> None:
        self._metrics |= {metric.name: registered(metric, self.registry) for metric in metrics}

    def __getitem__(self, name: str) -> Any:
        return self._metrics[name]

    def answered(self, route: str, code: str, seconds: float) -> None:
        """One request of either edge has ended. `route` and `code` come from small fixed sets."""
        self["trinity_requests_total"].labels(route, code).inc()
        self["trinity_request_seconds"].labels(route).observe(seconds)

    def ignored(self, fields: Iterable[str]) -> None:
        """Count fields of a request that had no effect. They come from a small fixed set."""
        for field in fields:
            self["trinity_ignored_fields_total"].labels(field).inc()

    def continued(self, paused_s: float) -> None:
        """One sequence goes on after its engine was lost, so long ago."""
        self["trinity_continuation_seconds"].observe(paused_s)

    def admitted(self, held: Mapping[str, int], num_gateways: int) -> None:
        """Show how many slots each client holds here, and among how many gateways they are divided."""
        self["trinity_gateways"].set(num_gateways)
        for name, num in held.items():
            self["trinity_client_requests"].labels(name).set(num)

    def engine(self, engine_id: str, version: int, stats: Mapping[str, Any]) -> None:
        """Count what one engine said of itself: gauges are summed over engines, its counters continue from its last answer."""
        now_s = time.monotonic()
        _, before = self._engines.get(engine_id, (now_s, {}))
        for field, name in COUNTERS.items():
            self[name].inc(max(0, stats.get(field, 0) - before.get(field, 0)))
        self._dispatch.add(stats.get("dispatch_seconds", {}), before.get("dispatch_seconds", {}))
        self["trinity_weights_version"].set(version)
        self["trinity_weights_switch_seconds"].set(stats.get("switch_seconds", 0.0))
        self._engines[engine_id] = now_s, stats
        self._engines = {key: seen for key, seen in self._engines.items() if now_s - seen[0] < STALE_S}
        self._add_up([found for _, found in self._engines.values()])

    def _add_up(self, engines: Sequence[Mapping[str, Any]]) -> None:
        longest_s = max((found.get("longest_pass_seconds", 0.0) for found in engines), default=0.0)
        self["trinity_longest_pass_seconds"].set(longest_s)
        self["trinity_kv_tier_bytes"].set(max((found.get("tier_bytes", 0) for found in engines), default=0))
        for field, name in SUMS.items():
            self[name].set(sum(found.get(field, 0) for found in engines))
        free, total = (sum(found.get(f"num_{what}_blocks", 0) for found in engines) for what in KV)
        self["trinity_kv_usage"].set(1 - free / total if total else 0.0)

    def engines(self, infos: Iterable["Info"]) -> None:
        """Count what all engines said of themselves, and show each beside the others. One that did not answer has nothing."""
        infos = tuple(infos)
        self._forget(self._engines.keys() - {info.engine_id for info in infos})
        for name in EACH.values():
            self[name].clear()  # of engines that have gone
        for info in infos:
            self.engine(info.engine_id, info.version, info.stats)
            for field, name in EACH.items():
                self[name].labels(info.engine_id, info.role).set(info.stats.get(field, 0))

    def _forget(self, silent: Iterable[str]) -> None:
        """Keep of these what their counters continue from."""
        for engine_id in silent:
            seen_s, stats = self._engines[engine_id]
            self._engines[engine_id] = seen_s, {field: stats[field] for field in GROWS & stats.keys()}
        self._add_up([found for _, found in self._engines.values()])

    @contextmanager
    def sequence(self, adapter: str | None = None) -> Iterator["TokenClock"]:
        """Time one sequence inside the block, and count how it ends: `abort` where nobody wants more of it. Where it is for an
        adapter, it counts as that one's, too."""
        clock = TokenClock(self, adapter)
        try:
            yield clock
        except BaseException as error:
            clock.end("abort" if isinstance(error, GeneratorExit | asyncio.CancelledError) else "error")
            raise

    def placement(self, snapshot: Snapshot | None) -> None:
        """Count what the placement service said, or that it is away."""
        if self._changes is None:
            self._declare(PLACEMENT_METRICS)
            self._changes = Changes(self)
        self["trinity_placement_up"].set(snapshot is not None)
        if snapshot is None:
            return
        held_LE = snapshot.table.num_replicas_LE
        self["trinity_placement_epoch"].set(snapshot.table.epoch)
        self["trinity_placement_imbalance"].set(snapshot.imbalance)
        for what, num in zip(SURVIVES, snapshot.survives, strict=True):
            self["trinity_placement_survives"].labels(what).set(num)
        self["trinity_placement_replicas"].set(int(held_LE.sum()))
        self["trinity_placement_max_replicas"].set(int(held_LE.max(initial=0)))
        self._shards(snapshot)
        self._changes.see(snapshot)

    def _shards(self, snapshot: Snapshot) -> None:
        for state in STATES:
            self["trinity_placement_shards"].labels(state).set(sum(shard.state == state for shard in snapshot.shards))
        rows, sizes = self["trinity_shard_rows_per_second"], self["trinity_shard_weight_bytes"]
        for gauge in (rows, sizes):
            gauge.clear()  # of shards that have gone
        for shard in snapshot.shards:
            rows.labels(shard.name).set(shard.rows_per_s)
            sizes.labels(shard.name).set(shard.weight_bytes)

    def render(self, load_alone: bool = False) -> tuple[bytes, str]:
        """The exposition, or its part about load (LOAD), and its content type."""
        shown = self.registry.restricted_registry(LOAD) if load_alone else self.registry
        return prometheus.generate_latest(shown), CONTENT_TYPE_PLAIN_0_0_4


class DispatchSeconds:
    """Collects trinity_dispatch_seconds over all engines: they send counts, and the client library takes only single values."""

    def __init__(self) -> None:
        self._totals = {phase: ([0] * (len(DISPATCH_S) + 1), 0.0) for phase in DISPATCH_PHASES}
        self._seen = False

    def add(self, now: Mapping[str, Any], before: Mapping[str, Any]) -> None:
        """Add what an engine counted since its last answer; one that counts from the start again is another engine."""
        for phase in DISPATCH_PHASES & now.keys():
            self._seen = True
            (counts, seconds), (total, sum_s) = now[phase], self._totals[phase]
            old, old_s = before.get(phase, ([0] * len(counts), 0.0))
            if len(counts) == len(total) and seconds >= old_s:
                added = [max(0, a - b) for a, b in zip(counts, old, strict=True)]
                self._totals[phase] = [a + b for a, b in zip(total, added, strict=True)], sum_s + seconds - old_s

    def collect(self) -> Iterator[HistogramMetricFamily]:
        family = HistogramMetricFamily(DISPATCH_SECONDS.name, DISPATCH_SECONDS.help, labels=DISPATCH_SECONDS.labels)
        bounds = [*map(str, DISPATCH_S), "+Inf"]
        for phase, (counts, sum_s) in self._totals.items() if self._seen else ():
            family.add_metric([phase], list(zip(bounds, accumulate(counts), strict=True)), sum_s)
        yield family


class Changes:
    """Counts each change once, when it has ended. Those that had ended before the first snapshot are not counted."""

    def __init__(self, exporter: Exporter):
        self._exporter = exporter
        self._counted: set[tuple[int, float]] | None = None
        self._recoveries = 0
        for result in RESULTS.values():
            exporter["trinity_placement_changes_total"].labels(result)

    def see(self, snapshot: Snapshot) -> None:
        ended = {(change.epoch, change.started_s): change for change in snapshot.changes if change.phase in RESULTS}
        for key in ended.keys() - (ended.keys() if self._counted is None else self._counted):
            change = ended[key]
            self._exporter["trinity_placement_changes_total"].labels(RESULTS[change.phase]).inc()
            self._exporter["trinity_placement_copies_total"].inc(change.num_copies)
            self._exporter["trinity_placement_copied_bytes_total"].inc(change.copied_bytes)
        self._counted = set(ended)
        self._exporter["trinity_placement_recoveries_total"].inc(max(0, snapshot.num_recoveries - self._recoveries))
        self._recoveries = snapshot.num_recoveries
        if snapshot.changes:
            self._exporter["trinity_placement_change_seconds"].set(snapshot.changes[0].seconds)


class TokenClock:
    """Time and count the Deltas of one sequence, from now on."""

    def __init__(self, exporter: Exporter, adapter: str | None = None):
        self._exporter, self._adapter = exporter, adapter
        if adapter is not None:
            exporter["trinity_adapter_requests"].labels(adapter).inc()
        self._began_s = self._previous_s = time.perf_counter()
        self._seen = self._ended = False

    def tick(self, delta: Delta) -> None:
        """A Delta of several tokens counts as so many equal intervals."""
        now_s, count = time.perf_counter(), len(delta.token_ids)
        elapsed_s, self._previous_s = now_s - self._previous_s, now_s
        if not self._seen:
            self._seen = True
            self._exporter["trinity_time_to_first_token_seconds"].observe(elapsed_s)
            self._exporter["trinity_queue_seconds"].observe(delta.queue_s)
            self._exporter["trinity_prompt_tokens_total"].inc(delta.num_prompt_tokens)
        else:
            for _ in range(count):
                self._exporter["trinity_inter_token_seconds"].observe(elapsed_s / count)
        self._exporter["trinity_generated_tokens_total"].inc(count)
        if self._adapter is not None:
            self._exporter["trinity_adapter_generated_tokens_total"].labels(self._adapter).inc(count)
        if delta.finish_reason is not None:
            self.end(delta.finish_reason)

    def end(self, reason: str) -> None:
        """Count the end of the sequence; only the first one counts."""
        if not self._ended:
            self._ended = True
            self._exporter["trinity_sequence_seconds"].observe(time.perf_counter() - self._began_s)
            self._exporter["trinity_sequences_total"].labels(reason).inc()
            if self._adapter is not None:
                self._exporter["trinity_adapter_requests"].labels(self._adapter).dec()
                self._exporter["trinity_adapter_sequences_total"].labels(self._adapter, reason).inc()
