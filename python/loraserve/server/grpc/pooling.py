"""Embeddings, classes and scores over gRPC: messages to requests, run as generating ones are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import replace

from loraserve.engine.scoring import Scoring
from loraserve.errors import InvalidRequestError, LoraserveError
from loraserve.pooling.params import Pooled, PoolingParams
from loraserve.request import GenerateRequest
from loraserve.server.access.request_limits import RequestLimits
from loraserve.server.request_run import CallOrigin, RequestRunner, cut_error
from loraserve.v1 import loraserve_pb2 as pb
from loraserve.wire.pooling import (
    PooledMessage,
    classes_to_wire,
    embeddings_to_wire,
    kind_from_wire,
    pooling_from_wire,
    prompts_from_wire,
    request_without_prompt,
)

MAX_VALUES = 2**21  # of one answer: a message has 16 MiB at most


class PooledAnswers:
    """Answers what is pooled.

    Args:
        runner: runs the requests.
    """

    def __init__(self, runner: RequestRunner) -> None:
        self._runner = runner

    async def embed(self, message: pb.EmbedRequest, origin: CallOrigin) -> pb.EmbedResponse:
        """Vectors of the prompts. Raises LoraserveError."""
        with self._understood(message, origin):
            requests = _requests(message, pooling_from_wire(message))
        pooled, num_tokens = await self._run(requests, origin)
        return embeddings_to_wire(pooled, num_tokens)

    async def classify(self, message: pb.ClassifyRequest, origin: CallOrigin) -> pb.ClassifyResponse:
        """Labels of the prompts. Raises LoraserveError."""
        with self._understood(message, origin):
            requests = _requests(message, PoolingParams(task="classify"))
        pooled, num_tokens = await self._run(requests, origin)
        return classes_to_wire(pooled, num_tokens)

    async def score(self, message: pb.ScoreRequest, origin: CallOrigin) -> pb.ScoreResponse:
        """Scores of the pairs. Raises LoraserveError."""
        with self._understood(message, origin):
            request = request_without_prompt(message, PoolingParams(kind=kind_from_wire(message.pooling)))
            RequestLimits.check_num_inputs(max(len(message.queries), len(message.documents)))
            head = await self._runner.head_of(request.adapter, origin)
            scoring = Scoring.of(list(message.queries), list(message.documents), request, head)
        pooled, num_tokens = await self._run(scoring.requests, origin)
        return pb.ScoreResponse(scores=scoring.scores(pooled), prompt_tokens=num_tokens)

    async def _run(self, requests: Sequence[GenerateRequest], origin: CallOrigin) -> tuple[list[Pooled], int]:
        """What each was pooled to, and the tokens of all; a cancelled call aborts them."""
        found: dict[int, Pooled] = {}
        async with self._runner.run(requests, origin) as run, aclosing(run.deltas()) as deltas:  # type: ignore[type-var]
            async for prompt, delta in deltas:
                if delta.pooled is None:
                    raise cut_error()
                found[prompt] = delta.pooled
            num_values = sum(one.values.size for one in found.values())
            if num_values > MAX_VALUES:
                raise InvalidRequestError(
                    f"the answer would have {num_values} numbers, the limit is {MAX_VALUES}: send fewer "
                    "prompts, or ask for fewer dimensions"
                )
            return [found[prompt] for prompt in range(len(requests))], run.num_prompt_tokens

    @contextmanager
    def _understood(self, message: PooledMessage, origin: CallOrigin) -> Iterator[None]:
        """Counts a message that can't be understood as refused."""
        try:
            yield
        except LoraserveError:
            self._runner.refused(message.adapter or dict(message.adapters) or None, origin)
            raise


def _requests(message: pb.EmbedRequest | pb.ClassifyRequest, params: PoolingParams) -> list[GenerateRequest]:
    request = request_without_prompt(message, params)
    RequestLimits.check_num_inputs(len(message.prompts))
    return [replace(request, prompt=prompt) for prompt in prompts_from_wire(message.prompts)]
