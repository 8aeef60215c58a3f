"""The page of an inspection: its words and data, and its charts in a real browser."""

import json
from dataclasses import replace
from xml.etree import ElementTree

import pytest
import torch

import rankdecay as rd
from rankdecay.inspection import Inspection, inspect
from rankdecay.lab.report.inspection import inspection_page, render, short_labels
from tests.lab.browsing import wait_for

EVIL = "<img src=x onerror=window.owned=1>%{y}</script><b>"
CHECKPOINTS = [f"/runs/tiny/checkpoint-{step}/model.safetensors" for step in (0, 10, 20)]


@pytest.fixture(scope="module")
def reports() -> list[Inspection]:
    """Three checkpoints of a GPT-2 that learns to repeat under low-rank decay."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    ids = {"bos_token_id": 0, "eos_token_id": 0}
    model = GPT2LMHeadModel(GPT2Config(n_layer=3, n_head=4, n_embd=32, vocab_size=16, n_positions=16, **ids))
    optimizer = torch.optim.AdamW(rd.param_groups(model, query_key=rd.LowRank(20.0)), lr=3e-3, weight_decay=0.0)
    rd.attach(optimizer)
    found = []
    for step in range(21):
        if step % 10 == 0:
            found.append(replace(inspect(model), source=CHECKPOINTS[step // 10]))
        half = torch.randint(0, 16, (4, 8))
        ids = torch.cat([half, half], 1)
        logits = model(input_ids=ids).logits[:, :-1]
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return found


@pytest.fixture(scope="module")
def broken(reports) -> Inspection:
    """One head without a finite number, and names that are markup."""
    rows = [{**row, "name": EVIL} for row in reports[-1].rows]
    bad = next(i for i, row in enumerate(rows) if (row["layer"], row["head"], row["product"]) == (1, 2, "query_key"))
    figures = {key: None for key, value in rows[bad].items() if isinstance(value, float)}
    rows[bad] |= figures | {"singular_values": [None] * rows[bad]["head_dim"]}
    return Inspection(EVIL, rows, [EVIL], [EVIL])


def _data(page):
    return json.loads(page.split('id="run-data">')[1].split("</script>")[0])


# --- words and data ---


def test_the_words_say_what_the_rows_say(reports):
    last = [row for row in reports[-1].rows if row["product"] == "query_key"]
    lowest = min(last, key=lambda row: (row["pseudo_rank"], row["layer"], row["head"]))
    page = render(reports[-1:])
    assert "In 3 of 3 layers, W_Kᵀ W_Q has a clearly lower pseudo rank than the same shapes untrained" in page
    against = f"{lowest['pseudo_rank']:.3g} against {lowest['untrained']['pseudo_rank']:.3g}"
    assert f"lowest: layer {lowest['layer']} head {lowest['head']}, {against}" in page
    assert "In 0 of 3 layers, W_Kᵀ W_Q" in render(reports[:1])


def test_the_table_is_of_means_beside_the_untrained(reports):
    def mean(report):
        values = [row["stable_rank"] for row in report.rows if (row["layer"], row["product"]) == (2, "value_output")]
        return f"{sum(values) / 4:.3g}"

    row = next(r for r in reports[0].rows if r["product"] == "value_output")
    bracket = f"<small>[{row['untrained']['stable_rank']:.3g}]</small>"
    assert f"<td>{mean(reports[-1])} {bracket}</td>" in render(reports[-1:])
    assert f"<td>{mean(reports[0])} → {mean(reports[-1])} {bracket}</td>" in render(reports)


def test_a_head_that_is_not_finite_is_named_and_left_out_of_means(broken):
    page = render([broken])
    assert "not finite: layer 1 head 2." in page
    layer = _data(page)["kinds"][0]["reports"][0][1]
    assert layer["values"]["pseudo_rank"][2] is None
    assert layer["spectra"][2] is None
    assert page.count(">×<") == 0  # the mean over the other three is known


def test_text_is_only_ever_text(broken):
    page = render([broken, broken])
    assert "<img" not in page.split("<script")[0]
    assert page.count("</script>") == render([replace(broken, source="a", notes=[], unhandled=[])]).count("</script>")


def _of_a_matrix(baseline):
    balance = dict.fromkeys(("nuclear_gap", "nuclear_ratio", "imbalance"))
    return {k: v for k, v in baseline.items() if k not in ("squared_norms", "mean_frobenius")} | balance


def test_normalised_queries_and_keys_have_charts_of_their_own():
    rows = inspect(torch.nn.MultiheadAttention(16, 2)).rows
    matrices = [
        {k: v for k, v in row.items() if k not in ("product", "squared_norms", "mean_frobenius")}
        | dict.fromkeys(("nuclear_gap", "nuclear_ratio", "imbalance"))
        | {"untrained": _of_a_matrix(row["untrained"]), "matrix": role}
        for row, role in zip(rows[:2] * 2, ["query"] * 2 + ["key"] * 2, strict=True)
    ]
    kinds = _data(render([Inspection("m", matrices + rows[2:])]))["kinds"]
    assert [kind["key"] for kind in kinds] == ["query", "key", "value_output"]
    assert list(kinds[0]["measures"]) == ["pseudo_rank", "effective_share", "stable_rank"]
    assert [kind["factors"] for kind in kinds] == [None, None, ["W_V", "W_O"]]
    assert "norms" not in kinds[0]["reports"][0][0]


def test_many_singular_values_are_thinned_to_first_and_last(reports, monkeypatch):
    monkeypatch.setattr("rankdecay.lab.report.inspection.SNAPSHOT_NUMBERS", 100)
    data = _data(render(reports))
    assert [layers[0]["spectra"] is None for layers in data["kinds"][0]["reports"]] == [False, True, False]
    assert "first and the last checkpoint only" in data["notices"][0]


def test_the_two_figures_of_the_paper_are_in_the_data(reports):
    data = _data(render(reports))
    rows = {(r["layer"], r["head"], r["product"]): r for r in reports[-1].rows}
    for kind in data["kinds"]:
        for layer in kind["reports"][-1]:
            first = rows[layer["layer"], 0, kind["key"]]
            for drawn, values in zip(layer["norms"], first["squared_norms"].values(), strict=True):
                assert drawn == pytest.approx(values, rel=1e-3)
            for head, (mean, nuclear) in zip(layer["heads"], layer["bounds"], strict=True):
                row = rows[layer["layer"], head, kind["key"]]
                assert (mean, nuclear) == pytest.approx((row["mean_frobenius"], row["nuclear_norm"]), rel=1e-3)
            grey = data["untrained_pairs"][layer["untrained_pairs"]]
            assert grey[2][0] == pytest.approx(first["untrained"]["mean_frobenius"], rel=1e-3)
    page = render(reports[-1:])
    own = [row for row in reports[-1].rows if row["product"] == "value_output"]
    mean = sum(row["imbalance"] for row in own) / len(own)
    assert (
        f"sharper measure: {mean:.3g} here (mean over heads), {own[0]['untrained']['imbalance']:.3g} untrained" in page
    )
    assert "each row of W_V is as large as its column of W_O" in page


@pytest.mark.parametrize(
    ("sources", "labels"),
    [
        (CHECKPOINTS, ["checkpoint-0", "checkpoint-10", "checkpoint-20"]),
        (["a/b.pt", "a/c.pt"], ["b.pt", "c.pt"]),
        (["a/b.pt"], ["a/b.pt"]),
        (["m", "m"], ["1: m", "2: m"]),
        (["", "x"], [".", "x"]),
    ],
)
def test_labels_are_what_differs_in_the_paths(sources, labels):
    assert short_labels(sources) == labels


def test_nothing_to_show_is_refused(tmp_path):
    for reports in ([], [Inspection("m", [])]):
        with pytest.raises(ValueError, match="nothing to show"):
            inspection_page(reports, tmp_path / "page.html")
    assert list(tmp_path.iterdir()) == []


# --- in a browser ---


@pytest.fixture
def open_reports(open_page, tmp_path):
    """Opens the page of some reports, the charts under `within` drawn."""

    def open_(reports, width=1280, within="#query_key"):
        page = open_page(inspection_page(reports, tmp_path / "page.html"), width=width)
        for chart in page.locator(f"{within} .chart").all():
            chart.scroll_into_view_if_needed()
            chart.locator("svg").wait_for()
        return page

    return open_


def _drawn(page, identity, what="figure.series"):
    return page.evaluate(f"JSON.parse(JSON.stringify(document.getElementById('{identity}').{what}))")


def _choose(page, label, option):
    page.locator("#map-query_key").scroll_into_view_if_needed()  # a chart out of view is not drawn
    page.locator("#query_key").get_by_label(label).select_option(option)


def _click(page, layer, head, kind="query_key"):
    chart = page.locator(f"#map-{kind}")
    chart.scroll_into_view_if_needed()
    box = chart.bounding_box()
    x, y = page.evaluate(
        f"(({{across, down}}) => [across.at({head}), down.at({layer})])(document.getElementById('map-{kind}').scales)"
    )
    page.mouse.move(box["x"] + x, box["y"] + y)
    page.locator(f"#map-{kind} .hovertext").wait_for()
    page.mouse.click(box["x"] + x, box["y"] + y)


def test_a_measure_changes_the_map_and_a_click_shows_the_head(open_reports, reports):
    page = open_reports(reports[-1:], within="main")
    rows = {(r["layer"], r["head"]): r for r in reports[-1].rows if r["product"] == "query_key"}
    assert page.locator(".chart svg").count() == 10
    assert page.locator("#trajectory-query_key").count() == 0
    for measure in ("pseudo_rank", "stable_rank", "nuclear_gap"):
        _choose(page, "Measure", measure)
        value = float(f"{rows[1, 3][measure]:.4g}")
        wait_for(page, "document.getElementById('map-query_key').figure.cells.values[1][3] === value", value)
    _click(page, 1, 3)
    wait_for(page, "document.getElementById('cell-query_key').textContent.startsWith('Layer 1, head 3: Nuclear gap')")
    label = page.locator("#map-query_key .hovertext").text_content()
    assert "untrained" in label
    assert "transformer.h.1.attn" in label
    sigma = rows[1, 3]["singular_values"]
    trace = _drawn(page, "spectrum-query_key")[-1]
    assert trace["y"] == pytest.approx([max(s / sigma[0], 1e-7) for s in sigma], rel=2e-3)
    _choose(page, "Scale", "linear")
    wait_for(page, "document.getElementById('spectrum-query_key').figure.y.type === 'linear'")
    baseline = rows[1, 3]["untrained"]["singular_values"]
    untrained = _drawn(page, "spectrum-query_key")[0]
    assert untrained["name"] == "untrained"
    assert untrained["y"] == pytest.approx([s / baseline[0] for s in baseline], rel=2e-3)


def test_what_is_equal_at_balance_is_drawn_beside_the_untrained(open_reports, reports):
    page = open_reports(reports, within="main")
    row = next(r for r in reports[-1].rows if (r["layer"], r["head"], r["product"]) == (1, 0, "query_key"))
    line, trained, untrained = _drawn(page, "norms-query_key")
    assert line["x"] == line["y"]
    assert len(trained["x"]) == 3 * 8  # the first head of each of three layers
    assert trained["x"][8:16] == pytest.approx([max(v, line["x"][0]) for v in row["squared_norms"]["query"]], rel=1e-3)
    assert trained["y"][8:16] == pytest.approx([max(v, line["x"][0]) for v in row["squared_norms"]["key"]], rel=1e-3)
    assert len(set(trained["colors"])) == 3
    assert untrained["x"] == pytest.approx(row["untrained"]["squared_norms"]["query"], rel=1e-3)
    _, trained, untrained = _drawn(page, "bounds-value_output")
    assert len(trained["x"]) == 3 * 4
    assert all(nuclear <= mean * 1.001 for mean, nuclear in zip(trained["x"], trained["y"], strict=True))
    of_values = next(r for r in reports[-1].rows if r["product"] == "value_output")["untrained"]
    assert untrained["x"] == pytest.approx([of_values["mean_frobenius"]], rel=1e-3)
    _choose(page, "Checkpoint", "checkpoint-0")
    page.locator("#bounds-value_output").scroll_into_view_if_needed()
    page.locator("#value_output").get_by_label("Checkpoint").select_option("checkpoint-0")
    wait_for(page, "document.getElementById('bounds-value_output').figure.series[1].x[0] !== value", trained["x"][0])


def test_several_reports_have_a_line_each(open_reports, reports):
    page = open_reports(reports)
    profile = [t for t in _drawn(page, "profile-query_key") if "name" in t]
    assert [t["name"] for t in profile] == ["untrained", "checkpoint-0", "checkpoint-10", "checkpoint-20"]
    assert page.locator("#query_key .keys").first.locator("span").all_inner_texts() == [
        t["name"] for t in [*profile[1:], profile[0]]
    ]
    lines = _drawn(page, "trajectory-query_key")
    assert [line["name"] for line in lines] == ["layer 0", "layer 1", "layer 2"]
    for line, values in zip(lines, zip(*(t["y"] for t in profile[1:]), strict=True), strict=True):
        assert line["y"] == pytest.approx(list(values))
    assert len(_drawn(page, "spectrum-query_key")) == 4
    after = _drawn(page, "map-query_key", "figure.cells")
    _choose(page, "Checkpoint", "checkpoint-0")
    wait_for(page, "document.getElementById('map-query_key').figure.cells.values[0][0] > value", after["values"][0][0])
    before = _drawn(page, "map-query_key", "figure.cells")
    assert before["range"] == after["range"]


def test_a_cell_without_a_number_is_crossed_and_markup_is_inert(open_reports, broken):
    page = open_reports([broken], width=375)
    (crosses,) = _drawn(page, "map-query_key")
    assert (crosses["x"], crosses["y"]) == ([2], [1])
    assert page.locator("#map-query_key").get_by_text("×").count() == 1
    _click(page, 1, 2)
    wait_for(page, "document.getElementById('cell-query_key').textContent.startsWith('Layer 1, head 2: not finite.')")
    assert EVIL in page.locator("#cell-query_key").inner_text()
    assert EVIL in page.locator("#map-query_key .hovertext").text_content()
    assert page.locator("img[src=x]").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth") == 375


def test_a_wide_chart_describes_every_line_and_a_drag_zooms(open_reports, reports):
    page = open_reports(reports)
    chart = page.locator("#profile-query_key")
    chart.scroll_into_view_if_needed()
    box = chart.bounding_box()
    page.mouse.move(box["x"] + 0.52 * box["width"], box["y"] + 200)
    lines = chart.locator(".hovertext > *").all_inner_texts()
    assert lines[0] == "layer 1"
    assert [line.split(":")[0] for line in lines[1:]] == ["untrained", "checkpoint-0", "checkpoint-10", "checkpoint-20"]
    whole = _drawn(page, "profile-query_key", "figure.x.range")
    page.mouse.down()
    page.mouse.move(box["x"] + 0.8 * box["width"], box["y"] + 250, steps=3)
    page.mouse.up()
    low, high = _drawn(page, "profile-query_key", "zoom.x")
    assert whole[0] < low < high < whole[1]
    labels = chart.locator("svg text").all_inner_texts()
    _choose(page, "Measure", "stable_rank")  # what is drawn again stays as it was zoomed
    assert _drawn(page, "profile-query_key", "zoom.x") == [low, high]
    chart.scroll_into_view_if_needed()
    box = chart.bounding_box()
    page.mouse.dblclick(box["x"] + 0.52 * box["width"], box["y"] + 200)
    wait_for(page, "document.getElementById('profile-query_key').zoom === null")
    assert chart.locator("svg text").all_inner_texts() != labels


def test_a_chart_is_saved_as_svg(open_reports, reports):
    page = open_reports(reports)
    chart = page.locator("#spectrum-query_key")
    chart.hover()
    with page.expect_download() as saved:
        chart.get_by_role("button", name="SVG").click()
    assert saved.value.suggested_filename == "spectrum-query_key.svg"
    picture = ElementTree.parse(saved.value.path()).getroot()
    assert picture.tag == "{http://www.w3.org/2000/svg}svg"
    assert {"index", "σ / σ₁"} <= {text.text for text in picture.iter("{http://www.w3.org/2000/svg}text")}


def test_the_words_and_tables_need_no_script(browser, reports, tmp_path):
    page = browser.new_page(java_script_enabled=False)
    page.goto(inspection_page(reports, tmp_path / "page.html").as_uri())
    assert page.locator("#query_key tbody tr").count() == 3
    assert page.locator("#query_key tbody").get_by_text("transformer.h.1.attn").is_visible()
    page.close()
