"""The engine: schedule, run, sample, commit, in a loop on one thread."""

from __future__ import annotations

import itertools
import logging
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

from loraserve import _core, errors
from loraserve.adapters.check import AdapterCheck
from loraserve.adapters.extent_loader import ExtentLoader
from loraserve.adapters.load_book import LoadBook
from loraserve.adapters.manifest import AdapterManifest, read_manifest
from loraserve.adapters.registry import AdapterRegistry, RegisteredAdapter, check_adapter_name
from loraserve.adapters.startup import StartingAdapters
from loraserve.backends import Backend
from loraserve.chat_template import ChatTemplate
from loraserve.config import EngineConfig
from loraserve.deadlines import Deadlines
from loraserve.engine_lock import EngineLock
from loraserve.engine_thread import EngineThread
from loraserve.errors import (
    AdapterFormatError,
    DeadlineError,
    EngineStoppedError,
    InvalidRequestError,
    LoraserveError,
    NotFiniteError,
)
from loraserve.grammar_compiler import GrammarCompiler, GrammarMatcher
from loraserve.info import AdapterInfo, AdapterStats, EngineInfo, EngineStats
from loraserve.request import SHARED_CACHE, CacheScope, FinishReason, TokenLogprob
from loraserve.request_clock import RequestClock
from loraserve.runner import BLOCK_SIZE, ModelRunner
from loraserve.sampler import SamplingState, sample
from loraserve.sampling_params import SamplingParams
from loraserve.usage import UsageBook, UsageCounter
from loraserve.waiting_limit import WaitingLimit

logger = logging.getLogger(__name__)

CoreEvent = tuple[
    int, int | None, Literal["stop", "length", "abort", "error"] | None, tuple[str, str] | None, int
]


class EngineOutput(NamedTuple):
    """One event of one sequence: a token, its end, or both; `error` only with the end."""

    request_id: int
    token_id: int | None
    logprob: TokenLogprob | None
    finish_reason: FinishReason | None
    error: LoraserveError | None
    num_cached_tokens: int
    clock: RequestClock

    @property
    def is_last(self) -> bool:
        return self.finish_reason is not None or self.error is not None


@dataclass(frozen=True)
class _Sequence:
    """What the engine knows of an unfinished sequence besides the scheduler's books."""

    sampling: SamplingState
    clock: RequestClock
    deadline_s: float | None
    num_prompt_tokens: int
    usage: list[UsageCounter]
    adapter_names: tuple[str, ...]


class Engine:
    """Runs sequences on one model; every method may be called from any thread.

    One that nobody holds any more goes away with its threads and its memory. In a forked child every
    method raises EngineStoppedError.

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
        self._on_outputs = on_outputs
        self._on_failure = on_failure
        self._lock = EngineLock()  # guards the scheduler, the registry and the sequences
        self._thread = EngineThread(self)
        self._wake = self._thread.wake
        with self._thread.building():
            self._build(backend)

    def _build(self, backend: Backend | None) -> None:
        config = self.config
        self.runner = ModelRunner(config, backend)
        self._idle = threading.Condition(cast(threading.Lock, self._lock))
        self.refusal: str | None = None  # why no new requests are taken
        self._is_stopping = False
        self._sequences: dict[int, _Sequence] = {}
        self._endings: dict[int, FinishReason | LoraserveError] = {}  # why the engine ended them itself
        self._deadlines = Deadlines()
        self._waiting_limit = WaitingLimit(config.max_waiting)
        self._registry = AdapterRegistry()
        self._loads = LoadBook()
        self._usage = UsageBook()
        self._turns = itertools.count()
        self._loader = ExtentLoader(
            self.runner.backend,
            AdapterCheck(
                self.runner.base_shape,
                config.dtype,
                config.max_lora_rank,
                self.runner.model.path,
                self.runner.model.tokenizer,
            ),
            self._wake.set,
        )
        self._uses_every_core = self.runner.backend.computes_on_cpu and (
            config.num_threads is None or config.num_threads >= (os.cpu_count() or 1)
        )
        self.max_model_len = self.runner.model.max_model_len
        self._vocab_size = self.runner.model.config.vocab_size
        eos = self.runner.model.tokenizer.eos_token_ids
        self.grammars = GrammarCompiler(self.runner.model.tokenizer, self._vocab_size)
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
        starting = StartingAdapters(config.failed_adapters)
        starting.register(
            config.adapters.items(),
            lambda name, path: self.load_adapter(name, path, config.manifests.get(name)),
        )
        starting.check(config.on_adapter_error)
        self.adapter_failures = tuple(starting.failures)
        self.runner.backend.start()
        self._thread.start(on_end=self._loader.shutdown)

    def submit(
        self,
        prompt: Sequence[int],
        adapters: Sequence[tuple[str, float]],
        params: SamplingParams,
        seed: int | None,
        *,
        arrived_at: float | None = None,
        deadline_s: float | None = None,
        cache_scope: CacheScope = SHARED_CACHE,
        needs_adapter: bool = False,
        matcher: GrammarMatcher | None = None,
    ) -> int:
        """Queue one sequence and return its request id.

        Args:
            prompt: token ids.
            adapters: (name, weight) pairs.
            params: how to sample.
            seed: of this sequence; None draws one.
            arrived_at: when the request came, on `time.monotonic`; None is now.
            deadline_s: seconds from arrival after which it ends with DeadlineError.
            cache_scope: whose cached prompts it finds and adds to.
            needs_adapter: refuse it if the weights leave only the base model.
            matcher: of the grammar it follows, for this sequence alone.

        Raises:
            InvalidRequestError, PermissionDeniedError, AdapterNotFoundError, AdapterUnavailableError,
            CapacityError, OverloadedError, DeadlineError, EngineStoppedError: the request was refused;
                nothing was queued.
        """
        self._check_token_ids(prompt)
        self._check_token_ids(params.stop_token_ids)
        self._check_token_ids(params.logit_bias)
        arrived_at = time.monotonic() if arrived_at is None else arrived_at
        if deadline_s is not None and time.monotonic() >= arrived_at + deadline_s:
            raise _deadline_error(deadline_s)
        eos = () if params.ignore_eos else self._eos_token_ids
        stop_token_ids = [*eos, *params.stop_token_ids]
        with self._lock:
            self._check_accepting()
            self._waiting_limit.check(self._scheduler)
            request_id = self._scheduler.submit(
                list(prompt),
                list(adapters),
                params.max_tokens,
                params.min_tokens,
                stop_token_ids,
                cache_scope,
                needs_adapter,
            )
            sampling = SamplingState(
                params=params,
                seed=secrets.randbits(64) if seed is None else seed,
                prompt_token_ids=prompt,
                banned_until_min_tokens=stop_token_ids,
                matcher=matcher,
            )
            clock = RequestClock(arrived_at, self._scheduler.has_its_adapters(request_id))
            usage = self._usage.counters(name for name, _ in adapters)
            for counter in usage:
                counter.num_requests += 1
            names = tuple(name for name, _ in adapters)
            self._sequences[request_id] = _Sequence(sampling, clock, deadline_s, len(prompt), usage, names)
            if deadline_s is not None:
                self._deadlines.add(arrived_at + deadline_s, request_id)
        self._wake.set()
        return request_id

    def check_process(self) -> None:
        """Raises EngineStoppedError in a forked child, where nothing may be waited for."""
        self._lock.check_process()

    def abort(self, request_id: int) -> None:
        """End a sequence now; its last event says "abort". Unknown or finished ids are left alone."""
        with self._lock:
            self._scheduler.abort(request_id)
        self._wake.set()

    def load_adapter(
        self,
        name: str,
        path: str | os.PathLike[str],
        manifest: AdapterManifest | None = None,
        *,
        replace: bool = False,
        turn: int | None = None,
    ) -> _core.Receipt:
        """Read, check and register an adapter; its bytes enter the pool on first use.

        Args:
            name: what requests call it.
            path: a PEFT directory.
            manifest: goes over the directory's own `loraserve.json`.
            replace: a name of other content passes over at once, with its pin and its usage; requests
                accepted before finish on the weights they were accepted with. Where this raises, all stays as
                it was.
            turn: of `take_turn`; of two replacements of a name the later turn lasts. None takes one now.

        Raises:
            InvalidRequestError: the name is not allowed, or taken by other content and `replace` is not set.
            AdapterFormatError, AdapterUnavailableError, CapacityError: the adapter can't be served.
        """
        turn = self.take_turn() if turn is None else turn
        check_adapter_name(name, self.config.base_names)
        path = os.path.abspath(path)  # it is read again at every load, wherever the process is then
        receipt = self._loader.check(path)
        manifest = (manifest or AdapterManifest()).merged_over(read_manifest(path))
        chat_template = self._checked_chat_template(name, manifest)
        with self._lock:
            self._check_accepting()
            old = self._registry.get(name)
            if replace and old is not None and old.turn > turn:
                return receipt  # asked for earlier, and replaced already
            adapter_id = self._scheduler.register_adapter(name, receipt.hash, receipt.nbytes, replace=replace)
            self._registry.add(
                RegisteredAdapter(name, path, receipt, adapter_id, manifest, chat_template, turn)
            )
            if old is not None and old.adapter_id != adapter_id:
                self._forget_replaced(old.adapter_id, name)
        self._wake.set()  # a pinned one is loaded soon
        for what in receipt.not_used:
            logger.warning("beside adapter %s, not used: %s", name, what)
        return receipt

    def take_turn(self) -> int:
        """The place of a `load_adapter` to come, in the order of these calls."""
        return next(self._turns)

    def unload_adapter(self, name: str) -> None:
        """Refuse new requests for `name`; queued and running ones finish, then its memory is free.

        Raises:
            AdapterNotFoundError: no adapter has this name.
        """
        with self._lock:
            self._scheduler.unregister_adapter(name)
            self._registry.remove(name)
            self._usage.forget(name)
            self._forget_unused()

    def warm_adapter(self, name: str) -> Future[float]:
        """Load an adapter into the pool ahead of requests; done, in seconds, once it is there.

        The load starts as soon as no request is short of memory for it.

        Raises:
            AdapterNotFoundError, AdapterUnavailableError, CapacityError, EngineStoppedError: it can't be
                loaded; the future raises them as well.
        """
        with self._lock:
            self._check_accepting()
            if self._scheduler.warm_adapter(name):
                done: Future[float] = Future()
                done.set_result(0.0)
                return done
            future = self._loads.wait_for(self._registered(name).adapter_id)
        self._wake.set()
        return future

    def pin_adapter(self, name: str, is_pinned: bool = True) -> None:
        """Keep an adapter in the pool from now on, or let it be evicted again; a pinned one is loaded soon.

        Raises:
            AdapterNotFoundError, AdapterUnavailableError, EngineStoppedError: it can't be used.
            CapacityError: pinned adapters would take over half of the pool, or an accepted request would
                not fit beside them.
        """
        with self._lock:
            self._check_accepting()
            self._scheduler.pin_adapter(name, is_pinned)
        self._wake.set()

    def find_adapter(self, name: str) -> RegisteredAdapter | None:
        with self._lock:
            return self._registry.get(name)

    def adapters(self) -> list[AdapterInfo]:
        """All registered adapters, in order of registration."""
        with self._lock:
            return [
                AdapterInfo(
                    name=adapter.name,
                    path=adapter.path,
                    description=adapter.manifest.description,
                    receipt=adapter.receipt,
                    **values,
                )
                for adapter, values in self._adapter_stats()
            ]

    def stats(self) -> EngineStats:
        """Load and counters now; takes microseconds, and some more per adapter."""
        with self._lock:
            core = self._scheduler.stats()
            return EngineStats(
                num_running=core["num_running"],
                num_waiting=core["num_waiting"],
                num_waiting_for_adapters=self._scheduler.num_waiting_for_adapters(),
                page_nbytes=self.runner.page_nbytes,
                num_pages=core["num_pages"],
                num_free_pages=core["free_pages"],
                num_kv_pages=core["kv_pages"],
                num_cached_pages=core["cached_pages"],
                num_adapter_pages=core["adapter_pages"],
                num_pinned_pages=core["pinned_pages"],
                num_adapters=len(self._registry),
                num_resident_adapters=core["num_resident_adapters"],
                num_adapter_loads=core["num_loads"],
                num_adapter_evictions=core["num_evictions"],
                num_preemptions=core["num_preemptions"],
                num_prefix_hit_tokens=core["num_prefix_hit_tokens"],
                base=self._usage.base.snapshot(),
                adapters={adapter.name: AdapterStats(**values) for adapter, values in self._adapter_stats()},
            )

    def info(self) -> EngineInfo:
        with self._lock:
            stats = self._scheduler.stats()
            return EngineInfo.build(
                self.config, self.max_model_len, self.runner, stats, num_adapters=len(self._registry)
            )

    def shutdown(self, deadline_s: float) -> None:
        """Refuse new requests, let running ones finish for `deadline_s` seconds, abort the rest, stop.

        Frees the weights and the pool. In a forked child there is nothing to stop.
        """
        if self._lock.is_foreign:
            return
        with self._lock:
            self.refusal = self.refusal or "the engine is shutting down and takes no new requests"
            self._idle.wait_for(lambda: not (self._sequences and self._thread.is_alive), timeout=deadline_s)
            for request_id in self._sequences:
                self._scheduler.abort(request_id)
            self._is_stopping = True
        self._wake.set()
        self._thread.join()
        self.runner.release()
        self._refuse_waiters(self.refusal)

    @property
    def is_stopped(self) -> bool:
        """The thread has nothing more to do."""
        return self._is_stopping and not self._sequences

    def begin_exit(self) -> None:
        """The interpreter exits: requests still open stay unanswered, and later ones are refused."""
        self._lock.begin_exit(self._thread.ident)
        self.refusal = "the interpreter exits, the engine takes no new requests"

    def step(self) -> bool:
        """Schedule, run, sample, commit, deliver, once; False if there was nothing to do."""
        try:
            return self._step()
        except BaseException as error:
            logger.exception("the engine failed")
            self._fail(f"the engine failed: {error}")
            return True

    def idle_s(self) -> float | None:
        """Seconds until a deadline; None if there is none."""
        return self._deadlines.next_in_s()

    def _step(self) -> bool:
        self._finish_loads()
        with self._lock:
            self._end_expired()
            step = self._scheduler.schedule()
            for request_id in step.admitted:
                self._admit(self._sequences[request_id])
        for move in step.moves:
            self.runner.move(*move)
        if step.loads:
            self.runner.backend.order_loads()
        for load in step.loads:
            self._start_load(*load)
        is_contended = self._uses_every_core and step.batch is not None
        self._loader.set_contended(is_contended)
        self.runner.backend.set_contended(is_contended)
        logprobs = self._execute(step) if step.batch is not None else {}
        num_delivered = self._deliver(logprobs)
        return step.batch is not None or num_delivered > 0

    def _execute(self, step: _core.Step) -> dict[int, TokenLogprob]:
        batch = step.batch
        assert batch is not None
        logits = self.runner.execute(batch)
        request_ids = batch.sample_request_ids.tolist()
        sequences = [self._sequences[request_id] for request_id in request_ids]
        states = [sequence.sampling for sequence in sequences]
        sampled = sample(logits, states, self.runner.ops.argmax)
        is_finite = sampled.is_finite.tolist()
        for sequence, token_id, is_usable in zip(
            sequences, sampled.token_ids.tolist(), is_finite, strict=True
        ):
            if not is_usable:
                continue
            sequence.sampling.append(token_id)
            sequence.clock.note_token()
            for counter in sequence.usage:
                counter.num_completion_tokens += 1
        with self._lock:
            for request_id, sequence, is_usable in zip(request_ids, sequences, is_finite, strict=True):
                if not is_usable:  # ended before the commit, which then takes no token for it
                    self._end(request_id, self._not_finite_error(sequence))
            self._scheduler.commit(step, sampled.token_ids)
            for request_id, sequence, is_usable in zip(request_ids, sequences, is_finite, strict=True):
                if sequence.sampling.matcher is not None and is_usable:
                    self._end_with_grammar(request_id, sequence.sampling.matcher)
        return {id_: lp for id_, lp in zip(request_ids, sampled.logprobs, strict=True) if lp is not None}

    def _admit(self, sequence: _Sequence) -> None:
        sequence.clock.admit()
        for counter in sequence.usage:
            counter.num_prompt_tokens += sequence.num_prompt_tokens

    def _end_expired(self) -> None:
        self._deadlines.forget_ended(self._sequences)
        for request_id in self._deadlines.take_expired():
            if request_id in self._sequences:
                deadline_s = self._sequences[request_id].deadline_s
                assert deadline_s is not None
                self._end(request_id, _deadline_error(deadline_s))

    def _not_finite_error(self, sequence: _Sequence) -> NotFiniteError:
        dtype = self.config.dtype
        remedy = "use other weights" if dtype == "float32" else "use other weights, or dtype float32"
        adapters = ", ".join(repr(name) for name in sequence.adapter_names)
        where = f"with adapter {adapters}" if adapters else "of the base model"
        error = NotFiniteError(
            f"the logits {where} are not finite at token {sequence.sampling.num_output_tokens} of the "
            f"answer: weights or their products overflow {dtype}; {remedy}"
        )
        logger.warning("a request failed: %s", error)
        return error

    def _end_with_grammar(self, request_id: int, matcher: GrammarMatcher) -> None:
        error = matcher.error
        if error is not None:
            self._end(request_id, error)
        elif matcher.is_ended:
            self._end(request_id, "stop")

    def _end(self, request_id: int, ending: FinishReason | LoraserveError) -> None:
        """End a sequence now, for a reason of the engine's own; its last event says which."""
        if self._scheduler.abort(request_id):
            self._endings[request_id] = ending

    def _start_load(self, adapter_id: int, slot: int, first_page: int, num_pages: int) -> None:
        with self._lock:
            sources = self._registry.sources(adapter_id)
            self._loads.start(adapter_id)
        self._loader.start(adapter_id, sources, self.runner.extent(slot, first_page, num_pages))

    def _finish_loads(self) -> None:
        for result in self._loader.take_results():
            if isinstance(result.outcome, LoraserveError):
                with self._lock:
                    names = ", ".join(self._registry.names(result.adapter_id))
                    logger.warning("adapter %s was not read into the pool: %s", names, result.outcome)
                    self._scheduler.adapter_load_failed(
                        result.adapter_id, type(result.outcome).__name__, str(result.outcome)
                    )
                    self._loads.finish(result.adapter_id, result.outcome)
            else:
                self.runner.bind(result.extent, result.outcome)
                with self._lock:
                    self._scheduler.adapter_loaded(result.adapter_id)
                    self._loads.finish(result.adapter_id, None)

    def _deliver(self, logprobs: dict[int, TokenLogprob]) -> int:
        with self._lock:
            events = self._scheduler.drain_outputs()
            outputs = [self._output(event, logprobs) for event in events]
            ended = [output for output in outputs if output.is_last]
            for output in ended:
                sequence = self._sequences.pop(output.request_id)
                for counter in sequence.usage:
                    counter.num_cached_tokens += output.num_cached_tokens
            self._waiting_limit.add_ends(len(ended))
            if not self._sequences:
                self._idle.notify_all()
        if outputs:
            self._on_outputs(outputs)
        return len(outputs)

    def _output(self, event: CoreEvent, logprobs: dict[int, TokenLogprob]) -> EngineOutput:
        request_id, token_id, finish, failure, num_cached_tokens = event
        error: LoraserveError | None = None
        finish_reason: FinishReason | None = None
        if failure is not None:
            error = getattr(errors, failure[0])(failure[1])
        elif finish == "abort":
            ending = self._endings.pop(request_id, "abort")
            if isinstance(ending, LoraserveError):
                error = ending
            else:
                finish_reason = ending
        elif finish != "error":
            finish_reason = finish
        logprob = None if token_id is None else logprobs.get(request_id)
        clock = self._sequences[request_id].clock
        return EngineOutput(request_id, token_id, logprob, finish_reason, error, num_cached_tokens, clock)

    def _fail(self, message: str) -> None:
        with self._lock:
            self.refusal = message
            self._is_stopping = True
            sequences = self._sequences
            self._sequences = {}
            self._idle.notify_all()
        self._refuse_waiters(message)
        error = EngineStoppedError(message)
        outputs = [
            EngineOutput(request_id, None, None, None, error, 0, sequence.clock)
            for request_id, sequence in sequences.items()
        ]
        self._on_outputs(outputs)
        self._on_failure()

    def _refuse_waiters(self, message: str) -> None:
        with self._lock:
            self._loads.fail_all(EngineStoppedError(message))

    def _adapter_stats(self) -> Iterator[tuple[RegisteredAdapter, dict[str, Any]]]:
        """The fields of `AdapterStats` for every name, in order of registration."""
        entries = {entry["name"]: entry for entry in self._scheduler.adapters()}
        for adapter in self._registry:
            entry, loads = entries[adapter.name], self._loads.counts(adapter.adapter_id)
            yield (
                adapter,
                {
                    "state": entry["state"],
                    "num_running": entry["num_running"],
                    "num_waiting": entry["num_waiting"],
                    "is_pinned": entry["is_pinned"],
                    "nbytes": entry["nbytes"],
                    "num_loads": entry["num_loads"],
                    "num_load_failures": loads.num_failures,
                    "num_evictions": entry["num_evictions"],
                    "load_s": loads.load_s,
                    "last_load_s": loads.last_load_s,
                    "usage": self._usage.of(adapter.name).snapshot(),
                },
            )

    def _forget_replaced(self, adapter_id: int, name: str) -> None:
        """Who waits for the old content of `name` to be loaded waits for the new."""
        if self._loads.is_awaited(adapter_id) and adapter_id not in self._registry.adapter_ids():
            try:
                is_resident = self._scheduler.warm_adapter(name)
                self._loads.pass_on(adapter_id, self._registered(name).adapter_id, is_resident)
            except LoraserveError as error:
                self._loads.answer(adapter_id, error)
        self._forget_unused()

    def _forget_unused(self) -> None:
        adapter_ids = set(self._scheduler.adapter_ids())
        self._registry.forget_sources_except(adapter_ids)
        self._loads.forget_except(adapter_ids, self._registry.adapter_ids())

    def _registered(self, name: str) -> RegisteredAdapter:
        adapter = self._registry.get(name)
        assert adapter is not None, "invariant: the scheduler and the registry know the same names"
        return adapter

    def _checked_chat_template(self, name: str, manifest: AdapterManifest) -> ChatTemplate | None:
        """The manifest's template; what a manifest asks for is tried out here, not on a request."""
        tokenizer = self.runner.model.tokenizer
        source = manifest.chat_template
        own = None if source is None else tokenizer.build_chat_template(source)
        try:
            self._check_token_ids(manifest.sampling.get("stop_token_ids", ()))
            self._check_token_ids(manifest.sampling.get("logit_bias", ()))
            if own is not None:
                own.check()
            if manifest.system_prompt is not None:
                messages = manifest.with_system_prompt([{"role": "user", "content": "hello"}])
                tokenizer.apply_chat_template(messages, template=own)
            if manifest.grammar is not None:
                self.grammars.compile(manifest.grammar)
        except InvalidRequestError as error:
            raise AdapterFormatError(f"manifest of adapter {name!r}: {error}") from error
        return own

    def _check_accepting(self) -> None:
        if self.refusal is not None:
            raise EngineStoppedError(self.refusal)

    def _check_token_ids(self, token_ids: Iterable[int]) -> None:
        for token_id in token_ids:
            if not 0 <= token_id < self._vocab_size:
                raise InvalidRequestError(
                    f"token id {token_id} is out of range, the vocabulary has {self._vocab_size} tokens"
                )


def _deadline_error(deadline_s: float) -> DeadlineError:
    return DeadlineError(
        f"the request was not finished in {deadline_s:g} s, give it more time or fewer tokens"
    )
