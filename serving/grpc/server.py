"""The gRPC server: services, limits, keys, TLS and draining."""

import asyncio
import time
from pathlib import Path

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from protos.trinity.v1 import inference_pb2_grpc as rpc
from protos.trinity.v1 import placement_pb2_grpc as placement_rpc
from serving.addresses import bracketed
from serving.frontend import Frontend
from serving.grpc.guard import PLACEMENT, Guard
from serving.grpc.inference import SERVICE, InferenceServicer
from serving.grpc.placement import PlacementServicer
from trinity.config import ServeConfig
from trinity.errors import ConfigError

HANDSHAKE_MS = 5_000  # until a connection's first settings
PENDING = 1000  # gRPC's own bound: of more calls than that, not yet begun, it ends some, CANCELLED
IDLE_MS = 300_000  # without a call
AGE_MS, SPARE_MS = 600_000, 5_000  # then the client is told to make another; its calls have their time to end
QUIET_S, MOST_QUIET_S = 0.02, 1.0  # without a new call, before its end; and how long that is waited for


class GrpcServer:
    """The listening server. `bind` takes a port, `start` serves, `set_ready` tells health, `stop` lets running calls end within
    `grace_s`."""

    def __init__(self, front: Frontend, config: ServeConfig):
        options = [
            ("grpc.so_reuseport", 0),
            ("grpc.max_receive_message_length", config.max_body_bytes),
            ("grpc.max_concurrent_streams", config.max_concurrent_requests),
            ("grpc.server.max_pending_requests", pending := max(PENDING, 2 * config.max_concurrent_requests)),
            ("grpc.server.max_pending_requests_hard_limit", 3 * pending),
            ("grpc.server_max_unrequested_time_in_server", int(config.request_timeout_s) + 1),  # its own: 30 s
            ("grpc.max_allowed_incoming_connections", config.max_connections),
            ("grpc.server_handshake_timeout_ms", HANDSHAKE_MS),
            ("grpc.max_connection_idle_ms", IDLE_MS),
            ("grpc.max_connection_age_ms", AGE_MS),
            ("grpc.max_connection_age_grace_ms", int(1000 * config.request_timeout_s) + SPARE_MS),
        ]
        self.calls = (guard := Guard(front)).calls
        self.server = grpc.aio.server(interceptors=[guard], options=options)
        self.health = health.aio.HealthServicer()
        self.port = 0
        self._config = config
        rpc.add_InferenceServicer_to_server(InferenceServicer(front), self.server)
        placement_rpc.add_PlacementServicer_to_server(PlacementServicer(front), self.server)
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self.server)
        names = (SERVICE, PLACEMENT, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self.server)

    def bind(self, port: int) -> None:
        """Take the port; 0: any. Raises ConfigError where it is taken or the certificate cannot be read."""
        address = f"{bracketed(self._config.host)}:{port}"
        try:
            if self._config.tls_cert:
                self.port = self.server.add_secure_port(address, credentials(self._config))
            else:
                self.port = self.server.add_insecure_port(address)
        except (RuntimeError, OSError) as error:
            raise ConfigError(f"gRPC cannot listen on {address}: {error}; choose another serve.grpc_port") from None

    async def start(self) -> None:
        await self.server.start()

    async def set_ready(self, ready: bool) -> None:
        status = health_pb2.HealthCheckResponse.SERVING if ready else health_pb2.HealthCheckResponse.NOT_SERVING
        for service in ("", SERVICE):
            await self.health.set(service, status)

    async def quiet(self) -> None:
        """Wait, a second at most, until no call has come for a moment: who stops before, ends calls on their way to us as
        CANCELLED (gRPC's issue 41785), where they would have heard UNAVAILABLE."""
        end_s = time.monotonic() + MOST_QUIET_S
        while (left_s := min(self.calls.last_s + QUIET_S, end_s) - time.monotonic()) > 0:
            await asyncio.sleep(left_s)

    async def stop(self, grace_s: float) -> None:
        await self.server.stop(grace_s)


def credentials(config: ServeConfig) -> grpc.ServerCredentials:
    assert config.tls_key
    assert config.tls_cert
    return grpc.ssl_server_credentials([(Path(config.tls_key).read_bytes(), Path(config.tls_cert).read_bytes())])
