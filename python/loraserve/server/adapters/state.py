"""`AdapterState`: adapters added at run time, kept in one file of `--state-dir` for the next start.

What the configuration names is never in it: that is loaded as configured at every start.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import stat
import threading
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from loraserve.engine.workers import Workers
from loraserve.errors import CapacityError, StateError
from loraserve.server.observe.logs import log_event
from loraserve.settings.entries import AdapterSettings
from loraserve.settings.errors import problems
from loraserve.validation.files import expanded, new_file, replace_file

FILE_NAME = "adapters.json"
LOCK_NAME = "lock"
FORMAT = "loraserve adapters"
VERSION = 2
READ_VERSIONS = (1, 2)  # the first had no generations
MAX_ADAPTERS = 2**16
MAX_FILE_NBYTES = 64 * 2**20
MAX_PUBLISHED = 16  # generations of a name that are kept, the newest

if TYPE_CHECKING:
    from loraserve.engine.versions import GenerationInfo

logger = logging.getLogger(__name__)


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)


_Number = Annotated[int, Field(ge=1, le=2**31 - 1)]
_Share = Annotated[float, Field(ge=0, le=1)]


class KeptPublication(_Part):
    """A generation that was published; `adapter` is how it is loaded again, None where it can't be."""

    number: _Number
    hash: str
    source: str
    since: float
    adapter: AdapterSettings | None = None


class KeptShadow(_Part):
    """Which generation requests are copied to, and which fraction of them."""

    generation: _Number
    fraction: Annotated[float, Field(ge=0.0001, le=1)]


class KeptGenerations(_Part):
    """Of a name: the highest number, the current one, 0 if unloaded, and what was published, in order."""

    last: _Number
    current: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0
    published: Annotated[list[KeptPublication], Field(max_length=MAX_PUBLISHED)] = []
    shares: dict[_Number, _Share] = {}
    shadow: KeptShadow | None = None


class _Content(_Part):
    format: str
    version: int
    adapters: dict[str, AdapterSettings]
    generations: dict[str, KeptGenerations] = {}


class AdapterState:
    """The adapters that were added at run time; this process's alone until `close`.

    Changes are made on the event loop, in order, and written on threads: the newest that is asked for lasts.

    Args:
        directory: made where it is not there.
        configured: names that the configuration gives; changes to them are not kept.

    Raises:
        StateError: the directory can't be written, another server has it, or its file is not ours to read.
    """

    def __init__(self, directory: Path, configured: Collection[str] = ()) -> None:
        self._directory = expanded(directory).absolute()
        self.path = self._directory / FILE_NAME
        self.configured = frozenset(configured)
        self._write_lock = threading.Lock()
        self._writes = Workers("writes of kept adapters", 1, MAX_ADAPTERS)
        self._turn = self._written_turn = 0
        self._earlier: dict[tuple[str, str], AdapterSettings] = {}  # by name and directory
        self._lock_file = _locked(self._directory)
        try:
            self._adapters, self._generations = _read(self.path)
            for name, known in self._generations.items():
                for one in known.published:
                    if one.adapter is not None:
                        self.remember(name, one.source, one.adapter)
            _check_writable(self._directory)
        except BaseException:
            os.close(self._lock_file)
            raise

    @property
    def adapters(self) -> Mapping[str, AdapterSettings]:
        """All that is kept, those that could not be loaded at this start as well."""
        return MappingProxyType(self._adapters)

    def restored(self) -> dict[str, AdapterSettings]:
        """What a start loads beside what is configured."""
        return {name: kept for name, kept in self._adapters.items() if name not in self.configured}

    @property
    def generations(self) -> Mapping[str, KeptGenerations]:
        """What is known of generations, those of configured names as well."""
        return MappingProxyType(self._generations)

    def note_generations(self, name: str, infos: Sequence[GenerationInfo]) -> None:
        """What is known of a name's now; it is written with the next change, or by `flush`."""
        has_part = sorted(infos, key=lambda one: (_has_part(one), one.is_kept, one.number))
        shown = sorted(has_part[-MAX_PUBLISHED:], key=lambda one: one.number)
        shadow = next((one for one in shown if one.shadow is not None and one.shadow.fraction), None)
        kept = KeptGenerations(
            last=max(one.number for one in infos),
            current=next(one.number for one in infos if one.is_current),
            published=[
                KeptPublication(
                    number=one.number,
                    hash=one.hash,
                    source=one.source,
                    since=one.since,
                    adapter=self._earlier.get((name, one.source)) if one.is_kept else None,
                )
                for one in shown
            ],
        )
        if name not in self.configured:
            kept.shares = {one.number: one.share for one in shown if one.share}
            if shadow is not None and shadow.shadow is not None:
                kept.shadow = KeptShadow(generation=shadow.number, fraction=shadow.shadow.fraction)
        self._set_generations(name, kept)

    def _set_generations(self, name: str, kept: KeptGenerations) -> None:
        if self._generations.get(name) == kept:
            return
        self._generations.pop(name, None)
        self._generations[name] = kept  # the newest last
        while len(self._generations) > MAX_ADAPTERS:
            del self._generations[next(iter(self._generations))]
        self._turn += 1

    async def flush(self, name: str) -> None:
        """Write what was noted of a name. Raises StateError: the file can't be written."""
        if self._is_behind:
            await self._save(name)

    def check_room(self, name: str) -> None:
        """Raises CapacityError: there are too many to keep one more."""
        if name not in self._adapters and len(self._adapters) >= MAX_ADAPTERS:
            raise CapacityError(
                f"{self.path} keeps {len(self._adapters)} adapters, the limit is {MAX_ADAPTERS}, unload some"
            )

    async def keep(self, name: str, adapter: AdapterSettings) -> None:
        """Raises StateError: the file can't be written; the next change or `close` tries again."""
        if self._is_kept_elsewhere(name) or (self._adapters.get(name) == adapter and not self._is_behind):
            return
        self._adapters[name] = adapter
        await self._save(name)

    def remember(self, name: str, directory: str, adapter: AdapterSettings) -> None:
        """How to load what lies there as this name, should it become current again."""
        self._earlier[name, directory] = adapter
        while len(self._earlier) > MAX_ADAPTERS:
            del self._earlier[next(iter(self._earlier))]

    async def follow(self, name: str, directory: str) -> None:
        """Keep for a name what was remembered of a directory. Raises as `keep` does."""
        current, earlier = self._adapters.get(name), self._earlier.get((name, directory))
        if earlier is not None:
            of_name = {} if current is None else {"pin": current.pin, "weight": current.weight}
            await self.keep(name, earlier.model_copy(update=of_name))
        elif current is not None and current.path != directory:
            reason = "how it was loaded is not known, so the next start loads what was kept last"
            log_event(logger, "change not kept", level=logging.WARNING, adapter=name, reason=reason)

    async def set_pinned(self, name: str, is_pinned: bool) -> None:
        """Raises as `keep` does; a name that is not kept is left alone."""
        kept = self._adapters.get(name)
        if kept is not None:
            await self.keep(name, kept.model_copy(update={"pin": is_pinned}))

    async def drop(self, name: str) -> None:
        """Load it no more at the next start; raises as `keep` does, and leaves alone what is not kept."""
        is_kept = not self._is_kept_elsewhere(name) and self._adapters.pop(name, None) is not None
        if is_kept or self._is_behind:
            await self._save(name)

    async def forget(self, name: str) -> None:
        """As `drop`, and of its generations only how many there were: numbers go on should it come back."""
        known = self._generations.get(name)
        if known is not None:
            self._set_generations(name, KeptGenerations(last=known.last))
        await self.drop(name)

    def close(self) -> None:
        """Writes what could not be written before, and lets others have the directory."""
        try:
            if self._is_behind:
                self._write(self._turn, self._adapters, self._generations)
        except StateError as error:
            log_event(logger, "adapters not kept", level=logging.ERROR, reason=str(error))
        finally:
            os.close(self._lock_file)
            self._writes.close()

    @property
    def _is_behind(self) -> bool:
        return self._written_turn < self._turn

    def _is_kept_elsewhere(self, name: str) -> bool:
        if name in self.configured:
            reason = "the configuration names it, and the next start loads what that says"
            log_event(logger, "change not kept", level=logging.WARNING, adapter=name, reason=reason)
        return name in self.configured

    async def _save(self, name: str) -> None:
        self._turn += 1
        try:
            await self._writes.run(self._write, self._turn, dict(self._adapters), dict(self._generations))
        except StateError as error:
            reason = str(error)
            log_event(logger, "adapter not kept", level=logging.ERROR, adapter=name, reason=reason)
            raise StateError(f"adapter {name!r} is changed, but not for the next start: {reason}") from error

    def _write(
        self, turn: int, adapters: dict[str, AdapterSettings], generations: dict[str, KeptGenerations]
    ) -> None:
        """Replaces the file in one step; what is older than what it holds already is left out."""
        with self._write_lock:
            if turn <= self._written_turn:
                return
            data = _encoded(adapters, generations)
            if len(data) > MAX_FILE_NBYTES:
                reason = f"{self.path} would have {len(data)} bytes, the limit is {MAX_FILE_NBYTES}"
                log_event(logger, "generations not kept", level=logging.WARNING, reason=reason)
                data = _encoded(adapters, {})
            if len(data) > MAX_FILE_NBYTES:
                raise StateError(
                    f"{self.path} would have {len(data)} bytes, the limit is {MAX_FILE_NBYTES}: unload "
                    "adapters with large manifests"
                )
            try:
                replace_file(self.path, data, 0o600)
            except OSError as error:
                raise StateError(
                    f"{self.path} can't be written: {error.strerror}; mend that, the next change writes all"
                ) from error
            self._written_turn = turn


def _has_part(one: GenerationInfo) -> bool:
    """Whether requests get it, or copies of them."""
    is_shadow = one.shadow is not None and one.shadow.fraction > 0.0
    return one.is_current or one.share > 0.0 or is_shadow


def _locked(directory: Path) -> int:
    """The open lock file; whoever has it is the only server of this directory."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock_file = os.open(directory / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise _not_usable(directory, error) from error
    try:
        fcntl.flock(lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock_file)
        if not isinstance(error, BlockingIOError):
            raise _not_usable(directory, error) from error
        raise StateError(
            f"state directory {directory} is another server's, give each its own with --state-dir"
        ) from None
    return lock_file


def _check_writable(directory: Path) -> None:
    probe = new_file(directory / FILE_NAME)
    try:
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise _not_usable(directory, error) from error


def _not_usable(directory: Path, error: OSError) -> StateError:
    return StateError(
        f"state directory {directory} can't be used: {error.strerror}, "
        "choose one that can be written with --state-dir"
    )


def _read(path: Path) -> tuple[dict[str, AdapterSettings], dict[str, KeptGenerations]]:
    """(adapters, generations) that the file holds, nothing if it is not there. Raises StateError."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise _damaged(path, "is not a file")
        with path.open("rb") as file:
            data = file.read(MAX_FILE_NBYTES + 1)
    except FileNotFoundError:
        return {}, {}
    except OSError as error:
        raise _damaged(path, f"can't be read: {error.strerror}") from error
    if len(data) > MAX_FILE_NBYTES:
        raise _damaged(path, f"has more than {MAX_FILE_NBYTES} bytes, the limit")
    try:
        value: Any = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"is damaged, it is not JSON: {error}") from None
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise _damaged(path, f"is not loraserve's, its format is not {FORMAT!r}")
    if value.get("version") not in READ_VERSIONS:
        version = repr(value.get("version"))[:40]
        raise _damaged(path, f"has version {version}, this loraserve reads versions up to {VERSION}")
    try:
        content = _Content.model_validate(value)
    except ValidationError as error:
        raise _damaged(path, f"is damaged: {problems(error)}") from None
    for what, named in (("adapters", content.adapters), ("histories", content.generations)):
        if len(named) > MAX_ADAPTERS:
            raise _damaged(path, f"keeps {len(named)} {what}, the limit is {MAX_ADAPTERS}")
    return content.adapters, content.generations


def _damaged(path: Path, what: str) -> StateError:
    return StateError(
        f"{path} {what}; mend it, move it away to start without the adapters it keeps, "
        "or choose another directory with --state-dir"
    )


def _encoded(adapters: Mapping[str, AdapterSettings], generations: Mapping[str, KeptGenerations]) -> bytes:
    content = {
        "format": FORMAT,
        "version": VERSION,
        "adapters": {name: one.model_dump(exclude_defaults=True) for name, one in adapters.items()},
        "generations": {name: one.model_dump(exclude_defaults=True) for name, one in generations.items()},
    }
    return json.dumps(content, indent=1).encode()
