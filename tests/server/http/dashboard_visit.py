"""A browser's visit to the dashboard: what went wrong, what left the server's origin, how readable it is."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = Path("/usr/bin/chromium")
TIMEOUT_MS = 15_000


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    """A browser; without one the tests that need it are skipped."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not CHROMIUM.exists():
        pytest.skip(f"{CHROMIUM} is not installed")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield browser
        browser.close()


class Visit:
    """A new tab of a browser context; `open` it first."""

    def __init__(self, context: Any, url: str) -> None:
        context.set_default_timeout(TIMEOUT_MS)
        self.page = context.new_page()
        self.url = url
        self.console_errors: list[str] = []
        self.foreign_requests: list[str] = []

    def open(self) -> None:
        self.page.on("console", self._on_console)
        self.page.on("pageerror", lambda error: self.console_errors.append(str(error)))
        self.page.on("request", self._on_request)
        self.page.goto(self.url)

    def has_text(self, selector: str, text: str) -> None:
        """Waits until the element shows the text."""
        self.page.locator(selector).filter(has_text=text).first.wait_for()

    def contrast(self, selector: str) -> float:
        """Of the element's text to the first opaque background behind it (WCAG 2.2, contrast ratio)."""
        text, back = self.page.locator(selector).first.evaluate(
            """node => {
              let back = node;
              while (getComputedStyle(back).backgroundColor === "rgba(0, 0, 0, 0)") back = back.parentElement;
              return [getComputedStyle(node).color, getComputedStyle(back).backgroundColor];
            }"""
        )
        low, high = sorted((_luminance(text), _luminance(back)))
        return (high + 0.05) / (low + 0.05)

    def _on_console(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.console_errors.append(message.text)

    def _on_request(self, request: Any) -> None:
        if not request.url.startswith(self.url):
            self.foreign_requests.append(request.url)


def _luminance(rgb: str) -> float:
    channels = [int(value) / 255 for value in re.findall(r"\d+", rgb)[:3]]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
