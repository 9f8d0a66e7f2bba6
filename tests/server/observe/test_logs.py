"""Log lines for people and for machines."""

import json
import logging
import subprocess
import sys

import pytest
from loraserve.request import RequestTiming, Usage
from loraserve.server.observe.logs import (
    MAX_FIELD_CHARS,
    MAX_MESSAGE_CHARS,
    MAX_TRACEBACK_LINES,
    TEXT_FORMAT,
    JsonFormatter,
    TextFormatter,
    log_event,
)
from loraserve.server.observe.metrics import Metrics
from loraserve.server.observe.request_log import log_request


def record(message: str, *, extra: dict[str, object] | None = None) -> logging.LogRecord:
    return logging.getLogger("test").makeRecord(
        "test", logging.WARNING, "file.py", 1, message, (), None, extra=extra
    )


# what comes from outside, and how it is shown
SHOWN = [
    ("plain", "plain"),
    ('quotes " and \\', 'quotes " and \\'),
    ("ünïcode, 你好, 🙂", "ünïcode, 你好, 🙂"),
    ("two\nlines\r", r"two\nlines\r"),
    ("2026-01-01T00:00:00 INFO loraserve stopped\n", r"2026-01-01T00:00:00 INFO loraserve stopped\n"),
    ("\x1b[31mred\x1b[2K\x9b1A", r"\x1b[31mred\x1b[2K\x9b1A"),
    ("\x00\x07\x08\x7f\t", r"\x00\x07\x08\x7f\t"),
    ("\u202egpj.exe\u2066", r"\u202egpj.exe\u2066"),
    ("in\u200bvisible\ufeff", r"in\u200bvisible\ufeff"),
    ("line\u2028paragraph\u2029next\x85", r"line\u2028paragraph\u2029next\x85"),
    ("surrogate \udcff", r"surrogate \udcff"),
]


@pytest.mark.parametrize(("message", "shown"), SHOWN)
def test_a_record_is_one_line_of_text(message: str, shown: str) -> None:
    line = TextFormatter(TEXT_FORMAT).format(record(message))
    assert line.endswith(f" WARNING test {shown}")
    assert line.isprintable()


@pytest.mark.parametrize(("message", "shown"), SHOWN)
def test_a_record_is_one_line_of_json(message: str, shown: str) -> None:
    line = JsonFormatter().format(record(message, extra={"adapter": message, "what": object}))
    assert "\n" not in line
    entry = json.loads(line)
    assert (entry["message"], entry["level"], entry["logger"]) == (shown, "warning", "test")
    assert (entry["adapter"], entry["what"]) == (shown, "<class 'object'>")
    assert entry["time"].endswith("Z")


def test_a_record_has_a_bound() -> None:
    flood = record("x" * 10**6, extra={"adapter": "y" * 10**6})
    assert len(TextFormatter(TEXT_FORMAT).format(flood)) < MAX_MESSAGE_CHARS + 100
    assert len(JsonFormatter().format(flood)) < MAX_MESSAGE_CHARS + MAX_FIELD_CHARS + 200


@pytest.mark.parametrize("formatter", [TextFormatter(TEXT_FORMAT), JsonFormatter()])
def test_a_tracebacks_lines_can_not_be_taken_for_records(formatter: logging.Formatter) -> None:
    forged = "2026-01-01T00:00:00 INFO loraserve stopped"
    failed = record("failed")
    try:
        raise ValueError(f"broken\n{forged}\r{forged}\x1b[2K" + "\nmore" * 1000)
    except ValueError:
        failed.exc_info = sys.exc_info()
    text = formatter.format(failed)
    assert "\x1b" not in text
    assert not any(line.startswith(forged[:4]) for line in text.splitlines()[1:])
    assert len(text.splitlines()) <= MAX_TRACEBACK_LINES + 2
    assert "more" in text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("sql", "sql"),
        ("x outcome=success", '"x outcome=success"'),
        ("a=b", '"a=b"'),
        ("", '""'),
        ('say "x"', r'"say \"x\""'),
        ("a\nb", r'"a\\nb"'),
        (True, "True"),
        (1.5, "1.5"),
    ],
)
def test_a_field_is_one_field(caplog: pytest.LogCaptureFixture, value: str | float, text: str) -> None:
    caplog.set_level(logging.INFO)
    log_event(logging.getLogger("test"), "done", adapter=value, by=None, key="sales")
    (logged,) = caplog.records
    assert logged.getMessage() == f"done: adapter={text} key=sales"
    assert (vars(logged)["adapter"], "by" in vars(logged)) == (value, False)


def test_a_traceback_is_a_field() -> None:
    failed = record("failed")
    try:
        raise ValueError("broken")
    except ValueError:
        failed.exc_info = sys.exc_info()
    entry = json.loads(JsonFormatter().format(failed))
    assert "ValueError: broken" in entry["exception"]


LOGGED = ("request_id", "key", "route", "adapter", "outcome", "tokens")


def test_a_finished_request_is_one_record_with_its_fields(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    metrics = Metrics(on_finished=[log_request])
    request = metrics.request_started("/generate", "sql", request_id="r-1", key="sales")
    request.token(3)
    request.finished("success", Usage(10, 3, 4), RequestTiming(0.1, 0.2, 1.0, True))
    metrics.request_started("grpc").finished("refused")
    first, second = caplog.records
    assert {name: vars(first)[name] for name in LOGGED} == {
        "request_id": "r-1",
        "key": "sales",
        "route": "/generate",
        "adapter": "sql",
        "outcome": "success",
        "tokens": 3,
    }
    assert (vars(first)["prompt_tokens"], vars(first)["queue_ms"]) == (10, 100.0)
    assert second.getMessage().startswith("finished: route=grpc outcome=refused tokens=0")


def test_nobody_is_advised_to_install_what_no_route_takes() -> None:
    code = (
        "import logging; from loraserve.server.observe.logs import configure_logs; "
        "configure_logs('warning', 'text'); logger = logging.getLogger('uvicorn.error'); "
        "logger.warning('No supported WebSocket library detected'); logger.warning('something else')"
    )
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stderr
    assert "WebSocket" not in said
    assert "something else" in said
