"""Chromium for the tests of the pages, and visits that notice what a page must not do."""

import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page, Request

WIDE, NARROW = (1280, 800), (360, 740)
_PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
# As root, Chromium runs without its sandbox only; it shows pages of this machine, and no name leads to another one.
_ARGUMENTS = ["--no-sandbox", "--disable-dev-shm-usage", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
_TIMEOUT = 20_000
"""Milliseconds that a page may take for what is expected of it."""


class NoBrowser(Exception):
    """No Chromium is installed; the message has the reason."""


@contextmanager
def running() -> Iterator["Browser"]:
    """Raises NoBrowser."""
    from playwright.sync_api import sync_playwright  # half a second, which other tests do not wait

    program = next((found for name in _PROGRAMS if (found := shutil.which(name))), None)
    if program is None:
        raise NoBrowser(f"none of {', '.join(_PROGRAMS)} is installed. On Debian: apt install chromium")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=_ARGUMENTS)
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def visiting(
    browser: "Browser",
    url: str,
    *,
    dark: bool = False,
    size: tuple[int, int] = WIDE,
    scripts: bool = True,
    refused: Collection[int] = (),
) -> Iterator["Page"]:
    """The page at this address, in a window of its own. Fails at the end of the block where a page wrote an error or a
    warning to the console, raised one, or asked another host for anything. `refused`: the status of answers that are
    expected."""
    context = browser.new_context(
        color_scheme="dark" if dark else "light",
        viewport={"width": size[0], "height": size[1]},
        java_script_enabled=scripts,
        locale="en-GB",
        timezone_id="Europe/Berlin",
    )
    context.set_default_timeout(_TIMEOUT)
    faults = _watch(context, urlsplit(url).netloc, refused)
    try:
        page = context.new_page()
        page.goto(url)
        yield page
        assert not faults, "; ".join(faults)
    finally:
        context.close()


def _watch(context: "BrowserContext", host: str, refused: Collection[int]) -> list[str]:
    """The faults of its pages, as they come."""
    faults: list[str] = []
    told = tuple(f"the server responded with a status of {status} " for status in refused)

    def requested(request: "Request") -> None:
        address = urlsplit(request.url)
        if address.scheme not in ("data", "blob") and address.netloc != host:
            faults.append(f"a request to another host: {request.url}")

    def written(message: "ConsoleMessage") -> None:
        if message.type in ("error", "warning") and not any(text in message.text for text in told):
            faults.append(f"{message.type} on the console: {message.text}")

    context.on("request", requested)
    context.on("console", written)
    context.on("weberror", lambda error: faults.append(f"an error in a script: {error.error}"))
    return faults


def settle(page: "Page") -> None:
    """Waits for the parts of a page that are fetched after it."""
    from playwright.sync_api import expect

    expect(page.locator(".htmx-request")).to_have_count(0)


def hindrances(page: "Page") -> list[str]:
    """What axe finds on a page that makes it hard to use: the rule, and where. It needs scripts."""
    from axe_playwright_python.sync_playwright import Axe

    settle(page)
    found = Axe().run(page).response["violations"]
    return [f"{rule['id']} ({rule['help']}): {node['target']}" for rule in found for node in rule["nodes"]]


def overflow(page: "Page") -> int:
    """By how many pixels a page is wider than its window."""
    return int(page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth"))
