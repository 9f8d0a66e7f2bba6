"""The workloads: a batch given at once, and the field's streams of requests, as plain values.

slora    S-LoRA (arXiv:2311.03285): Gamma arrivals, adapters by a power law, uniform lengths
punica   Punica (arXiv:2310.18547): batches whose adapters are distinct, uniform, skewed or identical
zipf     adapters by Zipf's law, bursty Gamma arrivals
vtc      VTC (arXiv:2401.00588): two clients, one of which sends twice as much as the other

A generator is a function of its arguments and its seed alone.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from adapter_files import write_adapters

__all__ = ["Request", "Workload", "prompts", "punica", "slora", "vtc", "write_adapters", "zipf"]

VOCAB_SIZE = 49152
FIRST_TOKEN = 100  # below are special tokens

Popularity = Literal["distinct", "uniform", "skewed", "identical"]
POPULARITIES: tuple[Popularity, ...] = ("distinct", "uniform", "skewed", "identical")
Variant = Literal["steady", "on-off", "ramp"]
VARIANTS: tuple[Variant, ...] = ("steady", "on-off", "ramp")


@dataclass(frozen=True)
class Workload:
    """The offline workload: `num_requests` at once, `prompt_tokens` random tokens in, `new_tokens` out."""

    num_requests: int = 32
    prompt_tokens: int = 128
    new_tokens: int = 64
    seed: int = 42

    def prompts(self) -> list[list[int]]:
        generator = torch.Generator().manual_seed(self.seed)
        shape = (self.num_requests, self.prompt_tokens)
        ids: list[list[int]] = torch.randint(FIRST_TOKEN, VOCAB_SIZE, shape, generator=generator).tolist()
        return ids

    def adapters(self, num_distinct: int) -> list[str | None]:
        """One adapter name per request, round robin; 0 distinct is the base model."""
        if num_distinct == 0:
            return [None] * self.num_requests
        return [f"adapter-{i % num_distinct}" for i in range(self.num_requests)]


@dataclass(frozen=True)
class Request:
    """One request of a stream, `arrival_s` seconds after its start; `adapter` is an index."""

    arrival_s: float
    adapter: int
    prompt_tokens: int
    new_tokens: int


def slora(
    num_adapters: int,
    rate: float,
    *,
    duration_s: float = 300.0,
    alpha: float = 1.0,
    cv: float = 1.0,
    lengths: tuple[int, int] = (8, 512),
    seed: int = 42,
) -> list[Request]:
    """rate·duration requests; P(adapter i of n) = ((i+1)/n)^alpha - (i/n)^alpha; uniform lengths [low, high).

    Draws in the order of S-LoRA's own generator, from the same numbers.
    """
    random = np.random.RandomState(seed)
    num_requests = int(rate * duration_s)
    adapters = (random.power(alpha, num_requests) * num_adapters).astype(int)
    prompt_tokens = random.randint(*lengths, num_requests)
    new_tokens = random.randint(*lengths, num_requests)
    arrivals = _gamma_arrivals(random, num_requests, rate, cv)
    return _requests(arrivals, adapters, prompt_tokens, new_tokens)


def zipf(
    num_adapters: int,
    rate: float,
    *,
    duration_s: float = 300.0,
    exponent: float = 1.2,
    cv: float = 2.0,
    lengths: tuple[int, int] = (8, 512),
    seed: int = 42,
) -> list[Request]:
    """P(adapter of popularity k) ∝ k^-exponent; Gamma arrivals whose `cv` above 1 makes bursts.

    Stands for the field's runs on the BurstGPT trace, which is not bundled: the trace's bursts are modelled
    by the Gamma distribution that its paper fits (arXiv:2401.17644), its lengths by S-LoRA's.
    """
    random = np.random.RandomState(seed)
    num_requests = int(rate * duration_s)
    adapters = random.choice(num_adapters, num_requests, p=zipf_shares(num_adapters, exponent))
    prompt_tokens = random.randint(*lengths, num_requests)
    new_tokens = random.randint(*lengths, num_requests)
    arrivals = _gamma_arrivals(random, num_requests, rate, cv)
    return _requests(arrivals, adapters, prompt_tokens, new_tokens)


def zipf_shares(num_adapters: int, exponent: float) -> np.ndarray:
    weights = np.arange(1, num_adapters + 1, dtype=float) ** -exponent
    shares: np.ndarray = weights / weights.sum()
    return shares


def punica(
    popularity: Popularity,
    num_requests: int,
    *,
    batch_size: int = 32,
    max_total: int = 2048,
    seed: int = 42,
) -> list[Request]:
    """Requests that wait from the start, to be served `batch_size` at a time.

    Prompt p = clip(LogNormal(sigma 0.8, loc -1, scale 18), 1, max_total - 2);
    total = max(p + 2, U{0..max_total - 1}).
    """
    random = np.random.RandomState(seed)
    adapters: list[int] = []
    while len(adapters) < num_requests:
        batch = np.repeat(*_numbered(group_sizes(popularity, batch_size)))
        adapters += random.permutation(batch).tolist()
    prompts = np.clip(-1 + 18 * np.exp(0.8 * random.randn(num_requests)), 1, max_total - 2).astype(int)
    totals = np.maximum(prompts + 2, random.randint(0, max_total, num_requests))
    return _requests(np.zeros(num_requests), adapters[:num_requests], prompts, totals - prompts)


def group_sizes(popularity: Popularity, batch_size: int) -> list[int]:
    """How many requests of a batch ask for each adapter."""
    sizes: dict[Popularity, Callable[[int], list[int]]] = {
        "distinct": lambda n: [1] * n,
        "uniform": _even_groups,
        "skewed": _growing_groups,
        "identical": lambda n: [n],
    }
    return sizes[popularity](batch_size)


def _even_groups(batch_size: int) -> list[int]:
    """⌈√N⌉ groups that differ by one at most."""
    count = math.ceil(math.sqrt(batch_size))
    return [batch_size * (i + 1) // count - batch_size * i // count for i in range(count)]


def _growing_groups(batch_size: int) -> list[int]:
    """⌊1.5^k⌋ for k = 0, 1, …; the last group takes what is left."""
    sizes: list[int] = []
    while (left := batch_size - sum(sizes)) > 0:
        sizes.append(min(left, math.floor(1.5 ** len(sizes))))
    return sizes


def vtc(
    variant: Variant = "steady",
    *,
    rates: Sequence[float] = (1.5, 3.0),
    tokens: tuple[int, int] = (256, 256),
    duration_s: float = 360.0,
    phase_s: float = 60.0,
) -> list[Request]:
    """Evenly spaced requests of a client per rate, client i with adapter i.

    on-off: client 0 pauses every other phase; ramp: client 1's rate grows from nothing to twice its mean.
    """
    requests = []
    for client, rate in enumerate(rates):
        for index in range(int(rate * duration_s)):
            arrival_s = index / rate
            if variant == "on-off" and client == 0 and int(arrival_s // phase_s) % 2 == 1:
                continue
            if variant == "ramp" and client == 1:
                arrival_s = math.sqrt(index / (rate * duration_s)) * duration_s
            requests.append(Request(arrival_s, client, *tokens))
    return sorted(requests, key=lambda request: request.arrival_s)


def prompts(requests: Sequence[Request], seed: int = 42) -> list[list[int]]:
    """Random token ids for each request."""
    random = np.random.RandomState(seed)
    return [random.randint(FIRST_TOKEN, VOCAB_SIZE, request.prompt_tokens).tolist() for request in requests]


def _gamma_arrivals(random: np.random.RandomState, count: int, rate: float, cv: float) -> np.ndarray:
    """Gaps from Gamma(shape 1/cv², scale cv²/rate): mean 1/rate, deviation cv/rate."""
    return np.cumsum(random.gamma(1 / cv**2, cv**2 / rate, count))


def _numbered(sizes: list[int]) -> tuple[np.ndarray, list[int]]:
    return np.arange(len(sizes)), sizes


def _requests(
    arrivals: np.ndarray,
    adapters: np.ndarray | Sequence[int],
    prompt_tokens: np.ndarray,
    new_tokens: np.ndarray,
) -> list[Request]:
    rows = zip(arrivals, adapters, prompt_tokens, new_tokens, strict=True)
    return [Request(float(a), int(i), int(p), int(n)) for a, i, p, n in rows]
