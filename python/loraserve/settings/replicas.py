"""How many engines `loraserve deploy` runs, and what each has of the machines, as settings."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from loraserve.settings.adapter_sources import AdapterSourceSettings
from loraserve.settings.fields import Count, option

MAX_REPLICAS = 4096


class ReplicaSettings(AdapterSourceSettings):
    """A part of `ServeSettings`; one server has none of it."""

    replicas: Count | None = option(
        None,
        "replicas",
        "engines that share the requests, at least (default: 1); for `loraserve deploy`",
        "N",
        most=MAX_REPLICAS,
    )
    max_replicas: Count | None = option(
        None,
        "replicas",
        "start further engines as requests queue, up to so many (default: as --replicas)",
        "N",
        most=MAX_REPLICAS,
    )
    replica_target_requests: Count | None = option(
        None,
        "replicas",
        "requests under way in an engine, above which another one starts (default: --max-num-seqs)",
        "N",
    )
    replica_cores: Count | None = option(
        None,
        "replicas",
        "cores of each engine, which it has alone: --threads, its place on them and Ray's reservation",
        "N",
        most=4096,
    )
    replica_gpus: Annotated[int, Field(ge=0)] = option(
        0, "replicas", "GPUs that Ray reserves for each engine (with --device cuda at least 1)", "N", most=64
    )
    ray_address: str | None = option(
        None,
        "replicas",
        "Ray cluster to deploy to, as auto or ray://host:10001 (default: one of this machine, for as long as "
        "the command runs)",
        "ADDRESS",
    )

    @property
    def is_replicated(self) -> bool:
        """Whether anything was said that only several engines can do."""
        own = ReplicaSettings.model_fields.keys() - AdapterSourceSettings.model_fields.keys()
        return any(getattr(self, name) != ReplicaSettings.model_fields[name].default for name in own)
