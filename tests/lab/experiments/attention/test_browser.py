"""The page in a real browser, of an experiment that the real code trained and of made-up ones."""

import pytest

from rankdecay.lab.report import write_report

CHARTS = ["rank-chart", "quality-chart", "cost-chart", "training-chart"]
EVIL = "<img src=x onerror=window.owned=1></script><b>%{y}$"


def draw(page, identity, mark=".scatterlayer .trace"):
    chart = page.locator(f"#{identity}")
    chart.scroll_into_view_if_needed()
    chart.locator(mark).first.wait_for(state="attached")  # a line that is level has no height
    return chart


def choose(page, state, value):
    page.locator(f'select[data-state="{state}"]').select_option(value)


def last(identity, trace=0):
    """The last value of a trace, in the page."""
    return f"document.querySelector('#{identity}').data[{trace}].y.at(-1)"


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (375, "dark")])
def test_the_charts_are_drawn(opener, trained, width, scheme):
    opened = opener(trained / "report.html", width=width, scheme=scheme)
    page = opened.page
    for identity in CHARTS:
        draw(page, identity)
    draw(page, "mlp-chart", ".heatmaplayer image")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    if width > 1000:
        they_follow_their_choices(page)
    opened.check()
    page.close()


def they_follow_their_choices(page):
    draw(page, "rank-chart")
    page.locator("#rank .legend button", has_text="low-rank").click()
    page.wait_for_function("() => document.querySelectorAll('#rank-chart .scatterlayer .trace').length === 2")
    assert page.locator("#cost .legend button", has_text="low-rank").get_attribute("aria-pressed") == "false"
    choose(page, "mlp", "0")
    choose(page, "part", "value_output")
    choose(page, "measure", "imbalance")
    choose(page, "layer", "2")
    cell = "JSON.parse(document.getElementById('run-data').textContent).cells[1]"  # L2 at 10, no norm, MLP decay 0
    page.wait_for_function(f"() => {last('rank-chart')} === {cell}.ends.value_output.imbalance[2]")
    choose(page, "norm", "on")
    choose(page, "part", "query_key")
    page.wait_for_function("() => document.querySelector('#rank-chart').textContent.includes('choose W_Q or W_K')")
    choose(page, "part", "query")
    choose(page, "measure", "pseudo_rank")
    page.wait_for_function("() => document.querySelectorAll('#rank-chart .scatterlayer .trace').length === 2")
    draw(page, "training-chart")
    choose(page, "spread", "each")
    page.wait_for_function("() => document.querySelectorAll('#training-chart .cartesianlayer .subplot').length === 2")
    choose(page, "shown", "loss")
    page.wait_for_function("() => document.querySelectorAll('#training-chart .cartesianlayer .subplot').length === 1")
    draw(page, "quality-chart")
    choose(page, "quality", "accuracy")
    page.wait_for_function(f"() => {last('quality-chart')} === 0.5")


def test_a_hostile_name_is_shown_and_not_run(opener, make_experiment):
    options = {"strengths": {EVIL: (0.0, 1.0)}, "mlp_decays": (0.0, 0.1)}
    opened = opener(write_report(make_experiment((EVIL,), **options)))
    page = opened.page
    for identity in CHARTS:
        draw(page, identity)
    draw(page, "mlp-chart", ".heatmaplayer image").hover()
    point = draw(page, "rank-chart").locator(".point").first
    point.hover(force=True)
    page.locator("#rank-chart .hoverlayer .hovertext").first.wait_for()
    assert "<img src=x" in page.locator("#rank-chart .hoverlayer").text_content()
    opened.check()
    page.close()


def test_an_experiment_that_goes_on(opener, make_experiment):
    opened = opener(write_report(make_experiment(runs=1)))
    assert "not complete" in opened.page.locator(".headline").inner_text()
    draw(opened.page, "training-chart")
    opened.page.locator("#rank-chart").scroll_into_view_if_needed()
    opened.page.wait_for_function("() => document.querySelector('#rank-chart').textContent.includes('no value')")
    opened.check()
    opened.page.close()
