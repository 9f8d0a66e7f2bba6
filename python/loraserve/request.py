"""What goes into the engine and what comes out, as plain values."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from loraserve.errors import EngineStoppedError, InvalidRequestError, LoraserveError
from loraserve.pooling.params import Pooled, PoolingParams
from loraserve.sampling_params import MAX_TOKENS, SamplingParams
from loraserve.tools.call import ToolCall, ToolCallDelta, append_calls
from loraserve.tools.tool import ToolOptions
from loraserve.validation.values import check_float, check_int

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

AdapterSpec: TypeAlias = "None | str | Mapping[str, float]"
"""The base model (None), one adapter by name, or an exact weighted sum of adapters."""

CacheScope: TypeAlias = tuple[str, str]
"""(tenant, salt): what is cached of a prompt serves only requests of the same scope."""

SHARED_CACHE: CacheScope = ("", "")

MAX_CHAT_TEMPLATE_CHARS = 256 * 1024
MAX_TEMPLATE_KWARGS = 64
MAX_FLOW_NAME_CHARS = 512
FLOW_WEIGHTS = (0.001, 1000.0)  # least and most; as the core has them
_NOT_TEMPLATE_KWARGS = (
    "messages",
    "add_generation_prompt",
    "continue_final_message",
    "chat_template",
    "tokenize",
)

FinishReason: TypeAlias = Literal["length", "stop", "tool_calls", "abort"]


@dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """How a chat becomes a prompt; checked when built.

    Args:
        add_generation_prompt: end the prompt where the assistant's next message begins; None does so unless
            the final message is continued.
        continue_final_message: leave the last message open, so that the answer goes on with it.
        chat_template: Jinja source that renders this chat in place of the adapter's or the model's template.
        template_kwargs: further variables that the template sees.
        tools: functions that the answer may call, and which of them it must.
        is_parsed: whether reasoning and calls are set apart from the answer's text.
        thinking_budget: most tokens of reasoning, after which its end is forced; None sets no limit.
        needs_reasoning: whether a budget is an error where it is not known how the model writes reasoning.

    Raises:
        InvalidRequestError: the values contradict each other, or one is too large or not of its type.
    """

    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    chat_template: str | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    tools: ToolOptions = field(default_factory=ToolOptions)
    is_parsed: bool = field(default=True, compare=False)  # how the answer is told
    thinking_budget: int | None = None
    needs_reasoning: bool = True

    def __post_init__(self) -> None:
        if self.continue_final_message and self.add_generation_prompt:
            raise InvalidRequestError(
                "continue_final_message and add_generation_prompt are both true: a prompt can't go on with "
                "the final message and begin a new one, set one of them"
            )
        if self.chat_template is not None:
            _check_template(self.chat_template)
        _check_template_kwargs(self.template_kwargs)
        if self.tools.tools and "tools" in self.template_kwargs:
            raise InvalidRequestError("tools is set twice, leave it out of chat_template_kwargs")
        if not self.is_parsed and (self.tools.tools or self.thinking_budget is not None):
            raise InvalidRequestError("tools and a budget of reasoning are of answers that are parsed")
        if self.thinking_budget is not None:
            check_int("thinking_token_budget", self.thinking_budget, 0, MAX_TOKENS)

    @property
    def begins_answer(self) -> bool:
        """Whether the template is to add the generation prompt."""
        if self.add_generation_prompt is None:
            return not self.continue_final_message
        return self.add_generation_prompt


def _check_template(source: Any) -> None:
    if not isinstance(source, str):
        raise InvalidRequestError(f"chat_template is {source!r:.100}, it must be a string")
    if len(source) > MAX_CHAT_TEMPLATE_CHARS:
        raise InvalidRequestError(
            f"chat_template has {len(source)} characters, the limit is {MAX_CHAT_TEMPLATE_CHARS}"
        )


def _check_template_kwargs(kwargs: Any) -> None:
    if not isinstance(kwargs, Mapping) or not all(isinstance(name, str) for name in kwargs):
        raise InvalidRequestError(f"chat_template_kwargs is {kwargs!r:.100}, it must be {{name: value}}")
    if len(kwargs) > MAX_TEMPLATE_KWARGS:
        raise InvalidRequestError(
            f"chat_template_kwargs has {len(kwargs)} names, the limit is {MAX_TEMPLATE_KWARGS}"
        )
    for name in _NOT_TEMPLATE_KWARGS:
        if name in kwargs:
            raise InvalidRequestError(
                f"chat_template_kwargs has {name!r}, which is no variable of its own: "
                f"{'leave it out' if name == 'tokenize' else 'set it beside chat_template_kwargs'}"
            )


@dataclass(frozen=True)
class Flow:
    """Whose share of the engine a request is served from, beside others that wait; checked when built.

    Args:
        name: up to 512 characters; requests of one name are served in order.
        weight: of its tokens beside those of another flow, from 0.001 to 1000; the last one given holds.

    Raises:
        InvalidRequestError: the name is too long, or the weight out of range.
    """

    name: str = ""
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or len(self.name) > MAX_FLOW_NAME_CHARS:
            raise InvalidRequestError(
                f"the flow is {self.name!r:.100}, it must be text of at most {MAX_FLOW_NAME_CHARS} characters"
            )
        if any("\ud800" <= char <= "\udfff" for char in self.name):
            raise InvalidRequestError("the flow is not valid Unicode")
        check_float("weight of a flow", self.weight, *FLOW_WEIGHTS)


ONE_FLOW = Flow()


@dataclass(frozen=True, kw_only=True)
class GenerateRequest:
    """One prompt (or one chat) with its adapter and its sampling; exactly one of prompt and messages.

    Args:
        prompt_pair: a second text behind the prompt, put together as the tokenizer does with pairs.
        chat: how `messages` become the prompt.
        suffix: what stands behind the answer, where the model fills in the middle of a text.
        prediction: text that the answer is expected to repeat in large parts: guesses, which change nothing.
        deadline_s: seconds from its arrival in which it must be finished, else it ends with DeadlineError.
        truncate: keep only this many tokens of the prompt, its last ones.
        uses_model_defaults: whether what the model's generation_config.json says holds for `params` that were
            not given.
        cache_salt: up to 256 characters; only requests of the same salt share cached prompts.
        tenant: whose prompt it is; a server says so, and no cached prompt is shared between tenants.
        user: up to 512 characters, whose request it is: adapters with shares give it the same generation.
        pooling: what to make of the prompt's hidden states in place of an answer; of `params` nothing counts
            then.
        flow: whose share of the engine it is served from; a server says so.
        is_read_whole: whether nobody reads its answer before the end; of several engines another one may then
            begin anew where one is lost.
        may_use_base_model: whether the base model may answer where the weights leave no adapter to run.
    """

    prompt: str | Sequence[int] | None = None
    prompt_pair: str | None = None
    messages: Sequence[Mapping[str, Any]] | None = None
    chat: ChatOptions = ChatOptions()
    adapter: AdapterSpec = None
    params: SamplingParams = field(default_factory=SamplingParams)
    suffix: str | None = None
    prediction: str | None = None
    deadline_s: float | None = None
    truncate: int | None = None
    uses_model_defaults: bool = True
    cache_salt: str | None = None
    tenant: str = ""
    flow: Flow = ONE_FLOW
    may_use_base_model: bool = True
    pooling: PoolingParams | None = None
    user: str | None = None
    is_read_whole: bool = field(default=False, compare=False)


@dataclass(frozen=True)
class TokenLogprob:
    """Natural-log probability of a chosen token; `top` has the likeliest ids with theirs, best first."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]]


@dataclass(frozen=True)
class Usage:
    """Token counts of one answer; cached_tokens of the prompt came from the prefix cache.

    reasoning_tokens are those of its completion_tokens that lie within reasoning, the tag behind it included.
    Of what was guessed of the answer, the accepted tokens came and the rejected did not.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    accepted_prediction_tokens: int = 0
    rejected_prediction_tokens: int = 0
    reasoning_tokens: int = 0


@dataclass(frozen=True)
class RequestTiming:
    """How long one answer took, in seconds; the first token came after queue_s + prefill_s.

    Args:
        queue_s: from arrival until the model began with it: tokenising, waiting, loading adapters.
        prefill_s: from then to the first token; None if there was none.
        total_s: from arrival to the end.
        adapter_was_resident: whether all its adapters were in memory when it arrived; true without any.
    """

    queue_s: float
    prefill_s: float | None
    total_s: float
    adapter_was_resident: bool


@dataclass(slots=True)
class Delta:
    """What one step added to answer `index` of n.

    `text` may come later than its tokens: an unfinished character waits, and so does what may yet become a
    stop string. Of a chat's answer, `text` is its content, beside its reasoning and its calls. `logprobs` has
    one entry per token, None without any. The last delta of each answer, and no other, has finish_reason,
    usage, timing and stop_string, the one that ended it, if any, and what the prompt was pooled to, if that
    was asked for. The first delta of answer 0 has the prompt's logprobs, if they were. The last delta that a
    client receives also has the generations of the adapters that answered, by name.
    """

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None
    finish_reason: FinishReason | None
    usage: Usage | None
    timing: RequestTiming | None = None
    reasoning: str = ""
    tool_calls: Sequence[ToolCallDelta] = ()
    stop_string: str | None = None
    pooled: Pooled | None = None
    prompt_logprobs: Sequence[TokenLogprob | None] | None = None
    generations: Mapping[str, int] = field(default_factory=dict)


@dataclass
class Completion:
    """One whole answer, or as much as has been appended; the fields are those of `Delta`."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] | None = None
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    timing: RequestTiming | None = None
    reasoning: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)
    stop_string: str | None = None
    pooled: Pooled | None = None
    prompt_logprobs: Sequence[TokenLogprob | None] | None = None
    generations: Mapping[str, int] = field(default_factory=dict)

    def append(self, delta: Delta) -> None:
        """Add what one step brought; deltas come in order, all of this answer."""
        self.text += delta.text
        self.reasoning += delta.reasoning
        if delta.tool_calls:
            append_calls(self.tool_calls, delta.tool_calls)
        self.token_ids += delta.token_ids
        if delta.logprobs is not None:
            self.logprobs = (self.logprobs or []) + delta.logprobs
        self.finish_reason = delta.finish_reason or self.finish_reason
        self.usage = delta.usage or self.usage
        self.timing = delta.timing or self.timing
        self.stop_string = delta.stop_string or self.stop_string
        self.pooled = delta.pooled or self.pooled
        self.prompt_logprobs = delta.prompt_logprobs or self.prompt_logprobs
        self.generations = delta.generations or self.generations


@dataclass(frozen=True)
class RequestOutput:
    """All n answers to one prompt; the first answer's fields are also attributes of this.

    `generations` are those of its adapters that answered, by name.
    """

    prompt: str | None
    prompt_token_ids: list[int]
    adapter: AdapterSpec
    completions: list[Completion]
    generations: dict[str, int] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """Of the first answer, without the stop string that ended it."""
        return self.completions[0].text

    @property
    def reasoning(self) -> str:
        """Of the first answer, where it is set apart from its text; "" where there is none."""
        return self.completions[0].reasoning

    @property
    def tool_calls(self) -> list[ToolCall]:
        """Of the first answer."""
        return self.completions[0].tool_calls

    @property
    def token_ids(self) -> list[int]:
        """Of the first answer, the token that ended it included."""
        return self.completions[0].token_ids

    @property
    def logprobs(self) -> list[TokenLogprob] | None:
        """Of the first answer, one per token; None if none were asked for."""
        return self.completions[0].logprobs

    @property
    def prompt_logprobs(self) -> Sequence[TokenLogprob | None] | None:
        """One per token of the prompt, None for the first; None if none were asked for."""
        return self.completions[0].prompt_logprobs

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the first answer ended."""
        return self.completions[0].finish_reason

    @property
    def usage(self) -> Usage | None:
        """Token counts of the first answer."""
        return self.completions[0].usage

    @property
    def timing(self) -> RequestTiming | None:
        """How long the first answer took."""
        return self.completions[0].timing


@dataclass(frozen=True)
class BatchOutput:
    """What became of one of many requests: its output, or the error that it was refused with or failed.

    `index` is its place among the requests, from 0.
    """

    index: int
    output: RequestOutput | None
    error: LoraserveError | None

    def result(self) -> RequestOutput:
        """The output. Raises `error` where there is none."""
        if self.output is None:
            assert self.error is not None, "there is one of the two"
            raise self.error
        return self.output


@dataclass(frozen=True)
class PoolingOutput:
    """What one prompt was pooled to; the fields of `pooled` are also attributes of this."""

    prompt: str | None
    prompt_token_ids: list[int]
    adapter: AdapterSpec
    pooled: Pooled
    usage: Usage | None = None
    timing: RequestTiming | None = None

    @staticmethod
    def of(output: RequestOutput) -> "PoolingOutput":
        """Of the answer to a request with `pooling`. Raises EngineStoppedError where there is none."""
        (answer,) = output.completions
        if answer.pooled is None:
            raise EngineStoppedError("the engine stopped before the prompt was computed")
        return PoolingOutput(
            output.prompt,
            output.prompt_token_ids,
            output.adapter,
            answer.pooled,
            answer.usage,
            answer.timing,
        )

    @property
    def values(self) -> "npt.NDArray[np.float32]":
        """The embedding [dimensions], hidden states [tokens, dimensions], or logits [labels]."""
        return self.pooled.values

    @property
    def probabilities(self) -> "npt.NDArray[np.float32] | None":
        """Of the labels; None of embeddings."""
        return self.pooled.probabilities

    @property
    def labels(self) -> Sequence[str]:
        """Names of the labels; empty of embeddings."""
        return self.pooled.labels

    @property
    def label(self) -> str | None:
        """The likeliest label; None of embeddings."""
        return self.labels[int(self.values.argmax())] if self.labels else None
