"""What is served, and every answer to it, computed alone; requests get one of these, or a typed error."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from loraserve import LLM, SamplingParams
from loraserve.request import AdapterSpec

NUM_TOKENS = 24
NUM_PROMPTS = 4
NUM_STATIC, NUM_REPLACED, NUM_TRANSIENT = 16, 4, 4
SEED = 7
SUM = {"s0": 0.7, "s1": 0.3}
GREEDY = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
SAMPLED = SamplingParams(max_tokens=NUM_TOKENS, temperature=1.0, top_p=0.9, seed=SEED, ignore_eos=True)


@dataclass(frozen=True)
class Answer:
    """Of NUM_TOKENS tokens; a shorter request gets its beginning."""

    token_ids: tuple[int, ...]
    text: str


@dataclass
class Version:
    """A name had this content from `since` on, or later; until `until`, or a little longer."""

    content: str
    since: float
    until: float = float("inf")


@dataclass
class World:
    """Contents are directories of adapters; names are what a server calls them.

    Args:
        contents: content → directory.
        prompts: token ids.
        answers: (content or None or "sum", number of the prompt, whether sampled) → what the model says.
    """

    contents: Mapping[str, str]
    prompts: list[list[int]]
    answers: dict[tuple[str | None, int, bool], Answer]
    versions: dict[str, list[Version]] = field(default_factory=dict)

    def start(self) -> dict[str, str]:
        """name → directory of what a server is started with; forgets what came later."""
        names = list(self.contents)
        self.versions = {}
        for index in range(NUM_STATIC):
            self.put(f"s{index}", names[index])
        for index in range(NUM_REPLACED):
            self.put(f"r{index}", names[NUM_STATIC + 2 * index])
        return {name: self.contents[versions[-1].content] for name, versions in self.versions.items()}

    def put(self, name: str, content: str) -> Version:
        """The name gets this content from now on, where the server takes it; what it had may go on."""
        version = Version(content, time.monotonic())
        self.versions.setdefault(name, []).append(version)
        return version

    def settle(self, name: str, version: Version | None) -> None:
        """The server has answered: new requests get this version and no other; None if the name is gone."""
        for other in self.versions.get(name, []):
            if other is not version:
                other.until = min(other.until, time.monotonic())

    def expect_restart(self) -> None:
        """The server may be another one from now on, with what it is started with.

        That is the configuration, and of what came at run time whatever could be written last.
        """
        for index in range(NUM_REPLACED):
            self.put(f"r{index}", list(self.contents)[NUM_STATIC + 2 * index])
        for name in [name for name in self.versions if name[0] not in "sr"]:
            for content in {version.content for version in self.versions[name]}:
                self.put(name, content)

    def adopt(self, sources: Mapping[str, str]) -> None:
        """A server has started, and tells name → directory of what it has; unknown ones change nothing."""
        contents = {path: content for content, path in self.contents.items()}
        for name in {*sources, *self.versions}:
            content = contents.get(sources.get(name, ""))
            if content is not None:
                self.settle(name, self.put(name, content))
            elif name not in sources:
                self.settle(name, None)

    def other_content(self, name: str) -> str:
        """What a replaced name is to be next."""
        first = NUM_STATIC + 2 * int(name[1:])
        pair = list(self.contents)[first : first + 2]
        return pair[self.versions[name][-1].content == pair[0]]

    def allowed(self, name: str | None, since: float) -> set[str | None]:
        """The contents that a request since then may have been answered from."""
        if name is None or name == "sum":
            return {name}
        return {version.content for version in self.versions.get(name, []) if version.until >= since}

    def is_right(
        self, name: str | None, prompt: int, since: float, said: Answer, *, sampled: bool = False
    ) -> bool:
        """Whether an answer of a request sent at `since` is the beginning of what is right."""
        num_tokens = len(said.token_ids)
        return any(
            (said.token_ids and said.token_ids == right.token_ids[:num_tokens])
            or (said.text and right.text.startswith(said.text))
            for content in self.allowed(name, since)
            if (right := self.answers[content, prompt, sampled])
        )


def make_world(model: str, adapters: Mapping[str, str]) -> World:
    """Asks for every answer alone, one after the other."""
    draw = random.Random(0)
    prompts = [
        [draw.randrange(100, 40_000) for _ in range((3, 9, 40, 90)[number])] for number in range(NUM_PROMPTS)
    ]
    contents = dict(list(adapters.items())[: NUM_STATIC + 2 * NUM_REPLACED])
    names = list(contents)
    summed = {names[int(name[1:])]: weight for name, weight in SUM.items()}
    specs: dict[str | None, AdapterSpec] = {None: None, "sum": summed, **{name: name for name in names}}
    answers = {}
    settings = {"dtype": "float32", "device": "cpu", "memory": "64MiB", "prefix_caching": False}
    with LLM(model, contents, **settings) as llm:
        for content, spec in specs.items():
            for number, prompt in enumerate(prompts):
                for sampled in (False, True):
                    output = llm.generate([prompt], SAMPLED if sampled else GREEDY, spec, progress=False)[0]
                    answers[content, number, sampled] = Answer(tuple(output.token_ids), output.text)
    return World(contents, prompts, answers)


def broken_copies(directory: str, folder: Path) -> dict[str, Path]:
    """kind → a directory that is no adapter any more."""
    files = {file.name: file.read_bytes() for file in Path(directory).iterdir()}
    weights = files["adapter_model.safetensors"]
    changes = {
        "cut": {"adapter_model.safetensors": weights[: len(weights) // 2]},
        "no JSON": {"adapter_config.json": b"{"},
        "other ranks": {"adapter_config.json": files["adapter_config.json"].replace(b'"r": ', b'"r": 1')},
        "header": {"adapter_model.safetensors": b"\xff" * 8 + weights[8:]},
        "empty": {"adapter_model.safetensors": b""},
        "manifest": {"loraserve.json": b'{"chat_template": "{% for"}'},
    }
    copies = {}
    for kind, change in changes.items():
        copies[kind] = folder / kind.replace(" ", "-")
        copies[kind].mkdir(parents=True, exist_ok=True)
        for name, data in {**files, **change}.items():
            (copies[kind] / name).write_bytes(data)
    return copies
