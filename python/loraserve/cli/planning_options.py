"""Options of `plan` and `simulate`: a model, hardware, and who asks for what."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from loraserve.cli.options import add_dtype_option
from loraserve.config import QUANTIZATIONS, EngineConfig
from loraserve.errors import InvalidRequestError
from loraserve.validation.values import check_int

if TYPE_CHECKING:
    from loraserve.planning.workload import WorkloadSpec

MAX_RANKS = 1024
MODEL_HELP = (
    'built-in shapes as llama-3-8b, "smollm2", a directory with config.json, a .gguf file, or a Hub id, '
    "of which only config.json is fetched"
)


def add_hardware_options(parser: argparse.ArgumentParser) -> None:
    """MODEL, what it runs on, and the engine's settings that time and memory depend on."""
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    group = parser.add_argument_group("hardware and engine")
    group.add_argument(
        "--hardware",
        default="this",
        metavar="NAME|FILE",
        help="h100, h200, a100-80gb, l40s, l4, this (measured by --calibrate of `simulate`), or a .json "
        "file (default %(default)s)",
    )
    group.add_argument(
        "--costs", type=Path, metavar="FILE", help="costs of steps that `simulate --calibrate` has written"
    )
    add_dtype_option(group)
    group.add_argument("--quantization", "-q", choices=QUANTIZATIONS, default="auto", help="as of `serve`")
    group.add_argument("--memory", default=EngineConfig.memory, metavar="SIZE", help="as of `serve`")
    for flag, default in (
        ("--max-num-seqs", EngineConfig.max_num_seqs),
        ("--max-batched-tokens", EngineConfig.max_batched_tokens),
        ("--max-model-len", None),
    ):
        group.add_argument(flag, type=int, default=default, metavar="N", help="as of `serve`")


def add_workload_options(parser: argparse.ArgumentParser, *, rate: float) -> None:
    """Who asks for what, and when; `rate` is the default of requests a second."""
    group = parser.add_argument_group("requests")
    group.add_argument(
        "--adapters", type=int, default=0, metavar="N", help="how many there are (default none)"
    )
    group.add_argument(
        "--rank",
        "--ranks",
        dest="ranks",
        type=int,
        nargs="+",
        default=[16],
        metavar="R",
        help="of the adapters, in turns (default 16)",
    )
    group.add_argument(
        "--popularity",
        default="zipf:1.2",
        metavar="LAW",
        help="of the adapters: zipf:EXPONENT, power:ALPHA (S-LoRA's) or uniform (default %(default)s)",
    )
    group.add_argument(
        "--base-share", type=float, default=0.0, metavar="X", help="of requests to the base model (default 0)"
    )
    group.add_argument(
        "--requests-per-second",
        "--rate",
        dest="rate",
        type=float,
        default=rate,
        metavar="X",
        help="arrivals; 0 is all at once (default %(default)s)",
    )
    group.add_argument(
        "--cv",
        type=float,
        default=1.0,
        metavar="X",
        help="burstiness of arrivals; 1 is Poisson's (default 1)",
    )
    for flag, default in (("--prompt", "512"), ("--answer", "128")):
        group.add_argument(
            flag,
            default=default,
            metavar="TOKENS",
            help="N, LOW-HIGH, or lognormal:MEDIAN:SIGMA (default %(default)s)",
        )
    group.add_argument(
        "--shared-prefix",
        type=int,
        default=0,
        metavar="TOKENS",
        help="with which prompts of an adapter begin (default 0)",
    )
    group.add_argument("--prefixes", type=int, default=1, metavar="N", help="of an adapter (default 1)")
    group.add_argument("--seed", type=int, default=42, help="of everything drawn (default %(default)s)")


def planned_config(args: argparse.Namespace, device: str) -> EngineConfig:
    """The engine's settings. Raises InvalidRequestError."""
    return EngineConfig(
        model=args.model,
        device=device,
        dtype=args.dtype,
        quantization=args.quantization,
        memory=args.memory,
        max_num_seqs=args.max_num_seqs,
        max_batched_tokens=args.max_batched_tokens,
        max_model_len=args.max_model_len,
    )


def workload_spec(args: argparse.Namespace, num_requests: int) -> WorkloadSpec:
    """Raises InvalidRequestError."""
    from loraserve.planning.workload import Lengths, Popularity, WorkloadSpec  # noqa: PLC0415

    if len(args.ranks) > MAX_RANKS:
        raise InvalidRequestError(f"{len(args.ranks)} ranks are given, the limit is {MAX_RANKS}")
    for rank in args.ranks:
        check_int("rank", rank, 1, 2**16)
    return WorkloadSpec(
        num_requests=num_requests,
        rate=args.rate,
        cv=args.cv,
        num_adapters=args.adapters,
        popularity=Popularity.parse(args.popularity),
        base_share=args.base_share,
        prompt=Lengths.parse("--prompt", args.prompt),
        answer=Lengths.parse("--answer", args.answer),
        prefix_tokens=args.shared_prefix,
        num_prefixes=args.prefixes,
        seed=args.seed,
    )
