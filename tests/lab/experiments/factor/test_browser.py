"""The page of the matrix experiment in a real browser."""

import pytest

from rankdecay.lab.experiments.factor.experiment import Factor, run
from rankdecay.lab.report import write_report

CHARTS = ["spectra-chart", "balance-chart", "gap-chart"]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    out = tmp_path_factory.mktemp("factor") / "run"
    strengths = (0.0, 0.1, 0.3)
    run(Factor(seeds=3, strengths=strengths, steps=200, out=out, quiet=True, device="cpu"), "rankdecay factor")
    return out / "report.html"


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (375, "dark")])
def test_the_charts_are_drawn_and_follow_their_choices(opener, report, width, scheme):
    opened = opener(report, width=width, scheme=scheme)
    page = opened.page
    for identity in CHARTS:
        chart = page.locator(f"#{identity}")
        chart.scroll_into_view_if_needed()
        chart.locator(".scatterlayer .trace").first.wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") == width
    marks = "document.querySelector('#spectra-chart').data.at(-1).y.at(-1)"  # the least value at the largest strength
    page.wait_for_function(f"() => {marks} < 0.02")
    page.locator("#spectra").get_by_label("Arm").select_option("merged")
    page.locator("#spectra-chart").scroll_into_view_if_needed()
    page.wait_for_function(f"() => Math.abs({marks} - 0.2 / 1.3) < 1e-4")
    measured = "document.querySelector('#balance-chart').data.filter((trace) => trace.showlegend !== false)"
    assert page.evaluate(f"{measured}.length") == 3
    predicted, found = page.evaluate(  # at the last step: the law of the flow, dashed, and what was measured
        "document.querySelector('#balance-chart').data.slice(1, 3).map((trace) => trace.y.at(-1))"
    )
    assert found == pytest.approx(predicted, rel=0.15)
    page.locator("#gap").get_by_label("λ").select_option("0.3")
    page.locator("#gap-chart").scroll_into_view_if_needed()
    page.wait_for_function("() => document.querySelectorAll('#gap-chart .scatterlayer .trace').length >= 14")
    assert "soft" in page.locator(".headline").inner_text()
    opened.check()
    page.close()


def test_an_incomplete_run_has_a_page_too(opener, tmp_path):
    (tmp_path / "config.json").write_text('{"command": "factor", "settings": {"lr": 0.1}, "arms": []}')
    opened = opener(write_report(tmp_path))
    assert "not complete" in opened.page.locator(".headline").inner_text()
    assert not opened.page.locator("#spectra").is_visible()
    opened.check()
    opened.page.close()
