"""Where adapters may come from at run time, as settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import field_validator

from loraserve.adapters.source import check_template
from loraserve.settings.fields import Memory, Seconds, SettingsModel, Texts, option

DEFAULT_CACHE_DIR = Path("~/.cache/loraserve/adapters")
DEFAULT_CACHE_SIZE = "20GiB"


LORAX_SOURCES = ("hub", "local")  # what its flag of the same name says, and holds here anyway


class AdapterSourceSettings(SettingsModel):
    """A part of `ServeSettings`."""

    adapter_root: Texts = option(
        (),
        "sources",
        "directory under which adapters may be loaded at run time; repeat for more",
        "DIRECTORY",
    )
    hub_repo: Texts | None = option(
        None,
        "sources",
        "pattern of Hub repositories that may be loaded at run time; repeat for more "
        "(default: none where keys are configured, else all)",
        "PATTERN",
    )
    adapter_url: Texts = option(
        (),
        "sources",
        "prefix of s3://, gs://, az://, https:// or oci:// under which adapters may be loaded at run time; "
        "repeat for more",
        "URL",
    )
    adapter_source: str | None = option(
        None,
        "sources",
        "where an adapter that no one has loaded is fetched from when a request names it: a URL or directory "
        "with {name} in it, as s3://bucket/adapters/{name}",
        "TEMPLATE",
        env=("ADAPTER_SOURCE",),
    )
    adapter_source_name: Texts = option(
        ("*",),
        "sources",
        "pattern of names that --adapter-source is asked for; repeat for more",
        "PATTERN",
    )
    adapter_source_refresh_seconds: Seconds = option(
        300.0,
        "sources",
        "how often adapters of --adapter-source that are in use are compared with it; a new version takes "
        "the old one's place, 0 never looks",
        "SECONDS",
    )
    adapter_wait_seconds: Seconds = option(
        60.0,
        "sources",
        "how long a request waits for an adapter that is fetched, before it is told when to come back; its "
        "header X-Adapter-Wait says otherwise",
        "SECONDS",
    )
    adapter_dir: Path | None = option(
        None,
        "sources",
        "directory that is watched: each directory in it is an adapter of that name, loaded, replaced and "
        "unloaded as it changes",
        "DIRECTORY",
    )
    adapter_cache_dir: Path = option(
        DEFAULT_CACHE_DIR,
        "sources",
        "where what is fetched from URLs is kept; processes may share it",
        "DIRECTORY",
    )
    adapter_cache_size: Memory = option(
        DEFAULT_CACHE_SIZE, "sources", "most bytes kept there; what was used longest ago goes first", "SIZE"
    )

    @field_validator("adapter_source", mode="before")
    @classmethod
    def _of_lorax(cls, value: Any) -> Any:
        return None if value in LORAX_SOURCES else value

    @field_validator("adapter_source")
    @classmethod
    def _check_source(cls, value: str | None) -> str | None:
        return None if value is None else check_template(value)
