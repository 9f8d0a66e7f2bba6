"""Brings adapters, of files or of the host tier, into their extents of the pool on threads of its own."""

from __future__ import annotations

import os
import queue
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

from loraserve import _core
from loraserve.adapters.check import AdapterCheck, CheckedFiles
from loraserve.adapters.manifest import AdapterManifest
from loraserve.adapters.registry import WeightsSource
from loraserve.adapters.stored import StoredAdapter
from loraserve.backends import Backend, Extent
from loraserve.errors import AdapterUnavailableError, LoraserveError

NUM_LOADER_THREADS = 2
# A read that takes this long may hang, as of a dead mount; another thread takes its place, up to this many.
STUCK_READ_S = 0.9
MAX_LOADER_THREADS = 32

# While the model computes on the same cores, a load rests this long after every half megabyte: it then takes
# a thirtieth of a core from the step. Open loads share the rest, and a queue of them is not slowed at all:
# by then the batch waits for adapters more than for cores.
REST_S = 0.008
MAX_OPEN_LOADS_AT_REST = 4

Stamp: TypeAlias = "tuple[tuple[int, int], ...] | None"


@dataclass(frozen=True)
class LoadResult:
    """One finished load: the layout of the bytes now in the extent, or why there are none."""

    adapter_id: int
    extent: Extent
    outcome: _core.AdapterLayout | LoraserveError


@dataclass
class _Read:
    """What a loader thread is at."""

    began_at: float
    is_replaced: bool = False


class ExtentLoader:
    """Starts loads and collects their results; `on_done` is called from a loader thread after each.

    `tier` holds adapters as they lay in their extents, found by content: one of these is copied, and its
    files, which may have changed since, are not read.

    The threads start with the first load, and end with `shutdown` or with the loader. (An executor of Python
    takes no more work once the main thread has ended, though other threads of the program go on.)
    """

    def __init__(
        self,
        backend: Backend,
        check: AdapterCheck,
        tier: _core.HostTier,
        on_done: Callable[[], None],
    ) -> None:
        self._backend: Backend | None = backend
        self._check = check
        self._tier = tier
        self._on_done = on_done
        self._pace = _core.LoadPace()
        # Of files with embeddings or a head, of which a load reads what differs from the base's: when they
        # were compared with it.
        self._compared: dict[str, Stamp] = {}
        self._num_open = 0  # loads started whose results were not taken; the engine's thread counts
        self._jobs: _Jobs = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._reads: dict[int, _Read] = {}  # under way, by adapter id
        self._reads_lock = threading.Lock()
        self._end = weakref.finalize(self, _end_threads, self._jobs)
        self._end.atexit = False  # the engine's thread, which the exit waits for, ends them
        self._results: queue.SimpleQueue[LoadResult] = queue.SimpleQueue()

    def check(self, source: str | StoredAdapter, manifest: AdapterManifest | None = None) -> CheckedFiles:
        """Read and check an adapter, of a path or of the store, without loading it."""
        stamp = _stamp(source) if isinstance(source, str) else None
        checked = self._check.check(source, self._pace, manifest)
        receipt = checked.receipt
        if receipt.is_compared and checked.stored is None:
            self._compared[receipt.directory] = stamp if receipt.directory == source else None
        return checked

    @property
    def num_open(self) -> int:
        """Loads under way, and those whose results were not taken; on the engine's thread."""
        return self._num_open

    def set_contended(self, is_contended: bool) -> None:
        """Say whether the model computes now on the cores that adapters are read with."""
        self._pace.set_rest(rest_s(self._num_open) if is_contended else 0.0)

    def start(
        self, adapter_id: int, sources: Sequence[WeightsSource], extent: Extent, *, keeps: bool = False
    ) -> None:
        """Bring an adapter into `extent`, of the tier or the first readable source; on the engine's thread.

        `keeps`: one that is read is also copied to the tier, for its return.
        """
        if not self._threads:
            self._start_threads()
        self._num_open += 1
        self._jobs.put(partial(self._run, adapter_id, sources, extent, keeps))

    def replace_stuck_threads(self) -> None:
        """Have further threads read what waits behind reads that hang; only on the engine's thread."""
        stuck_since = time.monotonic() - STUCK_READ_S
        with self._reads_lock:
            stuck = [read for read in self._reads.values() if read.began_at < stuck_since]
            stuck = [read for read in stuck if not read.is_replaced]
            for read in stuck[: MAX_LOADER_THREADS - len(self._threads)]:
                read.is_replaced = True
                self._start_thread()

    def take_results(self) -> list[LoadResult]:
        """Loads that are done, each told once; only on the engine's thread."""
        results = [self._results.get_nowait() for _ in range(self._results.qsize())]
        self._num_open -= len(results)
        return results

    def shutdown(self) -> None:
        """Drop loads that wait, and return when those under way are over; nothing may be started later."""
        self._pace.set_rest(0.0)  # no step is delayed any more
        while not self._jobs.empty():
            self._jobs.get()
        self._end()
        for thread in self._threads:
            thread.join()
        self._tier.forget_except([])
        self._backend = None

    def _start_threads(self) -> None:
        for _ in range(NUM_LOADER_THREADS):
            self._start_thread()

    def _start_thread(self) -> None:
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        name = f"loraserve-loader-{len(self._threads)}"
        self._threads.append(threading.Thread(target=_work, args=(self._jobs,), name=name, daemon=True))
        self._threads[-1].start()

    def _run(self, adapter_id: int, sources: Sequence[WeightsSource], extent: Extent, keeps: bool) -> bool:
        """Whether the thread is to go on: not if another has taken its place."""
        read = _Read(time.monotonic())
        with self._reads_lock:
            self._reads[adapter_id] = read
        outcome: _core.AdapterLayout | LoraserveError | None
        try:
            outcome = self._restore(sources[0].receipt.hash, extent)
            if outcome is None:
                outcome = self._load_first_readable(sources, extent, keeps)
        except LoraserveError as error:
            outcome = error
        except BaseException as error:  # a panic of the core too: every load is answered
            outcome = AdapterUnavailableError(f"adapter {sources[0].name!r} can't be loaded: {error}")
        with self._reads_lock:
            del self._reads[adapter_id]
        self._results.put(LoadResult(adapter_id, extent, outcome))
        self._on_done()
        return not read.is_replaced

    def _restore(self, content_hash: str, extent: Extent) -> _core.AdapterLayout | None:
        packed = self._tier.find(content_hash)
        if packed is None:
            return None
        assert self._backend is not None, "invariant: a load is over before the loader is shut down"
        self._backend.restore(extent, packed, self._pace)
        return packed.layout

    def _load_first_readable(
        self, sources: Sequence[WeightsSource], extent: Extent, keeps: bool
    ) -> _core.AdapterLayout:
        for source in sources[:-1]:
            try:
                return self._load(source, extent, keeps)
            except LoraserveError:
                continue  # the same content was registered from another path as well
        return self._load(sources[-1], extent, keeps)

    def _load(self, source: WeightsSource, extent: Extent, keeps: bool) -> _core.AdapterLayout:
        stamp = self._compared.get(source.path)
        is_same = source.stored is not None or (stamp is not None and stamp == _stamp(source.path))
        assert self._backend is not None, "invariant: a load is over before the loader is shut down"
        base_linears = self._backend.base_linears

        def load(address: int, nbytes: int) -> _core.AdapterLayout:
            layout = _core.load_adapter(
                source.path,
                self._check.shape,
                self._check.dtype,
                self._check.max_lora_rank,
                source.receipt.hash,
                address,
                nbytes,
                self._pace,
                base_linears,
                None if source.stored is None else source.stored.files,
                self._check.base_weights,
                source.receipt if is_same else None,
                self._check.adapter_dtype,
            )
            if keeps:
                self._tier.keep(source.receipt.hash, address, layout, self._pace)
            return layout

        return self._backend.fill(extent, load, source.receipt.nbytes)


_Jobs: TypeAlias = "queue.SimpleQueue[Callable[[], bool] | None]"  # None ends a thread


def _work(jobs: _Jobs) -> None:
    while (job := jobs.get()) is not None:
        if not job():
            return
        del job  # it holds the loader


def _end_threads(jobs: _Jobs) -> None:
    for _ in range(NUM_LOADER_THREADS):
        jobs.put(None)


def _stamp(path: str) -> Stamp:
    """When the files of an adapter's weights were last changed, and their sizes; None if none are there."""
    try:
        names = sorted(name for name in os.listdir(path) if name.endswith(".safetensors"))
        stats = [os.stat(os.path.join(path, name)) for name in names]
    except (OSError, ValueError):
        return None
    return tuple((stat.st_mtime_ns, stat.st_size) for stat in stats) or None


def rest_s(num_open: int) -> float:
    """Seconds a load rests between bursts beside a running model, with `num_open` loads under way."""
    return REST_S / max(num_open, 1) if num_open <= MAX_OPEN_LOADS_AT_REST else 0.0
