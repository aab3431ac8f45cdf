"""Spans of requests, as a collector gets them: over loopback, in the protocol's own messages."""

import http.server
import threading
from contextlib import asynccontextmanager, contextmanager

import grpc
import httpx
import pytest
from fake import FakeEngine
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from protos.trinity.v1 import inference_pb2 as pb
from protos.trinity.v1 import inference_pb2_grpc as rpc
from serving.tracing import Tracing
from tests.waiting import WAIT_S
from trinity.errors import ConfigError, Unavailable

BODY = {"prompt": "the lazy dog", "max_tokens": 6, "temperature": 0.5}
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@contextmanager
def collector():
    """-> its endpoint, and the spans that it got."""
    spans = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            sent = self.rfile.read(int(self.headers["content-length"]))
            for resource in ExportTraceServiceRequest.FromString(sent).resource_spans:
                spans.extend(span for scope in resource.scope_spans for span in scope.spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *line):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1/traces", spans
        server.shutdown()


@asynccontextmanager
async def served(start, engine, endpoint):
    """-> a client of a server that sends its spans there, all of which are sent by the end of the block."""
    async with (
        start(engine, otlp_endpoint=endpoint) as server,
        httpx.AsyncClient(base_url=server.url, timeout=WAIT_S) as client,
    ):
        yield client


def attributes(span):
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in span.attributes}


async def test_a_span_says_what_a_sequence_took_and_nothing_of_its_text(start):
    with collector() as (endpoint, spans):
        async with start(FakeEngine(), otlp_endpoint=endpoint) as server:
            async with httpx.AsyncClient(base_url=server.url, timeout=WAIT_S) as client:
                await client.post("/v1/completions", json=BODY, headers={"traceparent": PARENT})
            async with grpc.aio.insecure_channel(server.grpc_address) as channel:
                asked = pb.GenerateRequest(text="the lazy dog", sampling=pb.SamplingParams(max_tokens=3))
                await rpc.InferenceStub(channel).Generate(asked, metadata=[("traceparent", PARENT)]).read()
                stream = rpc.InferenceStub(channel).Generate(asked)
                [event async for event in stream]
        # the gateway has sent what it had before it was gone
    assert len(spans) == 3
    over_http = spans[0]
    assert (over_http.trace_id.hex(), over_http.parent_span_id.hex()) == tuple(PARENT.split("-")[1:3])
    found = attributes(over_http)
    assert found["gen_ai.request.model"] == "fake"
    assert (found["gen_ai.request.max_tokens"], found["gen_ai.request.temperature"]) == (6, 0.5)
    assert found["gen_ai.usage.output_tokens"] == 6
    assert found["gen_ai.usage.input_tokens"] > 0
    assert [each.string_value for each in found["gen_ai.response.finish_reasons"].values] == ["length"]
    assert (found["trinity.weights_version.first"], found["trinity.weights_version.last"]) == (7, 12)
    assert [event.name for event in over_http.events] == ["first token"]
    assert b"lazy" not in over_http.SerializeToString()
    assert spans[1].trace_id == over_http.trace_id
    assert spans[2].trace_id != over_http.trace_id
    assert not spans[2].parent_span_id


@pytest.mark.parametrize("sent", ["", "00-zz", "x" * 4000, "00-" + "0" * 32 + "-" + "0" * 16 + "-01"])
async def test_a_parent_that_is_none_is_no_error(start, sent):
    with collector() as (endpoint, spans):
        async with served(start, FakeEngine(), endpoint) as client:
            assert (await client.post("/v1/completions", json=BODY, headers={"traceparent": sent})).status_code == 200
    assert [span.parent_span_id for span in spans] == [b""]


async def test_a_failure_is_the_spans(start):
    with collector() as (endpoint, spans):
        engine = FakeEngine(fail_after=2, error=Unavailable("secret words"))
        async with served(start, engine, endpoint) as client:
            assert (await client.post("/v1/completions", json=BODY)).status_code == 503
    [span] = spans
    assert attributes(span)["error.type"] == "Unavailable"
    assert span.status.code == span.status.STATUS_CODE_ERROR
    assert b"secret" not in span.SerializeToString()


async def test_a_collector_that_is_away_holds_nobody_up(start):
    async with served(start, FakeEngine(), "http://127.0.0.1:9/v1/traces") as client:
        assert (await client.post("/v1/completions", json=BODY)).status_code == 200


def test_the_extra_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ConfigError, match=r"trinity-moe\[otlp\]"):
        Tracing("http://127.0.0.1:4318/v1/traces", "any")
