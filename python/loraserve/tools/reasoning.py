"""`ReasoningFormat`: how a family of models sets its reasoning apart."""

from __future__ import annotations

from dataclasses import dataclass

from loraserve.tools.reader import Parse, Reader
from loraserve.tools.sink import Sink

HARMONY_FINAL = "<|channel|>final<|message|>"


@dataclass(frozen=True)
class ReasoningFormat:
    """Reasoning between two tags, at the beginning of an answer.

    Args:
        names: what `--reasoning-parser` calls it.
        begin: the tag before it.
        end: the tag behind it.
        is_certain: whether an answer begins with it also where no tag says so.
        forced_end: what ends it where so much is enough; `end` unless given.
        answer_begins: what a form of the answer begins behind; `end` unless given.
        is_of_calls: whether the family's calls are parsed together with its reasoning, which `parse` of the
            calls does then.
    """

    names: tuple[str, ...]
    begin: str
    end: str
    is_certain: bool = False
    forced_end: str = ""
    answer_begins: str = ""
    is_of_calls: bool = False

    @property
    def markers(self) -> tuple[str, ...]:
        """Texts that are special tokens in some vocabularies, which the parser must see."""
        return self.begin, self.end

    def is_of(self, template: str) -> bool:
        """Whether a chat template plainly shows reasoning of this form."""
        return not self.is_certain and self.begin in template and self.end in template

    def begins_in(self, prompt: str, *, is_continued: bool) -> bool:
        """Whether the answer to a prompt begins within reasoning.

        Args:
            prompt: its text.
            is_continued: whether the answer goes on with the prompt's final message.
        """
        if is_continued:
            return prompt.rfind(self.begin) > prompt.rfind(self.end)
        end = prompt.rstrip()
        return end.endswith(self.begin) or (self.is_certain and not end.endswith(self.end))

    def parse(self, reader: Reader, sink: Sink, is_begun: bool) -> Parse[None]:
        """Reasoning up to its end; nothing where there is none."""
        if is_begun:
            sink.begin_reasoning()
        space = yield from reader.space()
        tag = yield from reader.literal((self.begin,))
        if tag is None and not is_begun:
            sink.text(space)
            return
        sink.begin_reasoning()
        yield from reader.until((self.end,), sink.reason)
        sink.end_reasoning()


REASONING = (
    ReasoningFormat(("mistral",), "[THINK]", "[/THINK]"),
    ReasoningFormat(("seed_oss",), "<seed:think>", "</seed:think>"),
    ReasoningFormat(("gemma4",), "<|channel>thought\n", "<channel|>"),
    ReasoningFormat(("granite",), "Here is my thought process:", "Here is my response:"),
    ReasoningFormat(("qwen3", "think", "glm45", "smollm3", "hunyuan_a13b"), "<think>", "</think>"),
    ReasoningFormat(("deepseek_r1", "deepseek_v3"), "<think>", "</think>", is_certain=True),
    ReasoningFormat(
        ("gpt_oss", "openai_gptoss", "harmony"),
        "<|channel|>analysis<|message|>",
        "<|end|>",
        forced_end=f"<|end|><|start|>assistant{HARMONY_FINAL}",
        answer_begins=HARMONY_FINAL,
        is_of_calls=True,
    ),
)
