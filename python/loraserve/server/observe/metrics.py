"""Counts what every frontend serves: told of each request and each token, about a microsecond each.

Only the asyncio loop calls in here, so nothing locks. `prometheus.py` writes the counts for Prometheus.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from loraserve.request import AdapterSpec, RequestTiming, Usage
from loraserve.server.observe.adapter_series import AdapterSeries
from loraserve.server.observe.flow_series import FlowSeries
from loraserve.server.observe.histogram import REQUEST_SECONDS, TOKEN_SECONDS, TOKENS, Histogram
from loraserve.server.observe.outcomes import Outcome
from loraserve.server.observe.sliding_window import SlidingWindow

BASE_LABEL = ""
SUM_LABEL = "_sum"  # of requests for a weighted sum of adapters
OTHER_LABEL = "_other"  # of adapters beyond the limit; no adapter has either name


@dataclass(frozen=True, kw_only=True)
class RequestSummary:
    """One finished request, for logs and traces; times in seconds, `started_at` on the wall clock.

    `adapter` is what was asked for, a client's own text if no such adapter exists; `key` names the caller's.
    """

    route: str
    adapter: str
    request_id: str | None
    key: str | None
    traceparent: str | None
    outcome: Outcome
    started_at: float
    total_s: float
    ttft_s: float | None
    num_tokens: int
    usage: Usage | None
    timing: RequestTiming | None


class Traffic:
    """What one label has served."""

    def __init__(self) -> None:
        self.num_requests = 0
        self.total_s = 0.0
        self.recent = SlidingWindow()


class Metrics:
    """The counts of one server.

    Args:
        max_adapter_labels: adapters counted by name, first come first served; others share one label.
        on_finished: told of every finished request.
    """

    def __init__(
        self, max_adapter_labels: int = 100, on_finished: Sequence[Callable[[RequestSummary], None]] = ()
    ) -> None:
        self._max_adapter_labels = max_adapter_labels
        self._on_finished = tuple(on_finished)
        self.requests: Counter[tuple[str, Outcome]] = Counter()
        self.num_in_progress = 0
        self.ttft = Histogram(REQUEST_SECONDS)
        self.inter_token = Histogram(TOKEN_SECONDS)
        self.duration = Histogram(REQUEST_SECONDS)
        self.queue = Histogram(REQUEST_SECONDS)
        self.inference = Histogram(REQUEST_SECONDS)
        self.time_per_token = Histogram(TOKEN_SECONDS)
        self.prompt_tokens = Histogram(TOKENS)
        self.generated_tokens = Histogram(TOKENS)
        self.num_cached_tokens = 0
        self.recent = SlidingWindow()
        self.traffic: dict[str, Traffic] = {}
        self.adapter_series = AdapterSeries(max_adapter_labels)
        self.flow_series = FlowSeries(max_adapter_labels)

    def request_started(
        self,
        route: str,
        adapter: AdapterSpec = None,
        *,
        request_id: str | None = None,
        key: str | None = None,
        traceparent: str | None = None,
    ) -> RequestMetrics:
        """Call `finished` of what this returns exactly once.

        Args:
            route: one of few, never a client's path.
            adapter: what was asked for, whether it exists or not.
            request_id: what logs call the request.
            key: the name of the caller's key.
            traceparent: the client's span, as its header of this name tells it (W3C Trace Context).
        """
        self.num_in_progress += 1
        return RequestMetrics(self, route, adapter_names(adapter), request_id, key, traceparent)

    def label(self, adapter: str) -> str:
        """The adapter's own label, or the shared one; an adapter that may not exist must not come here."""
        if adapter in self.traffic:
            return adapter
        if adapter == BASE_LABEL:
            label = BASE_LABEL
        elif "+" in adapter:
            label = SUM_LABEL
        else:
            label = adapter if self._num_named() < self._max_adapter_labels else OTHER_LABEL
        self.traffic.setdefault(label, Traffic())
        return label

    def keep_only(self, adapters: Iterable[str]) -> None:
        """Forget adapters that are no longer registered, so that their places are free for others."""
        kept = {*adapters, BASE_LABEL, SUM_LABEL, OTHER_LABEL}
        for name in self.traffic.keys() - kept:
            del self.traffic[name]

    def record(self, summary: RequestSummary) -> None:
        """Count a request that has ended, and tell the observers; once for each `request_started`."""
        self.num_in_progress -= 1
        self.requests[summary.route, summary.outcome] += 1
        if summary.outcome == "success":
            self._record_success(summary)
        for on_finished in self._on_finished:
            on_finished(summary)

    def _record_success(self, summary: RequestSummary) -> None:
        self.duration.observe(summary.total_s)
        self.generated_tokens.observe(summary.num_tokens)
        if summary.usage is not None:
            self.prompt_tokens.observe(summary.usage.prompt_tokens)
            self.num_cached_tokens += summary.usage.cached_tokens
        if summary.timing is not None:
            self.queue.observe(summary.timing.queue_s)
            inference_s = summary.timing.total_s - summary.timing.queue_s
            self.inference.observe(inference_s)
            if summary.num_tokens:
                self.time_per_token.observe(inference_s / summary.num_tokens)
        traffic = self.traffic[self.label(summary.adapter)]
        traffic.num_requests += 1
        traffic.total_s += summary.total_s
        traffic.recent.add_request(summary.total_s, summary.ttft_s)
        self.recent.add_request(summary.total_s, summary.ttft_s)

    def _num_named(self) -> int:
        return len(self.traffic.keys() - {BASE_LABEL, SUM_LABEL, OTHER_LABEL})


class RequestMetrics:
    """One request, from its arrival to its end."""

    def __init__(
        self,
        metrics: Metrics,
        route: str,
        adapter: str,
        request_id: str | None,
        key: str | None,
        traceparent: str | None,
    ) -> None:
        self._metrics = metrics
        self._route = route
        self._adapter = adapter
        self._request_id = request_id
        self._key = key
        self._traceparent = traceparent
        self._started_at = time.time()
        self._started = time.perf_counter()
        self._last_token: float | None = None
        self._recent: SlidingWindow | None = None
        self._ttft_s: float | None = None
        self._num_tokens = 0
        self._is_finished = False

    def token(self, count: int = 1) -> None:
        """`count` tokens came, together."""
        now = time.perf_counter()
        if self._last_token is None or self._recent is None:
            # The first token shows that the adapter exists: only then may its name become a label.
            self._ttft_s = now - self._started
            self._metrics.ttft.observe(self._ttft_s)
            self._recent = self._metrics.traffic[self._metrics.label(self._adapter)].recent
        else:
            self._metrics.inter_token.observe(now - self._last_token)
        self._last_token = now
        self._num_tokens += count
        self._recent.add_tokens(count)
        self._metrics.recent.add_tokens(count)

    def finished(
        self, outcome: Outcome, usage: Usage | None = None, timing: RequestTiming | None = None
    ) -> None:
        """The request's end; a second one is ignored."""
        if self._is_finished:
            return
        self._is_finished = True
        summary = RequestSummary(
            route=self._route,
            adapter=self._adapter,
            request_id=self._request_id,
            key=self._key,
            traceparent=self._traceparent,
            outcome=outcome,
            started_at=self._started_at,
            total_s=time.perf_counter() - self._started,
            ttft_s=self._ttft_s,
            num_tokens=self._num_tokens,
            usage=usage,
            timing=timing,
        )
        self._metrics.record(summary)


def adapter_names(adapter: AdapterSpec) -> str:
    """ "" for the base model, a name without generation, or names with "+" between, which none contains."""
    if adapter is None or isinstance(adapter, str):
        return (adapter or BASE_LABEL).partition("@")[0]
    names = sorted({name.partition("@")[0] for name in adapter})
    return "+".join(names) if len(names) > 1 else next(iter(names), BASE_LABEL)
