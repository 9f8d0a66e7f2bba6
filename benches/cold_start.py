"""From the start of a process to an engine that is ready, and to its first token."""

import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

# Says when the engine is ready, then when it has answered.
PROGRAM = """
import sys
from loraserve import LLM, SamplingParams
llm = LLM(sys.argv[1])
print("ready", flush=True)
llm.generate([[1, 2, 3]], SamplingParams(max_tokens=1, temperature=0.0))
print("answered", flush=True)
"""


def measure(model: Path, repeats: int) -> dict[str, Any]:
    """Medians over processes; the files are in the page cache, as after a first start."""
    runs = [_start(model) for _ in range(repeats + 1)][1:]
    ready, answered = (statistics.median(moments) for moments in zip(*runs, strict=True))
    return {"model": model.name, "ready_s": ready, "first_token_s": answered}


def _start(model: Path) -> tuple[float, float]:
    command = [sys.executable, "-c", PROGRAM, str(model)]
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        moments = []
        for expected in ("ready", "answered"):
            line = process.stdout.readline().strip()
            if line != expected:
                raise RuntimeError(f"the engine's process said {line!r}, not {expected!r}")
            moments.append(time.perf_counter() - start)
    return moments[0], moments[1]
