"""From settings to a Serve application: engines, and the ingress over them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, RequestRouterConfig

from loraserve.adapters.source import parse_lora_adapters
from loraserve.ray.ingress import Ingress
from loraserve.ray.replica import EngineReplica
from loraserve.settings.errors import ConfigError
from loraserve.settings.foreign import adapter_values
from loraserve.settings.load import load_settings
from loraserve.settings.schema import ServeSettings

MAX_ONGOING = 100_000  # replicas and ingress have limits of their own, and errors that say so
MAX_STARTS = 3  # of a replica that can't load its model
HEALTH_PERIOD_S = 5.0
HEALTH_LIMIT_S = 60.0
QUIET = {"log_level": "WARNING", "enable_access_log": False}  # requests have a log of their own


def settings_of(args: Mapping[str, Any]) -> ServeSettings:
    """Settings as `serve run` and serveConfigV2 give them, by name; the environment's hold as well.

    `adapters` is {name: source}, or text as `LORA_ADAPTERS` has it. Ports are listened on by themselves only
    where they are given: Serve's proxy takes HTTP.

    Raises:
        ConfigError: a value is wrong.
    """
    values = {name.replace("-", "_"): value for name, value in args.items()}
    unknown = values.keys() - ServeSettings.model_fields.keys()
    if unknown:
        raise ConfigError(f"{min(unknown)!r} is no setting, `loraserve deploy --help` lists them")
    if isinstance(values.get("adapters"), str):
        values["adapters"] = adapter_values(parse_lora_adapters(values["adapters"]))
    settings = load_settings(values, os.environ).settings
    given = settings.model_fields_set
    ports = {name: None for name in ("http_port", "grpc_port") if name not in given}
    return settings.model_copy(update=ports)


def build_application(settings: ServeSettings) -> Application:
    """The application; its deployments are called "engines" and "ingress"."""
    engines = serve.deployment(
        EngineReplica,
        name="engines",
        max_ongoing_requests=MAX_ONGOING,
        max_constructor_retry_count=MAX_STARTS,
        health_check_period_s=HEALTH_PERIOD_S,
        health_check_timeout_s=HEALTH_LIMIT_S,
        graceful_shutdown_timeout_s=settings.drain_seconds,
        ray_actor_options=_resources(settings),
        logging_config=QUIET,
        request_router_config=RequestRouterConfig(request_router_class="loraserve.ray.router:RankedRouter"),
        **_scale(settings),
    )
    ingress = serve.deployment(
        Ingress,
        name="ingress",
        num_replicas=1,
        max_ongoing_requests=MAX_ONGOING,
        max_constructor_retry_count=MAX_STARTS,
        graceful_shutdown_timeout_s=settings.drain_seconds,
        ray_actor_options={"num_cpus": 0},
        logging_config=QUIET,
    )
    return ingress.bind(settings, engines.bind(_of_a_replica(settings)))


def num_gpus_of_each(settings: ServeSettings) -> int:
    """What Ray reserves for a replica."""
    return max(settings.replica_gpus, 1) if settings.device == "cuda" else settings.replica_gpus


def _resources(settings: ServeSettings) -> dict[str, Any]:
    return {"num_cpus": settings.replica_cores or 1, "num_gpus": num_gpus_of_each(settings)}


def _scale(settings: ServeSettings) -> dict[str, Any]:
    least = settings.replicas or 1
    most = settings.max_replicas or least
    if most == least:
        return {"num_replicas": least}
    target = settings.replica_target_requests or settings.max_num_seqs
    return {
        "autoscaling_config": AutoscalingConfig(
            min_replicas=least, initial_replicas=least, max_replicas=most, target_ongoing_requests=target
        )
    }


def _of_a_replica(settings: ServeSettings) -> ServeSettings:
    """Without what the ingress has alone; no key leaves it."""
    own: dict[str, Any] = {
        "api_key": None,
        "admin_key": None,
        "keys_file": None,
        "keys": (),
        "state_dir": None,
    }
    if settings.replica_cores is not None:
        own["threads"] = settings.replica_cores
    return settings.model_copy(update=own)
