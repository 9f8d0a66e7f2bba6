"""One line in the log for every finished request, on HTTP and gRPC alike."""

from __future__ import annotations

import logging

from loraserve.server.observe.logs import log_event
from loraserve.server.observe.metrics import RequestSummary

logger = logging.getLogger("loraserve.request")


def log_request(summary: RequestSummary) -> None:
    """The fields are in the text, and for `--log-format json` in the record."""
    usage, timing = summary.usage, summary.timing
    log_event(
        logger,
        "finished",
        request_id=summary.request_id,
        route=summary.route,
        key=summary.key,
        adapter=summary.adapter or None,
        outcome=summary.outcome,
        prompt_tokens=None if usage is None else usage.prompt_tokens,
        cached_tokens=None if usage is None else usage.cached_tokens,
        tokens=summary.num_tokens,
        queue_ms=None if timing is None else _ms(timing.queue_s),
        first_token_ms=None if summary.ttft_s is None else _ms(summary.ttft_s),
        ms=_ms(summary.total_s),
    )


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 1)
