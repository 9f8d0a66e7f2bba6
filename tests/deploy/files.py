"""The files of `deploy/`, and what servers in them are told."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from fastapi.routing import APIRoute
from loraserve.cli.main import build_parser
from loraserve.cli.serve_options import given_flags
from loraserve.server.http.status import router
from loraserve.settings.load import load_settings
from loraserve.settings.schema import ServeSettings

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
CHART = DEPLOY / "helm/loraserve"
CONFIG = "/etc/loraserve/loraserve.yaml"


def loaded(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def settings_of(
    arguments: Sequence[str], environ: Mapping[str, str], folder: Path, file: str = "{}"
) -> ServeSettings:
    """Of flags, variables and a file at `CONFIG`, which lies in `folder`; fails where they are refused."""
    path = folder / "loraserve.yaml"
    path.write_text(file)
    told = [str(path) if argument == CONFIG else argument for argument in arguments]
    parser, said = build_parser(), io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            parsed = parser.parse_args(["serve", *told])
            flags = given_flags(parsed, parser)
    except SystemExit:
        raise AssertionError(f"{arguments} are refused: {said.getvalue()}") from None
    config = None if parsed.config is None else Path(parsed.config)
    return load_settings(flags.values, environ, config).settings


def check_probes(container: Mapping[str, Any], ports: set[int | str]) -> None:
    """Each asks a route that the server has, on one of these ports."""
    paths = {route.path for route in router.routes if isinstance(route, APIRoute)}
    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        probe = container[name]["httpGet"]
        assert probe["path"] in paths, probe
        assert probe["port"] in ports, probe
    assert container["readinessProbe"]["httpGet"]["path"] == "/ready"
    assert container["livenessProbe"]["httpGet"]["path"] == "/health"
