"""The gateway: one Frontend with its HTTP and gRPC listeners, and the order in which they begin and end.

A plain class, started by tests as it is and by Ray Serve inside an ingress replica (serving/app.py).
Ending: health says NOT_SERVING; after serve.drain_delay_s, in which balancers hear of it, new requests get 503/UNAVAILABLE
while the running ones finish (at most serve.drain_timeout_s); then the listeners close.
"""

import asyncio
import itertools
import logging
from functools import partial

from serving.addresses import Door, bracketed
from serving.frontend import Frontend
from serving.grpc.server import GrpcServer
from serving.http.routes import build_app
from serving.http.server import HttpServer
from serving.limits import within_descriptors
from trinity.errors import ConfigError, Unavailable
from trinity.utils.lines import named
from trinity.utils.trying import tried

log = logging.getLogger("trinity.serving")
CUT_GRACE_S = 1.0


class Gateway:
    """Owns both listeners and the health monitor; `stop` may be called by several parties, and more than once."""

    def __init__(self, front: Frontend):
        self.front = front
        self._config = config = within_descriptors(front.config)
        self.http = HttpServer(build_app(front), config)
        self.grpc = GrpcServer(front, config)
        self._monitor: asyncio.Task[None] | None = None
        self._stopping: asyncio.Task[None] | None = None

    async def start(self, num_places: int = 1) -> None:
        """`num_places`: gateways that this machine may have; each takes the ports of the first place that is free.

        Raises ConfigError where all are taken or a certificate cannot be read.
        """
        self._bind(num_places)
        await self.http.start()
        await self.grpc.start()
        self.front.placement.start()
        served = named(self.front.info.line, self.front.info.version)
        self.front.pins.start(served if self.front.config.weights.startswith("pinned") else None)
        self._monitor = asyncio.create_task(self.front.monitor(on_change=self.grpc.set_ready))

    def _bind(self, num_places: int) -> None:
        for place in itertools.count():
            error = tried(partial(self._bind_at, place), ConfigError)
            if error is None:
                return
            if place + 1 == num_places:
                raise error

    def _bind_at(self, place: int) -> None:
        """HTTP first, so that of two which try the same place one has all of it."""
        http_port, grpc_port = (port and port + place for port in (self._config.http_port, self._config.grpc_port))
        self.http.bind(http_port)
        if (error := tried(partial(self.grpc.bind, grpc_port), ConfigError)) is not None:
            self.http.unbind()
            raise error

    @property
    def addresses(self) -> tuple[str, str]:
        """URL of HTTP and host:port of gRPC, with the ports that were bound."""
        return self.door(self.front.config.host)[:2]

    def door(self, node: str) -> Door:
        """The door by which others find it; one that listens everywhere is at that address of its node."""
        config = self.front.config
        scheme, everywhere = "https" if config.tls_cert else "http", not config.host.strip("0.:")
        host = bracketed(node if everywhere else config.host)
        return Door(f"{scheme}://{host}:{self.http.port}", f"{host}:{self.grpc.port}", node)

    def check_health(self) -> None:
        if self._monitor is None or self._monitor.done():
            raise Unavailable("the gateway's monitor has ended")

    async def stop(self) -> None:
        if self._stopping is None:
            self._stopping = asyncio.create_task(self._stop())
        await asyncio.shield(self._stopping)

    async def _stop(self) -> None:
        self.front.admission.leaving = True
        await self.grpc.set_ready(False)
        await asyncio.sleep(self.front.config.drain_delay_s)
        self.front.admission.draining = True
        grace_s = self.front.config.drain_timeout_s + CUT_GRACE_S
        await self.grpc.quiet()
        leaving = asyncio.create_task(self.grpc.stop(grace_s))  # its clients are told to connect anew
        if not await self.front.drain():
            log.warning("%d requests are cut: drain_timeout_s is over", self.front.admission.active)
            self.front.cut()
            await asyncio.sleep(CUT_GRACE_S)  # for their errors to reach their clients
        self.front.placement.stop()
        self.front.pins.stop()
        if self._monitor:
            self._monitor.cancel()
        await asyncio.gather(self.http.stop(CUT_GRACE_S), self.grpc.stop(CUT_GRACE_S), leaving)
        await asyncio.to_thread(self.front.tracing.close)
