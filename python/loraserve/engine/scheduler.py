"""The scheduler of an engine: the limits that configuration, model and device set it."""

from __future__ import annotations

from loraserve import _core
from loraserve.config import BLOCK_SIZE, EngineConfig
from loraserve.engine.model_runner import ModelRunner

MAX_DRAFT_TOKENS = 8  # guessed of a sequence in a step


def scheduler_of(config: EngineConfig, runner: ModelRunner) -> _core.Scheduler:
    """A scheduler of `runner`'s pool."""
    max_prefill_tokens, min_prefill_tokens = config.prefill_tokens(runner.backend.name)
    return _core.Scheduler(
        num_pages=runner.num_pages,
        page_nbytes=runner.page_nbytes,
        block_size=BLOCK_SIZE,
        max_num_seqs=config.max_num_seqs,
        max_batched_tokens=config.max_batched_tokens,
        max_prefill_tokens=max_prefill_tokens,
        min_prefill_tokens=min_prefill_tokens,
        max_running_adapter_nbytes=config.max_batch_adapter_nbytes,
        max_model_len=runner.model.max_model_len,
        prefix_caching=config.prefix_caching,
        max_num_slots=runner.max_num_slots,
        max_draft_tokens=MAX_DRAFT_TOKENS if config.speculate == "ngram" else 0,
    )
