"""`RegistryAccess`: what a registry of containers asks of who reads from it, and the credentials for that.

The challenge of the distribution protocol (distribution.github.io/distribution/spec/auth/token): a 401 names
a realm, which gives a token for a user name and password, or for nothing.
"""

from __future__ import annotations

import base64
import binascii
import ipaddress
import json
import os
import re
from pathlib import Path
from typing import Any, Final

import httpx

from loraserve.remote.http_answers import body, check_status, typed_errors
from loraserve.remote.location import AllowedLocations, RemoteLocation
from loraserve.remote.store import DeniedError, WrongAnswerError
from loraserve.validation.files import expanded, read_regular_file

CREDENTIALS: Final = (
    "credentials for it come from `auths` in the file REGISTRY_AUTH_FILE, or in config.json of DOCKER_CONFIG "
    "or ~/.docker"
)
MAX_CONFIG_NBYTES: Final = 2**20
MAX_TOKEN_NBYTES: Final = 2**16
DOCKER_HUB: Final = "docker.io"
_DOCKER_HUB_KEY: Final = "index.docker.io"
_PARAMETER = re.compile(r'([a-z]+)="([^"]*)"')


class RegistryAccess:
    """Of one repository, for one fetch.

    Args:
        location: the artifact.
        allowed: web servers that may be the realm of a registry elsewhere.
        client: asks the realm.
    """

    def __init__(self, location: RemoteLocation, allowed: AllowedLocations, client: httpx.Client) -> None:
        self._location = location
        self._allowed = allowed
        self._client = client
        self.headers: dict[str, str] = {}  # for requests to the registry, and nobody else

    def answer(self, challenge: str) -> None:
        """Get what a 401 asks for (its header WWW-Authenticate) into `headers`.

        Raises:
            DeniedError: there is nothing that it could be.
            WrongAnswerError: it sends to a realm where no credentials may go.
            TransientError: the realm does not answer.
        """
        scheme, _, rest = challenge.partition(" ")
        basic = _credentials(self._location)
        if scheme.lower() == "basic" and basic is not None:
            self.headers = {"Authorization": f"Basic {basic}"}
        elif scheme.lower() == "bearer":
            self.headers = {"Authorization": f"Bearer {self._token(dict(_PARAMETER.findall(rest)), basic)}"}
        else:
            raise DeniedError(f"it answered with status 401; {CREDENTIALS}")

    def _token(self, challenge: dict[str, str], basic: str | None) -> str:
        realm = _url(challenge.get("realm", ""))
        self._check_realm(realm)
        scope = f"repository:{self._location.path}:pull"  # and not what the registry says
        query = {"scope": scope} | ({"service": challenge["service"]} if "service" in challenge else {})
        headers = {} if basic is None else {"Authorization": f"Basic {basic}"}
        asked = self._client.stream("GET", realm, params=query, headers=headers)
        with typed_errors(), asked as answer:
            check_status(answer, CREDENTIALS)
            data = body(answer, MAX_TOKEN_NBYTES, "its token")
        try:
            told = json.loads(data)
            token = told.get("token") or told["access_token"]
        except (ValueError, KeyError, AttributeError, RecursionError):
            token = None
        if not isinstance(token, str) or not token.isascii() or not token.isprintable():
            raise WrongAnswerError("its realm gives no token")
        return token

    def _check_realm(self, realm: httpx.URL) -> None:
        """The registry's own host, one of its domain, or one that is allowed."""
        if not realm.scheme:
            raise WrongAnswerError("it asks for a token and names no realm that gives one")
        host = self._location.host.rpartition(":")[0] or self._location.host
        is_local = is_loopback(self._location.host)
        if realm.scheme != "https" and not (realm.scheme == "http" and is_local and is_loopback(realm.host)):
            raise WrongAnswerError(f"it sends to {realm.host or realm.scheme} for a token, without https")
        same = realm.host == host or (not _is_address(host) and _domain(realm.host) == _domain(host))
        if same or (is_local and is_loopback(realm.host)):
            return
        port = "" if realm.port is None else f":{realm.port}"
        target = RemoteLocation(realm.scheme, f"{realm.host}{port}", realm.path.strip("/"))
        if not self._allowed.allow(target):
            raise WrongAnswerError(
                f"it sends to {realm.host} for a token, which is not of its domain: allow it with "
                f"--adapter-url {target.origin}"
            )


def is_loopback(host: str) -> bool:
    """Whether this machine itself is meant, as is where a registry may speak plain HTTP."""
    name = host if host.count(":") > 1 and "[" not in host else re.sub(r":[0-9]+$", "", host)
    name = name.strip("[]")
    return name == "localhost" or (_is_address(name) and ipaddress.ip_address(name).is_loopback)


def is_inside(host: str) -> bool:
    """Whether it is an address within a machine or a network."""
    name = host.strip("[]")
    return name == "localhost" or (_is_address(name) and not ipaddress.ip_address(name).is_global)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _domain(host: str) -> tuple[str, ...]:
    return tuple(host.lower().split(".")[-2:])


def _url(text: str) -> httpx.URL:
    try:
        return httpx.URL(text)
    except httpx.InvalidURL:
        raise WrongAnswerError("it names no realm that could give a token") from None


def _credentials(location: RemoteLocation) -> str | None:
    """What follows "Basic": of the entry for the longest prefix of the repository; None where there is none.

    Raises DeniedError: the file can't be used.
    """
    host = _DOCKER_HUB_KEY if location.host == DOCKER_HUB else location.host
    wanted = f"{host}/{location.path}/"
    found = [(key, entry) for name, entry in _auths().items() if wanted.startswith(f"{(key := _key(name))}/")]
    if not found:
        return None
    _, entry = max(found, key=lambda one: len(one[0]))
    if isinstance(entry, dict):
        if isinstance(auth := entry.get("auth"), str) and auth:
            return _checked(auth)
        user, password = entry.get("username"), entry.get("password")
        if isinstance(user, str) and isinstance(password, str):
            return base64.b64encode(f"{user}:{password}".encode()).decode()
    raise DeniedError(f"{_config_path()} has an entry for {host} without a password: log in without a store")


def _checked(auth: str) -> str:
    try:
        base64.b64decode(auth, validate=True)
    except (binascii.Error, ValueError):
        raise DeniedError(f"{_config_path()} has an `auth` that is not base64") from None
    return auth


def _key(name: str) -> str:
    """Of "https://index.docker.io/v1/": "index.docker.io"."""
    return re.sub(r"(?:/v[12])?/*$", "", re.sub(r"^https?://", "", name))


def _auths() -> dict[str, Any]:
    path = _config_path()
    try:
        config = json.loads(read_regular_file(path, MAX_CONFIG_NBYTES))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError):
        raise DeniedError(f"{path} can't be read") from None
    auths = config.get("auths", {}) if isinstance(config, dict) else None
    if not isinstance(auths, dict):
        raise DeniedError(f"{path} has no object `auths`")
    return auths


def _config_path() -> Path:
    if path := os.environ.get("REGISTRY_AUTH_FILE"):
        return expanded(path)
    return expanded(os.environ.get("DOCKER_CONFIG") or "~/.docker") / "config.json"
