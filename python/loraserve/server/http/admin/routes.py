"""Adapters at run time: list, load with progress, unload, pin, warm; also under vLLM's names."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import orjson
from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import PlainTextResponse, Response, StreamingResponse

from loraserve.adapters.source import AdapterSource
from loraserve.engine.shadow import ShadowInfo
from loraserve.engine.stats import AdapterInfo
from loraserve.errors import AdapterNotFoundError
from loraserve.server.access.keys import Caller
from loraserve.server.adapters.loading import (
    LoadProgress,
    LoadRequest,
    OnLoadProgress,
    load_adapter,
    pin_adapter,
    roll_back_adapter,
    shadow_adapter,
    split_adapter,
    unload_adapter,
    warm_adapter,
)
from loraserve.server.adapters.sources import AdapterSources
from loraserve.server.http import status
from loraserve.server.http.admin.caller import admin_caller
from loraserve.server.http.admin.schema import (
    AdapterBody,
    AdaptersBody,
    FailedAdapterBody,
    GenerationBody,
    GenerationsBody,
    LoadBody,
    PinBody,
    ReceiptBody,
    RollbackBody,
    ShadowBody,
    ShadowResultsBody,
    SharesBody,
    VllmLoadBody,
    VllmUnloadBody,
    WarmBody,
)
from loraserve.server.http.admin.upload import OCTETS, check_upload, received
from loraserve.server.http.auth import current_caller
from loraserve.server.http.errors import MAX_MESSAGE_CHARS, Family, error_body
from loraserve.server.http.json_route import JsonRoute
from loraserve.server.http.state import HttpState, http_state
from loraserve.settings.fields import WEIGHTS
from loraserve.validation.printable import printable

if TYPE_CHECKING:
    from loraserve.adapters.manifest import AdapterManifest

EVENT_STREAM = "text/event-stream"
HEARTBEAT_S = 10.0  # a comment so often keeps proxies from cutting a long load

VLLM_SUCCESS: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/plain": {}}, "description": "Done."},
}

State = Annotated[HttpState, Depends(http_state)]
AnyCaller = Annotated[Caller, Depends(current_caller)]
Admin = Annotated[Caller, Depends(admin_caller)]

router = APIRouter(route_class=JsonRoute, tags=["administration"])
router.include_router(status.router)


@router.get("/adapters")
async def list_adapters(state: State, caller: AnyCaller) -> AdaptersBody:
    """All adapters the caller may use, by name, and those of them that the server started without."""
    adapters = sorted(state.engine.adapters(), key=lambda adapter: adapter.name)
    return AdaptersBody(
        adapters=[
            _adapter_body(state, adapter, caller) for adapter in adapters if caller.may_use(adapter.name)
        ],
        failed=[
            FailedAdapterBody(
                name=failure.name,
                source=failure.source if caller.is_admin else None,
                error=printable(str(failure.error), MAX_MESSAGE_CHARS) if caller.is_admin else None,
            )
            for failure in state.missing_adapters()
            if caller.may_use(failure.name)
        ],
    )


@router.post(
    "/adapters",
    status_code=201,
    responses={201: {"model": AdapterBody, "content": {EVENT_STREAM: {}}, "description": "Loaded."}},
)
async def load(body: LoadBody, request: Request, state: State, caller: Admin) -> Response:
    """Load an adapter; with `Accept: text/event-stream` the answer tells the progress.

    Events are `progress` {stage, done_bytes, total_bytes}, at the end `loaded` with the adapter, or `error`.
    """
    source = _sources(state).find(body.source, body.revision)
    wanted = LoadRequest(
        name=body.name,
        source=source,
        token=body.token,
        is_pinned=body.pin,
        is_warm=body.warm,
        replaces=body.replace,
        manifest=_manifest(body),
        expected_generation=body.expected_generation,
        share=body.share,
        shadow=body.shadow,
        weight=body.weight,
    )
    if EVENT_STREAM in request.headers.get("accept", ""):
        return StreamingResponse(
            _load_events(state, wanted, caller),
            media_type=EVENT_STREAM,
            headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
        )
    await _load(state, _sources(state), wanted, lambda _: None, caller)
    return _json(_find(state, body.name, caller), 201)


@router.put(
    "/adapters/{name}",
    status_code=201,
    response_model=AdapterBody,
    openapi_extra={"requestBody": {"content": {OCTETS: {"schema": {"type": "string", "format": "binary"}}}}},
)
async def upload(
    name: str,
    request: Request,
    state: State,
    caller: Admin,
    config: Annotated[str, Query(description="What adapter_config.json holds.", max_length=2**15)],
    replace: Annotated[bool, Query(description="Take the name from other content.")] = False,
    pin: Annotated[bool, Query(description="Keep it in the memory pool.")] = False,
    warm: Annotated[bool, Query(description="Load it into the memory pool now.")] = False,
    expected_generation: Annotated[
        int | None, Query(ge=0, description="What the name must be at, 0 for not loaded; 409 otherwise.")
    ] = None,
    share: Annotated[
        float | None, Query(ge=0, le=1, description="Of the name's requests that get it; with replace.")
    ] = None,
    shadow: Annotated[
        float | None,
        Query(ge=0.0001, le=1, description="Of the name's requests that are copied to it; with replace."),
    ] = None,
    weight: Annotated[
        float | None, Query(ge=WEIGHTS[0], le=WEIGHTS[1], description="Of its share of the engine.")
    ] = None,
) -> Response:
    """Load the adapter that is sent: a safetensors file as the body, 2 GiB at most.

    It is kept until it is unloaded or the server ends, and not for the next start.
    """
    check_upload(request)
    stored = await state.engine.receive_adapter(name, config, received(request))
    wanted = LoadRequest(
        name=name,
        source=AdapterSource("memory", stored.source),
        is_pinned=pin,
        is_warm=warm,
        replaces=replace,
        expected_generation=expected_generation,
        share=share,
        shadow=shadow,
        weight=weight,
        stored=stored,
    )
    await _load(state, None, wanted, lambda _: None, caller)
    return _json(_find(state, name, caller), 201)


@router.get("/adapters/{name}")
async def show(name: str, state: State, caller: AnyCaller) -> AdapterBody:
    """One adapter and what loading it found: 403 where the key may not use it, 404 where there is none."""
    caller.check_use(name)
    return _find(state, name, caller)


@router.delete("/adapters/{name}", status_code=204)
async def unload(name: str, state: State, caller: Admin) -> None:
    """Refuse new requests for the adapter; running ones finish, then its memory is free."""
    await _unload(state, name, caller)


@router.put("/adapters/{name}/pin")
async def pin(name: str, body: PinBody, state: State, caller: Admin) -> AdapterBody:
    """Keep the adapter in the memory pool, or no longer."""
    await pin_adapter(state.engine, name, body.pinned, by=caller.name, kept=state.kept)
    return _find(state, name, caller)


@router.get("/adapters/{name}/generations")
async def generations(name: str, state: State, caller: AnyCaller) -> GenerationsBody:
    """What was published under the name, oldest first, and which requests get which."""
    caller.check_use(name)
    return GenerationsBody(
        generations=[
            GenerationBody(
                number=one.number,
                hash=one.hash,
                source=one.source if caller.sees_paths else None,
                since=one.since,
                current=one.is_current,
                kept=one.is_kept,
                share=one.share,
                requests=one.num_requests if caller.sees_load else None,
                shadow=_shadow_body(one.shadow) if caller.sees_load else None,
            )
            for one in state.engine.generations(name)
        ]
    )


@router.put("/adapters/{name}/shares")
async def split(name: str, body: SharesBody, state: State, caller: Admin) -> GenerationsBody:
    """Let generations share the adapter's requests; the same `user` gets the same one."""
    await split_adapter(state.engine, name, body.shares, by=caller.name, kept=state.kept)
    return await generations(name, state, caller)


@router.put("/adapters/{name}/shadow")
async def shadow_requests(name: str, body: ShadowBody, state: State, caller: Admin) -> GenerationsBody:
    """Have copies of the adapter's requests run on a generation, to be compared with what is answered."""
    await shadow_adapter(state.engine, name, body.generation, body.fraction, by=caller.name, kept=state.kept)
    return await generations(name, state, caller)


@router.delete("/adapters/{name}/shadow")
async def end_shadow(name: str, state: State, caller: Admin) -> GenerationsBody:
    """Copy no requests of the adapter any more: 404 where it has no shadow."""
    await shadow_adapter(state.engine, name, None, 0.0, by=caller.name, kept=state.kept)
    return await generations(name, state, caller)


@router.post("/adapters/{name}/rollback")
async def roll_back(name: str, body: RollbackBody, state: State, caller: Admin) -> GenerationsBody:
    """Go back to an earlier generation, from the next request on."""
    await roll_back_adapter(
        state.engine,
        name,
        body.generation,
        expected_generation=body.expected_generation,
        by=caller.name,
        kept=state.kept,
    )
    return await generations(name, state, caller)


@router.post("/adapters/{name}/warm")
async def warm(name: str, state: State, caller: Admin) -> WarmBody:
    """Load the adapter into the memory pool now, ahead of its first request."""
    return WarmBody(seconds=await warm_adapter(state.engine, name, by=caller.name))


@router.post("/v1/load_lora_adapter", responses=VLLM_SUCCESS)
async def vllm_load(body: VllmLoadBody, state: State, caller: Admin) -> Response:
    """vLLM's way to load an adapter."""
    source = _sources(state).find(body.lora_path)
    wanted = LoadRequest(name=body.lora_name, source=source, replaces=body.load_inplace)
    await _load(state, _sources(state), wanted, lambda _: None, caller)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")


@router.post("/v1/unload_lora_adapter", responses=VLLM_SUCCESS)
async def vllm_unload(body: VllmUnloadBody, state: State, caller: Admin) -> Response:
    """vLLM's way to unload an adapter."""
    await _unload(state, body.lora_name, caller)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


async def _load(
    state: HttpState,
    sources: AdapterSources | None,
    wanted: LoadRequest,
    on_progress: OnLoadProgress,
    caller: Caller,
) -> None:
    await load_adapter(
        state.engine,
        sources,
        wanted,
        on_progress,
        by=caller.name,
        kept=state.kept,
        shares=state.access.shares,
    )


async def _unload(state: HttpState, name: str, caller: Caller) -> None:
    await unload_adapter(state.engine, name, by=caller.name, kept=state.kept, shares=state.access.shares)


async def _load_events(state: HttpState, wanted: LoadRequest, caller: Caller) -> AsyncIterator[bytes]:
    """Server-sent events of a load; a client that leaves ends the download, what has come further goes on."""
    progress: asyncio.Queue[LoadProgress | None] = asyncio.Queue()
    loading = asyncio.create_task(_load(state, _sources(state), wanted, progress.put_nowait, caller))
    loading.add_done_callback(lambda _: progress.put_nowait(None))
    try:
        while True:
            try:
                step = await asyncio.wait_for(progress.get(), HEARTBEAT_S)
            except TimeoutError:
                yield b": loading\n\n"
                continue
            if step is None:
                break
            yield _event("progress", asdict(step))
        await loading
        yield _event("loaded", _find(state, wanted.name, caller).model_dump())
    except Exception as error:
        yield _event("error", error_body(error, Family.PLAIN))
    finally:
        loading.cancel()


def _event(name: str, data: Any) -> bytes:
    return b"event: " + name.encode() + b"\ndata: " + orjson.dumps(data) + b"\n\n"


def _manifest(body: LoadBody) -> AdapterManifest | None:
    """Raises AdapterFormatError: a field is unknown, or not what it must be."""
    if body.manifest is None:
        return None
    from loraserve.adapters.manifest import AdapterManifest  # noqa: PLC0415 (imports jinja2)

    return AdapterManifest.from_fields(body.manifest, f"manifest of adapter {body.name!r}")


def _shadow_body(shadow: ShadowInfo | None) -> ShadowResultsBody | None:
    if shadow is None:
        return None
    results = shadow.results
    return ShadowResultsBody(
        fraction=shadow.fraction,
        compared=results.num_compared,
        identical=results.num_identical,
        ending_alike=results.num_ending_alike,
        agreement=results.agreement,
        tokens=results.num_tokens,
        shadow_tokens=results.num_shadow_tokens,
        seconds=results.seconds,
        shadow_seconds=results.shadow_seconds,
        errors=results.num_errors,
        dropped=results.num_dropped,
    )


def _json(body: AdapterBody, status_code: int) -> Response:
    return Response(orjson.dumps(body.model_dump()), status_code, media_type="application/json")


def _sources(state: HttpState) -> AdapterSources:
    return state.sources or AdapterSources()


def _find(state: HttpState, name: str, caller: Caller) -> AdapterBody:
    for adapter in state.engine.adapters():
        if adapter.name == name:
            return _adapter_body(state, adapter, caller)
    raise AdapterNotFoundError(f"adapter {name!r} is not registered")


def _adapter_body(state: HttpState, adapter: AdapterInfo, caller: Caller) -> AdapterBody:
    receipt = adapter.receipt
    load: dict[str, Any] = {
        "state": adapter.state,
        "pinned": adapter.is_pinned,
        "weight": state.access.shares.weight_of(adapter.name),
        "num_running": adapter.num_running,
        "num_waiting": adapter.num_waiting,
        "requests": adapter.usage.num_requests,
        "tokens": adapter.usage.num_completion_tokens,
        "loads": adapter.num_loads,
        "evictions": adapter.num_evictions,
        "uninvoked": adapter.num_uninvoked,
        "last_load_s": adapter.last_load_s,
    }
    return AdapterBody(
        name=adapter.name,
        generation=adapter.generation,
        path=adapter.path if caller.sees_paths else None,
        rank=receipt.rank,
        nbytes=receipt.nbytes,
        description=adapter.description,
        receipt=ReceiptBody(
            tensors=receipt.tensors,
            modules=receipt.modules,
            layers=receipt.layers,
            rank=receipt.rank,
            ranks=receipt.ranks,
            nbytes=receipt.nbytes,
            hash=receipt.hash,
            base_check=receipt.base_check,
            base_model=receipt.base_model if caller.sees_paths else None,
            base_copies=receipt.base_copies,
            notes=receipt.notes if caller.sees_paths else [],
            not_used=receipt.not_used if caller.sees_paths else [],
        ),
        **(load if caller.sees_load else dict.fromkeys(load)),
    )
