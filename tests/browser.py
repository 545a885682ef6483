"""A headless Chromium: Debian's, driven by Playwright."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from parts import need
from playwright.sync_api import Browser, Page, sync_playwright

QUIET = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
WAIT = 120_000  # milliseconds, on a busy machine


@contextmanager
def chromium() -> Iterator[Browser]:
    """A browser with a profile of its own, which goes with it."""
    found = shutil.which("chromium")
    need(found, "Debian's package chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=list(QUIET))
        yield browser
        browser.close()


@dataclass
class Opened:
    """A page, and whatever it complained of or asked the network for."""

    page: Page
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


@contextmanager
def opened(browser: Browser, file: Path, width: int, theme: str = "light") -> Iterator[Opened]:
    """The file from disk at that width, once its map is drawn."""
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=theme)  # type: ignore[arg-type]
    page.set_default_timeout(WAIT)
    found = Opened(page)
    page.on("console", lambda m: found.complaints.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda error: found.complaints.append(str(error)))
    page.on(
        "request",
        lambda r: None if r.url.startswith(("data:", "blob:", "file:")) else found.requests.append(r.url),
    )
    page.goto(file.as_uri())
    page.wait_for_function("document.documentElement.dataset.ready", timeout=WAIT)
    yield found
    page.close()
