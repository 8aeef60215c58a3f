"""The page of a sweep in a real browser, from a file and without a network."""

import pytest

from rankdecay.lab.experiment import write_report
from tests.lab.browsing import wait_for

CHARTS = ["boundaries-chart", "cell-accuracy", "cell-inner", "cell-spectrum"]
STROKE = "getComputedStyle(document.querySelector('#maps .boundary')).stroke"


@pytest.fixture(scope="module")
def report(shared_sweep):
    return write_report(shared_sweep)


@pytest.fixture
def open_sweep(open_page, report):
    def open_(path=report, **options):
        page = open_page(path, **options)
        page.locator("#maps").scroll_into_view_if_needed()
        page.locator("#maps .face").first.wait_for()
        return page

    return open_


def _cell(page, words):
    return page.locator(f'#maps .button[aria-label^="{words}"]').first


def _shows(page, words):
    wait_for(page, "document.querySelector('#cell-words').innerText.includes(value)", words)


def _colours(page):
    return page.evaluate("[...document.querySelectorAll('#maps .face')].map((face) => face.style.fill)")


def test_maps_and_charts_are_drawn(open_sweep):
    page = open_sweep()
    assert page.locator("#maps figure").count() == 10  # five arms at two decays of the rest
    assert page.locator("#maps .button").count() == 2 * (5 + 4 * 25)
    assert page.locator("#maps .boundary").count() > 0
    assert page.locator("#maps .beyond").count() > 0
    assert page.locator("#maps [fill='url(#hatch)']").count() > 0
    for identity in CHARTS:
        page.locator(f"#{identity}").scroll_into_view_if_needed()
        page.locator(f"#{identity} .trace").first.wait_for(state="attached")
    assert page.locator("#maps figcaption").last.inner_text().startswith("<img")


def test_hovering_a_cell_shows_its_runs(open_sweep):
    page = open_sweep()
    _cell(page, "L2, strength 0.3, 48 %").hover()
    _shows(page, "strength 0.3 · 48 % of the data")
    assert page.locator("#cell-words h3").inner_text() == "L2"
    assert "seed 2:" in page.locator("#cell-words .seeds").inner_text()
    page.locator("#cell-accuracy .trace").first.wait_for()
    wait_for(page, "document.querySelector('#cell-accuracy').data.length === 6")  # training and test of three seeds
    _cell(page, "no decay, 15 %").hover()
    _shows(page, "15 % of the data")
    wait_for(page, "document.querySelector('#cell-accuracy').data.at(-1).y.at(-1) < 0.5")


def test_a_click_keeps_a_cell_beside_others(open_sweep):
    page = open_sweep()
    kept = _cell(page, "soft threshold (prox), strength 0.1, 48 %")
    kept.click()
    assert kept.get_attribute("aria-pressed") == "true"
    _cell(page, "L2, strength 0.1, 20 %").hover()
    wait_for(page, "document.querySelectorAll('#cell-words h3').length === 2")
    wait_for(page, "document.querySelector('#cell-spectrum').data.length === 6")
    page.locator("h1").hover()
    page.locator("#maps").scroll_into_view_if_needed()
    wait_for(page, "document.querySelectorAll('#cell-words h3').length === 1")
    _shows(page, "strength 0.1 · 48 %")
    kept.click()
    assert kept.get_attribute("aria-pressed") == "false"


def test_the_keyboard_reaches_every_cell(open_sweep):
    page = open_sweep()
    _cell(page, "soft threshold (prox), strength 0.03, 20 %").focus()
    for key, words in [
        ("ArrowRight", "strength 0.1 · 20 %"),
        ("ArrowUp", "strength 0.1 · 27 %"),
        ("ArrowLeft", "strength 0.03 · 27 %"),
        ("ArrowLeft", "strength 0.01 · 27 %"),
        ("ArrowLeft", "strength 1 · 27 %"),  # of the map before
    ]:
        page.keyboard.press(key)
        _shows(page, words)
    assert page.locator("#cell-words h3").inner_text() == "L2"
    page.keyboard.press("Enter")
    assert page.locator("#maps .kept").count() == 1
    assert page.locator('#maps .button[tabindex="0"]').count() == 10


def test_the_colour_can_be_switched(open_sweep):
    page = open_sweep()
    before = _colours(page)
    page.get_by_label("Colour").select_option("steps_to_generalise")
    wait_for(page, "document.querySelectorAll('#maps .unreached').length > 0")
    after = _colours(page)
    assert before != after
    assert "" in after  # a median that was not reached has no colour
    assert page.locator("#map-scale").inner_text().split()[0] != "0"
    page.get_by_label("Decay of the rest").select_option("0.5")
    wait_for(page, "document.querySelectorAll('#maps figure').length === 5")
    page.get_by_label("Second chart").select_option("query_norm")
    wait_for(page, "document.querySelector('#inner-caption').textContent.startsWith('‖')")


def test_the_legend_hides_an_arm(open_sweep):
    page = open_sweep()
    page.locator("#phase .legend").get_by_role("button", name="no decay").click()
    wait_for(page, "document.querySelectorAll('#maps figure').length === 8")


def test_dark_mode_has_its_own_colours(open_sweep):
    page = open_sweep(scheme="dark")
    dark = page.evaluate(STROKE), _colours(page)
    page.emulate_media(color_scheme="light")
    wait_for(page, f"{STROKE} !== value", dark[0])
    wait_for(page, "document.querySelector('#maps .face').style.fill !== value", dark[1][0])


@pytest.mark.parametrize("width", [375, 700])
def test_a_narrow_page_does_not_scroll_sideways(open_sweep, width):
    page = open_sweep(width=width, height=900)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    cell = _cell(page, "soft threshold (prox), strength 0.1, 48 %")
    cell.click()
    _shows(page, "strength 0.1 · 48 %")
    assert page.locator(".cell").bounding_box()["y"] < 900  # in view, below the maps


def test_a_sweep_that_has_only_begun(open_page, make_sweep):
    directory = make_sweep(["prox"], summary=False)
    (directory / "metrics.jsonl").unlink()
    page = open_page(write_report(directory))
    assert "not complete" in page.locator("#result").inner_text()
