"""A browser that has no network, for every test that opens a page."""

from functools import partial

import pytest

from tests import needs
from tests.waiting import HANG

ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
]
ARGUMENTS += ["--disable-component-update", "--disable-sync"]


class Opened:
    """A page and what went wrong in it: console output, exceptions, requests that leave the machine."""

    def __init__(self, browser, path, width=1280, height=900, scheme="light"):
        self.wrong = []
        self.page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
        self.page.on("console", self._console)
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("request", self._request)
        self.page.set_default_timeout(1000 * HANG)
        self.page.goto(path.as_uri())

    def _console(self, message):
        if message.type in ("error", "warning"):
            self.wrong.append(message.text)

    def _request(self, request):
        if request.url.split(":")[0] not in ("file", "data", "blob"):
            self.wrong.append(request.url)

    def check(self):
        assert self.page.evaluate("window.owned") is None
        assert self.wrong == []


@pytest.fixture(scope="module")
def browser():
    chromium = needs.chromium()
    api = needs.package("playwright.sync_api")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def opener(browser):
    """`opener(path, width, height, scheme)` opens a page; its `check()` fails on anything that went wrong in it."""
    return partial(Opened, browser)
