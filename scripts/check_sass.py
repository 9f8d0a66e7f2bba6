"""Compiles the CUDA kernels for every supported GPU and checks the machine code; needs no GPU.

    python scripts/check_sass.py [--arch sm_90] [--file attention.cu]

Fails where a kernel spills registers, uses local memory, or lacks the instructions it was written for, and
prints registers and shared memory. Tools come from $NVCC, $CUDA_HOME/bin or PATH, and from $NVDISASM,
$CUDA_HOME/bin or PATH.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

CUDA = Path(__file__).parents[1] / "cuda"
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
STORAGES = ("BF16", "F16")
HEAD_DIMS = (64, 80, 128, 256)

LOADS_128 = r"LDG\.E(\.\w+)*\.128"
STORES_128 = r"STG\.E(\.\w+)*\.128"
TENSOR_CORES = r"HMMA\.16816"
ASYNC_COPIES = r"LDGSTS\.E(\.\w+)*\.128"
REQUIRED: Mapping[str, Sequence[str]] = {
    "lora_decode": (LOADS_128, STORES_128, TENSOR_CORES),
    "lora_prefill_shrink": (ASYNC_COPIES, TENSOR_CORES),
    "lora_prefill_expand": (ASYNC_COPIES, TENSOR_CORES),
    "paged_attention": (LOADS_128, TENSOR_CORES),
    "rms_norm": (LOADS_128, STORES_128),
    "silu_mul": (LOADS_128, STORES_128),
    "rope_and_cache": (LOADS_128, STORES_128),
    "scan_logits": (LOADS_128, STORES_128),
    "draw_tokens": (LOADS_128,),
    "take_sampled": (),
}
# Heads whose halves don't begin on 16 bytes move 8 at a time; none of HEAD_DIMS is one.
LOCAL_MEMORY = r"\b(LDL|STL)\b"


@dataclass(frozen=True)
class Usage:
    """What ptxas says of a kernel; bytes."""

    registers: int
    shared_nbytes: int
    stack_nbytes: int
    spill_nbytes: int


@dataclass(frozen=True)
class Unit:
    """One compilation."""

    file: str
    arch: str
    storage: str
    head_dim: int | None

    @property
    def options(self) -> list[str]:
        head_dim = [] if self.head_dim is None else [f"-DHEAD_DIM={self.head_dim}"]
        return [f"-arch={self.arch}", f"-DSTORAGE_{self.storage}", *head_dim]

    @property
    def variant(self) -> str:
        return self.storage.lower() + ("" if self.head_dim is None else f" D={self.head_dim}")


@dataclass(frozen=True)
class Result:
    unit: Unit
    usages: Mapping[str, Usage]
    problems: Sequence[str]


class MissingToolError(Exception):
    """A program that is not there, and how to get it."""


def parse_ptxas(log: str) -> dict[str, Usage]:
    """Usage by kernel, from what `ptxas -v` prints."""
    usages = {}
    for part in re.split(r"Compiling entry function '", log)[1:]:
        name = part.split("'", 1)[0]
        usages[name] = Usage(
            registers=_number(r"Used (\d+) registers", part),
            shared_nbytes=_number(r"(\d+) bytes smem", part),
            stack_nbytes=_number(r"(\d+) bytes stack frame", part),
            spill_nbytes=_number(r"(\d+) bytes spill stores", part)
            + _number(r"(\d+) bytes spill loads", part),
        )
    return usages


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return int(found[1]) if found else 0


def parse_sass(listing: str) -> dict[str, str]:
    """Instructions by kernel, from what `nvdisasm -c` or `cuobjdump -sass` prints."""
    kernels: dict[str, list[str]] = {}
    name = None
    for line in listing.splitlines():
        header = re.match(r"\.text\.(\w+):|\s*Function : (\w+)", line)
        if header:
            name = header[1] or header[2]
        elif re.match(r"\.section|//-+ ", line):
            name = None
        elif name is not None and re.match(r"\s*/\*[0-9a-f]{4,}\*/", line):
            kernels.setdefault(name, []).append(line)
    return {name: "\n".join(lines) for name, lines in kernels.items()}


def problems_of(usages: Mapping[str, Usage], sass: Mapping[str, str]) -> Iterator[str]:
    """What is wrong with the kernels of one compilation."""
    for name, usage in usages.items():
        code = sass.get(name, "")
        if usage.spill_nbytes:
            yield f"{name} spills registers, {usage.spill_nbytes} bytes"
        elif usage.stack_nbytes or re.search(LOCAL_MEMORY, code):
            yield f"{name} uses local memory, a stack frame of {usage.stack_nbytes} bytes"
        if name not in REQUIRED:
            yield f"{name} is not in REQUIRED of {Path(__file__).name}"
        for pattern in REQUIRED.get(name, ()):
            if not re.search(pattern, code):
                yield f"{name} has no instruction {pattern}"


def find_tool(variable: str, names: Sequence[str]) -> str:
    """The program `variable` names, or the first of `names` in $CUDA_HOME/bin or on PATH."""
    named = os.environ.get(variable)
    if named:
        if not shutil.which(named):
            raise MissingToolError(f"${variable} is {named}, which is no program")
        return named
    home = os.environ.get("CUDA_HOME")
    path = os.pathsep.join([*([str(Path(home) / "bin")] if home else []), os.environ.get("PATH", "")])
    for name in names:
        if found := shutil.which(name, path=path):
            return found
    package = {"NVCC": "nvidia-cuda-nvcc", "NVDISASM": "nvidia-cuda-nvdisasm"}[variable]
    raise MissingToolError(
        f"no {' or '.join(names)} in $CUDA_HOME/bin or on PATH: install the CUDA toolkit, "
        f"or the package {package} and set ${variable}"
    )


def check(unit: Unit, nvcc: str, disassembler: str) -> Result:
    """Compiles a unit and checks its kernels."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = str(Path(folder) / "kernels.cubin")
        source = str(CUDA / unit.file)
        options = ["-std=c++17", "-cubin", "-Xptxas=-v", *unit.options]
        compiled = _run([nvcc, *options, source, "-o", cubin])
        if compiled.returncode != 0:
            return Result(unit, {}, [f"does not compile:\n{compiled.stderr}"])
        arguments = ["-sass"] if Path(disassembler).name.startswith("cuobjdump") else ["-c"]
        disassembled = _run([disassembler, *arguments, cubin])
        if disassembled.returncode != 0:
            return Result(unit, {}, [f"can't be disassembled: {disassembled.stderr}"])
    usages = parse_ptxas(compiled.stderr)
    return Result(unit, usages, list(problems_of(usages, parse_sass(disassembled.stdout))))


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)


def units_of(files: Iterable[str], architectures: Sequence[str]) -> list[Unit]:
    units = []
    for file in files:
        head_dims = HEAD_DIMS if "HEAD_DIM" in (CUDA / file).read_text() else (None,)
        for storage in STORAGES:
            units += [Unit(file, arch, storage, dim) for dim in head_dims for arch in architectures]
    return units


def table(results: Sequence[Result], architectures: Sequence[str]) -> str:
    """Registers / bytes of static shared memory, a row per kernel and variant."""
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for result in results:
        for name, usage in result.usages.items():
            cells = rows.setdefault((name, result.unit.variant), {})
            cells[result.unit.arch] = f"{usage.registers} / {usage.shared_nbytes}"
    lines = [["kernel", "variant", *architectures]]
    lines += [[*key, *(cells.get(arch, "-") for arch in architectures)] for key, cells in rows.items()]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
        for line in [lines[0], ["-" * width for width in widths], *lines[1:]]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--arch", nargs="+", default=list(ARCHITECTURES), metavar="sm_XX")
    parser.add_argument("--file", nargs="+", default=sorted(path.name for path in CUDA.glob("*.cu")))
    arguments = parser.parse_args()
    try:
        nvcc = find_tool("NVCC", ["nvcc"])
        disassembler = find_tool("NVDISASM", ["nvdisasm", "cuobjdump"])
    except MissingToolError as error:
        print(f"check-sass: {error}", file=sys.stderr)
        return 2
    units = units_of(arguments.file, arguments.arch)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(lambda unit: check(unit, nvcc, disassembler), units))
    print("registers / bytes of static shared memory\n")
    print(table(results, arguments.arch))
    problems = [(result.unit, problem) for result in results for problem in result.problems]
    for unit, problem in problems:
        print(f"{unit.file} {unit.arch} {unit.variant}: {problem}", file=sys.stderr)
    print(f"\n{len(units)} compilations, {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
