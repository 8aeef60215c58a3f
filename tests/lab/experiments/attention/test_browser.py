"""The page in a real browser, of an experiment that the real code trained and of made-up ones."""

import json

import pytest

from rankdecay.lab.experiment import write_report

CHARTS = [f"{name}-chart" for name in ("rank", "quality", "cost", "curve", "layer-0", "layer-1", "layer-2")]
EVIL = "<img src=x onerror=window.owned=1></script><b>%{y}$"


def draw(page, identity, mark=".scatterlayer .trace"):
    chart = page.locator(f"#{identity}")
    chart.scroll_into_view_if_needed()
    chart.locator(mark).first.wait_for(state="attached")  # a line that is level has no height
    return chart


def choose(page, state, value):
    page.locator(f'select[data-state="{state}"]').first.select_option(value)


def last(identity, trace):
    """The last value of a trace, in the page."""
    return f"document.querySelector('#{identity}').data.at({trace}).y.at(-1)"


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (375, "dark")])
def test_the_charts_are_drawn(open_page, trained, width, scheme):
    page = open_page(trained / "report.html", width=width, scheme=scheme)
    for identity in CHARTS:
        draw(page, identity)
    draw(page, "mlp-chart", ".heatmaplayer image")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    if width > 1000:
        they_follow_their_choices(page, json.loads((trained / "summary.json").read_text())["arms"])


def they_follow_their_choices(page, cells):
    """Every chart follows a choice that it shares with others."""
    traces = "document.querySelectorAll('#rank-chart .scatterlayer .trace').length"
    draw(page, "rank-chart")
    page.wait_for_function(f"() => {traces} === 3")  # two arms, and the untrained value
    page.locator("#rank .legend button", has_text="low-rank").click()
    page.wait_for_function(f"() => {traces} === 2")
    assert page.locator("#cost .legend button", has_text="low-rank").get_attribute("aria-pressed") == "false"
    for state, value in (("mlp", "0"), ("part", "value_output"), ("measure", "imbalance"), ("layer", "2")):
        choose(page, state, value)
    cell = next(c for c in cells if (c["name"], c["strength"], c["mlp_decay"], c["qk_norm"]) == ("l2", 10, 0, False))
    expected = float(f"{cell['layers'][1]['value_output']['imbalance']:.4g}")
    page.wait_for_function(f"() => {last('rank-chart', -1)} === {expected}")
    assert page.locator('#cost select[data-state="measure"]').input_value() == "imbalance"
    choose(page, "norm", "on")
    choose(page, "part", "query_key")
    page.wait_for_function("() => document.querySelector('#rank-chart').textContent.includes('choose W_Q or W_K')")
    choose(page, "part", "query")
    choose(page, "measure", "pseudo_rank")
    page.wait_for_function(f"() => {traces} === 2")
    draw(page, "quality-chart")
    choose(page, "quality", "accuracy")
    page.wait_for_function(f"() => {last('quality-chart', -1)} === 0.5")
    draw(page, "curve-chart")
    choose(page, "curve", "accuracy")
    page.wait_for_function(f"() => {last('curve-chart', -1)} === 0.5")


def test_a_hostile_name_is_shown_and_not_run(open_page, make_experiment):
    options = {"strengths": {EVIL: (0.0, 1.0)}, "mlp_decays": (0.0, 0.1)}
    page = open_page(write_report(make_experiment((EVIL,), **options)))
    for identity in CHARTS:
        draw(page, identity)
    draw(page, "mlp-chart", ".heatmaplayer image").hover()
    point = draw(page, "rank-chart").locator(".point").first
    point.hover(force=True)
    page.locator("#rank-chart .hoverlayer .hovertext").first.wait_for()
    assert "<img src=x" in page.locator("#rank-chart .hoverlayer").text_content()


def test_an_experiment_that_goes_on(open_page, make_experiment):
    page = open_page(write_report(make_experiment(runs=1)))
    assert "not complete" in page.locator(".headline").inner_text()
    draw(page, "curve-chart")
    assert "no value" in page.locator("#rank .absent").inner_text()
