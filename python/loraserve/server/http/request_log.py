"""One line in the log for every finished request, on HTTP and gRPC alike."""

from __future__ import annotations

import logging

from loraserve.server.http.metrics import RequestSummary

logger = logging.getLogger("loraserve.request")


def log_request(summary: RequestSummary) -> None:
    """The fields are in the text, and for `--log-format json` in the record."""
    if not logger.isEnabledFor(logging.INFO):
        return
    fields = {
        "request_id": summary.request_id,
        "route": summary.route,
        "adapter": summary.adapter or None,
        "outcome": summary.outcome,
        "prompt_tokens": None if summary.usage is None else summary.usage.prompt_tokens,
        "cached_tokens": None if summary.usage is None else summary.usage.cached_tokens,
        "tokens": summary.num_tokens,
        "queue_ms": None if summary.timing is None else _ms(summary.timing.queue_s),
        "first_token_ms": None if summary.ttft_s is None else _ms(summary.ttft_s),
        "ms": _ms(summary.total_s),
    }
    given = {name: value for name, value in fields.items() if value is not None}
    text = " ".join(f"{name}={value}" for name, value in given.items())
    logger.info("%s", f"finished: {text}", extra=given)


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 1)
