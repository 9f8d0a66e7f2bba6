"""Guesses change no answer: whatever is guessed, answers are those of one token after another."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from loraserve import LLM, Grammar, SamplingParams, _core
from loraserve.engine import model_runner
from loraserve.errors import InvalidRequestError
from loraserve.request import RequestOutput
from loraserve.sampling.sampler import Sampled

from tests.e2e.oracle import generate_greedy
from tests.engine.test_run_ahead import Asked, QueueBackend

NUM_REQUESTS = 40
MAX_NUM_SEQS = 6  # so that steps have room for guesses

SCHEMA = {
    "type": "object",
    "properties": {"customer_name": {"type": "string", "maxLength": 8}, "order_number": {"type": "integer"}},
    "required": ["customer_name", "order_number"],
    "additionalProperties": False,
}
GRAMMARS = [
    Grammar("json_schema", SCHEMA),
    Grammar("regex", r"(abc abc )+[0-9]{2}"),
    Grammar("choice", ["left left left", "left left right"]),
]


def questions(names: list[str], tokenizer: Any) -> Asked:
    """Every parameter that looks at the tokens before, over prompts that repeat themselves."""
    draw = random.Random(3)
    asked = Asked([], [], [])
    for index in range(NUM_REQUESTS):
        words = [draw.randrange(5, 200) for _ in range(draw.choice((1, 3, 20)))]
        asked.prompts.append(words * draw.choice((1, 2, 4)))
        asked.adapters.append(draw.choice([None, *names]))
        settings = draw.choice(
            (
                {},
                {"temperature": 1.0},
                {"temperature": 0.4, "top_p": 0.9},
                {"repetition_penalty": 1.3},
                {"temperature": 0.7, "frequency_penalty": 0.3, "presence_penalty": 0.2},
                {"logit_bias": {17: 4.0, 220: 3.0}, "temperature": 0.5},
                {"stop_token_ids": draw.sample(range(49152), 8000), "min_tokens": 5},
                {"stop": tokenizer.decode([draw.randrange(300, 2000)]), "top_k": 2, "temperature": 1.0},
                {"grammar": draw.choice(GRAMMARS)},
                {"grammar": draw.choice(GRAMMARS), "temperature": 1.0, "min_tokens": 4},
                {"logprobs": 3, "temperature": 0.3},
                {"logprobs": 0, "grammar": GRAMMARS[0]},
            )
        )
        settings = {"max_tokens": draw.randrange(1, 60), "temperature": 0.0, "seed": index, **settings}
        asked.params.append(SamplingParams(ignore_eos=draw.random() < 0.5, **settings))
    return asked


@contextmanager
def engine(model: str, adapters: dict[str, str], **settings: Any) -> Iterator[LLM]:
    settings = {"dtype": "float32", "device": "cpu", "max_num_seqs": MAX_NUM_SEQS, **settings}
    with LLM(model, adapters, **settings) as llm:
        yield llm
        assert llm.stats().num_kv_pages == 0


def ask(llm: LLM, asked: Asked) -> list[tuple[object, ...]]:
    """All that a caller sees of the answers, but for what was guessed."""
    return [seen(output) for output in llm.generate(*asked, progress=False)]


def seen(output: RequestOutput) -> tuple[object, ...]:
    usage = output.usage
    assert usage is not None
    return output.token_ids, output.text, output.finish_reason, output.logprobs, usage.completion_tokens


class Guesser:
    """A scheduler that is given guesses for every sequence before each step: right, wrong, or both in turn.

    Request ids count from the first it sees; `answers` are by their order.
    """

    def __init__(self, llm: LLM, answers: list[list[int]]) -> None:
        self._llm, self._answers = llm, answers
        self._draw = random.Random(11)
        self._scheduler: _core.Scheduler = llm._engine._scheduler
        self._first: int | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._scheduler, name)

    def submit(self, *arguments: Any) -> int:
        request_id = self._scheduler.submit(*arguments)
        self._first = request_id if self._first is None else self._first
        return request_id

    def schedule(self) -> _core.SchedulerOutput:
        for request_id in list(self._llm._engine._sequences):
            answer = self._answers[(request_id - (self._first or 0)) % NUM_REQUESTS]
            num_tokens = self._llm._engine._sampler.num_output_tokens(request_id) or 0
            guesses = answer[num_tokens:][: self._draw.randrange(12)]
            if self._draw.random() < 0.4:
                guesses.insert(self._draw.randrange(len(guesses) + 1), self._draw.randrange(49152))
            if self._draw.random() < 0.2:
                guesses += [self._draw.choice((0, 2, 49151)) for _ in range(4)]
            self._scheduler.give_draft(request_id, guesses)
        return self._scheduler.schedule()


@pytest.mark.parametrize("memory", ["1MiB", "32MiB"])  # 1 MiB: someone must wait, or give up what it has
def test_answers_are_those_of_one_token_after_another(
    tiny_model: tuple[Path, torch.nn.Module], tiny_adapters: dict[str, str], memory: str
) -> None:
    adapters = dict(list(tiny_adapters.items())[:6])
    with engine(str(tiny_model[0]), adapters, memory=memory) as llm:
        asked = questions(list(adapters), llm._engine.runner.model.tokenizer)
        expected = ask(llm, asked)
        assert {reason for _, _, reason, _, _ in expected} == {"length", "stop"}
        assert llm.stats().num_draft_tokens == 0
    with engine(str(tiny_model[0]), adapters, memory=memory, speculate="ngram") as llm:
        assert ask(llm, asked) == expected
        stats = llm.stats()
        assert 40 < stats.num_accepted_tokens < stats.num_draft_tokens
        guesser = Guesser(llm, [token_ids for token_ids, *_ in expected])
        llm._engine._scheduler = guesser  # type: ignore[assignment]
        assert ask(llm, asked) == expected
        assert llm.stats().num_accepted_tokens > stats.num_accepted_tokens + 100
        assert ask(llm, asked) == expected, "what is cached is what was computed for certain"


def test_greedy_answers_are_those_of_transformers(
    smollm2_path: str, hf_smollm2: Any, adapter_paths: dict[str, str], peft_oracle: Any
) -> None:
    prompt = "red green blue red green blue red green blue red"
    with engine(smollm2_path, adapter_paths, speculate="ngram", quantization="none", memory="1GiB") as llm:
        names = [None, *list(adapter_paths)[:3]]
        outputs = llm.generate(
            [prompt] * len(names), SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True), names
        )
        assert llm.stats().num_accepted_tokens > 10
    assert outputs[0].token_ids == generate_greedy(hf_smollm2[0], outputs[0].prompt_token_ids, 24)
    for name, output in zip(names, outputs, strict=True):
        expected = peft_oracle.greedy(output.prompt_token_ids, output.token_ids, name)
        assert output.token_ids == expected[: len(output.token_ids)], name


def test_a_keyword_that_a_grammar_leaves_no_choice_of_is_guessed(
    tiny_model: tuple[Path, torch.nn.Module],
) -> None:
    params = SamplingParams(max_tokens=100, temperature=1.0, seed=2, grammar=GRAMMARS[0])
    outputs = []
    for speculate in ("off", "ngram"):
        with engine(str(tiny_model[0]), {}, memory="32MiB", speculate=speculate) as llm:
            outputs.append(llm.generate("Who?", params)[0])
            keyword = llm._engine.runner.model.tokenizer.encode('customer_name": "')
    assert seen(outputs[0]) == seen(outputs[1])
    usage = outputs[1].usage
    assert usage is not None
    assert usage.accepted_prediction_tokens >= len(keyword) - 2


def test_usage_and_stats_count_what_was_guessed(tiny_model: tuple[Path, torch.nn.Module]) -> None:
    params = SamplingParams(max_tokens=40, temperature=0.0, logit_bias={17: 100.0}, ignore_eos=True)
    with engine(str(tiny_model[0]), {}, memory="32MiB", speculate="ngram") as llm:
        usage = llm.generate([[5, 6, 7]], params)[0].usage
        stats = llm.stats()
    assert usage is not None
    assert usage.accepted_prediction_tokens == stats.num_accepted_tokens
    assert usage.rejected_prediction_tokens == stats.num_draft_tokens - stats.num_accepted_tokens
    assert 30 < usage.accepted_prediction_tokens < 40


def test_a_request_may_ask_for_no_guesses(tiny_model: tuple[Path, torch.nn.Module]) -> None:
    params = {"max_tokens": 20, "temperature": 0.0, "ignore_eos": True, "logit_bias": {17: 100.0}}
    with engine(str(tiny_model[0]), {}, memory="32MiB", speculate="ngram") as llm:
        for grammar in (None, Grammar("regex", "(abc )+")):
            llm.generate([[5, 6, 7]], SamplingParams(speculate=False, grammar=grammar, **params))
        assert llm.stats().num_draft_tokens == 0
        llm.generate([[5, 6, 7]], SamplingParams(speculate=True, **params))
        assert llm.stats().num_draft_tokens > 0


def test_guesses_that_nobody_makes_are_refused(tiny_model: tuple[Path, torch.nn.Module]) -> None:
    with (
        engine(str(tiny_model[0]), {}, memory="32MiB") as llm,
        pytest.raises(InvalidRequestError, match=r"speculate is true.*start it with --speculate ngram"),
    ):
        llm.generate([[5, 6, 7]], SamplingParams(speculate=True))


def test_a_device_that_runs_ahead_refuses_to_guess(
    tiny_model: tuple[Path, torch.nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_runner, "open_backend", lambda config: QueueBackend(config, torch.float32))
    with pytest.raises(InvalidRequestError, match=r"speculate is 'ngram', which only a CPU can do"):
        LLM(str(tiny_model[0]), dtype="float32", speculate="ngram")


def test_what_can_not_be_sampled_behind_a_guess_ends_nobody(
    tiny_model: tuple[Path, torch.nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    params = SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True)
    prompts = [[5, 6, 7] * 4, [9, 8] * 6]
    with engine(str(tiny_model[0]), {}, memory="32MiB") as llm:
        expected = [seen(output) for output in llm.generate(prompts, params)]
    draw, num_lost = random.Random(1), 0
    with engine(str(tiny_model[0]), {}, memory="32MiB", speculate="ngram") as llm:
        sampler = llm._engine._sampler
        sample = sampler.sample

        def losing(logits: torch.Tensor, request_ids: Any, guesses: Any) -> Any:
            pending = sample(logits, request_ids, guesses)

            class Losing:
                def result(self) -> Sampled:
                    nonlocal num_lost
                    sampled = pending.result()
                    for row in range(1, len(guesses)):
                        if guesses[row - 1] >= 0 and draw.random() < 0.3:
                            sampled.is_finite[row] = False
                            num_lost += 1
                    return sampled

            return Losing()

        monkeypatch.setattr(sampler, "sample", losing)
        assert [seen(output) for output in llm.generate(prompts, params)] == expected
    assert num_lost > 5
