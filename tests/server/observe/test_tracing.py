"""Spans of finished requests, as an exporter gets them."""

import sys

import pytest
from loraserve.request import RequestTiming, Usage
from loraserve.server.observe import tracing
from loraserve.server.observe.metrics import Metrics
from loraserve.server.observe.tracing import Tracing, TracingError, otlp_exporter
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
SPAN_ID = "b7ad6b7169203331"


class Traced:
    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        self.tracing = Tracing(self.exporter, "test-service", "base-model")
        self.metrics = Metrics(on_finished=[self.tracing.record])

    def spans(self) -> dict[str, ReadableSpan]:
        self.tracing.shutdown()
        return {span.name: span for span in self.exporter.get_finished_spans()}


@pytest.fixture
def traced() -> Traced:
    return Traced()


def test_a_request_is_a_span_with_its_phases(traced: Traced) -> None:
    record = traced.metrics.request_started(
        "/generate", "sql", request_id="r1", traceparent=f"00-{TRACE_ID}-{SPAN_ID}-01"
    )
    record.token()
    record.finished("success", Usage(10, 1, 4), RequestTiming(0.1, 0.2, 1.0, False))
    spans = traced.spans()
    assert set(spans) == {"generate", "queue", "prefill", "decode"}
    root = spans["generate"]
    assert f"{root.context.trace_id:032x}" == TRACE_ID
    assert root.parent is not None
    assert f"{root.parent.span_id:016x}" == SPAN_ID
    assert dict(root.attributes or {}) == {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.request.model": "sql",
        "gen_ai.usage.input_tokens": 10,
        "gen_ai.usage.output_tokens": 1,
        "loraserve.adapter": "sql",
        "loraserve.adapter_was_resident": False,
        "loraserve.cached_tokens": 4,
        "loraserve.outcome": "success",
        "loraserve.request_id": "r1",
        "loraserve.route": "/generate",
    }
    assert root.resource.attributes["service.name"] == "test-service"
    begin = root.start_time or 0
    phases = [
        (
            name,
            round(((spans[name].start_time or 0) - begin) / 1e9, 3),
            round(((spans[name].end_time or 0) - begin) / 1e9, 3),
        )
        for name in ("queue", "prefill", "decode")
    ]
    assert phases == [("queue", 0.0, 0.1), ("prefill", 0.1, 0.3), ("decode", 0.3, 1.0)]
    assert all(spans[name].parent == root.context for name in ("queue", "prefill", "decode"))


@pytest.mark.parametrize("traceparent", [None, "", "nonsense", "00-0-0-00"])
def test_without_a_good_traceparent_a_trace_begins_here(traced: Traced, traceparent: str | None) -> None:
    traced.metrics.request_started("grpc", traceparent=traceparent).finished("refused")
    root = traced.spans()["generate"]
    assert root.parent is None
    assert (root.attributes or {})["gen_ai.request.model"] == "base-model"
    assert root.status.status_code == StatusCode.UNSET


def test_a_failed_request_is_an_error(traced: Traced) -> None:
    traced.metrics.request_started("grpc").finished("failed")
    assert traced.spans()["generate"].status.status_code == StatusCode.ERROR


def test_without_the_extra_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.grpc.trace_exporter", None)
    with pytest.raises(TracingError, match=r"pip install 'loraserve\[tracing\]'"):
        tracing.otlp_exporter("http://127.0.0.1:1")


def test_the_exporter_is_made_without_a_connection() -> None:
    otlp_exporter("http://127.0.0.1:1").shutdown()
