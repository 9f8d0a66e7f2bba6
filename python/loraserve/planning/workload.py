"""`Workload`: who asks for what, and when, drawn from the field's distributions or read from a trace.

popularity  zipf:S (P(k) ∝ k^-S), uniform, power:ALPHA (S-LoRA's), or base (no adapter)
lengths     N, LOW-HIGH (uniform, both included), lognormal:MEDIAN:SIGMA, all in tokens
arrivals    gaps of a Gamma distribution, 1 / rate in the mean with a coefficient of variation; 1 is Poisson
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from loraserve.errors import InvalidRequestError
from loraserve.validation.files import read_regular_file
from loraserve.validation.values import check_float, check_int

MAX_REQUESTS = 20_000_000
MAX_ADAPTERS = 100_000_000
MAX_TOKENS = 10_000_000
MAX_LINE_NBYTES = 2**12
MAX_TRACE_NBYTES = 2**31
BASE_MODEL = -1

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Lengths:
    """A distribution of tokens, as `spec` words it."""

    spec: str
    _kind: str
    _values: tuple[float, ...]

    @staticmethod
    def parse(name: str, spec: str) -> Lengths:
        """Of what a user wrote. Raises InvalidRequestError, which calls it `name`."""
        if found := re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", spec):
            low = int(found[1])
            high = low if found[2] is None else int(found[2])
            check_int(f"{name} {spec!r}", low, 1, MAX_TOKENS)
            check_int(f"{name} {spec!r}", high, low, MAX_TOKENS)
            return Lengths(spec, "uniform", (low, high))
        if found := re.fullmatch(r"lognormal:([\d.]{1,12}):([\d.]{1,12})", spec):
            try:
                median, sigma = float(found[1]), float(found[2])
            except ValueError:
                median = sigma = -1.0
            check_float(f"{name}: the median of {spec!r}", median, 1.0, MAX_TOKENS)
            check_float(f"{name}: sigma of {spec!r}", sigma, 0.0, 4.0)
            return Lengths(spec, "lognormal", (median, sigma))
        raise InvalidRequestError(
            f"{name} is {spec!r:.100}, it must be N, LOW-HIGH or lognormal:MEDIAN:SIGMA, in tokens"
        )

    def draw(self, random: np.random.RandomState, count: int, most: int | Ints) -> Ints:
        """[count], none longer than `most`, which is one number or [count]."""
        first, second = self._values
        if self._kind == "uniform":
            drawn = random.randint(int(first), int(second) + 1, count).astype(np.int64)
        else:
            drawn = np.round(first * np.exp(second * random.randn(count))).astype(np.int64)
        return np.clip(drawn, 1, most)

    @property
    def expected_tokens(self) -> int:
        """What must fit: the longest of a range, the median of a distribution with a tail."""
        return int(self._values[1] if self._kind == "uniform" else self._values[0])

    @property
    def mean(self) -> float:
        """In tokens, before any is cut."""
        first, second = self._values
        return (first + second) / 2 if self._kind == "uniform" else first * float(np.exp(second**2 / 2))


@dataclass(frozen=True)
class Popularity:
    """How requests are spread over adapters, as `spec` words it; ids are in order of popularity."""

    spec: str
    _kind: str
    _exponent: float

    @staticmethod
    def parse(spec: str) -> Popularity:
        """Raises InvalidRequestError."""
        kind, _, value = spec.partition(":")
        if kind in ("uniform", "base") and not value:
            return Popularity(spec, kind, 0.0)
        if kind in ("zipf", "power") and re.fullmatch(r"\d{1,3}(\.\d{1,9})?", value):
            exponent = float(value)
            check_float(f"popularity {spec!r}", exponent, 0.0, 100.0, open_low=kind == "power")
            return Popularity(spec, kind, exponent)
        raise InvalidRequestError(
            f"popularity is {spec!r:.100}, it must be zipf:EXPONENT, power:ALPHA, uniform or base"
        )

    def shares(self, num_adapters: int) -> Floats:
        """[num_adapters] of all requests, the most popular first; of none where all go to the base model."""
        check_int("adapters", num_adapters, 0, MAX_ADAPTERS)
        if self._kind == "base" or num_adapters == 0:
            return np.zeros(0)
        if self._kind == "uniform":
            return np.full(num_adapters, 1 / num_adapters)
        if self._kind == "zipf":
            weights = np.arange(1, num_adapters + 1, dtype=np.float64) ** -self._exponent
            return np.asarray(weights / weights.sum())
        bounds = (np.arange(num_adapters + 1) / num_adapters) ** self._exponent
        return np.asarray(np.diff(bounds))

    def draw(self, random: np.random.RandomState, count: int, num_adapters: int) -> Ints:
        """[count] ids, or `BASE_MODEL`."""
        shares = self.shares(num_adapters)
        if not len(shares):
            return np.full(count, BASE_MODEL, dtype=np.int64)
        drawn = np.searchsorted(np.cumsum(shares), random.random_sample(count), side="right")
        return np.minimum(drawn, num_adapters - 1).astype(np.int64)


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Requests in order of arrival; arrays of one length, times in seconds from the start.

    `adapter` has ids, `BASE_MODEL` for none. Requests of one adapter with equal `prefix` begin with the same
    `prefix_tokens` tokens.
    """

    at_s: Floats
    adapter: Ints
    prompt_tokens: Ints
    answer_tokens: Ints
    prefix: Ints
    prefix_tokens: Ints

    def __len__(self) -> int:
        return len(self.at_s)

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """As `_core.simulate` takes them."""
        counts = ("prompt_tokens", "answer_tokens", "prefix", "prefix_tokens")
        found: dict[str, npt.NDArray[Any]] = {
            "at_s": np.ascontiguousarray(self.at_s, dtype=np.float64),
            "adapter": np.ascontiguousarray(self.adapter, dtype=np.int64),
        }
        return found | {name: np.ascontiguousarray(getattr(self, name), dtype=np.uint32) for name in counts}


@dataclass(frozen=True, kw_only=True)
class WorkloadSpec:
    """A workload to be drawn.

    Args:
        num_requests: how many.
        rate: requests a second; 0 is all at once.
        cv: coefficient of variation of the gaps between arrivals.
        num_adapters, popularity: who is asked for.
        base_share: of requests that go to the base model.
        prompt, answer: lengths.
        prefix_tokens: with which prompts begin, each prefix the same ones; 0 is none.
        num_prefixes: an adapter has so many, drawn evenly.
        seed: of everything that is drawn.
    """

    num_requests: int
    rate: float = 0.0
    cv: float = 1.0
    num_adapters: int = 0
    popularity: Popularity = Popularity("uniform", "uniform", 0.0)
    base_share: float = 0.0
    prompt: Lengths = Lengths("128", "uniform", (128, 128))
    answer: Lengths = Lengths("64", "uniform", (64, 64))
    prefix_tokens: int = 0
    num_prefixes: int = 1
    seed: int = 42

    def __post_init__(self) -> None:
        check_int("requests", self.num_requests, 1, MAX_REQUESTS)
        check_float("rate", self.rate, 0.0, 1e9)
        check_float("cv", self.cv, 0.0, 100.0)
        check_int("adapters", self.num_adapters, 0, MAX_ADAPTERS)
        check_float("base_share", self.base_share, 0.0, 1.0)
        check_int("prefix_tokens", self.prefix_tokens, 0, MAX_TOKENS)
        check_int("prefixes", self.num_prefixes, 1, 2**29)
        check_int("seed", self.seed, 0, 2**32 - 1)

    def draw(self, max_model_len: int) -> Workload:
        """Long tails are cut: a prompt to what the longest or median answer leaves of the context, an answer
        to what its prompt leaves.

        Raises:
            InvalidRequestError: ranges, medians or the shared prefix don't fit into the context.
        """
        most_prompt = self._most_prompt(max_model_len)
        random, count = np.random.RandomState(self.seed), self.num_requests
        adapter = self.popularity.draw(random, count, self.num_adapters)
        if self.base_share > 0:
            adapter[random.random_sample(count) < self.base_share] = BASE_MODEL
        prompts = self.prompt.draw(random, count, most_prompt)
        if self.prefix_tokens:
            prompts = np.maximum(prompts, self.prefix_tokens + 1)
        answers = self.answer.draw(random, count, max_model_len - prompts)
        at_s = self._arrivals(random)
        prefix = random.randint(0, self.num_prefixes, count).astype(np.int64)
        prefix_tokens = np.full(count, self.prefix_tokens, dtype=np.int64)
        return Workload(
            at_s=at_s,
            adapter=adapter,
            prompt_tokens=prompts,
            answer_tokens=answers,
            prefix=prefix,
            prefix_tokens=prefix_tokens,
        )

    def _most_prompt(self, max_model_len: int) -> int:
        prompt, answer = self.prompt.expected_tokens, self.answer.expected_tokens
        if self.prefix_tokens >= prompt:
            prompt = self.prefix_tokens + 1
        if prompt + answer > max_model_len:
            raise InvalidRequestError(
                f"prompts of {prompt} tokens and answers of {answer} don't fit into the context of "
                f"{max_model_len}: give shorter ones (--prompt, --answer, --shared-prefix) or more context"
            )
        return max_model_len - answer

    def _arrivals(self, random: np.random.RandomState) -> Floats:
        if self.rate == 0:
            return np.zeros(self.num_requests)
        if self.cv == 0:
            return np.arange(self.num_requests) / self.rate
        gaps = random.gamma(1 / self.cv**2, self.cv**2 / self.rate, self.num_requests)
        return np.asarray(np.cumsum(gaps))


def read_trace(path: Path) -> Workload:
    """Of a file of JSON lines, a request each: {"at": seconds, "adapter": name or null, "prompt_tokens": N,
    "answer_tokens": N, "prefix": name, "prefix_tokens": N}; the last two may be left out.

    Raises:
        InvalidRequestError: the file can't be read, a line is wrong, or times fall.
    """
    adapters: dict[str, int] = {}
    prefixes: dict[str, int] = {}
    rows: list[tuple[float, int, int, int, int, int]] = []
    for number, values in _lines(path):
        rows.append(_row(path, number, values, adapters, prefixes))
        if len(rows) > 1 and rows[-1][0] < rows[-2][0]:
            raise InvalidRequestError(
                f"{path}, line {number}: at is {rows[-1][0]:g} after {rows[-2][0]:g}, requests must be in "
                "order of their times"
            )
    if not rows:
        raise InvalidRequestError(f"{path} has no requests")
    columns = list(zip(*rows, strict=True))
    at_s = np.array(columns[0], dtype=np.float64)
    adapter, prompts, answers, prefix, prefix_tokens = (np.array(c, dtype=np.int64) for c in columns[1:])
    return Workload(
        at_s=at_s - at_s[0],
        adapter=adapter,
        prompt_tokens=prompts,
        answer_tokens=answers,
        prefix=prefix,
        prefix_tokens=prefix_tokens,
    )


def _lines(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        data = read_regular_file(path, MAX_TRACE_NBYTES)
        for number, line in enumerate(BytesIO(data), start=1):
            if len(line) > MAX_LINE_NBYTES or number > MAX_REQUESTS:
                raise InvalidRequestError(
                    f"{path}, line {number}: the limits are {MAX_REQUESTS} lines of {MAX_LINE_NBYTES} bytes"
                )
            if line.strip():
                yield number, _parsed(path, number, line)
    except InvalidRequestError:
        raise
    except OSError as error:
        raise InvalidRequestError(f"trace {path} can't be read: {error}") from None


def _parsed(path: Path, number: int, line: bytes) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        reason = f"{error.msg} at column {error.colno}"
    except (ValueError, RecursionError) as error:
        reason = str(error)
    raise InvalidRequestError(f"{path}, line {number} is not JSON: {reason}")


def _row(
    path: Path, number: int, values: Any, adapters: dict[str, int], prefixes: dict[str, int]
) -> tuple[float, int, int, int, int, int]:
    where = f"{path}, line {number}"
    if not isinstance(values, dict):
        raise InvalidRequestError(f"{where}: expected an object")
    known = {"at", "adapter", "prompt_tokens", "answer_tokens", "prefix", "prefix_tokens"}
    if unknown := values.keys() - known:
        raise InvalidRequestError(f"{where}: unknown fields {', '.join(sorted(map(str, unknown)))}")
    if missing := [name for name in ("at", "prompt_tokens", "answer_tokens") if name not in values]:
        raise InvalidRequestError(f"{where}: {missing[0]} is missing")
    at: Any = values["at"]
    adapter, prefix = values.get("adapter"), values.get("prefix")
    check_float(f"{where}: at", at, -1e12, 1e12)
    for name, value in (("adapter", adapter), ("prefix", prefix)):
        if value is not None and not isinstance(value, str):
            raise InvalidRequestError(f"{where}: {name} is {value!r:.100}, it must be a text or null")
    prompt: Any = values["prompt_tokens"]
    answer: Any = values["answer_tokens"]
    prefix_tokens: Any = values.get("prefix_tokens", 0)
    check_int(f"{where}: prompt_tokens", prompt, 1, MAX_TOKENS)
    check_int(f"{where}: answer_tokens", answer, 1, MAX_TOKENS)
    check_int(f"{where}: prefix_tokens", prefix_tokens, 0, prompt)
    return (
        float(at),
        BASE_MODEL if adapter is None else adapters.setdefault(adapter, len(adapters)),
        prompt,
        answer,
        0 if prefix is None else prefixes.setdefault(prefix, len(prefixes)),
        prefix_tokens,
    )
