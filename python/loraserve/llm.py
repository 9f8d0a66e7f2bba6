"""In-process batch inference: `LLM.generate` and `LLM.chat`."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from types import TracebackType
from typing import TYPE_CHECKING, Any

from loraserve._core import Receipt
from loraserve.adapters.manifest import AdapterManifest
from loraserve.config import EngineConfig
from loraserve.engine.calls import Prompt, as_prompts, params_per_request, per_request
from loraserve.engine.local_run import LocalRun
from loraserve.engine.pooled_calls import PooledCalls
from loraserve.engine.stats import AdapterInfo, EngineInfo, EngineStats
from loraserve.engine.versions import GenerationInfo
from loraserve.errors import InvalidRequestError
from loraserve.pooling.head import ClassificationHead
from loraserve.request import (
    AdapterSpec,
    BatchOutput,
    ChatOptions,
    GenerateRequest,
    PoolingOutput,
    RequestOutput,
)
from loraserve.sampling_params import SamplingParams
from loraserve.tools.tool import Tool, ToolOptions
from loraserve.validation.did_you_mean import did_you_mean
from loraserve.validation.values import check_int

if TYPE_CHECKING:
    from torch import Tensor

READ_AHEAD_STEPS = 4  # of an iterator: as many requests as so many full steps hold
MAX_READ_AHEAD = 2**20

Messages = Sequence[Mapping[str, Any]]


class LLM(PooledCalls):
    """One base model with its adapters, in this process.

    Args:
        model: a Hugging Face directory, a Hub id, a `.gguf` file, or "smollm2" (the embedded default).
        adapters: name → PEFT directory, or another place that `load_adapter` takes.
        **settings: the other fields of `EngineConfig` (dtype, device, memory, max_lora_rank, …).

    Raises:
        ModelError, AdapterFormatError, InvalidRequestError, CapacityError, DeviceError: it can't be loaded.
    """

    def __init__(self, model: str, adapters: Mapping[str, str] | None = None, **settings: Any) -> None:
        _check_names(settings)
        settings.setdefault("max_waiting", None)  # a batch is as long as its caller made it
        config = EngineConfig(model=model, adapters={} if adapters is None else adapters, **settings)
        self._run = LocalRun(config)
        self._engine = self._run.engine

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        adapter: AdapterSpec | Sequence[AdapterSpec] = None,
        *,
        progress: bool | None = None,
        cache_salt: str | None = None,
        user: str | None | Sequence[str | None] = None,
    ) -> list[RequestOutput]:
        """Answer all prompts, mixed in one batch; outputs are in the order of the prompts.

        Args:
            prompts: one prompt or many; a prompt is a string or a list of token ids.
            params: for all, or one per prompt.
            adapter: for all, or one per prompt: None, a name, or {name: weight}.
            progress: show a bar; None shows one on a terminal when the batch takes over a second.
            cache_salt: up to 256 characters; only calls with the same salt share cached prompts.
            user: whose prompts they are, for all, or one per prompt; adapters with shares give the same user
                the same generation.

        Raises:
            InvalidRequestError, AdapterNotFoundError, AdapterFormatError, AdapterUnavailableError,
            CapacityError, NotFiniteError, EngineStoppedError: some request was refused or failed; the
                others of this call are aborted.
        """
        prompt_list = as_prompts(prompts)
        requests = [
            GenerateRequest(
                prompt=prompt, adapter=one_adapter, params=one_params, cache_salt=cache_salt, user=one_user
            )
            for prompt, one_adapter, one_params, one_user in zip(
                prompt_list,
                per_request(adapter, len(prompt_list), "adapter"),
                params_per_request(params, len(prompt_list)),
                per_request(user, len(prompt_list), "user"),
                strict=True,
            )
        ]
        return self._run.run(requests, progress)

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
        user: str | None | Sequence[str | None] = None,
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
                user=one_user,
            )
            for chat, one_adapter, one_params, one_user in zip(
                chats,
                per_request(adapter, len(chats), "adapter"),
                params_per_request(params, len(chats)),
                per_request(user, len(chats), "user"),
                strict=True,
            )
        ]
        return self._run.run(requests, progress)

    def generate_iter(
        self,
        requests: Iterable[Prompt | GenerateRequest],
        params: SamplingParams | None = None,
        adapter: AdapterSpec = None,
        *,
        ordered: bool = True,
        read_ahead: int | None = None,
        cache_salt: str | None = None,
        user: str | None = None,
    ) -> Iterator[BatchOutput]:
        """Answer requests of any number in bounded memory; yields each one's output, or its error.

        Requests are read from the iterator as there is room for them, all on the calling thread: one that is
        slow is waited for while nothing is ready to be given out. An error of one does not end the others.
        An iteration that is closed, or dropped, before its end aborts what is open. Other calls may be made
        between two outputs.

        Args:
            requests: prompts, or a `GenerateRequest` with an adapter, parameters or a chat of its own.
            params: of the prompts.
            adapter: of the prompts: None, a name, or {name: weight}.
            ordered: yield in the order of the requests; False yields each as it is ready.
            read_ahead: most requests that are read and not yet given out, which memory is bounded by; None is
                four times `max_num_seqs`. With `ordered` one long answer holds up so many.
            cache_salt, user: of the prompts; as of `generate`.

        Raises:
            InvalidRequestError: an argument is wrong, or this thread is in another call.
            EngineStoppedError: the engine has failed, or was closed.
        """
        config = self._engine.config
        if read_ahead is None:
            read_ahead = min(READ_AHEAD_STEPS * config.max_num_seqs, config.max_waiting or MAX_READ_AHEAD)
        check_int("read_ahead", read_ahead, 1, MAX_READ_AHEAD)
        (params,) = params_per_request(params, 1)

        def as_request(item: Prompt | GenerateRequest) -> GenerateRequest:
            if isinstance(item, GenerateRequest):
                return item
            return GenerateRequest(
                prompt=item, adapter=adapter, params=params, cache_salt=cache_salt, user=user
            )

        return self._run.iterate(map(as_request, _iterator(requests)), read_ahead, ordered=ordered)

    def load_adapter(
        self,
        name: str,
        path: str | os.PathLike[str] | None = None,
        manifest: AdapterManifest | None = None,
        *,
        tensors: Mapping[str, Tensor] | None = None,
        config: Mapping[str, Any] | None = None,
        replace: bool = False,
        expected_generation: int | None = None,
        share: float | None = None,
        shadow: float | None = None,
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
            expected_generation: what the name must be at, 0 for not loaded, else GenerationConflictError.
            share: of the name's requests that get it, from 0 to 1, others get what they got; None is all.
            shadow: of the name's requests that are copied to it, which answers none; see `shadow_adapter`.
        """
        with self._run.one_call():
            adapters = self._engine.adapters
            source = adapters.source_of(name, path, tensors, config)
            return adapters.load(
                name,
                source,
                manifest,
                replace=replace,
                expected_generation=expected_generation,
                share=share,
                shadow=shadow,
            )

    def split_adapter(self, name: str, shares: Mapping[int, float]) -> None:
        """Give generations of an adapter shares of its requests, from 0 to 1, which sum to 1.

        Requests of the same `user` get the same generation while the shares stay.

        Raises:
            AdapterNotFoundError: no adapter has this name, or no such generation is kept.
            InvalidRequestError: the shares do not sum to 1.
        """
        with self._run.one_call():
            self._engine.adapters.generations.split(name, shares)

    def shadow_adapter(self, name: str, generation: int | None, fraction: float = 0.1) -> None:
        """Have copies of an adapter's requests run on one of its generations, to be compared.

        What they come to, `generations` tells. They run behind everything else and change no answer. The
        shadow ends where its generation is given requests, or the adapter is unloaded.

        Args:
            name: the adapter's.
            generation: one that is kept and answers no requests; None ends the shadow.
            fraction: of the requests that name the adapter alone and no generation of it, from 0.0001 to 1.

        Raises:
            AdapterNotFoundError: no adapter has this name, no such generation is kept, or there is no shadow.
            InvalidRequestError: the generation answers requests, or the fraction is out of range.
        """
        with self._run.one_call():
            self._engine.adapters.generations.shadow(name, generation, fraction)

    def roll_back_adapter(
        self, name: str, generation: int | None = None, *, expected_generation: int | None = None
    ) -> int:
        """Make an earlier generation current; see `EngineAdapters.roll_back`."""
        with self._run.one_call():
            generations = self._engine.adapters.generations
            return generations.roll_back(name, generation, expected_generation=expected_generation)

    def generations(self, name: str) -> list[GenerationInfo]:
        """What is remembered of an adapter's, oldest first. Raises AdapterNotFoundError."""
        with self._run.one_call():
            return self._engine.adapters.generations.infos(name)

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter; AdapterNotFoundError if there is none of this name."""
        with self._run.one_call():
            self._engine.adapters.unload(name)

    def warm_adapter(self, name: str) -> float:
        """Load an adapter into memory now; the seconds it took. See `EngineAdapters.warm` for the errors."""
        with self._run.one_call():
            return self._engine.adapters.warm(name).result()

    def pin_adapter(self, name: str, is_pinned: bool = True) -> None:
        """Keep an adapter in memory, or let it go again; see `EngineAdapters.pin` for the errors."""
        with self._run.one_call():
            self._engine.adapters.pin(name, is_pinned)

    def adapters(self) -> list[AdapterInfo]:
        """Every registered adapter, in order of registration."""
        with self._run.one_call():
            return self._engine.adapters.infos()

    def stats(self) -> EngineStats:
        """Load and counters of this moment."""
        with self._run.one_call():
            return self._engine.stats()

    def info(self) -> EngineInfo:
        """Settings, and the load of this moment."""
        with self._run.one_call():
            return self._engine.info()

    def close(self) -> None:
        """Stop the engine and free its memory; safe to call twice.

        A signal handler that interrupted a call may close too: the call then ends with EngineStoppedError.
        """
        if self._run.is_in_call:
            threading.Thread(target=self._engine.shutdown, args=(0.0,), name="loraserve-close").start()
        else:
            self._engine.shutdown(0.0)

    def _pool(self, requests: Sequence[GenerateRequest], progress: bool | None) -> list[PoolingOutput]:
        return [PoolingOutput.of(output) for output in self._run.run(requests, progress)]

    def _head_of(self, adapter: AdapterSpec) -> ClassificationHead | None:
        return self._run.head_of(adapter)

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _iterator(requests: Any) -> Iterator[Any]:
    if isinstance(requests, str | GenerateRequest):
        raise InvalidRequestError("requests is a single one, give an iterable of them")
    try:
        return iter(requests)
    except TypeError:
        raise InvalidRequestError(f"requests is {requests!r:.100}, give an iterable") from None


def _check_names(settings: Mapping[str, Any]) -> None:
    """Raises InvalidRequestError: a setting is none of `EngineConfig`."""
    known = [one.name for one in fields(EngineConfig) if one.init]
    for name in settings.keys() - set(known):
        raise InvalidRequestError(f"{name!r:.100} is no setting{did_you_mean(name, known)}")
