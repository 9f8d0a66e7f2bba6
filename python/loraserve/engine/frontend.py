"""Requests to token ids, token ids to text: what every frontend shares."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from itertools import repeat
from typing import Generic, Protocol, TypeVar

from loraserve._core import __version__
from loraserve.adapters.text import common_text, without_weightless
from loraserve.engine.engine import Engine
from loraserve.engine.prepared import ALL_PARAMETERS, PreparedRequest, prepare, resolve_adapters
from loraserve.engine.sequence import EngineOutputs, SequenceEnd, SequenceRecord
from loraserve.errors import AdapterNotFoundError
from loraserve.pooling.head import ClassificationHead
from loraserve.pooling.pooler import Pooler
from loraserve.request import (
    AdapterSpec,
    Delta,
    FinishReason,
    GenerateRequest,
    TokenLogprob,
    Usage,
)
from loraserve.sampling.grammar import Grammar
from loraserve.sampling.matcher import Matcher
from loraserve.sampling.prompt_scores import PromptScores
from loraserve.text.detokenizer import IncrementalDetokenizer, StopStrings
from loraserve.text.tokenizer import Tokenizer
from loraserve.tools.sink import AnswerPiece

MAX_PREPARED_AGAIN = 3  # of a request, whose adapters are replaced meanwhile

Owner = TypeVar("Owner")


class Recording(Protocol):
    """Of a request that is to be copied: what its first answer comes to."""

    @property
    def seed(self) -> int:
        """Of its first answer, which the copy is drawn with as well."""
        ...

    def note(self, delta: Delta) -> None:
        """What a step added to the first answer."""
        ...


class Copier(Protocol):
    """Who copies requests."""

    def begin(self, prepared: PreparedRequest) -> Recording | None:
        """To be told the answer of a request that was accepted, if it is to be copied."""
        ...


class ActiveSequence:
    """One of the n answers to a request: turns what the engine gives it into deltas of text."""

    def __init__(
        self,
        index: int,
        prepared: PreparedRequest,
        record: SequenceRecord,
        reader: Pooler | PromptScores | None = None,
        recording: Recording | None = None,
    ) -> None:
        tokenizer = prepared.tokenizer
        self.recording = recording
        self._index = index
        self._num_prompt_tokens = len(prepared.prompt_token_ids)
        self._num_tokens = 0
        self._num_reasoning_tokens = 0
        self._end_ids = {*tokenizer.eos_token_ids, *prepared.params.stop_token_ids}
        self._detokenizer = IncrementalDetokenizer(tokenizer, prepared.prompt_token_ids)
        self._stop_strings = StopStrings(prepared.params.stop_strings)
        self._record = record
        self._pooler = reader if isinstance(reader, Pooler) else None
        self._scores = reader if isinstance(reader, PromptScores) else None  # until they are told
        form = prepared.form
        self._parser = None if form is None else form.parser()
        self._shown: Mapping[int, str] = {} if form is None else form.shown

    def push(self, token_id: int, logprob: TokenLogprob | None) -> Delta:
        """What a token adds behind which the engine goes on; the last delta if it ends the answer."""
        return self._with_scores(self._push(token_id, logprob))

    def _with_scores(self, delta: Delta) -> Delta:
        if self._scores is not None:
            delta.prompt_logprobs = self._scores.logprobs
            self._scores = None
        return delta

    def _push(self, token_id: int, logprob: TokenLogprob | None) -> Delta:
        self._num_tokens += 1
        text = self._text(token_id)
        logprobs = None if logprob is None else [logprob]
        if self._stop_strings.stops:
            text = self._stop_strings.push(text)
            if self._stop_strings.is_matched:
                self._note_reasoning(1)
                return self._last(text, [token_id], logprobs, "stop")
        if self._parser is None:
            return Delta(self._index, text, [token_id], logprobs, None, None)
        was_reasoning = self._parser.is_reasoning
        piece = self._parser.push(text)
        self._num_reasoning_tokens += was_reasoning or self._parser.is_reasoning
        if self._parser.is_over:
            return self._last("", [token_id], logprobs, "stop", piece)
        return _delta(self._index, piece, [token_id], logprobs)

    def end(self, end: SequenceEnd) -> Delta:
        """The last delta.

        Raises:
            LoraserveError: the sequence failed.
        """
        if end.error is not None:
            raise end.error
        if self._pooler is not None:
            delta = self._last("", [], None, "abort" if end.finish_reason == "abort" else "stop")
            delta.pooled = self._pooler.pooled
            return delta
        token_ids = [] if end.token_id is None else [end.token_id]
        self._num_tokens += len(token_ids)
        self._note_reasoning(len(token_ids))
        text = self._last_text(token_ids, end.finish_reason)
        finish = "stop" if self._stop_strings.is_matched else end.finish_reason
        logprobs = None if end.logprob is None else [end.logprob]
        return self._with_scores(self._last(text, token_ids, logprobs, finish))

    def _note_reasoning(self, num_last_tokens: int) -> None:
        """The answer ends with these tokens, perhaps within its reasoning."""
        if self._parser is not None and self._parser.is_reasoning:
            self._num_reasoning_tokens += num_last_tokens

    def _text(self, token_id: int) -> str:
        """What a token adds to the text that is complete; of special tokens, those that parsers see."""
        shown = self._shown.get(token_id)
        if shown is None:
            return self._detokenizer.push_one(token_id)
        return self._detokenizer.end_run() + shown

    def _last_text(self, token_ids: list[int], finish: FinishReason | None) -> str:
        """New text without the end token, and what was held back."""
        is_end_token = finish == "stop" and bool(token_ids) and token_ids[-1] in self._end_ids
        text = "".join(map(self._text, () if is_end_token else token_ids)) + self._detokenizer.flush()
        text = self._stop_strings.push(text)
        return text if self._stop_strings.is_matched else text + self._stop_strings.flush()

    def _last(
        self,
        text: str,
        token_ids: list[int],
        logprobs: list[TokenLogprob] | None,
        finish: FinishReason | None,
        piece: AnswerPiece | None = None,
    ) -> Delta:
        """The last delta, of `text`, or of a piece that is parsed already."""
        record = self._record
        usage = Usage(
            self._num_prompt_tokens,
            self._num_tokens,
            record.num_cached_tokens,
            min(record.num_accepted_tokens, self._num_tokens),  # some may stand behind a stop string
            record.num_draft_tokens - record.num_accepted_tokens,
            self._num_reasoning_tokens,
        )
        timing, stop_string = record.timing(), self._stop_strings.matched
        if self._parser is None:
            return Delta(
                self._index, text, token_ids, logprobs, finish, usage, timing, stop_string=stop_string
            )
        piece = piece or self._parser.finish(text, is_cut=finish in ("length", "abort"))
        delta = _delta(self._index, piece, token_ids, logprobs)
        is_cut = self._stop_strings.is_matched and not self._parser.is_whole
        has_calls = finish == "stop" and self._parser.num_calls > 0 and not is_cut
        delta.finish_reason = "tool_calls" if has_calls else finish
        delta.usage, delta.timing, delta.stop_string = usage, timing, stop_string
        return delta


def _delta(
    index: int, piece: AnswerPiece, token_ids: list[int], logprobs: list[TokenLogprob] | None
) -> Delta:
    return Delta(
        index,
        piece.content,
        token_ids,
        logprobs,
        None,
        None,
        reasoning=piece.reasoning,
        tool_calls=piece.tool_calls,
    )


class Frontend(Generic[Owner]):
    """Submits requests to an engine and hands every delta to the owner of its request.

    Args:
        engine: what answers.
        copier: told what requests that it copies are answered; None copies none.
    """

    def __init__(self, engine: Engine, copier: Copier | None = None) -> None:
        self._engine = engine
        self._copier = copier
        self._tokenizer = engine.runner.model.tokenizer
        self._active: dict[int, tuple[ActiveSequence, Owner]] = {}

    def prepare(self, request: GenerateRequest, arrived_at: float | None = None) -> PreparedRequest:
        """Tokenise and resolve a request and compile its grammar; slow, call it off the loop.

        `arrived_at` is on `time.monotonic`, None is now.

        Raises:
            InvalidRequestError: as of the function `prepare`, and where the grammar can't be used.
        """
        prepared = prepare(
            request,
            self._tokenizer,
            self._engine.max_model_len,
            self._engine.adapters.find,
            self._engine.adapters.generations.route,
            self._engine.runner.model.sampling_defaults,
            arrived_at,
            self._engine.config,
            self._engine.runner.model.head,
            self._engine.runner.model.config.hidden_size,
            self._engine.runner.model.pooling,
        )
        if request.pooling is not None:
            return prepared
        return replace(prepared, matcher=self._matcher(prepared))

    def _matcher(self, prepared: PreparedRequest) -> Matcher | None:
        """Of the form that answers must have."""
        tokenizer, form, grammar = prepared.tokenizer, prepared.form, prepared.params.grammar
        if form is None or not form.forces_calls:
            matcher = None if grammar is None else self._compiled(prepared, grammar)
            return matcher if form is None else form.matcher(matcher, tokenizer)
        calls = form.call_matcher(tokenizer, partial(self._compiled, prepared))
        return form.matcher(calls, tokenizer)

    def _compiled(self, prepared: PreparedRequest, grammar: Grammar) -> Matcher:
        return self._engine.grammars.compile(grammar, prepared.cache_scope, prepared.tokenizer)

    def head_of(self, spec: AdapterSpec) -> ClassificationHead | None:
        """What classifies prompts for these adapters, the model's where they have none; None without any.

        Raises InvalidRequestError: as of `resolve_adapters`.
        """
        merged = self._engine.config.merge
        adapters = resolve_adapters(spec) or ([] if merged is None else [(merged, 1.0)])
        found = [self._engine.adapters.find(name) for name, _ in adapters]
        heads = [one.head for one in found if one is not None and one.head is not None]
        return heads[0] if heads else self._engine.runner.model.head

    def tokenizer_for(self, spec: AdapterSpec) -> Tokenizer:
        """What `prepare` tokenises prompts for these adapters with.

        Raises:
            AdapterNotFoundError: an adapter does not exist.
            InvalidRequestError: as of `resolve_adapters`, or several bring different tokens.
        """
        texts = {}
        merged = self._engine.config.merge
        adapters = resolve_adapters(spec) or ([] if merged is None else [(merged, 1.0)])
        for name in without_weightless(adapters):
            found = self._engine.adapters.find(name)
            if found is None:
                raise AdapterNotFoundError(f"adapter {name!r} is not registered")
            texts[name] = found.text
        return common_text(self._tokenizer, texts, needs_template=False, given=ALL_PARAMETERS).tokenizer

    def answer_fingerprint(self, spec: AdapterSpec) -> str:
        """Of what decides on answers: version, base, precision, device, weights of adapters; 16 hex digits.

        An adapter that is not registered has no part in it.
        """
        runner, config = self._engine.runner, self._engine.config
        base = (runner.model.fingerprint, runner.model.quantization, runner.device)
        parts: list[object] = [__version__, *base, config.dtype, config.adapter_dtype, config.merge]
        weights = {spec: 1.0} if isinstance(spec, str) else spec or {}
        for name, weight in weights.items():
            if (found := self._engine.adapters.find(name)) is not None:
                parts.append((found.receipt.hash, weight))
        return hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest()

    def submit(self, prepared: PreparedRequest, owner: Owner) -> list[int]:
        """Queue all n sequences of a request, or none; their request ids.

        Answer i is drawn with the request's seed + i.

        Raises:
            AdapterReplacedError: a name of its adapters has another meaning now: prepare it again.
            LoraserveError: as of `Engine.submit`.
        """
        request_ids: list[int] = []
        params = prepared.params
        recording = None if self._copier is None else self._copier.begin(prepared)
        try:
            for index in range(prepared.num_sequences):
                reader = self._reader(prepared) if index == 0 else None
                seed = None if params.seed is None else params.seed + index
                if index == 0 and recording is not None:
                    seed = recording.seed
                record = SequenceRecord(prepared.arrived_at)
                request_id = self._engine.submit(
                    prepared.prompt_token_ids,
                    prepared.adapters,
                    params,
                    seed,
                    record=record,
                    deadline_s=prepared.deadline_s,
                    cache_scope=prepared.cache_scope,
                    flow=prepared.request.flow,
                    needs_adapter=prepared.needs_adapter,
                    matcher=prepared.matcher and prepared.matcher.copy(),
                    prediction=prepared.prediction and prepared.prediction.copy(),
                    reader=reader,
                    eos_token_ids=prepared.tokenizer.eos_token_ids,
                    registered=prepared.registered,
                )
                request_ids.append(request_id)
                sequence = ActiveSequence(index, prepared, record, reader, recording if index == 0 else None)
                self._active[request_id] = (sequence, owner)
        except BaseException:
            self.abort(request_ids)
            raise
        return request_ids

    def _reader(self, prepared: PreparedRequest) -> Pooler | PromptScores | None:
        """What is to be made of the rows of its prompt."""
        prompt, pooling, params = prepared.prompt_token_ids, prepared.pooling, prepared.params
        if pooling is not None:
            return Pooler(pooling, len(prompt), prepared.head)
        if params.prompt_logprobs is None:
            return None
        vocab_size = self._engine.runner.vocab_size
        ends = params.max_tokens == 0
        return PromptScores(prompt, params.prompt_logprobs, vocab_size, ends_with_prompt=ends)

    def abort(self, request_ids: Iterable[int]) -> None:
        """End sequences now, without further deltas."""
        for request_id in request_ids:
            if self._active.pop(request_id, None) is not None:
                self._engine.abort(request_id)

    def route(
        self,
        outputs: EngineOutputs,
        on_delta: Callable[[Owner, Delta], object],
        on_error: Callable[[Owner, Exception], object],
    ) -> None:
        """Turn what a step gave into deltas; a sequence ended by a stop string is aborted in the engine."""
        active, logprobs = self._active, outputs.logprobs or repeat(None)
        tokens = zip(outputs.request_ids, outputs.token_ids, strict=True)
        for (request_id, token_id), logprob in zip(tokens, logprobs, strict=False):
            found = active.get(request_id)
            if found is None:
                continue  # aborted: nobody waits for it
            sequence, owner = found
            try:
                delta = sequence.push(token_id, logprob)
            except Exception as error:
                self.abort([request_id])
                on_error(owner, error)
                continue
            if delta.finish_reason is not None:
                self.abort([request_id])
            if sequence.recording is not None:
                sequence.recording.note(delta)
            on_delta(owner, delta)
        for end in outputs.ends:
            found = active.pop(end.request_id, None)
            if found is None:
                continue
            sequence, owner = found
            try:
                delta = sequence.end(end)
            except Exception as error:
                on_error(owner, error)
                continue
            if sequence.recording is not None:
                sequence.recording.note(delta)
            on_delta(owner, delta)
