"""`RequestLimits`: what the launcher allows one request, over HTTP and gRPC alike."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from loraserve.engine.prepared import check_deadline
from loraserve.engine.queue import deadline_error
from loraserve.errors import InvalidRequestError, PromptTooLongError
from loraserve.request import GenerateRequest

if TYPE_CHECKING:
    from loraserve.async_engine import AsyncEngine
    from loraserve.engine.prepared import PreparedRequest


MAX_INPUTS = 2048  # of a call that embeds, classifies or scores, as OpenAI has it


@dataclass(frozen=True, kw_only=True)
class RequestLimits:
    """The most that one request may ask for.

    Args:
        request_timeout_s: deadline of every request that has no shorter one; None leaves it to the request.
        max_best_of: most sequences that TGI's `best_of` and OpenAI's `best_of` may compare.
        max_stop_sequences: stop strings of one request.
        max_top_n_tokens: alternatives per token.
        max_client_batch_size: prompts of one request.
        max_input_tokens: of a prompt; None is the context length less one.
        adapter_wait_s: how long it waits for an adapter that is fetched.
        trust_request_chat_template: whether a request may bring a chat template of its own.
    """

    request_timeout_s: float | None = None
    max_best_of: int = 8
    max_stop_sequences: int = 16
    max_top_n_tokens: int = 20
    max_client_batch_size: int = 128
    max_input_tokens: int | None = None
    adapter_wait_s: float = 60.0
    trust_request_chat_template: bool = False

    def check(self, request: GenerateRequest) -> None:
        """Raises InvalidRequestError: the request asks for more."""
        num_strings = len(request.params.stop_strings)
        if num_strings > self.max_stop_sequences:
            raise InvalidRequestError(
                f"stop has {num_strings} strings, limit is {self.max_stop_sequences}: send fewer"
            )
        self.check_alternatives("logprobs", request.params.logprobs or 0)
        self.check_alternatives("prompt_logprobs", request.params.prompt_logprobs or 0)
        if request.chat.chat_template is not None and not self.trust_request_chat_template:
            raise InvalidRequestError(
                "chat_template is given, but this server takes no templates from requests: leave it out, "
                "put one into the adapter's loraserve.json, or start the server with "
                "--trust-request-chat-template"
            )

    def check_num_prompts(self, num_prompts: int) -> None:
        """Raises InvalidRequestError: one call has more prompts than `max_client_batch_size`."""
        limit = self.max_client_batch_size
        if num_prompts > limit:
            raise InvalidRequestError(
                f"the request has {num_prompts} prompts, limit is {limit}: send several"
            )

    @staticmethod
    def check_num_inputs(num_inputs: int) -> None:
        """Raises InvalidRequestError: a call that pools has no inputs, or too many."""
        if num_inputs == 0:
            raise InvalidRequestError("input is an empty list, give at least one")
        if num_inputs > MAX_INPUTS:
            raise InvalidRequestError(
                f"the request has {num_inputs} inputs, limit is {MAX_INPUTS}: send several"
            )

    def check_best_of(self, best_of: int) -> None:
        """Raises InvalidRequestError: it is not from 1 to `max_best_of`."""
        if not 1 <= best_of <= self.max_best_of:
            raise InvalidRequestError(f"best_of is {best_of}, it must be from 1 to {self.max_best_of}")

    def check_alternatives(self, name: str, num_tokens: int) -> None:
        """Raises InvalidRequestError: it is over `max_top_n_tokens`; `name` is what the caller calls it."""
        if not 0 <= num_tokens <= self.max_top_n_tokens:
            raise InvalidRequestError(f"{name} is {num_tokens}, it must be from 0 to {self.max_top_n_tokens}")

    async def prepare(
        self, engine: AsyncEngine, requests: Sequence[GenerateRequest]
    ) -> list[PreparedRequest]:
        """All `requests`, ready to be submitted: none is queued before every limit is checked.

        Raises:
            InvalidRequestError, AdapterNotFoundError, OverloadedError: a request was refused.
            DeadlineError: they were not ready in time.
        """
        for request in requests:
            self.check(request)
            check_deadline(request.deadline_s)
        bounded = [self._within_timeout(request) for request in requests]
        limit_s = min((one.deadline_s for one in bounded if one.deadline_s is not None), default=None)
        preparing = _prepare_all(engine, bounded)
        try:
            prepared = await asyncio.wait_for(preparing, limit_s)
        except asyncio.TimeoutError:
            assert limit_s is not None, "there is no other limit"
            raise deadline_error(limit_s) from None
        for one in prepared:
            num_tokens, limit = len(one.prompt_token_ids), self.max_input_tokens
            if limit is not None and num_tokens > limit:
                raise PromptTooLongError(
                    f"prompt has {num_tokens} tokens, limit is {limit}: send a shorter one"
                )
        return prepared

    def _within_timeout(self, request: GenerateRequest) -> GenerateRequest:
        given = [s for s in (request.deadline_s, self.request_timeout_s) if s is not None]
        return replace(request, deadline_s=min(given, default=None))


async def _prepare_all(engine: AsyncEngine, requests: Sequence[GenerateRequest]) -> list[PreparedRequest]:
    return [await engine.prepare(request) for request in requests]
