"""A browser that has no network, for every test that opens a page."""

import pytest
import torch

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


@pytest.fixture(scope="module")
def browser():
    chromium = needs.chromium()
    api = needs.package("playwright.sync_api")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def tab(browser):
    """One for all tests of a module: the second page takes a quarter of the time, as its scripts are compiled."""
    page = browser.new_page()
    page.set_default_timeout(1000 * HANG)
    return page


@pytest.fixture
def open_page(tab):
    """`open_page(path, width, height, scheme)` gives the page; at the end nothing may have gone wrong in it.

    Wrong are errors and warnings on its console, exceptions, and requests that leave the machine.
    """
    wrong = []

    def console(message):
        if message.type in ("error", "warning"):
            wrong.append(message.text)

    def request(request):
        if request.url.split(":")[0] not in ("file", "data", "blob"):
            wrong.append(request.url)

    def check():
        assert tab.evaluate("window.owned") is None
        assert wrong == []

    def open_(path, width=1280, height=900, scheme="light"):
        check()
        tab.set_viewport_size({"width": width, "height": height})
        tab.emulate_media(color_scheme=scheme)
        tab.mouse.move(0, 0)  # away from where the last one left it
        tab.goto(path.as_uri())
        return tab

    listeners = {"console": console, "pageerror": lambda error: wrong.append(str(error)), "request": request}
    for event, listener in listeners.items():
        tab.on(event, listener)
    yield open_
    check()
    for event, listener in listeners.items():
        tab.remove_listener(event, listener)
    tab.goto("about:blank")


@pytest.fixture
def threads():
    """Sets the number of torch's threads, and puts it back at the end."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
