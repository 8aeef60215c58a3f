"""The page in a real browser: Debian's Chromium, driven by Playwright, from a file and without a network."""

import importlib.util
from pathlib import Path

import pytest

from rankdecay.lab.experiment import write_report
from tests.lab.browsing import wait_for

CHARTS = ["accuracy-chart", "rank-chart", "spectra-chart", "share-chart", "attention-chart"]
EVIL = "<img src=x onerror=window.owned=1><b>%{y}</b>"


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    spec = importlib.util.spec_from_file_location("report_fixture", Path(__file__).with_name("conftest.py"))
    assert spec is not None
    assert spec.loader is not None
    fixture = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fixture)
    directory = tmp_path_factory.mktemp("browser") / "run"
    return write_report(fixture.write_run(directory, [*fixture.ARMS, EVIL]))


@pytest.fixture
def desktop(open_page, report):
    return open_page(report)


def _show(page, identity):
    """Bring a chart into view and wait until it is drawn."""
    chart = page.locator(f"#{identity}")
    chart.scroll_into_view_if_needed()
    chart.locator(".main-svg, svg.dial").first.wait_for()
    return chart


def _contrast(first, second):
    def luminance(colour):
        channels = [float(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted([luminance(first), luminance(second)])
    return (high + 0.05) / (low + 0.05)


def test_every_section_is_drawn(desktop):
    for identity in CHARTS:
        assert _show(desktop, identity).locator(".trace, .heatmaplayer image").count() > 0, identity
    _show(desktop, "needles")
    assert desktop.locator(".needle").count() == 7
    assert desktop.locator(".needle .fan").count() >= 2
    assert desktop.locator("#attention-chart .heatmaplayer image").count() == 7 * 2
    assert EVIL in desktop.locator("#accuracy .legend").inner_text()


def test_hovering_names_the_values(desktop):
    box = _show(desktop, "accuracy-chart").bounding_box()
    desktop.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 3)
    label = desktop.locator("#accuracy-chart .hoverlayer .legend")
    label.wait_for()
    assert "step 400" in label.text_content()
    assert "low-rank decay" in label.text_content()
    box = _show(desktop, "attention-chart").bounding_box()
    desktop.mouse.move(box["x"] + box["width"] * 0.3, box["y"] + 70)
    label = desktop.locator("#attention-chart .hovertext")
    label.wait_for()
    assert "no decay, head 1" in label.text_content()


def test_the_slider_and_play_move_through_time(desktop):
    _show(desktop, "needles")
    fans = desktop.locator(".needle .fan").count()
    _show(desktop, "spectra-chart")
    smallest = "document.querySelector('#spectra-chart').data.at(-4).y.at(-1)"  # of low-rank decay
    end = desktop.evaluate(smallest)
    desktop.locator("#step-slider").fill("0")
    wait_for(desktop, f"{smallest} > 100 * value", end)
    assert desktop.locator("#step-output").inner_text() == "0"
    _show(desktop, "needles")
    wait_for(desktop, "document.querySelectorAll('.needle .fan').length < value", fans)
    desktop.locator("#play").click()
    wait_for(desktop, "document.querySelector('#step-output').textContent === '800'")
    _show(desktop, "spectra-chart")
    wait_for(desktop, f"{smallest} === value", end)


def test_a_choice_redraws_its_chart(desktop):
    _show(desktop, "spectra-chart")
    largest = "document.querySelector('#spectra-chart').data[0].y[0] === value"
    length = "document.querySelector('#spectra-chart').data[0].y.length === value"
    scale = desktop.locator("#spectra").get_by_label("Values")
    matrix = desktop.locator("#spectra").get_by_label("Matrix")
    wait_for(desktop, largest, 1)
    scale.select_option("absolute")
    wait_for(desktop, f"!({largest})", 1)
    scale.select_option("relative")
    wait_for(desktop, largest, 1)
    matrix.select_option("product:1:0")
    wait_for(desktop, length, 8)
    matrix.select_option("singular_values:0:0")
    wait_for(desktop, length, 16)


def test_the_legend_hides_an_arm_everywhere(desktop):
    traces = "document.querySelectorAll('#accuracy-chart .scatterlayer .trace').length === value"
    _show(desktop, "accuracy-chart")
    before = desktop.locator("#accuracy-chart .scatterlayer .trace").count()
    button = desktop.locator("#accuracy .legend").get_by_role("button", name="low-rank decay")
    button.click()
    wait_for(desktop, traces, before - 3)  # its seeds and its median
    assert button.get_attribute("aria-pressed") == "false"
    _show(desktop, "needles")
    wait_for(desktop, "document.querySelectorAll('.needle').length === value", 6)
    button.click()
    _show(desktop, "accuracy-chart")
    wait_for(desktop, traces, before)


def test_a_phone_gets_the_words_first_and_needs_no_sideways_scrolling(open_page, report):
    page = open_page(report, width=375, height=812)
    paint = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
    assert paint < page.evaluate("performance.getEntriesByType('navigation')[0].domContentLoadedEventEnd")
    assert page.locator("#attention-chart .main-svg").count() == 0  # far down: not drawn before it is needed
    for identity in [*CHARTS, "needles"]:
        _show(page, identity)
    assert page.evaluate("document.documentElement.scrollWidth") == 375
    box = _show(page, "accuracy-chart").bounding_box()
    x, y = page.evaluate(
        "(({xaxis: x, yaxis: y}) => [x._offset + x.d2p(400), y._offset + y.d2p(0.08)])"
        "(document.querySelector('#accuracy-chart')._fullLayout)"
    )
    page.mouse.move(box["x"] + x, box["y"] + y)
    label = page.locator("#accuracy-chart .hovertext")
    label.wait_for()
    assert "step 400: 0.08" in label.text_content()
    assert page.evaluate("document.querySelector('#figures .scroll').scrollWidth") > 375  # the table scrolls by itself
    assert page.evaluate("parseFloat(getComputedStyle(document.body).fontSize)") >= 15


def test_dark_mode_is_readable_and_can_be_switched(open_page, report):
    page = open_page(report, scheme="dark")
    tick = "getComputedStyle(document.querySelector('#accuracy-chart .xtick text')).fill"
    _show(page, "accuracy-chart")
    background, text = page.evaluate(f"[getComputedStyle(document.body).backgroundColor, {tick}]")
    assert _contrast(background, "rgb(0, 0, 0)") < 1.3
    assert _contrast(background, text) > 4.5
    page.emulate_media(color_scheme="light")
    wait_for(page, f"{tick} !== value", text)
    background, text = page.evaluate(f"[getComputedStyle(document.body).backgroundColor, {tick}]")
    assert _contrast(background, "rgb(255, 255, 255)") < 1.1
    assert _contrast(background, text) > 4.5


def test_a_run_without_snapshots_or_summary(open_page, make_run):
    page = open_page(write_report(make_run(["low_rank"], summary=False, snapshots=False)))
    _show(page, "accuracy-chart")
    assert "no snapshots" in page.locator("#time").inner_text()
