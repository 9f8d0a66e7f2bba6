"""How the server is: for load balancers, for Prometheus, for TGI's clients and for the dashboard."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse

from loraserve.server.access.disclosure import shown_info
from loraserve.server.access.keys import Caller
from loraserve.server.http.auth import current_caller
from loraserve.server.http.state import HttpState, http_state
from loraserve.server.observe.metrics import Traffic
from loraserve.server.observe.prometheus import CONTENT_TYPE, pool_pages, render

LOAD_FIELDS = ("running", "waiting", "pages", "page_nbytes", "tokens_per_s", "requests_per_s")

State = Annotated[HttpState, Depends(http_state)]
AnyCaller = Annotated[Caller, Depends(current_caller)]

router = APIRouter(tags=["status"])


@router.get("/ping", include_in_schema=False, response_class=Response)
@router.get(
    "/health",
    response_class=Response,
    responses={503: {"description": "The engine failed or is stuck."}},
)
async def health(state: State) -> Response:
    """200 with an empty body as long as the process should live, however busy it is."""
    if state.engine.has_failed:
        return _unhealthy("unhealthy")
    stuck = state.engine.stuck
    return Response() if stuck is None else _unhealthy(f"stuck: {stuck}")


@router.get(
    "/ready", response_class=Response, responses={503: {"description": "New requests are refused now."}}
)
async def ready(state: State) -> Response:
    """200 as long as new requests are taken; 503 from the stop signal on.

    The body is empty, or tells how many adapters the server started without; /adapters says which and why.
    """
    refusal = state.engine.refusal
    if refusal is not None:
        return _unhealthy(refusal)
    missing = state.missing_adapters()
    return JSONResponse({"num_failed_adapters": len(missing)}) if missing else Response()


@router.get("/info")
async def info(state: State, caller: AnyCaller) -> dict[str, Any]:
    """What is served: TGI's fields, then the engine's own; its load and its paths for administrators."""
    engine, limits = state.engine.info(), state.limits
    max_input = engine.max_model_len - 1
    return {
        "model_id": state.served_names[0],
        "model_sha": None,
        "model_dtype": f"torch.{engine.dtype}",
        "model_device_type": engine.device,
        "model_pipeline_tag": "text-generation",
        "max_concurrent_requests": state.access.max_concurrent_requests,
        "max_best_of": limits.max_best_of,
        "max_stop_sequences": limits.max_stop_sequences,
        "max_input_tokens": min(limits.max_input_tokens or max_input, max_input),
        "max_total_tokens": engine.max_model_len,
        "validation_workers": 1,
        "max_client_batch_size": limits.max_client_batch_size,
        "router": "loraserve",
        "sha": None,
        "docker_label": None,
        "served_model_names": list(state.served_names),
        **shown_info(engine, caller),
    }


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def metrics(request: Request, state: State) -> Response:
    """Prometheus' text format; where keys are configured an admin key is needed, unless opened to all."""
    if state.access.has_keys and not state.access.has_open_metrics:
        caller = await current_caller(request, state, None, None)
        caller.require_admin()
    engine = state.engine
    batches = None if state.batches is None else state.batches.counts()
    remote = None if state.sources is None else state.sources.remote
    text = render(state.metrics, engine.info(), engine.stats(), batches, remote, state.more_series())
    return Response(text, media_type=CONTENT_TYPE)


@router.get("/dashboard/stats", include_in_schema=False)
async def dashboard_stats(state: State, caller: AnyCaller) -> dict[str, Any]:
    """Load and traffic of the last seconds, where the caller may see what others do."""
    if not caller.sees_load:
        return dict.fromkeys(LOAD_FIELDS) | {"is_admin": False, "adapters": {}}
    stats, recent = state.engine.stats(), state.metrics.recent
    state.metrics.keep_only(stats.adapters)
    return {
        "running": stats.num_running,
        "waiting": stats.num_waiting,
        "pages": pool_pages(stats),
        "page_nbytes": stats.page_nbytes,
        "tokens_per_s": recent.tokens_per_s(),
        "requests_per_s": recent.requests_per_s(),
        "is_admin": caller.is_admin,
        "adapters": {name: _traffic(traffic) for name, traffic in state.metrics.traffic.items()},
    }


def _traffic(traffic: Traffic) -> dict[str, Any]:
    recent = traffic.recent
    return {
        "requests_per_s": recent.requests_per_s(),
        "tokens_per_s": recent.tokens_per_s(),
        "ttft_s": recent.ttft_s(),
        "latency_s": recent.latency_s(),
        "latency_series_s": recent.latency_series_s(),
    }


def _unhealthy(error: str) -> Response:
    return JSONResponse({"error": error, "error_type": "healthcheck"}, 503)
