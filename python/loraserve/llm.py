"""In-process batch inference: `LLM.generate` and `LLM.chat`."""

from __future__ import annotations

import operator
import os
import queue
import threading
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from loraserve._core import Receipt
from loraserve.adapters.manifest import AdapterManifest
from loraserve.config import EngineConfig
from loraserve.engine.adapters import AdapterReplacedError
from loraserve.engine.engine import Engine
from loraserve.engine.frontend import MAX_PREPARED_AGAIN, Frontend
from loraserve.engine.prepared import PreparedRequest
from loraserve.engine.sequence import EngineOutputs
from loraserve.engine.stats import AdapterInfo, EngineInfo, EngineStats
from loraserve.errors import InvalidRequestError
from loraserve.request import AdapterSpec, ChatOptions, Completion, Delta, GenerateRequest, RequestOutput
from loraserve.sampling_params import SamplingParams
from loraserve.tools.tool import Tool, ToolOptions

if TYPE_CHECKING:
    from torch import Tensor

PROGRESS_DELAY_S = 1.0  # batches that end sooner show no progress bar

Prompt = str | Sequence[int]
Messages = Sequence[Mapping[str, Any]]


class LLM:
    """One base model with its adapters, in this process.

    Args:
        model: a Hugging Face directory, a Hub id, a `.gguf` file, or "smollm2" (the embedded default).
        adapters: name → PEFT directory, or another place that `load_adapter` takes.
        **settings: the other fields of `EngineConfig` (dtype, device, memory, max_lora_rank, …).

    Raises:
        ModelError, AdapterFormatError, InvalidRequestError, CapacityError, DeviceError: it can't be loaded.
    """

    def __init__(self, model: str, adapters: Mapping[str, str] | None = None, **settings: Any) -> None:
        self._turn = _Turn()
        self._call = threading.Lock()  # calls from several threads take turns
        self._events: queue.SimpleQueue[EngineOutputs] = queue.SimpleQueue()
        settings.setdefault("max_waiting", None)  # a batch is as long as its caller made it
        config = EngineConfig(model=model, adapters={} if adapters is None else adapters, **settings)
        self._engine = Engine(config, self._events.put)
        self._frontend: Frontend[_Pending] = Frontend(self._engine)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        adapter: AdapterSpec | Sequence[AdapterSpec] = None,
        *,
        progress: bool | None = None,
        cache_salt: str | None = None,
    ) -> list[RequestOutput]:
        """Answer all prompts, mixed in one batch; outputs are in the order of the prompts.

        Args:
            prompts: one prompt or many; a prompt is a string or a list of token ids.
            params: for all, or one per prompt.
            adapter: for all, or one per prompt: None, a name, or {name: weight}.
            progress: show a bar; None shows one on a terminal when the batch takes over a second.
            cache_salt: up to 256 characters; only calls with the same salt share cached prompts.

        Raises:
            InvalidRequestError, AdapterNotFoundError, AdapterFormatError, AdapterUnavailableError,
            CapacityError, NotFiniteError, EngineStoppedError: some request was refused or failed; the
                others of this call are aborted.
        """
        prompt_list = _as_prompts(prompts)
        requests = [
            GenerateRequest(prompt=prompt, adapter=one_adapter, params=one_params, cache_salt=cache_salt)
            for prompt, one_adapter, one_params in zip(
                prompt_list,
                _per_request(adapter, len(prompt_list), "adapter"),
                _params_per_request(params, len(prompt_list)),
                strict=True,
            )
        ]
        return self._run(requests, progress)

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        adapter: AdapterSpec | Sequence[AdapterSpec] = None,
        *,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any] | Tool] | None = None,
        tool_choice: str | Mapping[str, Any] | None = None,
        parallel_tool_calls: bool | None = None,
        thinking_token_budget: int | None = None,
        progress: bool | None = None,
        cache_salt: str | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation or many through the model's chat template.

        Args and errors as of `generate`, and of `ChatOptions` for how the template is used. Reasoning and
        calls are set apart from the text, as `tool_parser` and `reasoning_parser` of `EngineConfig` say.

        Args:
            messages: one conversation, or many.
            tools: functions in OpenAI's form, the same for all.
            tool_choice: "none", "auto", "required", or OpenAI's object that names a function, or several.
            parallel_tool_calls: False allows one call an answer.
            thinking_token_budget: most tokens of reasoning, after which its end is forced.
        """
        options = ChatOptions(
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            chat_template=chat_template,
            template_kwargs=chat_template_kwargs or {},
            tools=ToolOptions.from_fields(tools, tool_choice, parallel_tool_calls),
            thinking_budget=thinking_token_budget,
        )
        chats: list[Any] = [messages] if not messages or isinstance(messages[0], Mapping) else list(messages)
        requests = [
            GenerateRequest(
                messages=chat,
                chat=options,
                adapter=one_adapter,
                params=one_params,
                cache_salt=cache_salt,
            )
            for chat, one_adapter, one_params in zip(
                chats,
                _per_request(adapter, len(chats), "adapter"),
                _params_per_request(params, len(chats)),
                strict=True,
            )
        ]
        return self._run(requests, progress)

    def load_adapter(
        self,
        name: str,
        path: str | os.PathLike[str] | None = None,
        manifest: AdapterManifest | None = None,
        *,
        tensors: Mapping[str, Tensor] | None = None,
        config: Mapping[str, Any] | None = None,
        replace: bool = False,
    ) -> Receipt:
        """Check and register an adapter, or replace the one of this name; see `EngineAdapters.load`.

        Args:
            name: what requests are to call it.
            path: a PEFT directory, a GGUF adapter, or a directory of TensorRT-LLM's arrays.
            manifest: goes over the directory's own `loraserve.json`.
            tensors: in place of `path`: torch tensors under PEFT's names, with their `config`, what
                adapter_config.json would hold. They are copied to a file without a name, at most 2 GiB of one
                adapter and 8 GiB of all, and are gone with the adapter.
            config: of `tensors`.
            replace: whether the name may have other content, which this takes the place of.
        """
        with self._one_call():
            adapters = self._engine.adapters
            source = adapters.source_of(name, path, tensors, config)
            return adapters.load(name, source, manifest, replace=replace)

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter; AdapterNotFoundError if there is none of this name."""
        with self._one_call():
            self._engine.adapters.unload(name)

    def warm_adapter(self, name: str) -> float:
        """Load an adapter into memory now; the seconds it took. See `EngineAdapters.warm` for the errors."""
        with self._one_call():
            return self._engine.adapters.warm(name).result()

    def pin_adapter(self, name: str, is_pinned: bool = True) -> None:
        """Keep an adapter in memory, or let it go again; see `EngineAdapters.pin` for the errors."""
        with self._one_call():
            self._engine.adapters.pin(name, is_pinned)

    def adapters(self) -> list[AdapterInfo]:
        """Every registered adapter, in order of registration."""
        with self._one_call():
            return self._engine.adapters.infos()

    def stats(self) -> EngineStats:
        """Load and counters of this moment."""
        with self._one_call():
            return self._engine.stats()

    def info(self) -> EngineInfo:
        """Settings, and the load of this moment."""
        with self._one_call():
            return self._engine.info()

    def close(self) -> None:
        """Stop the engine and free its memory; safe to call twice.

        A signal handler that interrupted a call may close too: the call then ends with EngineStoppedError.
        """
        if self._turn.lock.locked():
            threading.Thread(target=self._engine.shutdown, args=(0.0,), name="loraserve-close").start()
        else:
            self._engine.shutdown(0.0)

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, requests: Sequence[GenerateRequest], progress: bool | None) -> list[RequestOutput]:
        with self._one_call():
            return self._answer(requests, progress)

    def _one_call(self) -> threading.Lock:
        """To be held while this thread is in a call.

        Raises:
            InvalidRequestError: it is in one already, which may hold a lock that this one would wait for.
            EngineStoppedError: this is a forked child.
        """
        self._engine.check_process()
        if self._turn.lock.locked():
            raise InvalidRequestError(
                "this thread is in a call of the same LLM: a signal handler can only close it; "
                "set a flag there, and call when the first call has returned"
            )
        return self._turn.lock

    def _answer(self, requests: Sequence[GenerateRequest], progress: bool | None) -> list[RequestOutput]:
        pending = [_Pending(request, self._frontend.prepare(request)) for request in requests]
        request_ids: list[int] = []
        with self._call:
            try:
                for item in pending:
                    request_ids += self._submit(item)
                self._wait(pending, progress)
            except BaseException:
                self._frontend.abort(request_ids)
                raise
        return [item.output() for item in pending]

    def _submit(self, item: _Pending) -> list[int]:
        """Its request ids; what was prepared before another thread replaced its adapter is prepared again."""
        for _ in range(MAX_PREPARED_AGAIN):
            try:
                return self._frontend.submit(item.prepared, item)
            except AdapterReplacedError:
                item.prepare(self._frontend.prepare(item.request, item.prepared.arrived_at))
        return self._frontend.submit(item.prepared, item)

    def _wait(self, pending: Sequence[_Pending], progress: bool | None) -> None:
        collector = _Collector(sum(len(item.completions) for item in pending))
        disable = None if progress is None else not progress
        delay = PROGRESS_DELAY_S if progress is None else 0.0
        with tqdm(total=collector.num_open, unit="answer", disable=disable, delay=delay) as bar:
            while collector.num_open > 0:
                num_open = collector.num_open
                self._frontend.route(self._events.get(), collector.on_delta, collector.on_error)
                if collector.error is not None:
                    raise collector.error
                bar.update(num_open - collector.num_open)


class _Turn(threading.local):
    """A lock for each thread, held while it is in a call; one is taken whole, whenever a signal comes."""

    def __init__(self) -> None:
        self.lock = threading.Lock()


class _Collector:
    """Counts the open answers of one call and keeps its first error."""

    def __init__(self, num_open: int) -> None:
        self.num_open = num_open
        self.error: Exception | None = None

    def on_delta(self, item: _Pending, delta: Delta) -> None:
        item.completions[delta.index].append(delta)
        self.num_open -= delta.finish_reason is not None

    def on_error(self, item: _Pending, error: Exception) -> None:
        self.error = self.error or error


class _Pending:
    """A request of this process and the answers collected so far."""

    def __init__(self, request: GenerateRequest, prepared: PreparedRequest) -> None:
        self.request = request
        self.prepare(prepared)

    def prepare(self, prepared: PreparedRequest) -> None:
        """What is to be submitted of it."""
        self.prepared = prepared
        self.completions = [Completion() for _ in range(prepared.params.n)]

    def output(self) -> RequestOutput:
        prompt = self.request.prompt if isinstance(self.request.prompt, str) else None
        return RequestOutput(prompt, self.prepared.prompt_token_ids, self.request.adapter, self.completions)


def _as_prompts(prompts: Any) -> list[Prompt]:
    """A list of prompts; one string, or one list of token ids, is one prompt."""
    if isinstance(prompts, str):
        return [prompts]
    try:
        items = list(prompts)
    except TypeError:
        raise InvalidRequestError(f"prompts is {prompts!r}, give a string or a list") from None
    return [items] if items and _is_integer(items[0]) else items


def _is_integer(value: Any) -> bool:
    try:
        operator.index(value)
    except TypeError:
        return False
    return True


def _per_request(value: Any, num_requests: int, name: str) -> list[Any]:
    if value is None or isinstance(value, str | Mapping | SamplingParams):
        return [value] * num_requests
    if not isinstance(value, Sequence):
        raise InvalidRequestError(
            f"{name} is {value!r}, give one for all prompts or a list with one for each"
        )
    if len(value) != num_requests:
        raise InvalidRequestError(f"{name} has {len(value)} entries for {num_requests} prompts")
    return list(value)


def _params_per_request(value: Any, num_requests: int) -> list[SamplingParams]:
    params = [one or SamplingParams() for one in _per_request(value, num_requests, "params")]
    for one in params:
        if not isinstance(one, SamplingParams):
            raise InvalidRequestError(f"params is {one!r}, give SamplingParams")
    return params
