"""The charts of attention against its SVMs: what they are drawn from."""

import json
import shutil

import numpy as np
import pytest

from rankdecay.lab.experiment import read, write_report
from rankdecay.lab.experiments.margin.charts import SMALLEST, at_equal_margins
from rankdecay.lab.experiments.margin.experiment import EXPERIMENT
from rankdecay.lab.experiments.margin.measures import climb


def sections_of(directory):
    stored = read(EXPERIMENT, [directory])
    return {section.anchor: section for section in EXPERIMENT.sections(stored)}, stored


@pytest.fixture(scope="module")
def sections(planar):
    return sections_of(planar)[0]


def lines_of(chart, **where):
    return [line for line in chart.lines if all(line.where.get(name, at) == at for name, at in where.items())]


def test_curves_end_where_the_summary_does(sections, summary):
    charts = {chart.name: chart for name in ("direction", "norms") for chart in sections[name].parts}
    assert list(charts) == ["cosine-nuclear", "cosine-frobenius", "nuclear-excess", "frobenius-excess"]
    for name, chart in charts.items():
        for row in summary["arms"]:
            for number, which in enumerate(row["datasets"]):
                curve, end = (line for line in lines_of(chart, set=str(which)) if line.arm == row["name"])
                assert curve.y[-1] == end.y[0] == row["each"][name.replace("-", "_")][number]
                assert curve.x[-1] == end.x[0] == row["each"]["margin"][number]
                assert min(curve.x) >= 0.1
            mean, thin, end = (line for line in lines_of(chart, set="mean") if line.arm == row["name"])
            assert [thin.mark, end.mark] == ["thin", "points"]
            assert [thin.x[1], thin.y[1]] == [*end.x, *end.y] == [row["margin"], row[name.replace("-", "_")]]
            assert all(low <= y <= high for low, y, high in zip(mean.low, mean.y, mean.high, strict=True))
            assert mean.words[-1].endswith(f"{row['seeds']} sets)")
            assert mean.x[-1] <= min(row["each"]["margin"]) * 1.001


def test_diagonal_weights_have_no_curve_in_the_data_set_they_cannot_solve(sections):
    chart = sections["direction"].parts[0]
    assert {line.arm for line in lines_of(chart, set="1")} == {"merged", "separate", "low_rank"}
    assert {line.arm for line in lines_of(chart, set="0")} == {"merged", "separate", "low_rank", "diagonal"}


def test_singular_values_are_drawn_beside_those_of_the_solutions(sections, summary, planar):
    (chart,) = sections["spectra"].parts
    with np.load(next((planar / "snapshots").glob("*.npz"))) as arrays:
        expected = np.linalg.svd(arrays["separate_nuclear"], compute_uv=False)
        last = np.linalg.svd(arrays["separate_weights"][-1, 2], compute_uv=False)
    for which, sizes in (("2", expected[2]), ("mean", expected.mean(0))):
        lines = lines_of(chart, set=which, spectrum="separate", svm="nuclear")
        dashed = [line.y[0] for line in lines if line.mark == "dashed"]
        assert dashed == pytest.approx([size for size in sizes if size > 1e-5 * sizes[0]])
    largest = lines_of(chart, set="2", spectrum="separate")[0]
    margin = next(row for row in summary["arms"] if row["name"] == "separate")["each"]["margin"][2]
    assert largest.label == "σ1"
    assert largest.y[-1] == pytest.approx(last[0] / margin, rel=1e-4)


def test_means_are_over_data_sets_at_equal_margins():
    margin = np.array([[-1.0, 1.0], [10.0, 10.0], [1000.0, 100.0]])
    grid, every = at_equal_margins(margin, np.log10(np.abs(margin)) + np.array([0.0, 2.0]))
    assert (grid[0], grid[-1]) == pytest.approx((10**0.5, 100))  # from where half have come to where the first ended
    assert np.isfinite(every).sum(0)[[0, -1]].tolist() == [1, 2]
    assert every[:, -1] == pytest.approx([2, 4])
    assert at_equal_margins(np.array([[-1.0], [0.0]]), np.zeros((2, 1)))[0].size == 0
    grid, every = at_equal_margins(margin, np.array([[0.0, 0.0], [np.nan, 1.0], [0.0, 2.0]]))
    assert every.shape == (1, grid.size)  # of the other nothing is known


def test_a_curve_begins_after_the_last_evaluation_without_a_margin():
    assert climb(np.array([1.0, -1.0, 0.01, 0.5, 2.0, 1.5]), SMALLEST).tolist() == [3, 4, 5]
    assert climb(np.array([1.0, np.nan]), SMALLEST).tolist() == []
    assert climb(np.array([2.0, 3.0]), SMALLEST).tolist() == [0, 1]


def test_without_a_readable_snapshot_solutions_and_pictures_are_missing(planar, tmp_path):
    copy = shutil.copytree(planar, tmp_path / "copy")
    snapshot = next((copy / "snapshots").glob("*.npz"))
    snapshot.write_bytes(snapshot.read_bytes()[:100])
    sections, stored = sections_of(copy)
    assert "cannot be read" in stored.notices[0]
    assert sections["picture"].parts == []
    (spectra,) = sections["spectra"].parts
    assert spectra.lines
    assert not [line for line in spectra.lines if line.mark == "dashed"]


def test_many_data_sets_are_not_all_offered(planar, summary, tmp_path):
    copy = shutil.copytree(planar, tmp_path / "copy")
    (copy / "summary.json").write_text(json.dumps(summary | {"datasets": 51}))
    assert "The first 50 of 51 data sets can be chosen; means are over all." in write_report(copy).read_text("utf-8")


def test_a_summary_alone_has_charts_without_lines(planar, tmp_path):
    shutil.copy(planar / "config.json", tmp_path / "config.json")
    summary = json.loads((planar / "summary.json").read_text("utf-8"))
    del summary["lines"]  # of the metrics, by which a later version would miss them
    (tmp_path / "summary.json").write_text(json.dumps(summary), "utf-8")
    assert "No arm shown has a margin in this data set." in write_report(tmp_path).read_text("utf-8")
