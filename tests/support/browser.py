"""Debian's Chromium, driven by playwright, and axe-core for accessibility.

    with chromium() as browser:
        page = browser.open("http://127.0.0.1:9000/")

Without Chromium or playwright the test is skipped, or fails with CI=true.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from support.tools import not_tested, require_tool

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

AXE = Path(__file__).with_name("axe.min.js")
SECONDS = 90.0  # for an element to appear, on a busy machine


@dataclass
class Chromium:
    """`problems`: uncaught errors, errors on the console, and requests to other hosts, of all pages."""

    browser: Browser
    problems: list[str] = field(default_factory=list)

    def open(self, url: str, dark: bool = False, width: int = 1200, **context: Any) -> Page:
        """A page in a context of its own: it shares no cookies with others."""
        # axe-core is put into the page, which its content security policy forbids to scripts of the page itself
        page = self.browser.new_context(
            color_scheme="dark" if dark else "light", viewport={"width": width, "height": 900}, **context
        ).new_page()
        page.set_default_timeout(1000 * SECONDS)
        origin = "/".join(url.split("/")[:3])
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        page.on("console", lambda message: message.type == "error" and self.problems.append(message.text))
        page.on(
            "request",
            lambda request: request.url.startswith((origin, "data:", "blob:")) or self.problems.append(request.url),
        )
        page.goto(url)
        return page


@contextmanager
def chromium() -> Iterator[Chromium]:
    executable = require_tool("chromium")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        not_tested("playwright is not installed (pip install playwright)", fails_in_ci=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=executable, args=["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
        )
        try:
            yield Chromium(browser)
        finally:
            browser.close()


def accessibility_faults(page: Page) -> list[str]:
    """The serious and critical faults that axe-core finds: rule, what is wrong, and the first places."""
    page.evaluate(AXE.read_text(encoding="utf-8"))
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
    return [
        f"{fault['id']}: {fault['help']}: {[node['html'][:120] for node in fault['nodes'][:3]]}"
        for fault in found["violations"]
        if fault["impact"] in ("serious", "critical")
    ]
