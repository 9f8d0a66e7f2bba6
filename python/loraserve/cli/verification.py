"""An adapter's answers here, and what transformers and PEFT compute for the same tokens."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

from loraserve.errors import InvalidRequestError, ModelError
from loraserve.llm import LLM
from loraserve.sampling_params import SamplingParams
from loraserve.validation.files import read_regular_file

if TYPE_CHECKING:
    from loraserve.config import EngineConfig

NUM_LOGPROBS: Final = 20
MAX_ERROR: Final = 1e-3  # of log-probabilities in float32, whose sums have other orders here and there
NO_CHANGE: Final = 1e-6

MAX_PROMPTS: Final = 1000
MAX_PROMPTS_NBYTES: Final = 2**24

NAME: Final = "verified"


@dataclass(frozen=True)
class Answer:
    """A greedy answer: for each of its tokens the likeliest ids with their log-probabilities, best first."""

    prompt: list[int]
    token_ids: list[int]
    likeliest: list[list[tuple[int, float]]]


@dataclass(frozen=True)
class Position:
    """One token of an answer beside PEFT's; `error` is the largest difference of the likeliest's values.

    `behind` is how far PEFT's log-probability of the token lies behind that of the one it would choose, and
    `change` how far the adapter moves log-probabilities from the base model's.
    """

    token_id: int
    peft_token_id: int
    error: float
    behind: float
    change: float

    @property
    def differs(self) -> bool:
        """Whether PEFT would choose another token, and not for a tie."""
        return self.behind > 2 * MAX_ERROR


def serve(config: EngineConfig, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[Answer]:
    """Answer all prompts with the configuration's one adapter, in one batch.

    Raises:
        LoraserveError: the model or the adapter can't be loaded, or a prompt is too long.
    """
    params = SamplingParams(max_tokens=num_tokens, temperature=0.0, logprobs=NUM_LOGPROBS)
    with LLM(
        config.model,
        config.adapters,
        dtype=config.dtype,
        quantization=config.quantization,
        device=config.device,
        max_lora_rank=config.max_lora_rank,
    ) as llm:
        outputs = llm.generate([list(prompt) for prompt in prompts], params, NAME)
    answers = []
    for prompt, output in zip(prompts, outputs, strict=True):
        completion = output.completions[0]
        likeliest = [logprob.top for logprob in completion.logprobs or ()]
        answers.append(Answer(list(prompt), list(completion.token_ids), likeliest))
    return answers


class PeftReference:
    """The model in transformers with the adapter in PEFT, in float32 on the CPU.

    Args:
        model: a Hugging Face directory or a .gguf file.
        adapter: a PEFT directory.
        added_tokens: beyond the model's, which it has embeddings for.

    Raises:
        ModelError: transformers or PEFT is not installed, or can't load one of the two.
    """

    def __init__(self, model: Path, adapter: str, added_tokens: Sequence[int] = ()) -> None:
        try:
            from peft import PeftModel  # noqa: PLC0415 (an extra)
            from transformers import AutoModelForCausalLM  # noqa: PLC0415 (an extra)
        except ImportError as error:
            raise ModelError(
                f"verifying needs transformers and PEFT: pip install 'loraserve[verify]' ({error})"
            ) from error
        where = {"gguf_file": model.name} if model.is_file() else {}
        directory = model.parent if model.is_file() else model
        try:
            with _quiet(), warnings.catch_warnings(record=True) as warned:
                warnings.simplefilter("always")
                base = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **where)
                if added_tokens:
                    base.resize_token_embeddings(max(added_tokens) + 1, mean_resizing=False)
                self._model: Any = PeftModel.from_pretrained(base, adapter).eval()
        except Exception as error:  # whatever the two libraries raise
            raise ModelError(f"transformers and PEFT can't load this: {error!s:.500}") from error
        messages = [str(warning.message) for warning in warned]
        missing = next((text for text in messages if "missing adapter keys" in text), None)
        if missing is not None:
            raise ModelError(
                "PEFT does not find all of this adapter under the names it has in the file, so there is "
                "nothing to compare with; `loraserve adapters check` says what is applied. PEFT: "
                f"{missing:.300}"
            )

    @torch.inference_mode()
    def compare(self, answer: Answer) -> list[Position]:
        """Each token of the answer beside what PEFT computes after the prompt and the tokens before it."""
        own = self._log_probs(answer)
        with self._model.disable_adapter():
            base = self._log_probs(answer)
        positions = []
        for index, (token_id, likeliest) in enumerate(zip(answer.token_ids, answer.likeliest, strict=True)):
            row = own[index]
            best = int(row.argmax())
            positions.append(
                Position(
                    token_id=token_id,
                    peft_token_id=best,
                    error=max(abs(value - float(row[other])) for other, value in likeliest),
                    behind=float(row[best] - row[token_id]),
                    change=float((row - base[index]).abs().max()),
                )
            )
        return positions

    def _log_probs(self, answer: Answer) -> torch.Tensor:
        """Before each token of the answer: [tokens, vocabulary]."""
        ids = torch.tensor([[*answer.prompt, *answer.token_ids]])
        offsets = self._offsets(answer)
        logits = self._model(input_ids=ids, **offsets).logits[0, len(answer.prompt) - 1 : -1]
        return torch.log_softmax(logits.float(), -1)

    def _offsets(self, answer: Answer) -> dict[str, list[int | None]]:
        """What PEFT's own `generate` passes on: where an invocation in the prompt begins, from the end."""
        invocation = getattr(self._model.active_peft_config, "alora_invocation_tokens", None)
        if not invocation:
            return {}
        prompt, size = answer.prompt, len(invocation)
        starts = [i for i in range(len(prompt) - size + 1) if prompt[i : i + size] == list(invocation)]
        from_end = len(prompt) + len(answer.token_ids) - starts[-1] if starts else None
        return {"alora_offsets": [from_end]}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The libraries' warnings are about training."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def read_prompts(path: Path) -> list[str]:
    """A prompt per line that is not blank. Raises InvalidRequestError."""
    try:
        lines = read_regular_file(path, MAX_PROMPTS_NBYTES).decode().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequestError(f"prompts can't be read: {error}") from error
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise InvalidRequestError(f"{path} has no prompts: write one per line")
    if len(prompts) > MAX_PROMPTS:
        raise InvalidRequestError(f"{path} has {len(prompts)} prompts, the limit is {MAX_PROMPTS}")
    return prompts
