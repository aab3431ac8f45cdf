"""A gateway over the fake engine as a process of its own, without Ray: `python lone_gateway.py HTTP_PORT GRPC_PORT DELAY_S`.

SIGTERM drains it, as the application's end would.
"""

# ruff: noqa: E402
import asyncio
import signal
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]

from fake import FakeEngine, fake_tokenizer

from serving.engine import LocalClient
from serving.frontend import Frontend
from serving.gateway import Gateway
from trinity.config import ServeConfig


async def main(http_port: int, grpc_port: int, delay_s: float) -> None:
    client = LocalClient(FakeEngine(max_model_len=4096, delay_s=delay_s), fake_tokenizer(), "fake")
    config = ServeConfig(http_port=http_port, grpc_port=grpc_port, drain_delay_s=4)
    gateway = Gateway(Frontend(client, client.tokenizer, await client.info(), config))
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    await gateway.start()
    await ended.wait()
    await gateway.stop()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])))
