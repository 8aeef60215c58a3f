"""The page of attention against its SVMs in a real browser."""

import json
import shutil

import pytest

from rankdecay.lab.experiment import write_report
from tests.lab.lines import without_checksums

CHARTS = ["cosine-nuclear-chart", "cosine-frobenius-chart", "nuclear-excess-chart", "frobenius-excess-chart"]
CHARTS += ["spectra-chart"]
EVIL = "<img src=x onerror=window.owned=1></script><b>%{y}$"


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (375, "dark")])
def test_the_charts_are_drawn_and_follow_their_choices(open_page, planar, width, scheme):
    page = open_page(planar / "report.html", width=width, scheme=scheme)
    for identity in CHARTS:
        chart = page.locator(f"#{identity}")
        chart.scroll_into_view_if_needed()
        chart.locator(".scatterlayer .trace").first.wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") == width

    words = "document.querySelector('#cosine-nuclear-chart').data.filter((trace) => trace.mode === 'lines')"
    lines = f"{words}.filter((trace) => trace.hovertemplate && trace.line.width > 2).length"
    bands = f"{words}.filter((trace) => trace.fill === 'toself').length"
    page.locator("#direction").scroll_into_view_if_needed()
    page.wait_for_function(f"() => {lines} === 4 && {bands} === 4")
    page.locator("#direction").get_by_label("Data set").select_option("1")
    page.wait_for_function(f"() => {lines} === 3 && {bands} === 0")  # diagonal weights have no part in this one
    page.locator("#direction .legend button").first.click()
    page.wait_for_function(f"() => {lines} === 2")

    assert page.locator("#spectra").get_by_label("Data set").input_value() == "1"  # one choice for all charts
    page.locator("#spectra-chart").scroll_into_view_if_needed()
    run_data = "JSON.parse(document.getElementById('run-data').textContent).charts.at(-1).lines"
    last = "document.querySelector('#spectra-chart').data[0].y.at(-1)"
    for arm in ("separate", "merged"):
        page.locator("#spectra").get_by_label("Arm").select_option(arm)
        page.locator("#spectra-chart").scroll_into_view_if_needed()
        own = f"{run_data}.find(({{ where }}) => where.set === '1' && where.spectrum === '{arm}').y.at(-1)"
        page.wait_for_function(f"() => {last} === {own}")
    axis = "document.querySelector('#spectra-chart').layout.yaxis.type"
    assert page.evaluate(axis) == "log"
    page.locator("#spectra").get_by_label("Axis").select_option("linear")
    page.wait_for_function(f"() => {axis} !== 'log'")


def test_the_pictures_follow_time_arm_and_data_set(open_page, planar):
    page = open_page(planar / "report.html")
    section = page.locator("#picture")
    section.scroll_into_view_if_needed()
    section.locator("svg").first.wait_for()
    assert section.locator("svg").count() == 2
    for mark, count in ((".token", 6), (".selected", 2), (".direction", 2), (".query", 2), (".target", 4)):
        assert section.locator(mark).count() == count
    assert "from the nuclear SVM" in section.locator("figcaption").first.inner_text()
    tip = "document.querySelector('#pictures .direction line').getAttribute('x2')"
    ended = page.evaluate(tip)
    slider = page.locator("#moment")
    slider.focus()
    page.keyboard.press("Home")
    page.wait_for_function("() => !document.querySelector('#pictures .direction')")  # W begins at zero
    assert "step 0, margin not yet" in section.locator("output").inner_text()
    page.keyboard.press("ArrowRight")
    page.wait_for_function(f"() => document.querySelector('#pictures .direction') && {tip} !== '{ended}'")
    section.get_by_label("Arm").select_option("diagonal")
    section.get_by_label("Data set").select_option("3")
    page.wait_for_function("() => document.querySelector('#pictures small').textContent.includes('ℓ1 solution')")
    assert slider.input_value() == slider.get_attribute("max")  # another is shown at its end
    section.get_by_label("Data set").select_option("1")
    page.wait_for_function("() => document.querySelector('#pictures').textContent.includes('did not take part')")


def test_names_from_outside_are_only_text(open_page, planar, tmp_path):
    directory = shutil.copytree(planar, tmp_path / "run")
    for name in ("config.json", "summary.json", "metrics.jsonl"):
        path = directory / name
        path.write_text(without_checksums(path.read_text()).replace('"separate"', json.dumps(EVIL)))
    page = open_page(write_report(directory))
    chart = page.locator("#cosine-nuclear-chart")
    chart.scroll_into_view_if_needed()
    chart.locator(".scatterlayer .trace").first.wait_for()
    assert EVIL in page.locator("#direction .legend").inner_text()
    box = chart.bounding_box()
    for share in (0.2, 0.4, 0.6):  # names are in hovers too
        page.mouse.move(box["x"] + share * box["width"], box["y"] + 0.3 * box["height"])
        page.wait_for_timeout(100)


def test_an_incomplete_run_has_a_page_too(open_page, tmp_path):
    (tmp_path / "config.json").write_text('{"command": "margin", "settings": {"l2": 0.1}, "arms": []}')
    page = open_page(write_report(tmp_path))
    assert "not complete" in page.locator(".headline").inner_text()
    for section in ("#direction", "#picture", "#figures"):
        assert page.locator(section).count() == 0
