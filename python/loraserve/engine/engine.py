"""The engine: schedule, run, sample, commit, in a loop on one thread."""

from __future__ import annotations

import copy
import logging
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import compress
from types import MappingProxyType
from typing import cast

import numpy as np
import torch

from loraserve import _core
from loraserve.adapters.registry import RegisteredAdapter
from loraserve.backends import Backend
from loraserve.config import EngineConfig
from loraserve.engine.adapters import EngineAdapters
from loraserve.engine.launch import StepLauncher
from loraserve.engine.lock import EngineLock
from loraserve.engine.model_runner import ModelRunner
from loraserve.engine.prompt_rows import RowReader, RowReaders
from loraserve.engine.queue import Deadlines, Intake, WaitingLimit, deadline_error
from loraserve.engine.running_step import RunningStep, StepLogprobs
from loraserve.engine.scheduler import scheduler_of
from loraserve.engine.sequence import EngineOutputs, SequenceEnd, SequenceRecord, SequenceState
from loraserve.engine.shadow import COPIES_FLOW
from loraserve.engine.stats import EngineInfo, EngineStats
from loraserve.engine.thread import EngineThread
from loraserve.errors import EngineStoppedError
from loraserve.request import ONE_FLOW, SHARED_CACHE, CacheScope, Flow
from loraserve.sampling.grammar_compiler import GrammarCompiler
from loraserve.sampling.matcher import Matcher
from loraserve.sampling.prediction import Prediction
from loraserve.sampling.sampler import FailedSamples, Sampler
from loraserve.sampling_params import SamplingParams

logger = logging.getLogger(__name__)


class Engine:
    """Runs sequences on one model; every method may be called from any thread.

    One that nobody holds any more goes away with its threads and its memory. In a forked child every
    method raises EngineStoppedError.

    Args:
        config: what to load and how much memory it may use.
        on_outputs: called on the engine's thread with what each step gave, in order.
        on_failure: called on the engine's thread if it ends by an error, after everyone was told.
        backend: the device; the one `config.device` means unless given.
    """

    def __init__(
        self,
        config: EngineConfig,
        on_outputs: Callable[[EngineOutputs], None],
        on_failure: Callable[[], None] = lambda: None,
        *,
        backend: Backend | None = None,
    ) -> None:
        self.config = config
        self._on_outputs = on_outputs
        self._on_failure = on_failure
        self._lock = EngineLock()  # guards the scheduler, the adapters and the sequences
        self._thread = EngineThread(self)
        self._wake = self._thread.wake
        with self._thread.building():
            self._build(backend)

    def _build(self, backend: Backend | None) -> None:
        config = self.config
        self.runner = ModelRunner(config, backend)
        self._idle = threading.Condition(cast(threading.Lock, self._lock))
        self._intake = Intake()
        self._is_stopping = False
        self._running: RunningStep | None = None  # launched behind the last one that was committed
        self._step_began: float | None = None  # on time.monotonic, of the first that is not committed
        self._sequences: dict[int, SequenceState] = {}
        self._deadlines = Deadlines()
        self._waiting_limit = WaitingLimit(config.max_waiting)
        self.max_model_len = self.runner.model.max_model_len
        self._sampler = Sampler(self.runner.sample)
        self._readers = RowReaders()
        self.grammars = GrammarCompiler(self.runner.model.tokenizer, self.runner.vocab_size)
        self._scheduler = scheduler_of(config, self.runner)
        self.num_waiting = self._scheduler.num_waiting  # accepted and not running; takes microseconds
        self.num_waiting_for_adapters = self._scheduler.num_waiting_for_adapters
        self.adapters = EngineAdapters(
            config, self.runner, self._scheduler, self.grammars, self._lock, self._intake, self._wake
        )
        self.launcher = StepLauncher(
            self.runner,
            self.adapters,
            self._sampler,
            self._readers,
            uses_every_core=self.runner.backend.computes_on_cpu
            and (config.num_threads is None or config.num_threads >= _core.usable_cores()),
        )
        self.adapters.load_configured()
        self.runner.backend.start(self._wake.set)
        self._thread.start(on_end=self.adapters.loader.shutdown)

    def submit(
        self,
        prompt: Sequence[int],
        adapters: Sequence[tuple[str, float]],
        params: SamplingParams,
        seed: int | None,
        *,
        record: SequenceRecord | None = None,
        deadline_s: float | None = None,
        cache_scope: CacheScope = SHARED_CACHE,
        flow: Flow = ONE_FLOW,
        needs_adapter: bool = False,
        matcher: Matcher | None = None,
        reader: RowReader | None = None,
        eos_token_ids: Sequence[int] | None = None,
        prediction: Prediction | None = None,
        registered: Mapping[str, RegisteredAdapter | None] = MappingProxyType({}),
    ) -> int:
        """Queue one sequence and return its request id.

        Args:
            prompt: token ids.
            adapters: (name, weight) pairs.
            params: how to sample.
            seed: of this sequence; None draws one.
            record: what becomes of it is noted there; None makes one of a request that comes now.
            deadline_s: seconds from arrival after which it ends with DeadlineError.
            cache_scope: whose cached prompts it finds and adds to.
            flow: whose share of the engine it is served from.
            needs_adapter: refuse it if the weights leave only the base model.
            matcher, reader, prediction: of its grammar, its prompt's rows, its answer; for it alone.
            eos_token_ids: what ends it by itself, unless `params` ignores that; None is as the model's.
            registered: what the adapters' names meant when the prompt was made.

        Raises:
            AdapterReplacedError: they mean something else now.
            InvalidRequestError, PermissionDeniedError, AdapterNotFoundError, AdapterUnavailableError,
            CapacityError, OverloadedError, DeadlineError, EngineStoppedError: nothing was queued.
        """
        self.config.check_speculate(params.speculate)
        chosen_ids = (*params.stop_token_ids, *params.logit_bias)
        has_own_ids = self.runner.are_own(prompt) and self.runner.are_own(chosen_ids)
        if has_own_ids:  # else what its adapter adds is looked up with the adapter
            self.runner.check_token_ids(prompt)
            self.runner.check_token_ids(chosen_ids)
        generates = reader is None or not reader.ends_with_prompt
        record = record or SequenceRecord(time.monotonic())
        if deadline_s is not None and time.monotonic() >= record.arrived_at + deadline_s:
            raise deadline_error(deadline_s)
        ends = self.runner.eos_token_ids if eos_token_ids is None else eos_token_ids
        with self._lock:
            self._intake.check()
            self._waiting_limit.check(self._scheduler)
            self.adapters.of_requests.check_registered(registered)
            self.adapters.of_requests.check_combination(adapters)
            added = self.adapters.of_requests.added_tokens(adapters)
            if not has_own_ids:
                self.runner.check_token_ids(prompt, added.known)
                self.runner.check_token_ids(chosen_ids, added.producible)
            ends = self.runner.producible(ends, added.producible)
            stop_token_ids = [*(() if params.ignore_eos else ends), *params.stop_token_ids]
            request_id = self._scheduler.submit(
                list(prompt),
                to_apply := list(self.adapters.of_requests.to_apply(adapters)),
                params.max_tokens if generates else 0,
                params.min_tokens if generates else 0,
                stop_token_ids,
                cache_scope,
                needs_adapter and len(to_apply) == len(adapters),
                params.speculate is False,
                None if reader is None else reader.rows,
                (flow.name, flow.weight),
            )
            if reader is not None:
                self._readers.add(request_id, reader)
            seed = secrets.randbits(64) if seed is None else seed
            if generates:
                # A token that only prompts may have is no column of its logits.
                seen = self.runner.producible(prompt, added.producible) if added.known else prompt
                self._sampler.add(request_id, params, seed, seen, stop_token_ids, matcher, prediction)
            record.adapter_was_resident = self._scheduler.has_its_adapters(request_id)
            names = tuple(name for name, _ in adapters)
            usage = [] if flow is COPIES_FLOW else self.adapters.count_request(names)
            self._sequences[request_id] = SequenceState(record, deadline_s, len(prompt), usage, names)
            if deadline_s is not None:
                self._deadlines.add(record.arrived_at + deadline_s, request_id)
        self._wake.set()
        return request_id

    def check_process(self) -> None:
        """Raises EngineStoppedError in a forked child, where nothing may be waited for."""
        self._lock.check_process()

    def abort(self, request_id: int) -> None:
        """End a sequence now; its last event says "abort". Unknown or finished ids are left alone."""
        with self._lock:
            self._scheduler.finish(request_id, "abort")
        self._wake.set()

    def stats(self) -> EngineStats:
        """Load and counters now; takes microseconds, and some more per adapter."""
        with self._lock:
            return EngineStats.build(
                self._scheduler.stats(),
                self._scheduler.flows(),
                self.runner,
                num_adapters=len(self.adapters),
                host_tier=self.adapters.host_tier,
                base=self.adapters.usage.base,
                adapters=self.adapters.by_name(),
            )

    def info(self) -> EngineInfo:
        """Settings, and the load of this moment."""
        with self._lock:
            return EngineInfo.build(
                self._scheduler.stats(),
                self.runner,
                self.config,
                max_model_len=self.max_model_len,
                num_adapters=len(self.adapters),
                host_tier=self.adapters.host_tier,
            )

    @property
    def refusal(self) -> str | None:
        """Why no new requests are taken; None while they are."""
        return self._intake.refusal

    def refuse_new(self) -> str:
        """Take no requests any more, and say why; what stood in their way before stays the reason."""
        with self._lock:
            reason = self._intake.refusal or "the engine is shutting down and takes no new requests"
            self._intake.refusal = reason
            return reason

    @property
    def step_s(self) -> float:
        """Seconds that the step under way has taken so far; 0 where there is none."""
        began = self._step_began
        return 0.0 if began is None else time.monotonic() - began

    def shutdown(self, deadline_s: float) -> None:
        """Refuse new requests, let running ones finish for `deadline_s` seconds, abort the rest, stop.

        Frees the weights and the pool. In a forked child there is nothing to stop.
        """
        if self._lock.is_foreign:
            return
        refusal = self.refuse_new()
        with self._lock:
            self._idle.wait_for(lambda: not (self._sequences and self._thread.is_alive), timeout=deadline_s)
            for request_id in self._sequences:
                self._scheduler.finish(request_id, "abort")
            self._is_stopping = True
        self._wake.set()
        self._thread.join()
        self.runner.release()
        self.adapters.pool_loads.refuse_waiters(refusal)

    @property
    def is_stopped(self) -> bool:
        """The thread has nothing more to do."""
        return self._is_stopping and not self._sequences and self._running is None

    def begin_exit(self) -> None:
        """The interpreter exits: requests still open stay unanswered, and later ones are refused."""
        self._lock.begin_exit(self._thread.ident)
        self._intake.refusal = "the interpreter exits, the engine takes no new requests"

    def step(self) -> bool:
        """Schedule, run, sample, commit, deliver, once; False if there was nothing to do."""
        try:
            return self._step()
        except BaseException as error:
            logger.exception("the engine failed")
            self._fail(f"the engine failed: {error}")
            return True

    def idle_s(self) -> float | None:
        """Seconds until a request's deadline, or until a load is late; None if there is neither."""
        times = self._deadlines.next_in_s(), self.adapters.pool_loads.next_late_in_s()
        return min((seconds for seconds in times if seconds is not None), default=None)

    def _step(self) -> bool:
        self.adapters.pool_loads.finish()
        running, self._running = self._running, None
        if running is None:
            running = self._launch(self._plan())
        if running is not None and self._may_run_ahead(running):
            self._running = self._launch(self._plan_ahead())
        logprobs = StepLogprobs({}) if running is None else self._commit(running)
        return self._deliver(logprobs) or running is not None

    def _plan(self) -> _core.SchedulerOutput:
        with self._lock:
            self._end_expired()
            self.adapters.pool_loads.announce_late()
            for request_id, draft in self._sampler.drafts(self._scheduler.draftable(), self._scheduler.draft):
                self._scheduler.give_draft(request_id, draft)
            return self._admit(self._scheduler.schedule())

    def _plan_ahead(self) -> _core.SchedulerOutput | None:
        """The step behind the one that runs; None if that must be committed first."""
        with self._lock:
            self._end_expired()
            self.adapters.pool_loads.announce_late()
            planned = self._scheduler.schedule_ahead()
            return None if planned is None else self._admit(planned)

    def _admit(self, planned: _core.SchedulerOutput) -> _core.SchedulerOutput:
        for request_id, num_cached_tokens in planned.admitted:
            self._sequences[request_id].admit(num_cached_tokens)
        return planned

    def _may_run_ahead(self, running: RunningStep) -> bool:
        """Whether the device can go on with what it has just sampled, unseen."""
        return (
            self.runner.backend.runs_ahead
            and not isinstance(running.samples, FailedSamples)
            and not self._sampler.depend_on_last_token(running.request_ids)
        )

    def _launch(self, planned: _core.SchedulerOutput | None) -> RunningStep | None:
        """Begin what was planned; None if nothing of it is to be committed."""
        if planned is None:
            return None
        if planned.batch is not None and self._step_began is None:
            self._step_began = time.monotonic()
        return self.launcher.launch(planned)

    def _commit(self, running: RunningStep) -> StepLogprobs:
        """Wait for the step's tokens and take them; the logprobs that were asked for, by request."""
        try:
            sampled = running.samples.result()
        except torch.OutOfMemoryError as error:
            self._end_step(running.planned, error)
            return StepLogprobs({})
        finally:
            self._step_began = None if self._running is None else time.monotonic()
        request_ids, token_ids = running.request_ids, sampled.token_ids
        with self._lock:
            for row in np.flatnonzero(~sampled.is_finite).tolist():
                if running.is_behind_guess(row):
                    token_ids[row] = -1  # behind a guess: the next step finds it so, if the guess comes true
                else:
                    self._end_not_finite(request_ids[row])  # before the commit, which takes no token for it
            for request_id in running.with_rows and self._readers.not_finite(running.with_rows):
                self._end_not_finite(request_id)
            are_taken = self._scheduler.commit(running.planned, token_ids)
        if running.guesses:
            running.note_guesses(self._sequences, token_ids, are_taken)
        if not all(are_taken):
            request_ids, token_ids = list(compress(request_ids, are_taken)), token_ids[are_taken]
        now, sequences = time.monotonic(), self._sequences
        for request_id in request_ids:
            sequences[request_id].note_token(now)
        endings = self._sampler.append(request_ids, token_ids.tolist())
        if endings:
            with self._lock:
                for request_id, ending in endings:
                    self._scheduler.finish(request_id, ending)
        return StepLogprobs(sampled.logprobs)

    def _end_step(self, planned: _core.SchedulerOutput, shortage: torch.OutOfMemoryError) -> None:
        """End the requests of a step that was not computed; nothing of it is kept."""
        batch = planned.batch
        assert batch is not None
        error = self.runner.out_of_memory(batch, shortage)
        logger.error("a step failed, its %d requests end: %s", batch.num_seqs, error)
        with self._lock:
            for request_id in batch.request_ids:
                self._scheduler.finish(request_id, error)
            self._scheduler.commit(planned, np.zeros(batch.num_samples, dtype=np.int32))

    def _end_expired(self) -> None:
        self._deadlines.forget_ended(self._sequences)
        for request_id in self._deadlines.take_expired():
            if request_id in self._sequences:
                deadline_s = self._sequences[request_id].deadline_s
                assert deadline_s is not None
                self._scheduler.finish(request_id, deadline_error(deadline_s))

    def _end_not_finite(self, request_id: int) -> None:
        if request_id not in self._sequences:  # it ended while the step ran
            return
        num_output_tokens = self._sampler.num_output_tokens(request_id)
        error = self._sequences[request_id].not_finite_error(self.config.dtype, num_output_tokens)
        if self._scheduler.finish(request_id, error):
            logger.warning("a request failed: %s", error)

    def _deliver(self, logprobs: StepLogprobs) -> bool:
        """Hand out what has come since the last time; False if that was nothing."""
        with self._lock:
            drained = self._scheduler.drain_outputs()
            of_tokens = logprobs.take_all(drained.request_ids)
            ends = [self._end(end, logprobs) for end in drained.ends]
            self._waiting_limit.add_ends(len(ends))
            if not self._sequences:
                self._idle.notify_all()
        outputs = EngineOutputs(drained.request_ids, drained.token_ids, of_tokens, ends)
        if not (outputs.request_ids or ends):
            return False
        self._on_outputs(outputs)
        return True

    def _end(self, end: _core.RequestEnd, logprobs: StepLogprobs) -> SequenceEnd:
        request_id, token_id, error = end.request_id, end.token_id, end.error
        self._sampler.remove(request_id)
        del self._sequences[request_id]
        self._readers.remove(request_id)
        return SequenceEnd(
            request_id,
            token_id,
            None if token_id is None else logprobs.take(request_id),
            end.finish_reason,
            None if error is None else copy.copy(error),  # one failed load ends several, each raises its own
        )

    def _fail(self, message: str) -> None:
        with self._lock:
            self._intake.refusal = message
            self._is_stopping = True
            self._running = None
            sequences = self._sequences
            self._sequences = {}
            self._idle.notify_all()
        self.adapters.pool_loads.refuse_waiters(message)
        error = EngineStoppedError(message)
        ends = [SequenceEnd(request_id, None, None, None, error) for request_id in sequences]
        self._on_outputs(EngineOutputs((), (), (), ends))
        self._on_failure()
