"""What every HTTP route works with, and the limits a client can run into before the engine sees it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fastapi import Request

from loraserve.engine.workers import Workers
from loraserve.server.access.request_limits import RequestLimits
from loraserve.server.http.responses.store import ResponseStore, StoreLimits
from loraserve.server.http.token_texts import TokenTexts
from loraserve.server.request_run import RequestRunner

if TYPE_CHECKING:
    from prometheus_client.core import Metric

    from loraserve.adapters.startup import AdapterFailure
    from loraserve.async_engine import AsyncEngine
    from loraserve.server.access.keys import AccessControl
    from loraserve.server.adapters.resolver import AdapterResolver
    from loraserve.server.adapters.sources import AdapterSources
    from loraserve.server.adapters.state import AdapterState
    from loraserve.server.adapters.watched import WatchedDirectory
    from loraserve.server.batches.service import BatchService
    from loraserve.server.observe.metrics import Metrics
    from loraserve.text.tokenizer import Tokenizer

NUM_TOKENIZERS = 1
MAX_TOKENIZATIONS = 256


@dataclass(frozen=True, kw_only=True)
class HttpLimits(RequestLimits):
    """Bounds on what one connection may ask, beside those on a request.

    Args:
        max_body_nbytes: of a request's body; more is refused with 413.
        max_header_nbytes: of the request line and all headers; more closes the connection.
        header_timeout_s: from the first byte of a request to the end of its headers.
        body_timeout_s: from there to the end of the body.
        write_timeout_s: that a client may leave an answer unread before its connection is cut.
        keep_alive_s: that an idle connection stays open.
    """

    max_body_nbytes: int = 16 * 2**20
    max_header_nbytes: int = 64 * 2**10
    header_timeout_s: float = 10.0
    body_timeout_s: float = 60.0
    write_timeout_s: float = 60.0
    keep_alive_s: float = 75.0


@dataclass(kw_only=True)
class HttpState:
    """One server's parts.

    Args:
        engine: what answers.
        served_names: names of the base model; the first is the one that answers carry.
        access: who may use what.
        metrics: told of every request.
        limits: see `HttpLimits`.
        sources: where adapters may be loaded from.
        adapter_failures: adapters that the server started without.
        batches: files and batches; None keeps none.
        resolver: fetches adapters that requests name; None fetches none.
        watched: brings those of a directory; None where none is watched.
        kept: where changes of adapters are kept for the next start; None forgets them.
        cors_origins: whose web pages a browser lets call this server; "*" is everybody's.
        response_limits: how many responses are kept for their callers.
        adapters_at_start: names of the adapters that were given at start, in order.
        more_series: what /metrics has beside what one server has.
        started_at: when, in Unix seconds.
    """

    engine: AsyncEngine
    served_names: tuple[str, ...]
    access: AccessControl
    metrics: Metrics
    limits: HttpLimits = field(default_factory=HttpLimits)
    sources: AdapterSources | None = None
    cors_origins: tuple[str, ...] = ()
    adapters_at_start: tuple[str, ...] = ()
    adapter_failures: tuple[AdapterFailure, ...] = ()
    resolver: AdapterResolver | None = None
    watched: WatchedDirectory | None = None
    kept: AdapterState | None = None
    response_limits: StoreLimits = field(default_factory=StoreLimits)
    batches: BatchService | None = None
    more_series: Callable[[], Iterable[Metric]] = tuple
    started_at: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        info = self.engine.info()
        self.max_model_len = info.max_model_len
        self.device = info.device
        self._token_texts = TokenTexts(self.engine.tokenizer)
        self.parsing = Workers("request bodies", NUM_TOKENIZERS, MAX_TOKENIZATIONS)
        self.tokenizations = Workers("tokenizations", NUM_TOKENIZERS, MAX_TOKENIZATIONS)
        self.responses = ResponseStore(self.response_limits)
        self.runner = RequestRunner(self.engine, self.metrics, self.limits, self.resolver, self.watched)

    def texts_of(self, tokenizer: Tokenizer) -> TokenTexts:
        """Texts of single tokens of a request's tokenizer; the model's are kept from request to request."""
        return self._token_texts.of(tokenizer)

    def missing_adapters(self) -> list[AdapterFailure]:
        """Of the failures at start, those whose name is still not served and has not been unloaded."""
        if not self.adapter_failures:
            return []
        served = {adapter.name for adapter in self.engine.adapters()}
        missing = [failure for failure in self.adapter_failures if failure.name not in served]
        if self.kept is None:
            return missing
        wanted = self.kept.configured | self.kept.adapters.keys()
        return [failure for failure in missing if failure.name in wanted]


async def http_state(request: Request) -> HttpState:
    """The state of the app that serves `request`, as a dependency."""
    state: HttpState = request.app.state.http
    return state
