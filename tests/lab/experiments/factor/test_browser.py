"""The page of the matrix experiment in a real browser."""

import pytest

from rankdecay.lab.experiment import run
from rankdecay.lab.experiments.factor.experiment import EXPERIMENT
from rankdecay.lab.experiments.factor.settings import Factor

CHARTS = ["spectra-chart", "balance-chart", "gap-chart"]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    out = tmp_path_factory.mktemp("factor") / "run"
    strengths = (0.0, 0.1, 0.3)
    settings = Factor(seeds=3, strengths=strengths, steps=200, out=out, quiet=True, device="cpu")
    run(EXPERIMENT, settings, "rankdecay factor")
    return out / "report.html"


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (375, "dark")])
def test_the_charts_are_drawn_and_follow_their_choices(open_page, report, width, scheme):
    page = open_page(report, width=width, scheme=scheme)
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
    measured = "document.querySelector('#balance-chart').data.filter((trace) => trace.showlegend)"
    law = "document.querySelector('#balance-chart').data.filter((trace) => trace.line.dash === 'dash')"
    assert page.evaluate(f"{measured}.map((trace) => trace.name)") == ["λ = 0", "λ = 0.1", "λ = 0.3"]
    found = page.evaluate(f"{measured}[1].y.at(-1)")  # at the last step, and the law of the flow
    assert found == pytest.approx(page.evaluate(f"{law}[0].y.at(-1)"), rel=0.15)
    page.locator("#gap").get_by_label("λ").select_option("0.3")
    page.locator("#gap-chart").scroll_into_view_if_needed()
    drawn = "document.querySelector('#gap-chart').data"
    page.wait_for_function(f"() => {drawn}.filter((trace) => trace.line.dash === 'dot').length === 4")  # two factors
    assert page.evaluate(f"{drawn}.filter((trace) => trace.fill).length") == 5
    assert "soft" in page.locator(".headline").inner_text()
