"""The dashboard in a browser, against a server without an engine; and its files over plain HTTP."""

from __future__ import annotations

import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from loraserve.server.http.dashboard.router import STATIC, accepts_html

from tests.server.http.dashboard_visit import Visit, chromium
from tests.server.http.fake_dashboard_server import (
    BASE,
    KEY,
    RESULTS,
    DashboardThread,
    FakeDashboardServer,
)

NAMES = ["sql", "json", "pirate"]
BROWSER_ACCEPT = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"
PHONE = {"width": 360, "height": 740}
DESKTOP = {"width": 1280, "height": 800}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def fake() -> FakeDashboardServer:
    return FakeDashboardServer(NAMES)


@pytest.fixture
def fake_server(fake: FakeDashboardServer) -> Iterator[DashboardThread]:
    with DashboardThread(fake.app) as thread:
        yield thread


@pytest.fixture
def visit(browser: Any, fake_server: DashboardThread, request: pytest.FixtureRequest) -> Iterator[Visit]:
    """An open tab; it must end without an error in the console and without a request to elsewhere."""
    context = browser.new_context(**{"viewport": DESKTOP, **getattr(request, "param", {})})
    visit = Visit(context, fake_server.url)
    visit.open()
    yield visit
    context.close()
    assert visit.console_errors == []
    assert visit.foreign_requests == []


def fetch(url: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
    request = urllib.request.Request(url, headers=headers)
    try:
        with urllib.request.urlopen(request) as response:
            return response.status, dict(response.headers.items()), response.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, dict(error.headers.items()), error.read()


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        (BROWSER_ACCEPT, True),
        ("TEXT/HTML", True),
        ("text/html;q=0", False),
        ("application/json", False),
        ("*/*", False),
        ("", False),
    ],
)
def test_only_who_names_html_gets_the_page(accept: str, expected: bool) -> None:
    assert accepts_html(accept) is expected


def test_page_lets_nothing_in_from_elsewhere(fake_server: DashboardThread) -> None:
    status, headers, body = fetch(fake_server.url, accept=BROWSER_ACCEPT)
    assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
    policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert set(policy.values()) == {"'none'", "'self'"}
    assert b"<script>" not in body
    assert b"style=" not in body


def test_other_clients_are_told_where_to_look(fake_server: DashboardThread) -> None:
    status, headers, body = fetch(fake_server.url)
    assert (status, headers["content-type"], headers["vary"]) == (200, "application/json", "Accept")
    assert b'"/v1/models"' in body


@pytest.mark.parametrize(
    "name",
    ["none.js", "js", "vendor/README.md", "..%2frouter.py"],
)
def test_what_is_not_the_pages_is_not_served(fake_server: DashboardThread, name: str) -> None:
    assert fetch(f"{fake_server.url}dashboard/static/{name}")[0] == 404


def test_files_elsewhere_are_not_served(fake_server: DashboardThread, tmp_path: Path) -> None:
    secret = tmp_path / "secret.js"
    secret.write_text("export const secret = 1;")
    for path in (str(secret), os.path.relpath(secret, STATIC)):
        assert fetch(f"{fake_server.url}dashboard/static/{quote(path, safe='')}")[0] == 404


def test_unchanged_file_is_not_sent_again(fake_server: DashboardThread) -> None:
    url = f"{fake_server.url}dashboard/static/js/main.js"
    status, headers, _ = fetch(url)
    assert (status, headers["content-type"]) == (200, "text/javascript; charset=utf-8")
    assert fetch(url, **{"if-none-match": headers["etag"]})[0] == 304


def test_load_and_adapters_are_seen(visit: Visit, fake: FakeDashboardServer) -> None:
    fake.traffic["sql"] = {
        "requests_per_s": 2.5,
        "tokens_per_s": 80.0,
        "latency_s": 0.25,
        "latency_series_s": [None] * 30 + [0.2, 0.3] * 15,
    }
    visit.has_text("#connection", "live")
    visit.has_text("#figure-running", "3")
    visit.has_text("#figure-resident", "3 of 3")
    visit.has_text("#figure-pool", "39%")
    visit.has_text(".key-tokens", "123 tokens/s")
    visit.has_text("#pool-legend", "18.8 MiB")
    visit.has_text("#server-facts", f"{BASE} · float32 · cpu")
    visit.has_text("[data-adapter=sql]", "250 ms")
    assert visit.page.locator("#adapters-body tr").count() == len(NAMES)
    assert visit.page.locator("[data-adapter=sql] .sparkline .line").get_attribute("d")
    assert visit.page.locator("#chart-throughput canvas").count() == 1


@pytest.mark.parametrize("route", ["Chat", "Completion"])
def test_prompt_is_answered_side_by_side(visit: Visit, fake: FakeDashboardServer, route: str) -> None:
    page = visit.page
    page.get_by_text(route, exact=True).click()
    page.locator("#picks label[data-model=pirate]").click()
    page.fill("#prompt", "hello out there")
    page.fill("#temperature", "0.5")
    page.locator("#prompt").press("Control+Enter")
    visit.has_text("#run-status", "4 answers finished.")
    answers = page.locator(".answer .text").all_text_contents()
    assert answers == [f"{model} says: hello out there " for model in (BASE, *NAMES)]
    visit.has_text("[data-model=sql] footer", "5 tokens")
    assert {request["model"] for request in fake.requests} == {BASE, *NAMES}
    assert all(request["temperature"] == 0.5 and "seed" not in request for request in fake.requests)
    assert all(("prompt" in request) == (route == "Completion") for request in fake.requests)


def test_failing_answer_says_why(visit: Visit) -> None:
    visit.page.fill("#prompt", "fail")
    visit.page.click("#run")
    visit.has_text("#run-status", "0 answers finished, 3 failed.")
    visit.has_text(".answer[data-model=sql] .error", "the adapter is gone")


def test_endless_answers_are_stopped_while_the_page_stays_live(
    visit: Visit, fake: FakeDashboardServer
) -> None:
    for name in ("extra-1", "extra-2", "extra-3", "extra-4"):
        fake.adapters[name] = {**fake.adapters["sql"], "name": name}
    visit.page.reload()
    for name in ("pirate", "extra-1", "extra-2", "extra-3", "extra-4"):
        visit.page.locator(f"#picks label[data-model={name}]").click()
    visit.page.fill("#prompt", "endless")
    visit.page.click("#run")
    visit.page.locator(".answer[data-phase=streaming]").nth(4).wait_for()
    fake.stats["running"] = 77
    visit.has_text("#figure-running", "77")
    visit.page.click("#stop")
    visit.has_text("#run-status", "0 answers finished, 8 stopped.")


def test_adapter_is_loaded_and_unloaded(visit: Visit, fake: FakeDashboardServer) -> None:
    page = visit.page
    fake.may_load.clear()
    page.click("#load-open")
    page.fill("#load-name", "fresh")
    page.fill("#load-source", "owner/fresh")
    page.check("#load-pin")
    page.click("#load-submit")
    visit.has_text("#load-stage", "downloading: 2 MiB of 4 MiB")
    fake.may_load.set()
    visit.has_text("#load-receipt", "q_proj, v_proj")
    visit.has_text("#load-receipt", "Layers0")
    page.click("#load-close")
    visit.has_text("[data-adapter=fresh]", "Pinned")
    page.locator("#picks label[data-model=fresh]").wait_for()
    page.get_by_role("button", name="Unload fresh").click()
    page.click("#unload-confirm")
    page.locator("[data-adapter=fresh]").wait_for(state="detached")
    assert "fresh" not in fake.adapters


def test_unloading_is_asked_about(visit: Visit, fake: FakeDashboardServer) -> None:
    visit.page.get_by_role("button", name="Unload sql").click()
    visit.page.keyboard.press("Escape")
    visit.page.get_by_role("button", name="Unload json").click()
    visit.page.get_by_role("button", name="Keep").click()
    visit.page.locator("#unload-dialog").wait_for(state="hidden")
    assert list(fake.adapters) == NAMES


def test_refused_load_says_why(visit: Visit, fake: FakeDashboardServer) -> None:
    visit.page.click("#load-open")
    visit.page.fill("#load-name", "fresh")
    visit.page.fill("#load-source", "missing")
    visit.page.click("#load-submit")
    visit.has_text("#load-error", "no folder 'missing' under /adapters")
    assert "fresh" not in fake.adapters


def test_adapter_is_pinned_and_warmed(visit: Visit, fake: FakeDashboardServer) -> None:
    fake.adapters["json"]["state"] = "registered"
    visit.has_text("[data-adapter=json]", "on disk")
    visit.page.get_by_role("button", name="Load into the pool: json").click()
    visit.has_text("[data-adapter=json]", "in the pool")
    pin = visit.page.get_by_role("button", name="Pin json")
    pin.click()
    visit.has_text("[data-adapter=json]", "Pinned")
    assert pin.get_attribute("aria-pressed") == "true"
    pin.click()
    visit.page.locator("[data-adapter=json] [aria-pressed=false]").wait_for()
    assert fake.adapters["json"]["pinned"] is False


def test_versions_are_shared_out_shadowed_and_gone_back_to(visit: Visit, fake: FakeDashboardServer) -> None:
    page = visit.page
    page.get_by_role("button", name="Versions of sql").click()
    visit.has_text("[data-generation='3']", "Generation 3, current")
    visit.has_text("[data-generation='3']", "100 %")
    visit.has_text("[data-generation='1']", "remembered only")
    assert page.locator("#versions-list li").all_inner_texts()[0].startswith("Generation 3")
    assert not page.get_by_label("Share of generation 1").is_visible()
    assert not page.get_by_role("button", name="Make current: generation 1").is_visible()
    assert not page.get_by_role("button", name="Shadow: generation 3").is_visible()

    page.get_by_label("Fraction of requests copied to generation 2").fill("25")
    page.get_by_role("button", name="Shadow: generation 2").click()
    visit.has_text(
        "[data-generation='2']", "Shadow of 25 % of requests: 200 compared, 75% identical, 90% of tokens"
    )
    visit.has_text("[data-generation='2']", "1 failed, 7 dropped")
    page.get_by_role("button", name="End the shadow: generation 2").click()
    visit.has_text("[data-generation='2']", "Was a shadow: 200 compared")
    assert fake.generations[1]["shadow"]["fraction"] == 0.0

    page.get_by_label("Share of generation 2").fill("5.5")
    page.click("#versions-share")
    visit.has_text("#versions-error", "sum to 1.055, they must sum to 1")
    assert "status of 400" in visit.console_errors.pop()  # the browser's own word for it
    page.get_by_label("Share of generation 3").fill("94.5")
    page.click("#versions-share")
    visit.has_text("[data-generation='2']", "5.5 %")
    page.locator("#versions-error").wait_for(state="hidden")
    assert [one["share"] for one in fake.generations] == [0.0, 0.055, 0.945]
    page.get_by_role("button", name="Make current: generation 2").click()
    visit.has_text("[data-generation='2']", "Generation 2, current")
    assert page.get_by_label("Share of generation 3").input_value() == "0"
    page.click("#versions-back")
    visit.has_text("[data-generation='1']", "Generation 1, current")
    page.keyboard.press("Escape")
    page.locator("#versions-dialog").wait_for(state="hidden")


@pytest.mark.parametrize("viewport", [PHONE, DESKTOP], ids=["phone", "desktop"])
def test_versions_fit_and_offer_callers_without_rights_nothing(
    browser: Any, fake_server: DashboardThread, fake: FakeDashboardServer, viewport: dict[str, int]
) -> None:
    fake.generations[1]["source"] = "/adapters/" + "long-" * 40
    fake.generations[1]["shadow"] = {**RESULTS, "fraction": 0.1}
    context = browser.new_context(viewport=viewport)
    visit = Visit(context, fake_server.url)
    visit.open()
    visit.page.get_by_role("button", name="Versions of sql").click()
    visit.has_text("[data-generation='2']", "200 compared")
    dialog = visit.page.locator("#versions-dialog")
    if folder := os.environ.get("LORASERVE_SCREENSHOTS"):
        visit.page.screenshot(path=Path(folder) / f"versions-{viewport['width']}.png")
    assert dialog.evaluate("node => node.scrollWidth <= node.clientWidth")
    for selector in ("#versions-list h3", "#versions-list .hint", ".shadow-results"):
        assert visit.contrast(selector) >= 4.5, selector
    assert visit.page.locator("#versions-share").is_visible()
    fake.is_admin = False
    visit.page.locator("#versions-share").wait_for(state="hidden")
    assert not visit.page.get_by_role("button", name="Make current").first.is_visible()
    assert visit.page.locator("[data-generation='2']").is_visible()
    context.close()


def test_table_is_searched_and_sorted(visit: Visit) -> None:
    page = visit.page
    visit.has_text("#adapters-count", "3")

    def shown() -> list[str]:
        return page.locator(".adapter-name").all_text_contents()

    assert shown() == ["json", "pirate", "sql"]
    page.get_by_role("button", name="Rank").click()
    assert shown() == ["pirate", "json", "sql"]
    assert page.get_by_role("columnheader", name="Rank").get_attribute("aria-sort") == "descending"
    page.fill("#adapters-find", "Q")
    assert shown() == ["sql"]
    page.fill("#adapters-find", "nothing")
    visit.has_text("#adapters-empty", "No adapter matches “nothing”.")


def test_focus_survives_the_next_reading(visit: Visit, fake: FakeDashboardServer) -> None:
    visit.page.get_by_role("button", name="Unload sql").focus()
    fake.adapters["a-new-one"] = {**fake.adapters["sql"], "name": "a-new-one"}
    visit.page.locator("[data-adapter=a-new-one]").wait_for()
    assert visit.page.evaluate("document.activeElement.ariaLabel") == "Unload sql"


def test_texts_of_adapters_are_not_markup(visit: Visit, fake: FakeDashboardServer) -> None:
    fake.adapters["sql"]["description"] = "<img src=x onerror=alert(1)>"
    visit.has_text("[data-adapter=sql]", "<img src=x")
    assert visit.page.locator("[data-adapter=sql] img").count() == 0


def test_callers_without_rights_are_not_offered_what_they_may_not(
    visit: Visit, fake: FakeDashboardServer
) -> None:
    fake.is_admin = False
    visit.page.click("#admin-key")
    visit.has_text("#key-reason", "need an admin key")
    assert not visit.page.locator("#load-open").is_visible()
    assert not visit.page.get_by_role("button", name="Unload sql").is_visible()
    assert visit.page.get_by_role("button", name="Try in the playground: sql").is_visible()


def test_page_is_worked_by_keyboard(visit: Visit) -> None:
    page = visit.page
    visit.has_text("#connection", "live")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    for _ in range(2):
        page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "load-open"
    page.keyboard.press("Enter")
    page.locator("#load-dialog[open]").wait_for()
    assert page.evaluate("document.activeElement.id") == "load-name"
    page.keyboard.press("Escape")
    page.locator("#load-dialog").wait_for(state="hidden")
    assert page.evaluate("document.activeElement.id") == "load-open"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [PHONE, DESKTOP], ids=["phone", "desktop"])
def test_page_fits_and_is_readable(
    browser: Any,
    fake_server: DashboardThread,
    fake: FakeDashboardServer,
    viewport: dict[str, int],
    scheme: str,
) -> None:
    name = "an-adapter-with-a-very-long-name-that-someone-made-up:revision-2"
    fake.adapters[name] = {**fake.adapters["sql"], "name": name, "description": "word " * 60}
    context = browser.new_context(viewport=viewport, color_scheme=scheme)
    visit = Visit(context, fake_server.url)
    visit.open()
    visit.page.locator(f"[data-adapter='{name}']").wait_for()
    assert visit.page.evaluate("document.documentElement.scrollWidth") == viewport["width"]
    unload = visit.page.get_by_role("button", name=f"Unload {name}").bounding_box()
    assert unload["x"] + unload["width"] <= viewport["width"]
    for selector in (".hint", ".brand", "#load-open", "#adapters-count", ".field", ".state"):
        assert visit.contrast(selector) >= 4.5, selector  # WCAG 2.2, 1.4.3
    context.close()


@pytest.mark.parametrize("num_adapters", [0, 3, 120])
def test_page_ends_where_its_content_ends(
    browser: Any, fake_server: DashboardThread, fake: FakeDashboardServer, num_adapters: int
) -> None:
    fake.adapters = {f"a{i}": {**fake.adapters["sql"], "name": f"a{i}"} for i in range(num_adapters)}
    context = browser.new_context(viewport=PHONE, is_mobile=True, has_touch=True)
    visit = Visit(context, fake_server.url)
    visit.open()
    visit.has_text("#adapters-count", str(num_adapters))
    if num_adapters:
        visit.page.locator(f"#picks label[data-model=a{num_adapters - 1}]").wait_for()
    end, last = visit.page.evaluate(
        """() => [document.documentElement.scrollHeight,
                  document.querySelector('#prompt-form').getBoundingClientRect().bottom + scrollY]"""
    )
    assert 0 <= end - last < 40
    context.close()


def test_key_is_asked_for_and_kept_for_the_tab(browser: Any) -> None:
    fake = FakeDashboardServer(NAMES, needs_key=True)
    with DashboardThread(fake.app) as fake_server:
        context = browser.new_context()
        visit = Visit(context, fake_server.url)
        visit.open()
        visit.has_text("#key-reason", "This server asks for a key.")
        visit.page.fill("#key", "wrong")
        visit.page.locator("#key").press("Enter")
        visit.has_text("#key-reason", "The server does not know this key.")
        visit.page.fill("#key", KEY)
        visit.page.locator("#key").press("Enter")
        visit.has_text("#connection", "live")
        visit.page.reload()
        visit.has_text("#connection", "live")
        assert visit.page.evaluate("[localStorage.length, document.cookie]") == [0, ""]
        visit.page.click("#forget-key")
        visit.has_text("#connection", "key needed")
        context.close()
        assert all("401" in error for error in visit.console_errors)


def opacity(visit: Visit, selector: str) -> float:
    return float(visit.page.locator(selector).first.evaluate("node => getComputedStyle(node).opacity"))


def test_lost_server_is_told_and_found_again(visit: Visit) -> None:
    visit.has_text("#connection", "live")
    visit.has_text("#figure-running", "3")
    figures = ("#figure-running", ".panels > figure", ".table-card")
    assert [opacity(visit, selector) for selector in figures] == [1.0] * 3
    visit.page.context.set_offline(True)
    visit.has_text("#connection", "no connection")
    visit.has_text("#lost-text", "The server has not answered since ")
    visit.has_text("#lost-text", "this page keeps trying")
    assert visit.page.locator("#figure-running").text_content() == "3"
    assert all(opacity(visit, selector) < 0.6 for selector in figures)
    visit.page.context.set_offline(False)
    visit.has_text("#connection", "live")
    visit.page.locator("#lost").wait_for(state="hidden")
    assert [opacity(visit, selector) for selector in figures] == [1.0] * 3
    assert all("ERR_INTERNET_DISCONNECTED" in error for error in visit.console_errors)
    visit.console_errors.clear()
