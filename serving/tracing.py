"""Spans of requests over OTLP, where they are asked for (serve.otlp_endpoint, the extra `otlp`).

Decisions: a span is one sequence, from its request to its last token, under the caller's `traceparent`; its attributes are
OpenTelemetry's for generative AI, without a word of prompt or answer. A provider of our own: Ray has one, too. Sending is a
thread's of the library, which drops spans rather than hold anybody up.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from trinity.engine.request import Delta, SamplingParams
from trinity.errors import ConfigError

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer

TRACEPARENT: ContextVar[str | None] = ContextVar("traceparent", default=None)  # of the call that is being answered
MAX_CHARS = 64  # 55 of version 00
SEND_S = 2  # and at the server's end it waits no longer for a collector that is away


class SequenceSpan:
    """Notes on one sequence. `span` None: nobody asks."""

    def __init__(self, span: Any = None):
        self._span, self._is_first = span, True

    def tick(self, delta: Delta) -> None:
        if self._span is None:
            return
        if self._is_first:
            self._is_first = False
            self._span.add_event("first token")
            self._span.set_attribute("gen_ai.latency.time_in_queue", delta.queue_s)
        if delta.finish_reason is not None:
            self._span.set_attributes(_ended(delta))


class Tracing:
    """Makes spans. Owns the thread that sends them, until `close`."""

    def __init__(self, endpoint: str | None, model: str):
        """Raises ConfigError where the library is missing."""
        self._model, self._provider = model, _provider(endpoint) if endpoint else None
        self._tracer: Tracer | None = self._provider and self._provider.get_tracer("trinity.serving")

    @contextmanager
    def sequence(
        self, request_id: str, num_prompt: int, params: SamplingParams, model: str | None = None
    ) -> Iterator[SequenceSpan]:
        """A span around the block; what is raised there is its error, by its kind alone. It is nobody's current span: the block
        may be left in another context."""
        if self._tracer is None:
            yield SequenceSpan()
            return
        asked = _asked(model or self._model, request_id, num_prompt, params)
        span = self._tracer.start_span("llm_request", _context(), _kind(), asked)
        try:
            yield SequenceSpan(span)
        except BaseException as error:
            _fail(span, type(error).__name__)
            raise
        finally:
            span.end()

    def close(self) -> None:
        """Send what is left."""
        if self._provider is not None:
            self._provider.shutdown()


def _provider(endpoint: str) -> Any:
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"serve.otlp_endpoint needs {error.name}; install it with `pip install 'trinity-moe[otlp]'`, or leave it out"
        ) from None
    provider = TracerProvider(resource=Resource.create({"service.name": "trinity"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint, timeout=SEND_S)))
    return provider


def _context() -> Any:
    """The caller's span; a header that is none counts as absent, as the standard wants it."""
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    sent = TRACEPARENT.get()
    return TraceContextTextMapPropagator().extract({"traceparent": sent} if sent and len(sent) <= MAX_CHARS else {})


def _fail(span: Any, kind: str) -> None:
    from opentelemetry.trace import StatusCode

    span.set_attribute("error.type", kind)
    span.set_status(StatusCode.ERROR, kind)


def _kind() -> Any:
    from opentelemetry.trace import SpanKind

    return SpanKind.SERVER


def _asked(model: str, request_id: str, num_prompt: int, params: SamplingParams) -> dict[str, Any]:
    return {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.request.id": request_id,
        "gen_ai.request.model": model,
        "gen_ai.request.max_tokens": params.max_tokens,
        "gen_ai.request.temperature": params.temperature,
        "gen_ai.request.top_p": params.top_p,
        "gen_ai.request.top_k": params.top_k,
        "gen_ai.usage.input_tokens": num_prompt,
    }


def _ended(delta: Delta) -> dict[str, Any]:
    return {
        "gen_ai.usage.output_tokens": delta.num_generated_tokens,
        "gen_ai.response.finish_reasons": (str(delta.finish_reason),),
        "trinity.weights_version.first": delta.first_version,
        "trinity.weights_version.last": delta.version,
        "trinity.weights_line": delta.line,
    }
