"""OpenTelemetry traces: a span for every finished request, under the client's span where it named one.

    generate ├─ queue     arrival → the model begins
             ├─ prefill   → first token
             └─ decode    → end

Spans are made when a request ends, from times that were taken anyway: a token costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from loraserve.errors import LoraserveError
from loraserve.server.observe.metrics import RequestSummary
from loraserve.validation.printable import printable

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

NANOSECONDS = 1_000_000_000
MAX_NAME_CHARS = 1000


class TracingError(LoraserveError):
    """Traces were asked for and can't be made."""


def otlp_exporter(endpoint: str) -> SpanExporter:
    """Sends spans over gRPC; "http://" is plain text. Raises TracingError: the extra is not installed."""
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import (  # noqa: PLC0415 (an extra)
            OTLPSpanExporter,
        )
    except ImportError as error:
        raise TracingError(
            f"traces need {error.name}, install it: pip install 'loraserve[tracing]'"
        ) from None
    return OTLPSpanExporter(endpoint=endpoint)


class Tracing:
    """Makes and sends spans on a thread of its own; give `record` to `Metrics`."""

    def __init__(self, exporter: SpanExporter, service_name: str, model: str) -> None:
        from opentelemetry.sdk.resources import Resource  # noqa: PLC0415 (an extra)
        from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
        from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415
        from opentelemetry.trace.propagation.tracecontext import (  # noqa: PLC0415
            TraceContextTextMapPropagator,
        )

        self._model = model
        self._provider = TracerProvider(resource=Resource.create({"service.name": service_name}))
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("loraserve")
        self._propagator = TraceContextTextMapPropagator()

    def record(self, summary: RequestSummary) -> None:
        """Make the spans of a request that has ended; they are sent later, on the thread of its own."""
        from opentelemetry.trace import SpanKind, StatusCode, set_span_in_context  # noqa: PLC0415

        carrier = {} if summary.traceparent is None else {"traceparent": summary.traceparent}
        start = int(summary.started_at * NANOSECONDS)
        end = start + int(summary.total_s * NANOSECONDS)
        span = self._tracer.start_span(
            "generate",
            context=self._propagator.extract(carrier),
            kind=SpanKind.SERVER,
            attributes=self._attributes(summary),
            start_time=start,
        )
        if summary.outcome == "failed":
            span.set_status(StatusCode.ERROR)
        for name, begin_s, end_s in _phases(summary):
            phase_start = start + int(begin_s * NANOSECONDS)
            phase = self._tracer.start_span(name, set_span_in_context(span), start_time=phase_start)
            phase.end(start + int(end_s * NANOSECONDS))
        span.end(end)

    def shutdown(self) -> None:
        """Sends what is left; blocks for as long as the exporter takes."""
        self._provider.shutdown()

    def _attributes(self, summary: RequestSummary) -> dict[str, str | int | float | bool]:
        adapter = printable(summary.adapter, MAX_NAME_CHARS)
        attributes: dict[str, str | int | float | bool] = {
            "gen_ai.operation.name": "text_completion",
            "gen_ai.request.model": adapter or self._model,
            "gen_ai.usage.output_tokens": summary.num_tokens,
            "loraserve.route": summary.route,
            "loraserve.adapter": adapter,
            "loraserve.outcome": summary.outcome,
        }
        if summary.key is not None:
            attributes["loraserve.key"] = printable(summary.key, MAX_NAME_CHARS)
        if summary.request_id is not None:
            attributes["loraserve.request_id"] = summary.request_id
        if summary.usage is not None:
            attributes["gen_ai.usage.input_tokens"] = summary.usage.prompt_tokens
            attributes["loraserve.cached_tokens"] = summary.usage.cached_tokens
        if summary.timing is not None:
            attributes["loraserve.adapter_was_resident"] = summary.timing.adapter_was_resident
        return attributes


def _phases(summary: RequestSummary) -> list[tuple[str, float, float]]:
    """(name, begin, end) in seconds from the request's arrival, as far as they are known."""
    timing = summary.timing
    if timing is None:
        return []
    phases = [("queue", 0.0, timing.queue_s)]
    if timing.prefill_s is not None:
        first_token_s = timing.queue_s + timing.prefill_s
        phases.append(("prefill", timing.queue_s, first_token_s))
        phases.append(("decode", first_token_s, max(first_token_s, timing.total_s)))
    return phases
