"""From settings to the parts of a server."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from loraserve.adapters.history import GenerationHistory, KeptGeneration, Published
from loraserve.adapters.hub import download_adapter
from loraserve.adapters.remote import RemoteAdapters
from loraserve.adapters.startup import AdapterFailure, StartingAdapters
from loraserve.config import EngineConfig, parse_memory
from loraserve.errors import InvalidRequestError, LoraserveError
from loraserve.loader.hub import download_model
from loraserve.remote.location import AllowedLocations, parse_remote
from loraserve.server.access.fair_shares import FairShares
from loraserve.server.access.keys import AccessControl
from loraserve.server.access.request_limits import RequestLimits
from loraserve.server.access.tls import TlsConfig
from loraserve.server.adapters.resolver import AdapterResolver, allowed_by
from loraserve.server.adapters.sources import AdapterSources
from loraserve.server.adapters.state import AdapterState, KeptGenerations
from loraserve.server.adapters.watched import WatchedDirectory
from loraserve.server.grpc.service import GrpcServer
from loraserve.server.observe.logs import log_event
from loraserve.server.observe.metrics import Metrics
from loraserve.server.observe.request_log import log_request
from loraserve.server.observe.tracing import Tracing, otlp_exporter
from loraserve.settings.entries import AdapterSettings
from loraserve.settings.keys import api_keys, fair_by, hub_repos, prefix_cache_scope
from loraserve.settings.schema import ServeSettings
from loraserve.validation.files import expanded

MIN_CACHE_NBYTES = 2**16

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from loraserve.adapters.manifest import AdapterManifest
    from loraserve.async_engine import AsyncEngine
    from loraserve.server.batches.service import BatchService
    from loraserve.server.http.server import HttpServer
    from loraserve.server.http.state import HttpState


BATCH_SHARE = 8  # of the sequences: what a CPU has most of its throughput with
BATCH_DIR_NBYTES = 16 * 2**30  # where the setting says auto


def adapter_state(settings: ServeSettings) -> AdapterState | None:
    """None where there is no directory for it. Raises StateError: it can't be used."""
    if settings.state_dir is None:
        return None
    return AdapterState(settings.state_dir, settings.adapters)


def engine_config(
    settings: ServeSettings,
    *,
    with_downloads: bool = True,
    kept: AdapterState | None = None,
    sources: AdapterSources | None = None,
) -> EngineConfig:
    """The engine's part; what is on the Hub is fetched, unless `with_downloads` is false and it is left out.

    What is kept of run time is served too, if it comes from where `sources` allow.

    Raises LoraserveError: a value is out of range, or the Hub does not have something.
    """
    config = EngineConfig(
        model=settings.model,
        base_names=settings.served_names,
        dtype=settings.dtype,
        quantization=settings.quantization,
        adapter_dtype=settings.adapter_dtype,
        device=settings.device,
        memory=settings.memory,
        adapter_host_memory=settings.adapter_host_memory,
        keep_generations=settings.keep_generations,
        max_lora_rank=settings.max_lora_rank,
        max_num_seqs=settings.max_num_seqs,
        max_batch_adapter_memory=settings.max_batch_adapter_memory,
        max_batched_tokens=settings.max_batched_tokens,
        max_prefill_tokens=settings.max_prefill_tokens,
        max_waiting=settings.max_waiting,
        max_model_len=settings.max_model_len,
        generation_config=settings.generation_config,
        gpu_memory_utilization=settings.gpu_memory_utilization,
        cuda_graphs=settings.cuda_graphs,
        prefix_caching=settings.prefix_caching,
        tool_parser=settings.tool_parser,
        reasoning_parser=settings.reasoning_parser,
        num_threads=settings.threads,
        tensor_parallel_size=settings.tensor_parallel_size,
        on_adapter_error=settings.on_adapter_error,
    )
    model = settings.model
    if settings.revision is not None and with_downloads:
        model = str(download_model(settings.model, settings.revision))
    remote = (None if sources is None else sources.remote) or remote_adapters(settings)
    adapters: dict[str, str] = {}
    manifests: dict[str, AdapterManifest] = {}
    starting = StartingAdapters()
    restored = {} if kept is None else kept.restored()
    for name, adapter in {**settings.adapters, **restored}.items():
        with starting.trying(name, str(adapter.adapter_source())):
            manifest = adapter_manifest(name, adapter)
            if adapter.path is not None or with_downloads:
                adapters[name] = _adapter_path(adapter, remote, sources if name in restored else None)
                if manifest is not None:
                    manifests[name] = manifest
    histories: dict[str, GenerationHistory] = {}
    if kept is not None and with_downloads:
        histories = {
            name: _history(name, one, {} if name in kept.configured else kept.adapters, remote, sources)
            for name, one in kept.generations.items()
        }
    is_left_out = not with_downloads and settings.merge not in adapters
    return replace(
        config,
        model=model,
        adapters=adapters,
        merge=None if is_left_out else settings.merge,
        manifests=manifests,
        failed_adapters=tuple(starting.failures),
        histories=histories,
    )


def access_control(settings: ServeSettings, kept: AdapterState | None = None) -> AccessControl:
    """With the weights that are kept of adapters, too.

    Raises ConfigError: a key can't be read, or there are none to keep or tell apart."""
    keys = api_keys(settings)
    adapters = {**({} if kept is None else kept.restored()), **settings.adapters}
    return AccessControl(
        keys,
        max_concurrent_requests=settings.max_concurrent_requests,
        has_open_metrics=settings.open_metrics,
        prefix_cache_scope=prefix_cache_scope(settings, keys),
        shares=FairShares(
            fair_by(settings, keys), {name: adapter.weight for name, adapter in adapters.items()}
        ),
    )


def adapter_sources(settings: ServeSettings, access: AccessControl) -> AdapterSources:
    """What may be loaded at run time: no path without roots; with keys, of the Hub what settings name.

    Raises InvalidRequestError, ConfigError: a URL or size can't be read.
    """
    by_template = allowed_by(settings.adapter_source)
    return AdapterSources(
        (*settings.adapter_root, *by_template.roots),
        (*hub_repos(settings, has_keys=access.has_keys), *by_template.hub_repos),
        remote_adapters(settings),
    )


def remote_adapters(settings: ServeSettings) -> RemoteAdapters:
    """What brings adapters of URLs.

    Raises InvalidRequestError, StateError: a URL or the size can't be read, or the directory can't be used.
    """
    nbytes = parse_memory(settings.adapter_cache_size, "adapter_cache_size", least=MIN_CACHE_NBYTES)
    if nbytes is None:
        raise InvalidRequestError("adapter_cache_size is auto, give bytes, or text such as 20GiB")
    allowed = AllowedLocations.parsed((*settings.adapter_url, *allowed_by(settings.adapter_source).urls))
    remote = RemoteAdapters(settings.adapter_cache_dir, nbytes, allowed)
    if allowed.prefixes:
        remote.get_ready()
    return remote


def adapter_resolver(
    settings: ServeSettings, engine: AsyncEngine, sources: AdapterSources
) -> AdapterResolver | None:
    """None where adapters are served by name only. Raises InvalidRequestError: the template can't be used."""
    if settings.adapter_source is None:
        return None
    return AdapterResolver(
        engine,
        sources,
        settings.adapter_source,
        settings.adapter_source_name,
        settings.adapter_source_refresh_seconds,
    )


def watched_directory(settings: ServeSettings, engine: AsyncEngine) -> WatchedDirectory | None:
    """None where no directory is watched."""
    if settings.adapter_dir is None:
        return None
    return WatchedDirectory(engine, settings.adapter_dir, settings.adapters)


def request_limits(settings: ServeSettings) -> RequestLimits:
    """What one request may ask, whichever API it comes by."""
    return RequestLimits(
        request_timeout_s=settings.request_timeout_seconds,
        max_best_of=settings.max_best_of,
        max_stop_sequences=settings.max_stop_sequences,
        max_top_n_tokens=settings.max_top_n_tokens,
        max_client_batch_size=settings.max_client_batch_size,
        max_input_tokens=settings.max_input_tokens,
        adapter_wait_s=settings.adapter_wait_seconds,
        trust_request_chat_template=settings.trust_request_chat_template,
    )


def tls_config(settings: ServeSettings) -> TlsConfig | None:
    """None where the APIs speak plain text; the files are not opened yet."""
    if settings.tls_certificate is None or settings.tls_key is None:
        return None
    return TlsConfig(
        certificate=settings.tls_certificate, key=settings.tls_key, client_ca=settings.tls_client_ca
    )


def tracing(settings: ServeSettings) -> Tracing | None:
    """Raises TracingError: the extra is not installed."""
    if settings.otlp_endpoint is None:
        return None
    return Tracing(
        otlp_exporter(settings.otlp_endpoint), settings.otlp_service_name, settings.served_names[0]
    )


def metrics(settings: ServeSettings, traces: Tracing | None) -> Metrics:
    """Counts that also write the log of requests, and the traces if there are any."""
    observers = [log_request] if traces is None else [log_request, traces.record]
    return Metrics(settings.max_adapter_labels, observers)


def grpc_server(
    settings: ServeSettings,
    engine: AsyncEngine,
    access: AccessControl,
    sources: AdapterSources,
    metrics: Metrics,
    tls: TlsConfig | None,
    kept: AdapterState | None = None,
    resolver: AdapterResolver | None = None,
    watched: WatchedDirectory | None = None,
) -> GrpcServer | None:
    """None where it is off. Raises ListenError: the port can't be had."""
    if settings.grpc_port is None:
        return None
    credentials = None if tls is None else tls.grpc_credentials()
    return GrpcServer(
        engine,
        settings.host,
        settings.grpc_port,
        access=access,
        sources=sources,
        metrics=metrics,
        credentials=credentials,
        limits=request_limits(settings),
        max_message_nbytes=settings.max_body_size,
        kept=kept,
        resolver=resolver,
        watched=watched,
    )


def batch_service(settings: ServeSettings, engine: AsyncEngine, access: AccessControl) -> BatchService | None:
    """None where there is no directory for it. Raises StateError: it can't be used."""
    if settings.batch_dir is None:
        return None
    from loraserve.server.batches.service import batch_service  # noqa: PLC0415 (imports starlette)
    from loraserve.server.batches.store import BatchStore  # noqa: PLC0415

    max_nbytes = parse_memory(settings.batch_dir_size, "batch_dir_size") or BATCH_DIR_NBYTES
    max_running = settings.batch_max_num_seqs or max(settings.max_num_seqs // BATCH_SHARE, 1)
    return batch_service(BatchStore(settings.batch_dir, max_nbytes), access, max_running, engine.num_waiting)


def http_server(settings: ServeSettings, state: HttpState, tls: TlsConfig | None) -> HttpServer | None:
    """None where it is off. Raises ListenError: the port can't be had."""
    if settings.http_port is None:
        return None
    from loraserve.server.http.server import HttpServer  # noqa: PLC0415 (imports fastapi)

    context = None if tls is None else tls.http_context()
    return HttpServer(state, settings.host, settings.http_port, tls=context)


def http_state(
    settings: ServeSettings,
    engine: AsyncEngine,
    access: AccessControl,
    sources: AdapterSources,
    metrics: Metrics,
    failures: Sequence[AdapterFailure] = (),
    kept: AdapterState | None = None,
    batches: BatchService | None = None,
    resolver: AdapterResolver | None = None,
    watched: WatchedDirectory | None = None,
) -> HttpState:
    """What every HTTP route works with."""
    from loraserve.server.http.responses.store import StoreLimits  # noqa: PLC0415 (imports fastapi)
    from loraserve.server.http.state import HttpLimits, HttpState  # noqa: PLC0415

    limits = HttpLimits(
        max_body_nbytes=settings.max_body_size,
        header_timeout_s=settings.header_timeout_seconds,
        body_timeout_s=settings.body_timeout_seconds,
        **asdict(request_limits(settings)),
    )
    return HttpState(
        engine=engine,
        served_names=settings.served_names,
        access=access,
        metrics=metrics,
        limits=limits,
        sources=sources,
        cors_origins=settings.cors_origin,
        adapters_at_start=tuple(settings.adapters),
        adapter_failures=tuple(failures),
        resolver=resolver,
        watched=watched,
        kept=kept,
        batches=batches,
        response_limits=StoreLimits(
            max_nbytes=settings.response_store_memory, max_age_s=settings.response_store_seconds
        ),
    )


async def warm_up(
    engine: AsyncEngine, settings: ServeSettings, kept: AdapterState | None = None
) -> tuple[AdapterFailure, ...]:
    """Loads and pins the adapters that the settings and what is kept say; all failures of the start.

    Raises LoraserveError: an adapter can't be loaded, and that is to fail the start.
    """
    starting = StartingAdapters(engine.adapter_failures)
    failed = {failure.name for failure in starting.failures}
    wanted = {
        name: adapter
        for name, adapter in {**settings.adapters, **({} if kept is None else kept.restored())}.items()
        if (adapter.warm or adapter.pin) and name not in failed
    }
    results = await asyncio.gather(*(engine.warm_adapter(name) for name in wanted), return_exceptions=True)
    for (name, adapter), result in zip(wanted.items(), results, strict=True):
        with starting.trying(name, str(adapter.adapter_source())):
            if isinstance(result, BaseException):
                raise result
            if adapter.pin:
                await engine.pin_adapter(name, True)
    starting.check(settings.on_adapter_error)
    return tuple(starting.failures)


def _adapter_path(adapter: AdapterSettings, remote: RemoteAdapters, sources: AdapterSources | None) -> str:
    """Its directory, fetched if it is elsewhere; with `sources`, if they allow that."""
    source = adapter.adapter_source()
    if sources is not None:
        return str(sources.fetch(source))
    if source.kind == "local":
        return str(expanded(source.location))
    if source.kind == "remote":
        return str(remote.fetch(parse_remote(source.location)))
    return str(download_adapter(source.location, source.revision))


def _history(
    name: str,
    known: KeptGenerations,
    served: Mapping[str, AdapterSettings],
    remote: RemoteAdapters,
    sources: AdapterSources | None,
) -> GenerationHistory:
    """With those that can be had; what can't is told in the log. A name that is not served has none."""
    kept = []
    for one in known.published:
        if one.adapter is None or one.number == known.current or name not in served:
            continue
        try:
            path = _adapter_path(one.adapter, remote, sources)
            kept.append(KeptGeneration(one.number, path, adapter_manifest(name, one.adapter)))
        except LoraserveError as error:
            reason = str(error)
            log_event(
                logger,
                "generation not served",
                level=logging.WARNING,
                adapter=name,
                generation=one.number,
                reason=reason,
            )
    return GenerationHistory(
        last=known.last,
        published=tuple(Published(one.number, one.hash, one.source, one.since) for one in known.published),
        kept=tuple(kept),
        shares=known.shares,
        shadow=None if known.shadow is None else (known.shadow.generation, known.shadow.fraction),
    )


def adapter_manifest(name: str, adapter: AdapterSettings) -> AdapterManifest | None:
    """What the settings say of it beside its own manifest. Raises AdapterFormatError: it is wrong."""
    from loraserve.adapters.manifest import AdapterManifest  # noqa: PLC0415 (imports jinja2)

    if adapter.manifest is None:
        return None
    return AdapterManifest.from_fields(adapter.manifest, f"adapters.{name}.manifest")
