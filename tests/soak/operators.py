"""Who changes adapters while they are in use, and what happens to the machine."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

import httpx

from tests.soak.callers import Soak
from tests.soak.world import NUM_TRANSIENT

Operator: TypeAlias = "Callable[[Soak, httpx.AsyncClient], Awaitable[None]]"
NOT_WRITTEN = "but not for the next start"  # a change that is made, but can't be written


async def replaces(soak: Soak, client: httpx.AsyncClient) -> None:
    """A name gets other content; requests of before end with what they began with."""
    await soak.is_known.wait()
    name = soak.draw.choice([name for name in soak.world.versions if name.startswith("r")])
    version = soak.world.put(name, soak.world.other_content(name))
    await _load(soak, client, "replaces", name, version.content)


async def loads_and_unloads(soak: Soak, client: httpx.AsyncClient) -> None:
    """A name comes and goes."""
    await soak.is_known.wait()
    name = f"t{soak.draw.randrange(NUM_TRANSIENT)}"
    if any(version.until == float("inf") for version in soak.world.versions.get(name, [])):
        since = time.monotonic()
        response = await client.delete(f"/adapters/{name}")
        if response.status_code in (204, 404) or NOT_WRITTEN in response.text:
            soak.world.settle(name, None)
            soak.report.add("unloads", _outcome(response))
        else:
            soak.refused("unloads", response, since)
        return
    content = soak.draw.choice(list(soak.world.contents))
    soak.world.put(name, content)
    await _load(soak, client, "loads", name, content)


async def pins_and_warms(soak: Soak, client: httpx.AsyncClient) -> None:
    """An adapter is kept for a while; one too many is refused."""
    name, since = f"s{soak.draw.randrange(16)}", time.monotonic()
    for response in (
        await client.put(f"/adapters/{name}/pin", json={"pinned": True}),
        await client.post(f"/adapters/{name}/warm"),
        await client.put(f"/adapters/{name}/pin", json={"pinned": False}),
    ):
        if response.status_code in (200, 400, 429) or NOT_WRITTEN in response.text:
            soak.report.add("pins and warms", _outcome(response))
        else:
            soak.refused("pins and warms", response, since)


class Broken:
    """Loads directories that are no adapters, and takes files away from under adapters that are in use."""

    def __init__(self, copies: dict[str, Path], folder: Path) -> None:
        self._copies = copies
        self._folder = folder

    async def loads(self, soak: Soak, client: httpx.AsyncClient) -> None:
        """Refused by what is wrong, and nothing is left of it."""
        kind, path = soak.draw.choice(list(self._copies.items()))
        since = time.monotonic()
        response = await client.post("/adapters", json={"name": "broken", "source": str(path)})
        if response.status_code == 400 and "error" in response.json():
            soak.report.add(f"loads broken: {kind}", "400 refused")
        else:
            soak.refused(f"loads broken: {kind}", response, since)

    async def vanishes(self, soak: Soak, client: httpx.AsyncClient) -> None:
        """An adapter's files go away, so it can't be read again; then they are back."""
        await soak.is_known.wait()
        name, content = "v0", soak.draw.choice(list(soak.world.contents))
        path = self._folder / "vanishing"
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(soak.world.contents[content], path)
        version = soak.world.put(name, content)
        body = {"lora_name": name, "lora_path": str(path), "load_inplace": True}
        response = await client.post("/v1/load_lora_adapter", json=body)
        soak.world.settle(name, version)
        soak.report.add("vanishes", _outcome(response))
        await asyncio.sleep(soak.draw.uniform(0.0, 0.5))
        shutil.rmtree(path)
        await asyncio.sleep(soak.draw.uniform(0.0, 1.0))


class Disk:
    """A small file system, which is full or read-only for moments; without rights there is none."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.is_there = False
        self.is_well = asyncio.Lock()  # held by who needs it to be

    @contextmanager
    def mounted(self) -> Iterator[None]:
        """`is_there` says whether it could be made."""
        self.path.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "soak", str(self.path)]
        self.is_there = (
            os.geteuid() == 0 and subprocess.run(mount, check=False, capture_output=True).returncode == 0
        )
        try:
            yield
        finally:
            if self.is_there:
                subprocess.run(["umount", "--lazy", str(self.path)], check=True)

    async def fills(self, soak: Soak, _: httpx.AsyncClient) -> None:
        """Nothing more can be written for a moment."""
        filler = self.path / "filler"
        async with self.is_well:
            try:
                with filler.open("wb") as file:
                    while True:
                        file.write(bytes(4096))
                        file.flush()
            except OSError:
                soak.report.add("disk", "full")
            await asyncio.sleep(soak.draw.uniform(0.2, 1.0))
            filler.unlink()
        await asyncio.sleep(0.5)

    async def turns_read_only(self, soak: Soak, _: httpx.AsyncClient) -> None:
        """As a disk that fails; one that is written just then does not turn."""
        async with self.is_well:
            if await self._remount("ro"):
                soak.report.add("disk", "read-only")
                await asyncio.sleep(soak.draw.uniform(0.2, 1.0))
                assert await self._remount("rw")
        await asyncio.sleep(0.5)

    async def _remount(self, mode: str) -> bool:
        command = ["mount", "-o", f"remount,{mode}", str(self.path)]
        process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.DEVNULL)
        return await process.wait() == 0


async def pauses(soak: Soak, _: httpx.AsyncClient) -> None:
    """The machine sleeps for a while."""
    await asyncio.sleep(soak.draw.uniform(2.0, 6.0))
    if not soak.server.was_away(time.monotonic()):
        await soak.server.pause(soak.draw.uniform(0.2, 2.0))
        soak.report.add("pauses", "went on")


async def _load(soak: Soak, client: httpx.AsyncClient, kind: str, name: str, content: str) -> None:
    version = soak.world.versions[name][-1]
    since = time.monotonic()
    body = {"lora_name": name, "lora_path": soak.world.contents[content], "load_inplace": True}
    response = await client.post("/v1/load_lora_adapter", json=body)
    if response.status_code == 200 or NOT_WRITTEN in response.text:
        soak.world.settle(name, version)
        soak.report.add(kind, _outcome(response))
    else:
        soak.refused(kind, response, since)


def _outcome(response: httpx.Response) -> str:
    return f"{response.status_code}" + (" not kept" if NOT_WRITTEN in response.text else "")
