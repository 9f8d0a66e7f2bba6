"""Several engines behind one address, on Ray Serve (`pip install 'loraserve[ray]'`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.serve import Application


def app(args: dict[str, Any]) -> Application:
    """The application, for `serve run loraserve.ray:app model=smollm2 replicas=2` and serveConfigV2.

    Args:
        args: settings of `loraserve deploy` by name; variables of the environment hold as well.

    Raises:
        ConfigError: a value is wrong.
    """
    from loraserve.ray.application import build_application, settings_of  # noqa: PLC0415 (imports ray)

    return build_application(settings_of(args))
