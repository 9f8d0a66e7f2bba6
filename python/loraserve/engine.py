"""The engine: schedule, run, sample, commit, in a loop on one thread."""

from __future__ import annotations

import logging
import os
import secrets
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from loraserve import _core, errors
from loraserve.adapters.extent_loader import ExtentLoader
from loraserve.adapters.registry import AdapterRegistry, RegisteredAdapter, check_adapter_name
from loraserve.backends import Backend
from loraserve.config import EngineConfig
from loraserve.errors import EngineStoppedError, InvalidRequestError, LoraserveError
from loraserve.info import AdapterInfo, EngineInfo
from loraserve.request import FinishReason, TokenLogprob
from loraserve.runner import BLOCK_SIZE, ModelRunner
from loraserve.sampler import SamplingState, sample
from loraserve.sampling_params import SamplingParams

logger = logging.getLogger(__name__)

CoreEvent = tuple[
    int, int | None, Literal["stop", "length", "abort", "error"] | None, tuple[str, str] | None, int
]


@dataclass(frozen=True)
class EngineOutput:
    """One event of one sequence: a token, its end, or both; `error` only with the end."""

    request_id: int
    token_id: int | None
    logprob: TokenLogprob | None
    finish_reason: FinishReason | None
    error: LoraserveError | None
    num_cached_tokens: int

    @property
    def is_last(self) -> bool:
        return self.finish_reason is not None or self.error is not None


class Engine:
    """Runs sequences on one model; every method may be called from any thread.

    Args:
        config: what to load and how much memory it may use.
        on_outputs: called on the engine's thread with all events of a step, in order.
        on_failure: called on the engine's thread if it ends by an error, after everyone was told.
        backend: the device; the one `config.device` means unless given.
    """

    def __init__(
        self,
        config: EngineConfig,
        on_outputs: Callable[[list[EngineOutput]], None],
        on_failure: Callable[[], None] = lambda: None,
        *,
        backend: Backend | None = None,
    ) -> None:
        self.config = config
        self.runner = ModelRunner(config, backend)
        self._on_outputs = on_outputs
        self._on_failure = on_failure
        self._lock = threading.Lock()  # guards the scheduler, the registry and the states
        self._wake = threading.Event()
        self._idle = threading.Condition(self._lock)
        self.refusal: str | None = None  # why no new requests are taken
        self._is_stopping = False
        self._states: dict[int, SamplingState] = {}
        self._registry = AdapterRegistry()
        self._loader = ExtentLoader(
            self.runner.backend,
            self.runner.base_shape,
            config.dtype,
            config.max_lora_rank,
            self._wake.set,
        )
        self._uses_every_core = self.runner.backend.computes_on_cpu and (
            config.num_threads is None or config.num_threads >= (os.cpu_count() or 1)
        )
        self.max_model_len = self.runner.model.max_model_len
        self._vocab_size = self.runner.model.config.vocab_size
        eos = self.runner.model.tokenizer.eos_token_ids
        self._eos_token_ids = [token_id for token_id in eos if token_id < self._vocab_size]
        self._scheduler = _core.Scheduler(
            num_pages=self.runner.num_pages,
            page_nbytes=self.runner.page_nbytes,
            block_size=BLOCK_SIZE,
            max_num_seqs=config.max_num_seqs,
            max_batched_tokens=config.max_batched_tokens,
            max_model_len=self.max_model_len,
            prefix_caching=config.prefix_caching,
            max_num_slots=self.runner.max_num_slots,
        )
        for name, path in config.adapters.items():
            self.load_adapter(name, path)
        self._thread = threading.Thread(target=self._run, name="loraserve-engine", daemon=True)
        self._thread.start()

    def submit(
        self,
        prompt: Sequence[int],
        adapters: Sequence[tuple[str, float]],
        params: SamplingParams,
        seed: int | None,
    ) -> int:
        """Queue one sequence and return its request id.

        Raises:
            InvalidRequestError, AdapterNotFoundError, AdapterUnavailableError, CapacityError,
            EngineStoppedError: the request was refused; nothing was queued.
        """
        self._check_token_ids(prompt)
        self._check_token_ids(params.stop_token_ids)
        eos = () if params.ignore_eos else self._eos_token_ids
        stop_token_ids = [*eos, *params.stop_token_ids]
        with self._lock:
            self._check_accepting()
            request_id = self._scheduler.submit(
                list(prompt), list(adapters), params.max_tokens, params.min_tokens, stop_token_ids
            )
            self._states[request_id] = SamplingState(
                params=params,
                seed=secrets.randbits(64) if seed is None else seed,
                prompt_token_ids=prompt,
                banned_until_min_tokens=stop_token_ids,
            )
        self._wake.set()
        return request_id

    def abort(self, request_id: int) -> None:
        """End a sequence now; its last event says "abort". Unknown or finished ids are left alone."""
        with self._lock:
            self._scheduler.abort(request_id)
        self._wake.set()

    def load_adapter(self, name: str, path: str | os.PathLike[str]) -> _core.Receipt:
        """Read, check and register an adapter; its bytes enter the pool on first use.

        Raises:
            InvalidRequestError: the name is not allowed, or taken by other content.
            AdapterFormatError, AdapterUnavailableError, CapacityError: the adapter can't be served.
        """
        check_adapter_name(name)
        path = os.path.abspath(path)  # it is read again at every load, wherever the process is then
        receipt = self._loader.check(path)
        with self._lock:
            self._check_accepting()
            adapter_id = self._scheduler.register_adapter(name, receipt.hash, receipt.nbytes)
            self._registry.add(RegisteredAdapter(name, path, receipt, adapter_id))
        return receipt

    def unload_adapter(self, name: str) -> None:
        """Refuse new requests for `name`; queued and running ones finish, then its memory is free.

        Raises:
            AdapterNotFoundError: no adapter has this name.
        """
        with self._lock:
            self._scheduler.unregister_adapter(name)
            self._registry.remove(name)
            self._registry.forget_sources_except(set(self._scheduler.adapter_ids()))

    def adapters(self) -> list[AdapterInfo]:
        """All registered adapters, in order of registration."""
        with self._lock:
            states = {entry["name"]: entry for entry in self._scheduler.adapters()}
            return [
                AdapterInfo(
                    name=adapter.name,
                    path=adapter.path,
                    state=states[adapter.name]["state"],
                    num_running=states[adapter.name]["num_running"],
                    receipt=adapter.receipt,
                )
                for adapter in self._registry
            ]

    def info(self) -> EngineInfo:
        with self._lock:
            stats = self._scheduler.stats()
            return EngineInfo.build(
                self.config, self.max_model_len, self.runner, stats, num_adapters=len(self._registry)
            )

    def shutdown(self, deadline_s: float) -> None:
        """Refuse new requests, let running ones finish for `deadline_s` seconds, abort the rest, stop."""
        with self._lock:
            self.refusal = self.refusal or "the engine is shutting down and takes no new requests"
            self._idle.wait_for(lambda: not self._states, timeout=deadline_s)
            for request_id in self._states:
                self._scheduler.abort(request_id)
            self._is_stopping = True
        self._wake.set()
        self._thread.join()
        self._loader.shutdown()

    def stop_soon(self) -> None:
        """Ask the thread to end, without waiting or locking: safe from a finalizer on any thread."""
        self._is_stopping = True
        self._wake.set()

    def _run(self) -> None:
        _use_one_torch_thread()
        try:
            while not self._is_stopping or self._states:
                self._step()
        except BaseException as error:
            logger.exception("the engine failed")
            self._fail(f"the engine failed: {error}")

    def _step(self) -> None:
        self._wake.clear()
        self._finish_loads()
        with self._lock:
            step = self._scheduler.schedule()
        for move in step.moves:
            self.runner.move(*move)
        if step.loads:
            self.runner.backend.order_loads()
        for load in step.loads:
            self._start_load(*load)
        self._loader.set_contended(self._uses_every_core and step.batch is not None)
        logprobs = self._execute(step) if step.batch is not None else {}
        num_delivered = self._deliver(logprobs)
        if step.batch is None and num_delivered == 0:
            self._wake.wait()

    def _execute(self, step: _core.Step) -> dict[int, TokenLogprob]:
        batch = step.batch
        assert batch is not None
        logits = self.runner.execute(batch)
        request_ids = batch.sample_request_ids.tolist()
        states = [self._states[request_id] for request_id in request_ids]
        sampled = sample(logits, states)
        for state, token_id in zip(states, sampled.token_ids.tolist(), strict=True):
            state.append(token_id)
        with self._lock:
            self._scheduler.commit(step, sampled.token_ids)
        return {id_: lp for id_, lp in zip(request_ids, sampled.logprobs, strict=True) if lp is not None}

    def _start_load(self, adapter_id: int, slot: int, first_page: int, num_pages: int) -> None:
        with self._lock:
            sources = self._registry.sources(adapter_id)
        self._loader.start(adapter_id, sources, self.runner.extent(slot, first_page, num_pages))

    def _finish_loads(self) -> None:
        for result in self._loader.take_results():
            if isinstance(result.outcome, LoraserveError):
                logger.warning("adapter load failed: %s", result.outcome)
                with self._lock:
                    self._scheduler.adapter_load_failed(
                        result.adapter_id, type(result.outcome).__name__, str(result.outcome)
                    )
            else:
                self.runner.bind(result.extent, result.outcome)
                with self._lock:
                    self._scheduler.adapter_loaded(result.adapter_id)

    def _deliver(self, logprobs: dict[int, TokenLogprob]) -> int:
        with self._lock:
            events = self._scheduler.drain_outputs()
            outputs = [_engine_output(event, logprobs) for event in events]
            for output in outputs:
                if output.is_last:
                    del self._states[output.request_id]
            if not self._states:
                self._idle.notify_all()
        if outputs:
            self._on_outputs(outputs)
        return len(outputs)

    def _fail(self, message: str) -> None:
        with self._lock:
            self.refusal = message
            request_ids = list(self._states)
            self._states.clear()
            self._idle.notify_all()
        error = EngineStoppedError(message)
        self._on_outputs([EngineOutput(id_, None, None, None, error, 0) for id_ in request_ids])
        self._on_failure()

    def _check_accepting(self) -> None:
        if self.refusal is not None:
            raise EngineStoppedError(self.refusal)

    def _check_token_ids(self, token_ids: Sequence[int]) -> None:
        for token_id in token_ids:
            if not 0 <= token_id < self._vocab_size:
                raise InvalidRequestError(
                    f"token id {token_id} is out of range, the vocabulary has {self._vocab_size} tokens"
                )


def _use_one_torch_thread() -> None:
    """Keep torch's ops of this thread on it: OpenMP workers would spin on the cores the kernels use.

    torch also makes the number the default of threads to come, so another thread sets that back.
    """
    default = torch.get_num_threads()
    torch.set_num_threads(1)
    restore = threading.Thread(target=torch.set_num_threads, args=(default,))
    restore.start()
    restore.join()


def _engine_output(event: CoreEvent, logprobs: dict[int, TokenLogprob]) -> EngineOutput:
    request_id, token_id, finish, error, num_cached_tokens = event
    logprob = logprobs.get(request_id) if token_id is not None else None
    exception = None if error is None else getattr(errors, error[0])(error[1])
    finish_reason = None if finish == "error" else finish
    return EngineOutput(request_id, token_id, logprob, finish_reason, exception, num_cached_tokens)
