"""A training job's own /metrics, from its worker 0, beside the pool's that servers export.

Decisions: off unless train.metrics_port is set. Loopback, unless train.metrics_host says otherwise: then, as with any listener
of ours, there must be a key, and callers send it, any of the server's. A port that is taken costs the metrics, not the run; so
do those who connect and say nothing: they take MOST_CALLERS threads of a worker, and make room for who comes after them.
"""

import hmac
import logging
import socket
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import torch
from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.exposition import ThreadingWSGIServer

from trinity.config import Config
from trinity.errors import ConfigError
from trinity.models.common.losses import max_vio
from trinity.observability.prometheus import GPU_METRICS, TRAINING_METRICS
from trinity.observability.registry import registered
from trinity.observability.train_log import NONE, StepMetrics
from trinity.train.retry import RETRY_REASONS
from trinity.utils.origins import LOOPBACK, host_name

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

log = logging.getLogger(__name__)
CLIENT_S, LOOK_S, MOST_CALLERS, CALLER = 10.0, 0.05, 8, "trinity-metrics-caller"


class TrainExporter:
    """Turns the steps of a run into the declared metrics: a RunLog (trinity/observability/train_log.py)."""

    def __init__(self, layers: Sequence[int]):
        """`layers` with experts, by their numbers in the model."""
        self.registry, self.layers = CollectorRegistry(), layers
        self._metrics = {m.name: registered(m, self.registry) for m in TRAINING_METRICS if m.name not in GPU_METRICS}
        for reason in RETRY_REASONS.values():
            self["retries_total"].labels(reason)
        self._skipped = 0

    def __getitem__(self, name: str) -> Any:
        return self._metrics[f"trinity_train_{name}"]

    def _set_gpu(self, name: str, value: float | None) -> None:
        """Set a gauge that is there with GPUs only: without, 0 would be a value."""
        full = f"trinity_train_{name}"
        if value is not None and full not in self._metrics:
            [declared] = [metric for metric in TRAINING_METRICS if metric.name == full]
            self._metrics[full] = registered(declared, self.registry)
        if value is not None:
            self[name].set(value)

    def retry(self, reason: str) -> None:
        """Count it at once: a step may be tried for minutes before it succeeds, or never does."""
        self["retries_total"].labels(reason).inc()

    def step(self, metrics: StepMetrics) -> None:
        """One step has been taken, or skipped."""
        self["step"].set(metrics.step)
        self["loss"].set(metrics.loss)
        self["grad_norm"].set(metrics.grad_norm)
        self["tokens_total"].inc(metrics.tokens)
        for name, num in metrics.source_tokens.items():
            self["source_tokens_total"].labels(name).inc(num)
        self["tokens_per_second"].set(metrics.tokens / max(metrics.seconds, 1e-9))
        self._set_gpu("tokens_per_second_per_gpu", metrics.tokens_per_s_per_gpu)
        self._set_gpu("mfu", metrics.mfu)
        for phase, seconds in metrics.phases_s.items():
            self["phase_seconds"].labels(phase).observe(seconds)
        self["skipped_total"].inc(max(0, metrics.skipped - self._skipped))
        self._skipped = metrics.skipped
        if metrics.checkpoint_s is not None:
            self["checkpoint_seconds"].observe(metrics.checkpoint_s)
        for layer, violation in zip(self.layers, _max_vio(metrics), strict=False):  # none without counts
            self["max_vio"].labels(str(layer)).set(violation)

    def validation(
        self, step: int, loss: float, by_source: Mapping[str, float] = NONE, measures: Mapping[str, float] = NONE
    ) -> None:
        """The weights after `step` have that loss on held-out data."""
        self["validation_loss"].set(loss)
        for name, each in (by_source or {}).items():
            self["source_validation_loss"].labels(name).set(each)

    def scores(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """The weights after `step` have these scores."""
        for row in rows:
            self["score"].labels(row["task"]).set(row["mean"])
            if "passes" in row:
                self["gate_open"].labels(row["task"]).set(row["passes"])


def _max_vio(metrics: StepMetrics) -> list[float]:
    """MaxVio of each layer with experts."""
    return max_vio(torch.tensor(metrics.counts_LE)).tolist() if metrics.counts_LE else []


def check_listener(config: Config) -> None:
    """Raises ConfigError for metrics that anybody on the network could read."""
    if config.train.metrics_port is not None and not _is_loopback(config) and not config.serve.needs_key:
        raise ConfigError(
            f"train.metrics_host {config.train.metrics_host} is reachable by others: set serve.api_key (or TRINITY_API_KEY)"
        )


@contextmanager
def exported(exporter: TrainExporter, config: Config) -> Iterator[int | None]:
    """Inside the block its metrics are at http://HOST:PORT/metrics; -> the port, None without one."""
    host, port = config.train.metrics_host, config.train.metrics_port
    if port is None:
        yield None
        return
    app = _locked(make_wsgi_app(exporter.registry), _keys(config))
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        server: WSGIServer = make_server(
            host, port, app, type("Server", (_Server,), {"address_family": family}), _Handler
        )
    except OSError as error:
        log.warning("no metrics at %s:%d: %s; choose another train.metrics_port", host, port, error.strerror)
        yield None
        return
    threading.Thread(target=server.serve_forever, args=(LOOK_S,), name="trinity-metrics", daemon=True).start()
    log.info("metrics at http://%s:%d/metrics", host, server.server_port)
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()


def _is_loopback(config: Config) -> bool:
    return config.train.metrics_host in LOOPBACK


def _keys(config: Config) -> list[str]:
    """Those of clients and operators; empty where clients need none."""
    serve = config.serve
    return [*serve.client_by_key, *filter(None, [serve.admin_key])] if serve.needs_key else []


def _locked(app: "WSGIApplication", keys: Collection[str]) -> "WSGIApplication":
    """Serve those alone who send `Authorization: Bearer KEY`, compared in constant time; where there is none, those who call
    this machine by a name of its own: a page in a browser here may have another one (DNS rebinding)."""
    wanted = [f"Bearer {key}".encode() for key in keys]

    def refusal(environ: "WSGIEnvironment") -> tuple[str, bytes] | None:
        sent = environ.get("HTTP_AUTHORIZATION", "").encode("latin-1")
        if wanted and not sum(hmac.compare_digest(sent, one) for one in wanted):  # each is compared
            return "401 Unauthorized", b"send the server's key as `Authorization: Bearer KEY`\n"
        if not wanted and host_name(environ.get("HTTP_HOST", LOOPBACK[0])) not in LOOPBACK:
            return (
                "400 Bad Request",
                b"this server is called localhost; ask it by that name or its address, or set a key\n",
            )
        return None

    def call(environ: "WSGIEnvironment", start_response: "StartResponse") -> Any:
        if (refused := refusal(environ)) is None:
            return app(environ, start_response)
        start_response(refused[0], [("WWW-Authenticate", "Bearer"), ("Content-Type", "text/plain")])
        return [refused[1]]

    return call


class _Server(ThreadingWSGIServer):
    """A thread for each of MOST_CALLERS; for one more, who has been there longest is cut off."""

    request_queue_size = 128  # connections that wait to be seen; of one more the kernel takes no notice for a second

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self._callers: list[socket.socket] = []
        self._lock = threading.Lock()

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            self._callers.append(request)
            oldest = self._callers.pop(0) if len(self._callers) > MOST_CALLERS else None
        if oldest is not None:
            with suppress(OSError):
                oldest.shutdown(socket.SHUT_RDWR)
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        threading.current_thread().name = CALLER
        super().process_request_thread(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._lock, suppress(ValueError):
            self._callers.remove(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.debug("a reader of metrics was lost", exc_info=True)  # strangers fill no log


class _Handler(WSGIRequestHandler):
    timeout = CLIENT_S

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: a scrape every few seconds is no news."""
