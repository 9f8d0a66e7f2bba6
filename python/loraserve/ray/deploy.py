"""`deploy`: the application on a Ray cluster, that of this machine unless another is named."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn

import ray
from ray import serve

from loraserve.config import AUTO
from loraserve.errors import ModelError
from loraserve.ray.application import build_application, num_gpus_of_each
from loraserve.server.listen import check_can_listen
from loraserve.settings.errors import ConfigError
from loraserve.settings.load import LoadedSettings
from loraserve.settings.schema import ServeSettings

logger = logging.getLogger(__name__)

APP_NAME = "loraserve"
LOCAL_ADDRESS = "127.0.0.1"  # Ray's own ports are for this machine alone
OBJECT_STORE_NBYTES = 100 * 2**20  # nothing but messages
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
STOP_GRACE_S = 10.0


def deploy(loaded: LoadedSettings) -> None:
    """Serves until SIGTERM or SIGINT, then drains.

    Raises:
        ConfigError, ListenError: a setting is wrong, or a port can't be had; nothing was started.
        ModelError: the application can't start; the message is what the replica said.
    """
    settings = loaded.settings
    check_settings(settings)
    is_local = settings.ray_address is None
    try:
        _connect(settings)
        _on_signals(_leave)  # after Ray, which has handlers of its own
        ingress = run_application(settings, is_local)
        addresses = ingress.addresses.remote().result()
        print(_ready_line(settings, addresses), *ingress.facts.remote().result(), sep="\n", flush=True)
        stop = threading.Event()
        _on_signals(lambda *_: stop.set())
        stop.wait()
        logger.info("draining: running requests have %g s", settings.drain_seconds)
        if is_local:
            limit_s = settings.drain_seconds + STOP_GRACE_S
            ingress.stop.remote(settings.drain_seconds).result(timeout_s=limit_s)
        serve.delete(APP_NAME)
    finally:
        if is_local and ray.is_initialized():
            serve.shutdown()
        ray.shutdown()
    logger.info("stopped")


def _on_signals(handler: Callable[[int, FrameType | None], None]) -> None:
    for number in STOP_SIGNALS:
        signal.signal(number, handler)


def _leave(_number: int, _frame: FrameType | None) -> NoReturn:
    """Nothing is running yet."""
    raise SystemExit(0)


def check_settings(settings: ServeSettings) -> None:
    """Raises ConfigError, ListenError: what can be told before anything is started."""
    most = max(settings.replicas or 1, settings.max_replicas or 1)
    if settings.ray_address is None:
        if settings.device != "cuda" and most > 1 and str(settings.memory).lower() == AUTO:
            raise ConfigError(
                "memory is auto, of which each engine of this machine would take most: say how much each may "
                "have, as --memory 4GiB"
            )
        least, cores = settings.replicas or 1, settings.replica_cores or 0
        num_here = len(os.sched_getaffinity(0))
        if least * cores > num_here:
            raise ConfigError(
                f"{least} replicas would have {cores} cores each alone, this machine gives {num_here}: see "
                "--replica-cores"
            )
        for flag, port in (("--http-port", settings.http_port), ("--grpc-port", settings.grpc_port)):
            if port is not None:
                check_can_listen(settings.host, port, flag)


def run_application(settings: ServeSettings, is_local: bool) -> Any:
    """The ingress' handle, once it is ready. Raises ModelError: it does not get there."""
    if is_local:
        serve.start(proxy_location="Disabled")
    else:
        settings = settings.model_copy(update={"http_port": None})  # Serve's proxies listen
    try:
        return serve.run(build_application(settings), name=APP_NAME, route_prefix=None if is_local else "/")
    except RuntimeError as error:
        raise ModelError(f"the replicas do not start: {_cause(error)}") from None


def _messages() -> Iterator[str]:
    """What Serve says of the application's deployments; the engines' first."""
    application = serve.status().applications.get(APP_NAME)
    deployments = {} if application is None else application.deployments
    for name in sorted(deployments):
        yield str(deployments[name].message)


def _connect(settings: ServeSettings) -> None:
    if settings.ray_address is not None:
        ray.init(address=settings.ray_address)
        return
    most = max(settings.replicas or 1, settings.max_replicas or 1)
    ray.init(
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_NBYTES,
        num_cpus=max(os.cpu_count() or 1, most * (settings.replica_cores or 1)),
        logging_level=logging.WARNING,
        _node_ip_address=LOCAL_ADDRESS,
    )
    check_gpus(settings, int(ray.cluster_resources().get("GPU", 0)))


def check_gpus(settings: ServeSettings, num_here: int) -> None:
    """Raises ConfigError: the replicas would wait for GPUs that the machine does not have."""
    least, each = settings.replicas or 1, num_gpus_of_each(settings)
    if least * each > num_here:
        raise ConfigError(
            f"{least} replicas would have {each} GPUs each, Ray finds {num_here} on this machine: see "
            "--replicas and --replica-gpus"
        )


def _ready_line(settings: ServeSettings, addresses: dict[str, str]) -> str:
    scheme = "http" if settings.tls_certificate is None else "https"
    parts = [f"grpc {addresses['grpc']}"] if "grpc" in addresses else []
    parts += [f"http {scheme}://{addresses['http']}"] if "http" in addresses else []
    names = ", ".join(sorted(settings.adapters)) or "none"
    return (
        f"loraserve ready: {', '.join(parts) or 'behind Serve'}, model {settings.model}, "
        f"{settings.replicas or 1} replicas, adapters {names}"
    )


def _cause(error: Exception) -> str:
    """The last line that names an error of loraserve, of several tracebacks."""
    for text in (*_messages(), str(error)):
        lines = [line.strip() for line in text.splitlines() if "loraserve.errors." in line]
        if lines:
            return lines[-1].rpartition("loraserve.errors.")[2][:1000]
    return str(error).strip()[-1000:]
