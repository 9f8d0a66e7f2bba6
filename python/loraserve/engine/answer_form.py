"""`AnswerForm`: how calls and reasoning are written in a chat's answer, what shows them, what forces them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from loraserve.adapters.manifest import AdapterManifest
from loraserve.config import EngineConfig
from loraserve.errors import InvalidRequestError
from loraserve.request import ChatOptions
from loraserve.sampling.grammar import Grammar
from loraserve.sampling.matcher import Matcher
from loraserve.sampling.reasoning_matcher import ReasoningMatcher, ReasoningTags
from loraserve.text.tokenizer import Tokenizer
from loraserve.tools.answer import AnswerParser
from loraserve.tools.families import AUTO, HARMONY, TOOL_PARSERS, calls_of, reasoning_of
from loraserve.tools.formats.base import CallFormat
from loraserve.tools.lark import Lark
from loraserve.tools.reasoning import ReasoningFormat
from loraserve.tools.tool import ToolOptions


@dataclass(frozen=True)
class AnswerForm:
    """Of the answers to one chat.

    Args:
        options: the tools.
        calls: how calls are written; None where there are none.
        reasoning: how reasoning is written; None where it is not set apart.
        begins_in_reasoning: whether the prompt ends within it.
        thinking_budget: most tokens of it.
        shown: texts of special tokens that parsers see, by id.
        text_schema: of the JSON object that the answer is where it calls nothing; None leaves text free.
    """

    options: ToolOptions
    calls: CallFormat | None
    reasoning: ReasoningFormat | None
    begins_in_reasoning: bool
    thinking_budget: int | None
    shown: Mapping[int, str]
    text_schema: Mapping[str, Any] | None = None

    def with_text_form(self, grammar: Grammar) -> AnswerForm:
        """The same, whose answers either call tools or have this form.

        Raises:
            InvalidRequestError: there is no grammar of both.
        """
        assert self.calls is not None, "tools may be called"
        remedy = "leave out the tools or the form, or set tool_choice to none"
        if not self.calls.differs_from_json:
            raise InvalidRequestError(
                f"calls in the form {self.calls.names[0]} can't be told from an answer of a form: {remedy}"
            )
        schema = json.loads(str(grammar.value)) if grammar.kind == "json_schema" else {"type": "object"}
        if grammar.kind not in ("json", "json_schema") or schema.get("type") != "object":
            raise InvalidRequestError(
                f"beside tools the form of an answer must be a JSON schema of an object: {remedy}"
            )
        return replace(self, text_schema=schema)

    def parser(self) -> AnswerParser:
        """For one answer."""
        return AnswerParser(
            self.calls, self.reasoning, self.options, begins_in_reasoning=self.begins_in_reasoning
        )

    @property
    def forces_calls(self) -> bool:
        """Whether calls follow `grammar`, and are not left to the model."""
        is_forced = self.options.is_forced or self.text_schema is not None
        return self.calls is not None and self.options.may_call and is_forced

    def call_matcher(self, tokenizer: Tokenizer, compiled: Callable[[Grammar], Matcher]) -> Matcher:
        """What forces the calls, `compiled` from its grammar.

        Raises:
            InvalidRequestError: a schema can't be forced in this form, with the name of its tool.
        """
        assert self.calls is not None
        ids = {token.content: index for index, token in tokenizer.added_tokens().items()}
        lark = Lark(ids.get)
        try:
            return compiled(Grammar("lark", lark.whole(self._start(self.calls, lark))))
        except InvalidRequestError as error:
            text = lark.explained(str(error))
            raise InvalidRequestError(f"calls of the tools can't be forced: {text}") from None

    def _start(self, calls: CallFormat, lark: Lark) -> str:
        """Of an answer: calls alone where they must come, else with text, free or of its form."""
        options = self.options
        tools, parallel = options.callable_tools, options.parallel
        if options.mode != "auto":
            return calls.calls(lark, tools, parallel=parallel)
        if self.text_schema is None:
            return calls.answer(lark, tools, parallel=parallel)
        called = lark.rule("calls", calls.calls(lark, tools, parallel=parallel))
        return f"{lark.json(self.text_schema)} | {called}"

    def matcher(self, form: Matcher | None, tokenizer: Tokenizer) -> Matcher | None:
        """`form`, what the answer or its calls must be, behind its reasoning."""
        is_of_calls = self.forces_calls
        reasoning = self.reasoning
        if reasoning is None or (form is None and self.thinking_budget is None):
            return form
        if reasoning.is_of_calls and is_of_calls and self.thinking_budget is None:
            return form  # which has room for reasoning itself
        end = reasoning.end if is_of_calls else reasoning.answer_begins or reasoning.end
        tags = ReasoningTags(
            begin=reasoning.begin,
            end=end,
            forced_end=reasoning.forced_end or reasoning.end,
            is_begun=self.begins_in_reasoning or (reasoning.is_of_calls and form is not None),
        )
        return ReasoningMatcher(form, tokenizer, tags, self.thinking_budget)


def answer_form(
    chat: ChatOptions,
    prompt: str,
    tokenizer: Tokenizer,
    manifest: AdapterManifest,
    config: EngineConfig | None,
) -> AnswerForm | None:
    """What is to be set apart in answers to a chat; None where all of them is content.

    Args:
        chat: with its tools.
        prompt: what the template wrote.
        tokenizer: with the template, if the chat has none of its own.
        manifest: of the one adapter, or empty.
        config: of the engine; None leaves it to the template.

    Raises:
        InvalidRequestError: there are tools, and the form of calls is not known; or a budget of reasoning,
            and its form is not.
    """
    template = chat.chat_template
    if template is None:
        template = "" if tokenizer.chat_template is None else tokenizer.chat_template.source
    tool_parser = manifest.tool_parser or (AUTO if config is None else config.tool_parser)
    reasoning_parser = manifest.reasoning_parser or (AUTO if config is None else config.reasoning_parser)
    calls = calls_of(tool_parser, template) if chat.tools.may_call else None
    if chat.tools.may_call and calls is None:
        raise InvalidRequestError(
            "tools are given, but the chat template does not show in which form the model calls them: set "
            "tool_parser in the adapter's loraserve.json or --tool-parser, to one of "
            f"{', '.join(name for name in TOOL_PARSERS if name != AUTO)}"
        )
    reasoning = reasoning_of(reasoning_parser, template)
    if chat.thinking_budget is not None and chat.needs_reasoning and reasoning is None:
        raise InvalidRequestError(
            "thinking_token_budget is set, but the chat template does not show how the model writes "
            "reasoning: leave it out, or set reasoning_parser in the adapter's loraserve.json or "
            "--reasoning-parser"
        )
    if reasoning is not None and reasoning.is_of_calls:
        calls = HARMONY
    if calls is HARMONY and reasoning is not None and not reasoning.is_of_calls:
        reasoning = None
    if reasoning is not None and not reasoning.is_of_calls and prompt.rstrip().endswith(reasoning.end):
        reasoning = None  # the prompt has closed it
    if not chat.is_parsed or (calls is None and reasoning is None):
        return None
    markers = (*(calls.markers if calls else ()), *(reasoning.markers if reasoning else ()))
    return AnswerForm(
        chat.tools,
        calls,
        reasoning,
        reasoning is not None
        and reasoning.begins_in(prompt, is_continued=chat.continue_final_message)
        and not reasoning.is_of_calls,
        chat.thinking_budget,
        {
            index: text
            for text in markers
            if (index := tokenizer.id_of(text)) is not None and index in tokenizer.special_ids
        },
    )
