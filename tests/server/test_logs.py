"""Log lines for people and for machines."""

import json
import logging
import sys

import pytest
from loraserve.request import RequestTiming, Usage
from loraserve.server.http.metrics import Metrics
from loraserve.server.http.request_log import log_request
from loraserve.server.logs import JsonFormatter


def record(message: str, *, extra: dict[str, object] | None = None) -> logging.LogRecord:
    return logging.getLogger("test").makeRecord(
        "test", logging.WARNING, "file.py", 1, message, (), None, extra=extra
    )


@pytest.mark.parametrize("message", ["plain", 'quotes " and \\', "two\nlines", "ünïcode \udcff"])
def test_a_record_is_one_line_of_json(message: str) -> None:
    line = JsonFormatter().format(record(message, extra={"adapter": "sql", "what": object}))
    assert "\n" not in line
    entry = json.loads(line)
    assert (entry["message"], entry["level"], entry["logger"]) == (message, "warning", "test")
    assert (entry["adapter"], entry["what"]) == ("sql", "<class 'object'>")
    assert entry["time"].endswith("Z")


def test_a_traceback_is_a_field() -> None:
    failed = record("failed")
    try:
        raise ValueError("broken")
    except ValueError:
        failed.exc_info = sys.exc_info()
    entry = json.loads(JsonFormatter().format(failed))
    assert "ValueError: broken" in entry["exception"]


def test_a_finished_request_is_one_record_with_its_fields(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    metrics = Metrics(on_finished=[log_request])
    request = metrics.request_started("/generate", "sql", request_id="r-1")
    request.token(3)
    request.finished("success", Usage(10, 3, 4), RequestTiming(0.1, 0.2, 1.0, True))
    metrics.request_started("grpc").finished("refused")
    first, second = caplog.records
    assert {name: vars(first)[name] for name in ("request_id", "route", "adapter", "outcome", "tokens")} == {
        "request_id": "r-1",
        "route": "/generate",
        "adapter": "sql",
        "outcome": "success",
        "tokens": 3,
    }
    assert (vars(first)["prompt_tokens"], vars(first)["queue_ms"]) == (10, 100.0)
    assert second.getMessage().startswith("finished: route=grpc outcome=refused tokens=0")
