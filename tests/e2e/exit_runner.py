"""Runs programs as processes of their own and prints how each ended, as JSON lines.

Each is forked from this process, which has imported torch and nothing more, so that a hundred runs take
seconds; it then goes on as a program would, to the end of the interpreter.
Usage: python -m tests.e2e.exit_runner JOB.json
"""

import gc
import json
import os
import signal
import sys
import tempfile
from pathlib import Path

import loraserve.async_engine
import loraserve.llm  # noqa: F401 (each program finds it imported)

LIMIT_S = 60  # a program that takes longer hangs


def run(program: str) -> dict[str, object] | None:
    """How it ended; None in the process that is to be the program."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        pid = os.fork()
        if pid == 0:
            signal.alarm(LIMIT_S)
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            return None
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        out.seek(0)
        err.seek(0)
        return {"status": status, "stdout": out.read().decode(), "stderr": err.read().decode()}


def next_program(job: dict[str, object]) -> str | None:
    """Forks for each run; the program in the child, None once all have run."""
    programs: list[str] = job["programs"]  # type: ignore[assignment]
    for program in programs:
        ended = run(program)
        if ended is None:
            return program
        print(json.dumps(ended), flush=True)
    return None


gc.freeze()  # at their ends programs collect what they made, not all of torch, which takes most of a second
program = next_program(json.loads(Path(sys.argv[1]).read_text()))
if program is not None:
    exec(compile(program, "program", "exec"), {"__name__": "__main__"})
