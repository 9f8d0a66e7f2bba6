"""HTTP and gRPC with keys and sources over an engine without a model, on free ports, on a thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from types import SimpleNamespace, TracebackType
from typing import Any

from loraserve.adapters.startup import AdapterFailure
from loraserve.engine.stats import (
    AdapterInfo,
    AdapterStats,
    AdapterUsage,
    EngineInfo,
    EngineStats,
    HostTierStats,
)
from loraserve.engine.versions import GenerationInfo
from loraserve.errors import AdapterFormatError, AdapterNotFoundError, CapacityError, InvalidRequestError
from loraserve.server.access.fair_shares import FairShares
from loraserve.server.access.keys import AccessControl
from loraserve.server.access.request_limits import RequestLimits
from loraserve.server.access.tls import TlsConfig
from loraserve.server.adapters.sources import AdapterSources
from loraserve.server.adapters.state import AdapterState
from loraserve.server.grpc.service import GrpcServer
from loraserve.server.http.server import HttpServer
from loraserve.server.http.state import HttpState
from loraserve.server.observe.metrics import Metrics
from loraserve.server.observe.request_log import log_request
from loraserve.settings.entries import ApiKey, PrefixCacheScope

from tests.server.http.fake_engine import FakeEngine

START_TIMEOUT_S = 60.0
RECEIPT = SimpleNamespace(
    tensors=4,
    modules=["q_proj"],
    layers=[0, 1],
    rank=8,
    ranks=[8],
    nbytes=4096,
    hash="ab" * 32,
    base_check="fits",
    base_model=None,
    base_copies=[],
    notes=[],
    not_used=[],
)
HOST_TIER = HostTierStats(
    limit_nbytes=8192,
    nbytes=4096,
    num_adapters=1,
    num_hits=5,
    num_misses=3,
    num_evictions=2,
    num_failures=1,
)


class ControlEngine(FakeEngine):
    """Adapters by name and path; a path ending in "bad" is malformed, one in "large" can't be loaded."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.paths: dict[str, str] = {name: f"/adapters/{name}" for name in names}
        self.manifests: dict[str, Any] = {}
        self.pinned: set[str] = set()
        self.resident: set[str] = set()
        self.refusal: str | None = None
        self.has_failed = False
        self.stuck: str | None = None
        self.usage = AdapterUsage(
            num_requests=3, num_prompt_tokens=30, num_cached_tokens=10, num_completion_tokens=12
        )

    def info(self) -> Any:
        numbers = {name: 0 for name in EngineInfo.__dataclass_fields__ if name.startswith("num_")}
        return EngineInfo(
            version="1.0",
            model="fake",
            base_fingerprint="base1:" + "0" * 64,
            dtype="bfloat16",
            quantization="q4_k",
            weights_nbytes=2**28,
            adapter_dtype="int8",
            device="cpu",
            max_model_len=1024,
            max_lora_rank=64,
            page_nbytes=65536,
            host_tier=HOST_TIER,
            **numbers,
        )

    def stats(self) -> EngineStats:
        adapters = {
            name: AdapterStats(
                state="resident" if name in self.resident else "registered",
                num_running=1,
                num_waiting=2,
                is_pinned=name in self.pinned,
                nbytes=4096,
                usage=self.usage,
                num_loads=2,
                num_evictions=1,
                num_uninvoked=0,
                num_load_failures=0,
                load_s=0.25,
                last_load_s=0.1,
            )
            for name in self.paths
        }
        numbers = {name: 0 for name in EngineStats.__dataclass_fields__ if name.startswith("num_")}
        counts = {"num_kv_pages": 5, "num_cached_pages": 4, "num_adapter_pages": 3, "num_free_pages": 2}
        return EngineStats(
            **(numbers | counts | {"num_running": 7, "num_waiting": 6}),
            page_nbytes=65536,
            host_tier=HOST_TIER,
            base=self.usage,
            adapters=adapters,
        )

    def adapters(self) -> list[AdapterInfo]:
        receipt: Any = RECEIPT
        return [
            AdapterInfo(name=name, path=self.paths[name], description=None, receipt=receipt, **vars(stats))
            for name, stats in self.stats().adapters.items()
        ]

    def has_adapter(self, name: str) -> bool:
        return name in self.paths

    def generations(self, name: str) -> list[GenerationInfo]:
        """One alone: nothing is gone back to here."""
        return [
            GenerationInfo(
                number=1,
                hash="0" * 64,
                source=self._find(name),
                since=0.0,
                is_current=True,
                is_kept=True,
                share=1.0,
                num_requests=0,
            )
        ]

    async def load_adapter(
        self, name: str, path: str, manifest: Any = None, *, replace: bool = False, **_versions: None
    ) -> Any:
        if path.endswith("bad"):
            raise AdapterFormatError(f"{path} is malformed")
        if self.paths.get(name, path) != path and not replace:
            raise InvalidRequestError(f"adapter {name!r} is registered with other content")
        self.paths[name] = path
        self.manifests[name] = manifest
        return RECEIPT

    async def unload_adapter(self, name: str) -> None:
        self._find(name)
        del self.paths[name]

    async def warm_adapter(self, name: str) -> float:
        if self._find(name).endswith("large"):
            raise CapacityError("the adapter is larger than the pool")
        self.resident.add(name)
        return 0.5

    async def pin_adapter(self, name: str, is_pinned: bool) -> None:
        self._find(name)
        (self.pinned.add if is_pinned else self.pinned.discard)(name)

    def _find(self, name: str) -> str:
        if name not in self.paths:
            raise AdapterNotFoundError(f"adapter {name!r} is not registered")
        return self.paths[name]


class ControlServer:
    """Serves until the `with` block ends."""

    def __init__(
        self,
        make_engine: Callable[[], Any],
        *,
        keys: Sequence[ApiKey] = (),
        roots: Sequence[Any] = (),
        has_open_metrics: bool = False,
        tls: TlsConfig | None = None,
        request_timeout_s: float | None = None,
        cors_origins: tuple[str, ...] = (),
        adapter_failures: tuple[AdapterFailure, ...] = (),
        prefix_cache_scope: PrefixCacheScope = "key",
        shares: FairShares | None = None,
        kept: AdapterState | None = None,
    ) -> None:
        self._make_engine = make_engine
        self._tls = tls
        self._request_timeout_s = request_timeout_s
        self._cors_origins = cors_origins
        self._adapter_failures = adapter_failures
        self._kept = kept
        self._access = AccessControl(
            keys, has_open_metrics=has_open_metrics, prefix_cache_scope=prefix_cache_scope, shares=shares
        )
        self._sources = AdapterSources(roots, hub_repos=("*",))
        self.metrics = Metrics(on_finished=[log_request])
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), name="test-control")
        self.engine: Any = None
        self.url = ""
        self.grpc_address = ""

    async def _serve(self) -> None:
        try:
            self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
            self.engine = self._make_engine()
            state = HttpState(
                engine=self.engine,
                served_names=("base",),
                access=self._access,
                metrics=self.metrics,
                sources=self._sources,
                cors_origins=self._cors_origins,
                adapter_failures=self._adapter_failures,
                kept=self._kept,
            )
            tls = self._tls
            http = HttpServer(state, "127.0.0.1", 0, tls=None if tls is None else tls.http_context())
            grpc = GrpcServer(
                self.engine,
                "127.0.0.1",
                0,
                access=self._access,
                limits=RequestLimits(request_timeout_s=self._request_timeout_s),
                sources=self._sources,
                metrics=self.metrics,
                credentials=None if tls is None else tls.grpc_credentials(),
                kept=self._kept,
            )
            await http.start()
            await grpc.start()
            self.url = f"{'http' if tls is None else 'https'}://{http.address}"
            self.grpc_address = grpc.address
        finally:
            self._ready.set()
        await self._stop.wait()
        await grpc.stop(0.0)
        await http.stop(0.0)

    def __enter__(self) -> ControlServer:
        self._thread.start()
        assert self._ready.wait(START_TIMEOUT_S)
        assert self.url, "the server did not start"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()
