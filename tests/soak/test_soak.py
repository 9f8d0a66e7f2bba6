"""The real server under all that people and machines do to it, every answer compared with one computed alone.

A minute here; LORASERVE_SOAK_SECONDS makes it longer, LORASERVE_SOAK_SEED chooses another run.
"""

from __future__ import annotations

import asyncio
import os
import random
from pathlib import Path

import httpx
import pytest
import torch

from tests.soak.callers import CALLERS, Soak, keep_calling
from tests.soak.operators import Broken, Disk, loads_and_unloads, pauses, pins_and_warms, replaces
from tests.soak.report import Report
from tests.soak.server import DRAIN_S, READY_S, Idle, Server
from tests.soak.world import World, broken_copies, make_world

SECONDS = float(os.environ.get("LORASERVE_SOAK_SECONDS", "40"))
SEED = int(os.environ.get("LORASERVE_SOAK_SEED", "0"))
ROUND_S = 300.0  # then the server is stopped, and started as it was left
EXIT_S = 10.0  # after the drain: two on a machine that does nothing else
MAX_MORE_FILES = MAX_MORE_THREADS = (
    4  # a connection that is being closed, a thread that was not needed before
)
MAX_MORE_NBYTES = (
    48 * 2**20
)  # between two idle moments: caches of templates, grammars and text that are not full yet


@pytest.fixture(scope="module")
def world(tiny_model: tuple[Path, torch.nn.Module], tiny_adapters: dict[str, str]) -> World:
    return make_world(str(tiny_model[0]), tiny_adapters)


def test_every_answer_is_right_and_nothing_is_left(
    world: World, tiny_model: tuple[Path, torch.nn.Module], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = Report()
    disk = Disk(tmp_path / "disk")
    with disk.mounted():
        roots = (tmp_path / "adapters", Path(next(iter(world.contents.values()))).parent)
        server = Server(str(tiny_model[0]), world.start(), disk.path / "state", roots, tmp_path / "log")
        soak = Soak(world, server, report, random.Random(SEED))
        try:
            asyncio.run(_run(soak, disk, tmp_path))
        finally:
            server.close()
    report.notes.append(f"{SECONDS:g} s, seed {SEED}")
    with capsys.disabled():
        print(f"\n{report.table()}")
    log = (tmp_path / "log").read_text(errors="replace")
    assert not report.faults, report.table()
    assert "Traceback" not in log, log[log.index("Traceback") :][:3000]


async def _run(soak: Soak, disk: Disk, folder: Path) -> None:
    left = SECONDS
    while left > 0:
        seconds = min(left, ROUND_S)
        left -= seconds
        soak.world.start()
        await _begin(soak)
        await _work(soak, disk, folder, 0.25 * seconds)
        before = await soak.server.idle()
        await _work(soak, disk, folder, 0.4 * seconds)
        _compare(soak.report, before, await soak.server.idle())
        await _work(soak, disk, folder, 0.25 * seconds, kills=True)
        await soak.server.idle()
        await _work(soak, disk, folder, 0.1 * seconds, stops=True)


async def _begin(soak: Soak) -> None:
    """Start the server, and learn from it what it took over from before.

    What came from a directory that has changed since can't be told, and goes.
    """
    await soak.server.start()
    async with httpx.AsyncClient(base_url=soak.server.url, timeout=READY_S) as client:
        listed = (await client.get("/adapters")).json()["adapters"]
        for adapter in [one for one in listed if one["path"] not in soak.world.contents.values()]:
            assert (await client.delete(f"/adapters/{adapter['name']}")).status_code in (204, 500)
            listed.remove(adapter)
    soak.world.adopt({adapter["name"]: adapter["path"] for adapter in listed})
    soak.is_known.set()


async def _work(
    soak: Soak, disk: Disk, folder: Path, seconds: float, *, kills: bool = False, stops: bool = False
) -> None:
    """Everybody calls for some seconds; in the middle of it the process is killed, or at the end stopped."""
    stop = asyncio.Event()
    directory = next(iter(soak.world.contents.values()))
    broken = Broken(broken_copies(directory, folder / "adapters"), folder / "adapters")
    operators = [replaces, loads_and_unloads, pins_and_warms, broken.loads, broken.vanishes, pauses]
    if disk.is_there:
        operators += [disk.fills, disk.turns_read_only]
    callers = [*(caller for caller, count in CALLERS.items() for _ in range(count)), *operators]
    tasks = [asyncio.create_task(keep_calling(soak, caller, stop)) for caller in callers]
    try:
        await asyncio.sleep(seconds / 2)
        if kills:
            async with disk.is_well:  # a start without one is refused
                soak.is_known.clear()
                soak.world.expect_restart()
                soak.server.kill()
                soak.report.add("the server", "killed, and started again")
                await _begin(soak)
        await asyncio.sleep(seconds / 2)
        if stops:
            await _stop(soak)
    finally:
        stop.set()
        await asyncio.gather(*tasks)


async def _stop(soak: Soak) -> None:
    """SIGTERM while everybody calls."""
    took_s = await soak.server.stop()
    soak.report.notes.append(f"SIGTERM under load: ended after {took_s:.1f} s, with a drain of {DRAIN_S:g} s")
    if took_s > DRAIN_S + EXIT_S:
        soak.report.fault("the server", f"took {took_s:.1f} s to stop")
    else:
        soak.report.add("the server", "stopped in time")


def _compare(report: Report, before: Idle, after: Idle) -> None:
    """Nothing is left of the work between two idle moments."""
    report.notes.append(f"idle before: {before}, after: {after}")
    for what, more, limit in (
        ("pages", abs(sum(after.pages.values()) - sum(before.pages.values())), 0),
        ("open files", after.num_files - before.num_files, MAX_MORE_FILES),
        ("threads", after.num_threads - before.num_threads, MAX_MORE_THREADS),
        ("bytes of memory", after.rss_nbytes - before.rss_nbytes, MAX_MORE_NBYTES),
    ):
        if more > limit:
            report.fault("idle", f"{more} more {what} than before, {limit} may be")
