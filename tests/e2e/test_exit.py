"""However a program that made engines leaves: it ends with its own status and says nothing of ours.

LORASERVE_EXIT_RUNS sets how often each program is run: threads meet the end at different places.
"""

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

NUM_RUNS = int(os.environ.get("LORASERVE_EXIT_RUNS", "1"))

PREAMBLE = """
import asyncio, atexit, gc, os, signal, sys, threading, time
from loraserve import LLM, AsyncEngine, EngineConfig, GenerateRequest, SamplingParams
from loraserve.errors import LoraserveError
MODEL, ADAPTERS = {model!r}, {adapters!r}
SETTINGS = dict(dtype="float32", device="cpu", memory="16MiB", num_threads=2)
SHORT = SamplingParams(max_tokens=3, temperature=0, ignore_eos=True)
LONG = SamplingParams(max_tokens=200, temperature=0, ignore_eos=True)
def make(**more): return LLM(MODEL, ADAPTERS, **SETTINGS, **more)
def request(params): return GenerateRequest(prompt="hello", params=params)
def ask(llm, adapter=None): return llm.generate("hello", SHORT, adapter)[0].token_ids
def work(llm):
    while True: llm.generate(["hello"] * 8, LONG, list(ADAPTERS)[:8])
def daemon(target, *args): threading.Thread(target=target, args=args, daemon=True).start()
def interrupt_in(seconds): threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT)).start()
"""


@dataclass(frozen=True)
class Program:
    """`says`: the last line of what is printed; `error`: how the last line of stderr starts, "" if silent.

    Where Python may be interrupted while it prints the error, that stands anywhere (`is_cut`).
    """

    name: str
    code: str
    status: int = 0
    says: str = ""
    error: str = ""
    is_cut: bool = False


PROGRAMS = [
    Program("the end of the script", "llm = make(); ask(llm)"),
    Program("closed", "llm = make(); ask(llm); llm.close(); llm.close()"),
    Program("with", "with make() as llm: ask(llm)"),
    Program("deleted", "llm = make(); ask(llm); del llm"),
    Program("one after the other", "for _ in range(2):\n    llm = make(); ask(llm); del llm"),
    Program("one replaced by the next", "for _ in range(3):\n    llm = make(); ask(llm)"),
    Program("two at once", "one, two = make(), make(); ask(one); ask(two)"),
    Program("never asked", "llm = make()"),
    Program(
        "an iteration left open",
        "llm = make(); outputs = llm.generate_iter((request(LONG) for _ in iter(int, 1)), read_ahead=9)\n"
        "next(outputs)",
    ),
    Program("an exception", "llm = make(); ask(llm); raise ValueError('own')", 1, error="ValueError: own"),
    Program("sys.exit", "llm = make(); ask(llm); sys.exit(7)", 7),
    Program("sys.exit in a with", "with make() as llm: sys.exit(7)", 7),
    Program("os._exit", "llm = make(); ask(llm); os._exit(9)", 9),
    Program(
        "an exception in a generation",
        "llm = make()\ndef fail(*_): raise ValueError('own')\n"
        "signal.signal(signal.SIGALRM, fail); signal.setitimer(signal.ITIMER_REAL, 0.05); work(llm)",
        1,
        error="ValueError: own",
    ),
    Program(
        "Ctrl-C in a generation",
        "llm = make(); interrupt_in(0.05); work(llm)",
        -signal.SIGINT,
        error="KeyboardInterrupt",
    ),
    Program(
        "Ctrl-C twice",
        "llm = make(); interrupt_in(0.05); interrupt_in(0.06); work(llm)",
        -signal.SIGINT,
        error="KeyboardInterrupt",
        is_cut=True,
    ),
    Program(
        "Ctrl-C in a generation of a notebook",
        "llm = make(); before = ask(llm, 'a0')\nfor _ in range(3):\n    interrupt_in(0.03)\n"
        "    try: work(llm)\n    except KeyboardInterrupt: pass\n"
        "print(ask(llm, 'a0') == before, llm.stats().num_running)",
        says="True 0",
    ),
    Program(
        "Ctrl-C while a model is loaded",
        "interrupt_in(0.01)\nwhile True: llm = make()",
        -signal.SIGINT,
        error="KeyboardInterrupt",
    ),
    *(
        Program(
            f"{call} in a signal handler of a generation",
            "llm = make(); said = []\n"
            "def handle(*_):\n"
            f"    try: llm.{call}\n"
            "    except LoraserveError as error: said.append(str(error).partition(':')[0])\n"
            "signal.signal(signal.SIGALRM, handle); signal.setitimer(signal.ITIMER_REAL, 0.02)\n"
            "while not said: ask(llm, 'a0')\n"
            "print(*said)",
            says="this thread is in a call of the same LLM",
        )
        for call in ("generate('hello')", "load_adapter('b', ADAPTERS['a1'])", "stats()")
    ),
    Program(
        "close in a signal handler of a generation",
        "llm = make(); signal.signal(signal.SIGALRM, lambda *_: llm.close())\n"
        "signal.setitimer(signal.ITIMER_REAL, 0.05)\n"
        "try: work(llm)\n"
        "except LoraserveError as error: print(type(error).__name__)",
        says="EngineStoppedError",
    ),
    Program("a cycle", "llm = make(); llm.itself = llm; ask(llm); del llm"),
    Program("a cycle, collected", "llm = make(); llm.itself = llm; ask(llm); del llm; gc.collect()"),
    Program(
        "a finalizer that closes",
        "class Own:\n    def __init__(self): self.llm = make()\n"
        "    def __del__(self): self.llm.close()\nown = Own(); ask(own.llm)",
    ),
    Program(
        "daemon threads in generations", "llm = make()\nfor _ in range(3): daemon(work, llm)\ntime.sleep(0.1)"
    ),
    Program(
        "a daemon thread in checks of adapters",
        "llm = make()\ndef load():\n    while True:\n        llm.load_adapter('x', ADAPTERS['a1'])\n"
        "        llm.unload_adapter('x')\ndaemon(load); time.sleep(0.1)",
    ),
    Program(
        "daemon threads in loads",
        "llm = make()\ndef load(name):\n    while True: llm.warm_adapter(name)\n"
        "for name in ADAPTERS: daemon(load, name)\ntime.sleep(0.02)",
    ),
    Program("daemon threads that make engines", "for _ in range(2): daemon(make)\ntime.sleep(0.05)"),
    Program("a load under way", "llm = make()\nfor name in ADAPTERS: llm._engine.adapters.warm(name)"),
    Program(
        "copies of requests under way",
        "llm = make()\nllm.load_adapter('s', ADAPTERS['a1'])\n"
        "llm.load_adapter('s', ADAPTERS['a2'], replace=True, shadow=1.0)\n"
        "llm.generate([[7, 8, 9]] * 16, adapter='s')",
    ),
    Program("a generation under way", "llm = make(); daemon(work, llm); time.sleep(0.05); sys.exit(3)", 3),
    Program(
        "a thread that goes on after the main thread",
        "llm = make()\ndef late():\n    time.sleep(0.2); print(len(ask(llm, 'a3')))\n"
        "threading.Thread(target=late).start()",
        says="3",
    ),
    Program(
        "an engine made by a thread after the main thread",
        "def late():\n    time.sleep(0.2); print(len(ask(make(), 'a3')))\n"
        "threading.Thread(target=late).start()",
        says="3",
    ),
    Program(
        "asked at exit, after the engine",
        "def ask_late():\n    try: ask(llm)\n    except LoraserveError as error: print(error)\n"
        "atexit.register(ask_late); llm = make(); ask(llm)",
        says="the interpreter exits, the engine takes no new requests",
    ),
    Program(
        "asked at exit, before it", "llm = make(); atexit.register(lambda: print(len(ask(llm))))", says="3"
    ),
    Program("closed at exit", "atexit.register(lambda: llm.close()); llm = make(); ask(llm)"),
    Program(
        "a model that isn't there",
        "make(); LLM('/nowhere', **SETTINGS)",
        1,
        error="loraserve.errors.ModelError: ",
    ),
    Program(
        "an adapter that isn't there",
        "ADAPTERS['z'] = '/nowhere'; llm = make()",
        1,
        error="loraserve.errors.Adapter",
    ),
    Program(
        "a failed construction, caught",
        "ADAPTERS['z'] = '/nowhere'\nfor _ in range(3):\n"
        "    try: make()\n    except LoraserveError as error: kept = error\nprint('caught')",
        says="caught",
    ),
    Program("no memory", "LLM(MODEL, memory='1KiB')", 1, error="loraserve.errors.CapacityError: "),
    Program(
        "an async engine, not shut down",
        "async def main():\n    engine = AsyncEngine(EngineConfig(model=MODEL, **SETTINGS))\n"
        "    return [delta async for delta in await engine.submit(request(SHORT))]\n"
        "print(len(asyncio.run(main())) > 0)",
        says="True",
    ),
    Program(
        "an async engine in a stream",
        "async def main():\n    engine = AsyncEngine(EngineConfig(model=MODEL, **SETTINGS))\n"
        "    async for delta in await engine.submit(request(LONG)): sys.exit(4)\n"
        "asyncio.run(main())",
        4,
    ),
    Program(
        "an async engine on a daemon thread",
        "async def main():\n    engine = AsyncEngine(EngineConfig(model=MODEL, **SETTINGS))\n"
        "    while True:\n"
        "        async for _ in await engine.submit(request(LONG)): pass\n"
        "daemon(lambda: asyncio.run(main())); time.sleep(0.3)",
    ),
    Program(
        "Ctrl-C in asyncio",
        "async def main():\n    engine = AsyncEngine(EngineConfig(model=MODEL, **SETTINGS))\n"
        "    interrupt_in(0.05)\n    while True:\n"
        "        async for _ in await engine.submit(request(LONG)): pass\n"
        "asyncio.run(main())",
        -signal.SIGINT,
        error="KeyboardInterrupt",
    ),
    Program(
        "a client that was left open",
        "from loraserve.client import Client\nclient = Client('127.0.0.1:1')\n"
        "try: client.generate('hello')\nexcept LoraserveError as error: print(type(error).__name__)",
        says="EngineStoppedError",
    ),
]

FORKED = [
    Program("a child that exits", "sys.exit(5)", 5),
    Program("a child that ends", "pass"),
    Program("a child that fails", "raise ValueError('own')", 1, error="ValueError: own"),
    Program("a child that closes", "llm.close(); llm.close()"),
    Program("a child that deletes", "del llm; gc.collect()"),
    *(
        Program(
            f"a child that calls {call}",
            f"llm.{call}",
            1,
            error="loraserve.errors.EngineStoppedError: the engine belongs to process",
        )
        for call in (
            "generate('hello')",
            "chat([dict(role='user', content='hello')])",
            "generate('hello', adapter='a0')",
            "load_adapter('b', ADAPTERS['a1'])",
            "unload_adapter('a0')",
            "warm_adapter('a0')",
            "pin_adapter('a0')",
            "adapters()",
            "stats()",
            "info()",
        )
    ),
]

# The parent forks while its engine works, on threads that hold its locks now and then.
FORK = """
llm = make(); daemon(work, llm)
pid = os.fork()
if pid:
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os._exit(status & 255) if status >= 0 else os.kill(os.getpid(), -status)
"""


def run_all(
    programs: list[str], model: Path, adapters: dict[str, str], directory: Path
) -> list[dict[str, Any]]:
    preamble = PREAMBLE.format(model=str(model), adapters=dict(list(adapters.items())[:8]))
    job = directory / "job.json"
    job.write_text(json.dumps({"programs": [preamble + program for program in programs]}))
    command = [sys.executable, "-m", "tests.e2e.exit_runner", str(job)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in result.stdout.splitlines()]


def differences(program: Program, ended: dict[str, Any]) -> list[str]:
    """What is not as the program means it."""
    found = []
    if ended["status"] != program.status:
        found.append(f"status {ended['status']}, not {program.status}")
    said = ended["stdout"].splitlines()
    if (said[-1] if said else "") != program.says:
        found.append(f"said {said}, not {program.says!r}")
    lines = ended["stderr"].splitlines()
    last = lines[-1] if lines else ""
    is_own = last.startswith(program.error) if program.error else not lines
    ignored = "Exception ignored"
    if program.is_cut:  # an interrupt may meet Python itself while it waits for threads
        is_own |= program.error in ended["stderr"]
        ignored = "Exception ignored in: (?!<module 'threading')"
    if not is_own or re.search(ignored, ended["stderr"]):
        found.append(f"stderr {ended['stderr']!r}, not {program.error!r}")
    return [f"{program.name}: {difference}" for difference in found]


@pytest.mark.parametrize(("programs", "before"), [(PROGRAMS, ""), (FORKED, FORK)], ids=["programs", "forked"])
def test_a_program_ends_with_its_own_status(
    programs: list[Program],
    before: str,
    tiny_model: tuple[Path, torch.nn.Module],
    tiny_adapters: dict[str, str],
    tmp_path: Path,
) -> None:
    runs = [program for program in programs for _ in range(NUM_RUNS)]
    ended = run_all([before + program.code for program in runs], tiny_model[0], tiny_adapters, tmp_path)
    found = [text for program, end in zip(runs, ended, strict=True) for text in differences(program, end)]
    assert not found, "\n".join(found)


# Nothing but "cycle" and "async in a stream" may need the collector of cycles.
DROPS = {
    "del": "llm = make(); ask(llm); fill(llm._engine); del llm",
    "close": "llm = make(); ask(llm); fill(llm._engine); llm.close(); kept.append(llm); del llm",
    "replaced": "llm = make(); ask(llm, 'a0'); fill(llm._engine); llm = None",
    "cycle": "llm = make(); llm.itself = llm; fill(llm._engine); del llm; gc.collect()",
    "failed": "try: make(max_model_len=10**9)\nexcept LoraserveError: pass",
    "failed at an adapter": "try: LLM(MODEL, {'z': '/nowhere'}, **SETTINGS)\nexcept LoraserveError: pass",
    "async": "engine = AsyncEngine(EngineConfig(model=MODEL, **SETTINGS)); fill(engine._engine); del engine",
    "async in a stream": """
async def main():
    engine = AsyncEngine(EngineConfig(model=MODEL, **SETTINGS)); fill(engine._engine)
    async for delta in await engine.submit(request(LONG)): return
asyncio.run(main()); gc.collect()""",
}

# Prints whether eight engines of 64 MiB leave threads behind, or a quarter of their memory: the tokenizers of
# engines that are closed and kept take some 75 MiB.
LEFT = """
SETTINGS["memory"] = "64MiB"
kept = []
def fill(engine): engine.runner.pool.fill_(1)
def drop():
{drop}
gc.disable()
def state():
    with open("/proc/self/statm") as file: pages = int(file.read().split()[1])
    return len(os.listdir("/proc/self/task")), pages * os.sysconf("SC_PAGESIZE") / 2**20
make().close(); drop(); time.sleep(0.5)
before = state()
for _ in range(8): drop()
deadline = time.monotonic() + 20
while time.monotonic() < deadline:
    if "gc." in {drop!r}: gc.collect()
    left = [now - then for now, then in zip(state(), before)]
    if left[0] <= 0 and left[1] < 128: break
    time.sleep(0.05)
print(left[0] <= 0, left[1] < 128, file=sys.stdout if left[0] <= 0 and left[1] < 128 else sys.stderr)
print(left, file=sys.stderr) if left[0] > 0 or left[1] >= 128 else None
"""


def test_a_dropped_engine_leaves_neither_threads_nor_memory(
    tiny_model: tuple[Path, torch.nn.Module], tiny_adapters: dict[str, str], tmp_path: Path
) -> None:
    programs = [
        LEFT.format(drop="\n".join(f"    {line}" for line in code.splitlines())) for code in DROPS.values()
    ]
    ended = run_all(programs, tiny_model[0], tiny_adapters, tmp_path)
    assert {
        name: (end["status"], end["stdout"], end["stderr"]) for name, end in zip(DROPS, ended, strict=True)
    } == {name: (0, "True True\n", "") for name in DROPS}
