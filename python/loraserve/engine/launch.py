"""`StepLauncher`: what was planned goes to the device: moves, loads, the batch, the choice of tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from loraserve import _core
from loraserve.engine.adapters import EngineAdapters
from loraserve.engine.model_runner import ModelRunner
from loraserve.engine.prompt_rows import RowReaders
from loraserve.engine.running_step import RunningStep
from loraserve.engine.step_log import StepLog
from loraserve.sampling.sampler import FailedSamples, PendingSamples, Sampler

if TYPE_CHECKING:
    from collections.abc import Sequence


class StepLauncher:
    """Begins steps; on the engine's thread.

    Args:
        runner: the model.
        adapters: whose loads are planned with a step.
        sampler: of all sequences.
        readers: of those that want rows of their prompts.
        uses_every_core: whether a step leaves no core to what goes on beside it.
    """

    def __init__(
        self,
        runner: ModelRunner,
        adapters: EngineAdapters,
        sampler: Sampler,
        readers: RowReaders,
        *,
        uses_every_core: bool,
    ) -> None:
        self._runner = runner
        self._adapters = adapters
        self._sampler = sampler
        self._readers = readers
        self._uses_every_core = uses_every_core
        self._log: StepLog | None = None

    def log_steps(self) -> StepLog:
        """Note what each step from now on computes, and how long it takes."""
        self._log = StepLog(self._runner.page_nbytes)
        return self._log

    def launch(self, planned: _core.SchedulerOutput) -> RunningStep | None:
        """Begin what was planned; None if nothing of it is to be committed.

        Raises DeviceError: the device can't compute any more, whether or not anything was planned.
        """
        self._runner.backend.check()
        for move in planned.moves:
            self._runner.move(*move)
        if planned.loads:
            self._runner.backend.order_loads()
        for load in planned.loads:
            self._adapters.pool_loads.start(*load)
        if self._log is not None:
            self._log.launched(planned, self._adapters.loader.num_open)
        batch = planned.batch
        is_contended = self._uses_every_core and batch is not None
        self._adapters.loader.set_contended(is_contended)
        self._runner.backend.set_contended(is_contended)
        if batch is None:
            return None
        request_ids, guesses = batch.sample_request_ids, batch.draft_token_ids
        samples: PendingSamples
        try:
            samples = self._run(batch, request_ids, guesses)
            samples = samples if self._log is None else self._log.timed(samples)
        except torch.OutOfMemoryError as error:
            samples = FailedSamples(error.with_traceback(None))  # which would keep the step's tensors
            if self._log is not None:
                self._log.failed()
        return RunningStep(planned, request_ids, guesses, samples)

    def _run(self, batch: _core.Batch, request_ids: Sequence[int], guesses: Sequence[int]) -> PendingSamples:
        if not batch.num_hidden:
            return self._sampler.sample(self._runner.execute(batch), request_ids, guesses)
        rows = self._runner.execute_with_rows(batch)
        samples = self._sampler.sample(rows.logits, request_ids, guesses)
        self._readers.read(batch.hidden_spans, rows)
        return samples
