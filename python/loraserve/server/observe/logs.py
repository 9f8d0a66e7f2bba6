"""How this process logs: lines for people, or one JSON object a line for machines.

Much of what is logged comes from outside, and none of it can pass for a line, a field or a terminal's code
of its own: what is not printable is escaped, in both formats, and everything is bounded.
"""

from __future__ import annotations

import json
import logging
import re
import time
from typing import Any

from loraserve.validation.printable import printable

TEXT_FORMAT = "%(asctime)s %(levelname)s %(name)s %(message)s"
TIME_FORMAT = "%Y-%m-%dT%H:%M:%S"
MAX_MESSAGE_CHARS = 8000
MAX_FIELD_CHARS = 1000
MAX_TRACEBACK_LINES = 200
TRACEBACK_MARGIN = "    | "  # no line of a traceback begins as a record does

CHATTY = ("uvicorn.error", "httpx", "filelock", "urllib3")  # tell at `info` what nobody asked

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_PLAIN = re.compile(r'[^\s="\\]+')


def configure_logs(level: str, format_: str) -> None:
    """Everything goes to stderr; `format_` is "text" or "json"."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if format_ == "json" else TextFormatter(TEXT_FORMAT, TIME_FORMAT))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.getLogger("uvicorn.error").addFilter(_is_no_advice)
    for name in CHATTY:
        logging.getLogger(name).setLevel(max(logging.WARNING, logging.getLogger().level))


def _is_no_advice(record: logging.LogRecord) -> bool:
    """uvicorn tells what to install for WebSockets, of which no route takes any."""
    return "WebSocket" not in record.getMessage()


def log_event(
    logger: logging.Logger,
    what: str,
    *,
    level: int = logging.INFO,
    exc_info: bool = False,
    **fields: str | float | bool | None,
) -> None:
    """Logs `what: name=value …`, and the fields in the record for JSON; fields that are None are left out."""
    if not logger.isEnabledFor(level):
        return
    given = {name: value for name, value in fields.items() if value is not None}
    text = " ".join(f"{name}={_field_text(value)}" for name, value in given.items())
    logger.log(level, "%s", f"{what}: {text}" if text else what, extra=given, exc_info=exc_info)


class TextFormatter(logging.Formatter):
    """A line for every record; a traceback follows behind a margin."""

    def format(self, record: logging.LogRecord) -> str:
        """Called by `logging`; cut at `MAX_MESSAGE_CHARS`, and `MAX_TRACEBACK_LINES` of a traceback."""
        record.message = printable(record.getMessage(), MAX_MESSAGE_CHARS)
        record.asctime = self.formatTime(record, self.datefmt)
        lines = [self.formatMessage(record)]
        if record.exc_info:  # never `exc_text`: a formatter of someone else's may have left it there
            lines += _traceback_lines(self.formatException(record.exc_info))
        if record.stack_info:
            lines += _traceback_lines(record.stack_info)
        return f"\n{TRACEBACK_MARGIN}".join(lines)


class JsonFormatter(logging.Formatter):
    """time (UTC), level, logger and message, then what the record was given as `extra`."""

    def format(self, record: logging.LogRecord) -> str:
        """Called by `logging`; message and fields are cut at `MAX_MESSAGE_CHARS` and `MAX_FIELD_CHARS`."""
        entry: dict[str, Any] = {
            "time": f"{time.strftime(TIME_FORMAT, time.gmtime(record.created))}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": printable(record.getMessage(), MAX_MESSAGE_CHARS),
        }
        extra = {name: value for name, value in vars(record).items() if name not in _STANDARD}
        entry |= {name: _json_value(value) for name, value in extra.items()}
        if record.exc_info:
            entry["exception"] = "\n".join(_traceback_lines(self.formatException(record.exc_info)))
        return json.dumps(entry)


def _field_text(value: str | float | bool) -> str:
    """A field's value in a line, in quotes where it could be taken for several fields."""
    if not isinstance(value, str):
        return str(value)
    text = printable(value, MAX_FIELD_CHARS)
    return text if _PLAIN.fullmatch(text) else json.dumps(text, ensure_ascii=False)


def _json_value(value: Any) -> Any:
    if value is None or isinstance(value, int | float):
        return value
    return printable(str(value), MAX_FIELD_CHARS)


def _traceback_lines(text: str) -> list[str]:
    """Lines of a traceback, its last ones if there are too many: what failed stands at the end."""
    lines = [printable(line, MAX_MESSAGE_CHARS) for line in text.splitlines()]
    more = len(lines) - MAX_TRACEBACK_LINES
    return lines if more <= 0 else [f"… {more} lines", *lines[more:]]
