"""The page of attention against its SVMs: its words, its table and what its charts are drawn from."""

import json
import re
import shutil

import numpy as np
import pytest

from rankdecay.lab.errors import SettingError
from rankdecay.lab.experiments.margin.curves import at_equal_margins, climb, evenly, fitting
from rankdecay.lab.experiments.margin.data import draw
from rankdecay.lab.experiments.margin.experiment import Margin, print_summary, run
from rankdecay.lab.experiments.margin.page import render
from rankdecay.lab.report import draw_figure, write_report

EVIL = "<img src=x onerror=window.owned=1></script><b>%{y}$"


def visible(text):
    """A page without its scripts and styles."""
    return re.sub(r"<(script|style).*?</\1>", "", text, flags=re.DOTALL)


def data_of(text):
    return json.loads(re.search(r'id="run-data">(.*?)</script>', text, re.DOTALL)[1])


def summary_of(directory):
    return json.loads((directory / "summary.json").read_text())


@pytest.fixture(scope="module")
def text(planar):
    return render(planar)


@pytest.fixture
def copy(planar, tmp_path):
    return shutil.copytree(planar, tmp_path / "copy")


# --- words and table ---


def test_a_run_leaves_its_page_and_the_words_are_there_without_a_script(planar):
    text = visible((planar / "report.html").read_text())
    assert "{{" not in text
    assert "Which margin does softmax attention maximise" in text
    for row in summary_of(planar)["arms"]:
        assert f"{row['cosine_nuclear']:.4f}" in text
        assert f"{row['cosine_frobenius_least']:.4f}" in text
    assert "3 of 4 <small>1 inseparable</small>" in text
    assert '<section id="picture">' in text


def test_a_page_that_a_kill_prevented_is_written_the_next_time(copy, capsys):
    (copy / "report.html").unlink()
    settings = json.loads((copy / "config.json").read_text())["settings"]
    settings["parametrisation"] = tuple(settings["parametrisation"])
    run(Margin(**settings, out=copy, device="cpu", quiet=True), "rankdecay margin")
    assert "is complete" in capsys.readouterr().err
    assert (copy / "report.html").exists()


def test_an_arm_that_took_no_part_is_in_the_table_and_named(copy):
    summary = summary_of(copy)
    summary["arms"] = [row for row in summary["arms"] if row["name"] != "diagonal"]
    (copy / "summary.json").write_text(json.dumps(summary))
    text = visible(render(copy))
    assert "0 of 4 <small>4 inseparable</small>" in text
    assert "diagonal: all 4 inseparable" in text


def test_why_data_sets_are_left_out(copy):
    summary = summary_of(copy)
    row = summary["arms"][0] | {"infeasible": 1, "undecided": 2, "cosine_nuclear": None, "log10_loss_excess": -12345.6}
    (copy / "summary.json").write_text(json.dumps(summary | {"arms": [row]}))
    text = visible(render(copy))
    assert "1 of 4 <small>1 select the inseparable<br>2 select none</small>" in text
    assert "10<sup>−12,346</sup>" in text


def test_a_run_that_is_not_complete(tmp_path):
    (tmp_path / "config.json").write_text('{"command": "margin", "settings": {"l2": 0.1}, "arms": []}')
    text = visible(write_report(tmp_path).read_text())
    assert "not complete" in text
    assert '<section id="picture" hidden>' in text


def test_there_is_no_figure(planar, tmp_path):
    with pytest.raises(SettingError, match="margin has a page and no figure"):
        draw_figure([planar], tmp_path / "figure.png")


def test_text_from_outside_is_only_text(copy):
    for name in ("config.json", "summary.json", "metrics.jsonl"):
        path = copy / name
        path.write_text(path.read_text().replace('"separate"', json.dumps(EVIL)))
    text = render(copy)
    assert "<img src=x" not in text
    assert data_of(text)["arms"][1]["name"] == EVIL


def test_the_terminal_prints_a_summary_read_from_its_file(planar, capsys):
    print_summary(summary_of(planar))
    assert "Frobenius" in capsys.readouterr().out


# --- what the charts are drawn from ---


def test_curves_end_where_the_summary_does(planar, text):
    data = data_of(text)
    for arm, row in zip(data["arms"], summary_of(planar)["arms"], strict=True):
        assert arm["name"] == row["name"]
        assert list(arm["each"]) == [str(which) for which in row["datasets"]]
        for number, curve in enumerate(arm["each"].values()):
            for name in ("cosine_nuclear", "frobenius_excess", "margin"):
                assert curve[name][-1] == pytest.approx(row["each"][name][number], rel=1e-3)
            assert len(curve["singular_values"]) == 2
            assert min(curve["margin"]) >= 0.1
        assert arm["end"]["cosine_nuclear"] == pytest.approx(row["cosine_nuclear"], rel=1e-3)
    assert data["arms"][2]["norms"] == ["ℓ1", "ℓ2"]
    mean = data["arms"][1]["mean"]
    assert max(mean["margin"]) <= min(curve["margin"][-1] for curve in data["arms"][1]["each"].values()) * 1.001
    assert mean["sets"][-1] == 4
    nuclear = mean["cosine_nuclear"]
    assert np.all(np.array(nuclear["low"]) <= nuclear["mean"])
    assert np.all(np.array(nuclear["mean"]) <= nuclear["high"])
    with np.load(next((planar / "snapshots").glob("*.npz"))) as arrays:
        expected = np.linalg.svd(arrays["separate_nuclear"], compute_uv=False)
    assert data["arms"][1]["solutions"]["nuclear"]["2"] == pytest.approx(expected[2], rel=1e-3)
    assert data["arms"][1]["solutions"]["nuclear"]["mean"] == pytest.approx(expected.mean(0), rel=1e-3)


def test_means_are_over_data_sets_at_equal_margins():
    margin = np.array([[-1.0, 1.0], [10.0, 10.0], [1000.0, 100.0]])
    found = at_equal_margins(margin, [np.log10(np.abs(margin)) + np.array([0.0, 2.0])])
    low, high = found["margin"][0], found["margin"][-1]
    assert (low, high) == pytest.approx((10**0.5, 100))  # from where half have come to where the first has ended
    assert found["sets"][0] == 1
    assert found["sets"][-1] == 2
    assert found["values"][0]["mean"][-1] == pytest.approx(3)
    assert (found["values"][0]["low"][-1], found["values"][0]["high"][-1]) == pytest.approx((2, 4))
    nothing = at_equal_margins(np.array([[-1.0], [0.0]]), [np.zeros((2, 1))])
    assert nothing["margin"] == []


def test_a_curve_begins_after_the_last_evaluation_without_a_margin():
    assert climb(np.array([1.0, -1.0, 0.01, 0.5, 2.0, 1.5])).tolist() == [3, 4, 5]
    assert climb(np.array([1.0, np.nan])).tolist() == []
    assert climb(np.array([2.0, 3.0])).tolist() == [0, 1]


def test_many_evaluations_are_thinned_to_what_fits():
    assert evenly(10, 4).tolist() == [0, 3, 6, 9]
    assert evenly(3, 8).tolist() == [0, 1, 2]
    assert evenly(0, 8).tolist() == []
    rows = [{"datasets": list(range(1000))}] * 8
    assert fitting(rows, 12) * 8 * 50 * 17 <= 400_000
    assert fitting(rows, 10_000) == 8


def test_the_pictures_have_the_data_and_the_direction_of_w_z(planar, text):
    pictures = data_of(text)["pictures"]
    with np.load(next((planar / "snapshots").glob("*.npz"))) as arrays:
        tokens, z, W, nuclear, chosen = (
            arrays[name] for name in ("tokens", "queries", "separate_weights", "separate_nuclear", "separate_selected")
        )
    assert list(pictures["sets"]) == ["0", "1", "2", "3"]
    example, course = pictures["sets"]["2"][1], pictures["arms"][1]["2"]
    assert np.array(example["tokens"]) == pytest.approx(tokens[2, 1], rel=1e-3)
    assert example["query"] == pytest.approx(z[2, 1], rel=1e-3)
    assert course["selected"] == chosen[2].tolist()
    for angle, of in ((course["angles"][-1][1], W[-1, 2]), (course["nuclear"][1], nuclear[2])):
        x, y = of @ z[2, 1]
        assert angle == pytest.approx(np.arctan2(y, x), rel=1e-3)
    assert course["angles"][0] == [None, None]  # W begins at zero
    assert "1" not in pictures["arms"][2]
    assert all(left < right for left, right in zip(course["step"], course["step"][1:], strict=False))


def test_other_dimensions_have_no_picture_and_a_damaged_snapshot_is_named(copy):
    snapshot = next((copy / "snapshots").glob("*.npz"))
    snapshot.write_bytes(snapshot.read_bytes()[:100])
    text = render(copy)
    assert "cannot be read: what is drawn from it is left out" in visible(text)
    assert data_of(text)["pictures"] is None
    assert data_of(text)["arms"][0]["solutions"] == {"nuclear": {}, "frobenius": {}}
    data = draw("generic", range(4), 2, 3, 5, 4.0)
    np.savez(snapshot, tokens=data.tokens, queries=data.queries, heads=data.heads, labels=data.labels)
    assert data_of(render(copy))["pictures"] is None
