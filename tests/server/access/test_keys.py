"""Who a caller is, what they may use, and how much at once."""

import asyncio
import hmac
from contextlib import AsyncExitStack

import pytest
from loraserve.errors import OverloadedError, PermissionDeniedError, UnauthenticatedError
from loraserve.request import AdapterSpec
from loraserve.server.access.keys import AccessControl, Caller, is_loopback
from loraserve.settings.entries import ApiKey

KEYS = [
    ApiKey(name="sales", secret="secret-of-sales", adapters=("sales-*", "shared"), base_model=False),
    ApiKey(name="lab", secret="secret-of-lab", adapters=()),
    ApiKey(name="root", secret="secret-of-root", adapters=(), is_admin=True),
]


def caller(secret: str, keys: list[ApiKey] = KEYS) -> Caller:
    return AccessControl(keys).authenticate(f"Bearer {secret}", client_host="192.0.2.1")


@pytest.mark.parametrize(
    ("authorization", "text"),
    [
        (None, "no API key was given"),
        ("", "not a bearer token"),
        ("secret-of-sales", "not a bearer token"),
        ("Basic secret-of-sales", "not a bearer token"),
        ("Bearer", "not known"),
        ("Bearer ", "not known"),
        ("Bearer secret-of-sale", "not known"),
        ("Bearer secret-of-saless", "not known"),
        ("Bearer SECRET-OF-SALES", "not known"),
        ("Bearer secret-of-sales secret-of-lab", "not known"),
        ("Bearer \udcff", "not known"),
        ("Bearer " + "x" * 100_000, "not known"),
    ],
)
@pytest.mark.parametrize("host", ["127.0.0.1", "192.0.2.1"])
def test_what_is_no_key_is_refused_and_not_repeated(authorization: str | None, text: str, host: str) -> None:
    with pytest.raises(UnauthenticatedError, match=text) as caught:
        AccessControl(KEYS).authenticate(authorization, client_host=host)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
@pytest.mark.parametrize("name", ["sales", "lab", "root"])
def test_a_key_is_known_by_its_secret(scheme: str, name: str) -> None:
    found = AccessControl(KEYS).authenticate(f"{scheme} secret-of-{name}", client_host="")
    assert found.name == name


def test_every_key_is_compared_and_none_by_equality(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    compare = hmac.compare_digest

    def count(known: bytes, given: bytes) -> bool:
        compared.append(len(known))
        return compare(known, given)

    monkeypatch.setattr(hmac, "compare_digest", count)
    access = AccessControl(KEYS)
    access.authenticate("Bearer secret-of-sales", client_host="")
    assert compared == [32] * len(KEYS)


@pytest.mark.parametrize(
    ("secret", "adapter", "may"),
    [
        ("secret-of-sales", "sales-eu", True),
        ("secret-of-sales", "shared", True),
        ("secret-of-sales", "shared2", False),
        ("secret-of-sales", "presales-eu", False),
        ("secret-of-sales", "Sales-eu", False),
        ("secret-of-sales", None, False),
        ("secret-of-sales", "", False),
        ("secret-of-sales", {"sales-eu": 0.5, "shared": 0.5}, True),
        ("secret-of-sales", {"sales-eu": 0.5, "law": 0.5}, False),
        ("secret-of-sales", ["sales-eu", "law"], False),
        ("secret-of-lab", None, True),
        ("secret-of-lab", "shared", False),
        ("secret-of-root", "law", True),
        ("secret-of-root", None, True),
    ],
)
def test_a_key_opens_the_adapters_of_its_patterns(secret: str, adapter: AdapterSpec, may: bool) -> None:
    someone = caller(secret)
    if may:
        someone.check_use(adapter)
        return
    with pytest.raises(PermissionDeniedError, match="may not use"):
        someone.check_use(adapter)


@pytest.mark.parametrize(("secret", "is_admin"), [("secret-of-sales", False), ("secret-of-root", True)])
def test_only_an_admin_key_administers(secret: str, is_admin: bool) -> None:
    someone = caller(secret)
    if is_admin:
        someone.require_admin()
        return
    with pytest.raises(PermissionDeniedError, match="may not administer"):
        someone.require_admin()


@pytest.mark.parametrize(
    ("host", "is_local"),
    [
        ("127.0.0.1", True),
        ("127.8.9.1", True),
        ("::1", True),
        ("::ffff:127.0.0.1", True),
        ("192.0.2.1", False),
        ("::ffff:192.0.2.1", False),
        ("0.0.0.0", False),
        ("localhost", False),
        ("127.0.0.1.evil.example", False),
        ("", False),
    ],
)
def test_without_keys_loopback_administers_and_everybody_uses(host: str, is_local: bool) -> None:
    someone = AccessControl.open().authenticate(None, client_host=host)
    assert (someone.is_admin, is_loopback(host)) == (is_local, is_local)
    someone.check_use("anything")
    someone.check_use(None)


def test_with_keys_loopback_alone_is_nobody() -> None:
    with pytest.raises(UnauthenticatedError):
        AccessControl(KEYS).authenticate(None, client_host="127.0.0.1")


async def enter(someone: Caller, times: int) -> AsyncExitStack:
    stack = AsyncExitStack()
    for _ in range(times):
        await stack.enter_async_context(someone.admit())
    return stack


def test_a_key_runs_as_many_requests_as_it_may() -> None:
    async def run() -> None:
        access = AccessControl([ApiKey(name="a", secret="a", max_concurrent=2), ApiKey(name="b", secret="b")])
        a = access.authenticate("Bearer a", client_host="")
        held = await enter(a, 2)
        with pytest.raises(OverloadedError, match="key 'a' has 2 requests at once, limit is 2") as caught:
            await enter(access.authenticate("Bearer a", client_host=""), 1)
        assert (caught.value.reason, caught.value.retry_after_s > 0) == ("busy", True)
        async with access.authenticate("Bearer b", client_host="").admit():
            pass  # another key is not disturbed
        await held.aclose()
        await (await enter(a, 2)).aclose()

    asyncio.run(run())


def test_all_keys_together_run_as_many_requests_as_the_server_may() -> None:
    async def run() -> None:
        access = AccessControl(KEYS, max_concurrent_requests=1)
        async with access.authenticate("Bearer secret-of-lab", client_host="").admit():
            with pytest.raises(OverloadedError, match="limit is 1"):
                await enter(access.authenticate("Bearer secret-of-root", client_host=""), 1)

    asyncio.run(run())


def test_a_rate_is_spent_by_admitted_requests_only() -> None:
    async def run() -> None:
        access = AccessControl([ApiKey(name="a", secret="a", requests_per_minute=2, max_concurrent=1)])
        a = access.authenticate("Bearer a", client_host="")
        held = await enter(a, 1)
        for _ in range(5):
            with pytest.raises(OverloadedError, match="at once"):
                await enter(a, 1)
        await held.aclose()
        await (await enter(a, 1)).aclose()
        with pytest.raises(OverloadedError, match="2 requests a minute") as caught:
            await enter(a, 1)
        assert 0 < caught.value.retry_after_s <= 30.0

    asyncio.run(run())


def test_a_request_that_fails_leaves_its_slot() -> None:
    async def run() -> None:
        access = AccessControl([ApiKey(name="a", secret="a", max_concurrent=1)])
        a = access.authenticate("Bearer a", client_host="")
        for _ in range(3):
            with pytest.raises(RuntimeError):
                await fail_inside(a)

    async def fail_inside(someone: Caller) -> None:
        async with someone.admit():
            raise RuntimeError

    asyncio.run(run())


def test_a_key_does_not_show_its_secret() -> None:
    assert "secret-of" not in repr(KEYS[0])
