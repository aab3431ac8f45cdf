"""`trinity demo`: the whole product in a few minutes on two cores.

Trains preset tiny on the Python standard library's own source files with its experts in two shard actors, and serves them
meanwhile: the same prompt is answered every few seconds, from the weights as they are. Then it serves the checkpoint from
the same actors, asks one question over HTTP and one over gRPC, and shuts down.
"""

import argparse
import json
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from trinity.config import Config, setup_environment
from trinity.errors import ConfigError

STEPS = 200
MARK = ".trinity-demo"
LIVE_PROMPT, LIVE_EVERY_S = "    def __", 6.0
SAMPLING: dict[str, Any] = {"temperature": 0.7, "top_p": 0.9, "seed": 7}
HTTP_PROMPT = "def __init__(self, "
GRPC_PROMPT = "import os\nimport sys\n\n"


def run(arguments: argparse.Namespace, flags: list[str]) -> int:
    out = Path(arguments.out)
    _empty(out)
    config = Config.from_tree(
        {
            "model": "tiny",
            "train": {"out_dir": str(out), "steps": arguments.steps or STEPS},
            # training that takes idle cores only would never end beside somebody else's work
            "placement": {"pool": "demo", "num_shards": 2, "niceness": 0},
            "serve": {"http_port": 8000 * arguments.keep, "grpc_port": 9000 * arguments.keep, "api_key": None},
        }
    )
    setup_environment(config.cluster.auth)
    from actors import pool as pools
    from actors.cluster import joined
    from serving import app
    from trinity.launch import train

    app.check_ports(config.serve)
    started = time.monotonic()
    _say("Training a small Trinity model on Python's own standard library; its experts live in 2 shard actors.")
    with joined(config.cluster, config.train):
        result = train(config.replace(serve={"weights": "live"}), ask_on)
        _say(f"Trained in {time.monotonic() - started:.0f} s. Serving it from the same actors.")
        _serve(config, result["checkpoint"], keep=arguments.keep)
        pools.destroy(config.placement.pool, config.cluster.namespace)
    _say(f"Done in {time.monotonic() - started:.0f} s; everything is shut down. Files are in {out}.")
    return 0


def ask_on(http_url: str, grpc_address: str) -> None:
    """Ask the same question every few seconds, and print which step's weights answered, until the server drains."""
    import httpx

    asked = {"prompt": LIVE_PROMPT, "max_tokens": 20, "temperature": 0}
    with httpx.Client(base_url=http_url, timeout=60) as client, suppress(httpx.HTTPError):
        while True:
            answer = client.post("/v1/completions", json=asked).raise_for_status().json()["choices"][0]
            step, text = answer["weights_versions"]["last"], LIVE_PROMPT + answer["text"]
            print(f"    the weights of step {step} answer {text!r}", flush=True)
            time.sleep(LIVE_EVERY_S)


def _empty(out: Path) -> None:
    """Start afresh, but only in a folder that a demo made."""
    if out.exists() and not (out / MARK).is_file():
        raise ConfigError(f"{out} exists and was not made by the demo; choose another --out")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / MARK).touch()


def _serve(config: Config, checkpoint: str, keep: bool) -> None:
    from serving import app
    from serving.launch import provide_pool
    from trinity.commands.serve import wait_for_signal

    provide_pool(config, checkpoint)
    server = app.start(config, checkpoint)
    try:
        _say(f"Asked over HTTP (streaming), {HTTP_PROMPT!r}:")
        _print(HTTP_PROMPT, ask_http(server.http_url, HTTP_PROMPT))
        _say(f"Asked over gRPC, {GRPC_PROMPT!r}:")
        _print(GRPC_PROMPT, ask_grpc(server.grpc_address, GRPC_PROMPT))
        if keep:
            _say(TRY.format(http=server.http_url, grpc=server.grpc_address))
            wait_for_signal()
            _say("Draining; Ctrl-C again leaves at once.")
    finally:
        server.stop()


def ask_http(url: str, prompt: str, max_tokens: int = 64) -> Iterator[str]:
    """Stream a completion from the OpenAI-compatible endpoint."""
    import httpx

    with httpx.Client(base_url=url, timeout=60) as client:
        model = client.get("/v1/models").raise_for_status().json()["data"][0]["id"]
        asked = {"model": model, "prompt": prompt, "max_tokens": max_tokens, **SAMPLING, "stream": True}
        with client.stream("POST", "/v1/completions", json=asked) as response:
            response.raise_for_status()
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    yield json.loads(line[6:])["choices"][0]["text"]


def ask_grpc(address: str, prompt: str, max_tokens: int = 64) -> Iterator[str]:
    """Stream a completion from trinity.v1.Inference."""
    import grpc

    from protos.trinity.v1 import inference_pb2 as pb
    from protos.trinity.v1 import inference_pb2_grpc

    with grpc.insecure_channel(address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        sampling = pb.SamplingParams(max_tokens=max_tokens, **SAMPLING)
        for response in stub.Generate(pb.GenerateRequest(text=prompt, sampling=sampling), timeout=60):
            yield response.delta.text


def _print(prompt: str, pieces: Iterator[str]) -> None:
    print(prompt, end="")
    for piece in pieces:
        print(piece, end="", flush=True)
    print(flush=True)


def _say(text: str) -> None:
    print(f"\n>>> {text}", flush=True)


TRY = """It keeps serving; Ctrl-C stops it. Try from another terminal:
  curl {http}/v1/completions -H 'content-type: application/json' \\
       -d '{{"prompt": "class ", "max_tokens": 40, "temperature": 0}}'
  curl -N {http}/v1/completions -H 'content-type: application/json' \\
       -d '{{"prompt": "def main(", "max_tokens": 40, "stream": true}}'
  .venv/bin/trinity chat {http}
  grpcurl -plaintext -d '{{"text": "import re", "sampling": {{"max_tokens": 40}}}}' {grpc} trinity.v1.Inference/Generate"""
