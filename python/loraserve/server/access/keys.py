"""API keys: who calls, which adapters they may use, and how much at once.

Only digests of keys are kept. A presented key is compared with every one of them in constant time, so neither
how much of it is right nor which key it is shows in the time that takes.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from fnmatch import fnmatchcase

from loraserve.errors import OverloadedError, PermissionDeniedError, UnauthenticatedError
from loraserve.request import AdapterSpec, GenerateRequest
from loraserve.server.access.fair_shares import FairShares
from loraserve.server.access.limits import ConcurrencyLimit, RateLimit
from loraserve.server.access.token_quota import TokenQuota
from loraserve.settings.entries import ApiKey, PrefixCacheScope

SCHEME = "bearer"
PROXY_HEADERS = ("forwarded", "via", "x-forwarded-for", "x-forwarded-host", "x-real-ip")
BUSY_RETRY_S = 1.0  # a slot is free as soon as any request ends: when, nobody knows


class Caller:
    """Whoever sent a request: one key, or anybody where no keys are configured."""

    def __init__(
        self,
        key: ApiKey,
        concurrency: ConcurrencyLimit,
        rate: RateLimit | None,
        quota: TokenQuota | None,
        server: ConcurrencyLimit,
        tenant: str,
        shares: FairShares,
        *,
        sees_load: bool,
    ) -> None:
        self._key = key
        self._tenant = tenant
        self._shares = shares
        self.sees_load = sees_load  # what the server and all its callers do
        self._concurrency = concurrency
        self._rate = rate
        self.quota = quota  # None has no limit
        self._server = server

    @property
    def name(self) -> str:
        """The key's name, for logs and errors; without keys "anybody" or "loopback"."""
        return self._key.name

    @property
    def is_admin(self) -> bool:
        """Whether the caller may load, unload and pin adapters, and use every one."""
        return self._key.is_admin

    @property
    def sees_paths(self) -> bool:
        """Where files of the server lie."""
        return self.is_admin

    def may_use(self, adapter: str | None) -> bool:
        """Whether this caller may use an adapter, or the base model (None)."""
        if self._key.is_admin:
            return True
        if adapter is None:
            return self._key.base_model
        name = adapter.partition("@")[0]  # who may use one may use each of its generations
        return any(fnmatchcase(name, pattern) for pattern in self._key.adapters)

    def check_use(self, adapter: AdapterSpec | Iterable[str]) -> None:
        """Raises PermissionDeniedError unless everything `adapter` names may be used; no name is the base."""
        given = [adapter] if isinstance(adapter, str) and adapter else list(adapter or ())
        names: list[str | None] = [*given] or [None]
        for name in names:
            if not self.may_use(name):
                what = "the base model" if name is None else f"adapter {name!r}"
                raise PermissionDeniedError(f"key {self.name!r} may not use {what}, ask for another key")

    def sign(self, request: GenerateRequest) -> GenerateRequest:
        """What the engine must know of who asks, too. Raises InvalidRequestError: its adapters are none."""
        return replace(
            request,
            tenant=self._tenant,
            flow=self._shares.flow(self._key, request.adapter),
            may_use_base_model=self.may_use(None),
        )

    def require_admin(self) -> None:
        """Raises PermissionDeniedError unless this caller administers the server."""
        if not self.is_admin:
            raise PermissionDeniedError(
                f"{self.name!r} may not administer this server, use an admin key "
                "(without any keys configured: call from the machine itself)"
            )

    @asynccontextmanager
    async def admit(self) -> AsyncIterator[None]:
        """Hold this around a request: it takes a slot of the server and of the key, and one of its rate.

        Raises:
            OverloadedError: there is none; nothing was taken.
        """
        self._check_slot(self._server, "the server runs")
        self._check_slot(self._concurrency, f"key {self.name!r} has")
        wait_s = 0.0 if self._rate is None else self._rate.take()
        if wait_s > 0.0:
            limit = f"{self._key.requests_per_minute:g} requests a minute"
            raise OverloadedError(
                f"key {self.name!r} has used its {limit}, try again in {wait_s:.1f} s",
                retry_after_s=wait_s,
                reason="busy",
            )
        self._server.enter()
        self._concurrency.enter()
        try:
            yield
        finally:
            self._concurrency.leave()
            self._server.leave()

    @staticmethod
    def _check_slot(slots: ConcurrencyLimit, subject: str) -> None:
        if slots.is_full:
            raise OverloadedError(
                f"{subject} {slots.num_running} requests at once, limit is {slots.limit}, try again later",
                retry_after_s=BUSY_RETRY_S,
                reason="busy",
            )


class AccessControl:
    """The configured keys; without any, everybody may use everything and loopback administers.

    Args:
        keys: with distinct names and secrets; a secret is one or more visible ASCII characters.
        max_concurrent_requests: of all callers together; None has no limit.
        has_open_metrics: whether /metrics needs no key.
        prefix_cache_scope: "key" keeps the cached prompts of each key apart, "shared" lets all use all.
        shares: whose share of the engine requests are served from; None is one for all.
    """

    def __init__(
        self,
        keys: Sequence[ApiKey] = (),
        *,
        max_concurrent_requests: int | None = None,
        has_open_metrics: bool = False,
        prefix_cache_scope: PrefixCacheScope = "key",
        shares: FairShares | None = None,
    ) -> None:
        self.has_open_metrics = has_open_metrics
        self._server = ConcurrencyLimit(max_concurrent_requests)
        self.shares = shares or FairShares()
        is_shared = prefix_cache_scope == "shared"
        self._callers = [
            (_digest(key.secret), self._caller(key, "" if is_shared else key.name, has_keys=True))
            for key in keys
        ]
        self._anybody = self._caller(ApiKey(name="anybody", secret=""))
        self._local = self._caller(ApiKey(name="loopback", secret="", is_admin=True))

    @classmethod
    def open(cls) -> AccessControl:
        """No keys."""
        return cls()

    @property
    def has_keys(self) -> bool:
        """Whether any are configured; calls then need one."""
        return bool(self._callers)

    @property
    def max_concurrent_requests(self) -> int | None:
        """Requests of all callers together that may run at once; None has no limit."""
        return self._server.limit

    @property
    def num_running(self) -> int:
        """Requests of all callers together that run now."""
        return self._server.num_running

    def owner_of(self, caller: Caller) -> str:
        """Whose what a caller keeps here is: a key's, everybody's where there are none."""
        return caller.name if self._callers else ""

    def caller_of(self, owner: str) -> Caller:
        """Who `owner_of` said it of.

        Raises:
            UnauthenticatedError: there is no such key any more, or there are keys now where there were none.
        """
        if not self._callers and owner == "":
            return self._anybody
        for _, caller in self._callers:
            if caller.name == owner:
                return caller
        raise UnauthenticatedError(f"the key {owner!r} is none of this server's now")

    def authenticate(self, authorization: str | None, *, client_host: str) -> Caller:
        """Who sends `Authorization: authorization` from `client_host`, an IP address or "".

        Raises:
            UnauthenticatedError: there are keys, and this is none of them.
        """
        if not self._callers:
            return self._local if is_loopback(client_host) else self._anybody
        if authorization is None:
            raise UnauthenticatedError("no API key was given, send it as: Authorization: Bearer KEY")
        scheme, _, secret = authorization.strip().partition(" ")
        if scheme.lower() != SCHEME:
            raise UnauthenticatedError("authorization is not a bearer token, send: Authorization: Bearer KEY")
        caller = self._find(_digest(secret.strip()))
        if caller is None:
            raise UnauthenticatedError("the API key is not known to this server")
        return caller

    def _find(self, digest: bytes) -> Caller | None:
        """Compares with every key, also after a match."""
        found = None
        for known, caller in self._callers:
            if hmac.compare_digest(known, digest):
                found = caller
        return found

    def _caller(self, key: ApiKey, tenant: str = "", *, has_keys: bool = False) -> Caller:
        rate = None if key.requests_per_minute is None else RateLimit(key.requests_per_minute)
        per_minute = key.tokens_per_minute
        sees_load = key.is_admin or not has_keys
        return Caller(
            key,
            ConcurrencyLimit(key.max_concurrent),
            rate,
            None if per_minute is None else TokenQuota(key.name, per_minute),
            self._server,
            tenant,
            self.shares,
            sees_load=sees_load,
        )


def is_loopback(host: str) -> bool:
    """Whether an address is this machine's own; a name is not, whatever it resolves to."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_loopback)


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode(errors="surrogateescape")).digest()
