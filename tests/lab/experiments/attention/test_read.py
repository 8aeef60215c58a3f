import json

import pytest

from rankdecay.lab.errors import SettingError
from rankdecay.lab.experiments.attention.read import main_mlp_decay, read_grid, series


def test_a_complete_experiment(make_experiment):
    grid = read_grid(make_experiment())
    assert grid.arms == ["l2", "low_rank"]
    assert grid.unit == "tokens"
    assert len(grid.cells) == 7
    assert len(grid.records) == 7 * 2 * 5
    assert grid.notices == []


def test_what_the_real_code_writes(trained):
    grid = read_grid(trained)
    assert grid.summary is not None
    assert len(grid.cells) == 3 * 2 * 2
    assert {cell["qk_norm"] for cell in grid.cells} == {False, True}
    (trained / "summary.json").rename(trained / "kept.json")
    try:
        again = read_grid(trained)  # computed from the evaluations alone
    finally:
        (trained / "kept.json").rename(trained / "summary.json")
    assert again.summary is None
    assert again.unit == "tokens"
    assert again.cells == grid.cells


def test_only_the_runs_that_ended_count_while_it_goes_on(make_experiment):
    grid = read_grid(make_experiment(runs=3))
    assert grid.summary is None
    assert [(cell["name"], cell["strength"]) for cell in grid.cells] == [("l2", 0.0), ("l2", 0.1)]
    assert {row["strength"] for row in grid.records} == {0.0, 0.1, 1.0}
    assert "2 runs have ended" in grid.notices[0]


def test_a_last_line_cut_short_is_dropped_and_a_step_measured_again_counts_once(make_experiment):
    directory = make_experiment()
    path = directory / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    again = json.dumps(json.loads(lines[1]) | {"loss": 9.0}) + "\n"
    path.write_text("".join([*lines, again]) + lines[0][:50])
    grid = read_grid(directory)
    assert "cut short" in grid.notices[0]
    assert len(grid.records) == len(lines)
    assert grid.records[1]["loss"] == 9.0


@pytest.mark.parametrize(
    "change",
    [
        {"arm": None, "strength": "strong"},
        {"seed": None},
        {"qk_norm": 1},
        {"layers": [1]},
        {"layers": None},
        {"seconds": "long"},
        {"mlp_decay": "much"},
    ],
)
def test_a_damaged_evaluation_is_named(make_experiment, change):
    directory = make_experiment()
    path = directory / "metrics.jsonl"
    lines = path.read_text().splitlines()
    lines[2] = json.dumps(json.loads(lines[2]) | change)
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(SettingError, match=r"metrics\.jsonl, line 3"):
        read_grid(directory)


def test_a_loss_that_is_no_number_ends_a_run_as_divergence_does(make_experiment):
    directory = make_experiment(("l2",), strengths={"l2": (0.0, 1.0)}, seeds=1, summary=False)
    path = directory / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[4]["loss"] = rows[3]["loss"] = float("nan")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    grid = read_grid(directory)
    assert [(cell["diverged"], cell["loss"] is None) for cell in grid.cells] == [(1, True), (0, False)]


def test_what_is_no_experiment(tmp_path, make_experiment):
    with pytest.raises(SettingError, match=r"no config\.json"):
        read_grid(tmp_path)
    directory = make_experiment()
    summary = json.loads((directory / "summary.json").read_text())
    del summary["arms"][1]["strength"]
    (directory / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(SettingError, match=r"summary\.json has a damaged arm"):
        read_grid(directory)
    (directory / "summary.json").write_text("{")
    with pytest.raises(SettingError, match="not valid JSON"):
        read_grid(directory)


def test_an_experiment_that_has_only_begun(make_experiment):
    directory = make_experiment(summary=False)
    (directory / "metrics.jsonl").unlink()
    grid = read_grid(directory)
    assert (grid.cells, grid.records, grid.arms) == ([], [], ["l2", "low_rank"])


def cell(mlp, loss, strength=1.0, name="l2"):
    return {"name": name, "strength": strength, "mlp_decay": mlp, "qk_norm": False, "loss": loss}


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        ([], None),
        ([cell(None, 1.0)], None),
        ([cell(0.5, 1.0)], 0.5),
        ([cell(0.5, 1.0), cell(0.1, 2.0)], 0.1),
        ([cell(0.5, 2.0), cell(1.0, 1.0)], 1.0),
        ([cell(0.5, 2.0), cell(1.0, None)], 0.5),
        ([cell(0.5, None), cell(1.0, None)], 0.5),
    ],
)
def test_the_decay_of_the_mlps_to_speak_of(cells, expected):
    assert main_mlp_decay(cells) == expected


def test_a_series_goes_from_weak_to_strong_and_has_results_alone():
    cells = [cell(0.1, 2.0, 10.0, "b"), cell(0.1, 1.0, 0.0, "b"), cell(0.1, None, 1.0, "b"), cell(0.5, 1.0, 1.0, "a")]
    found = series(cells, qk_norm=False, mlp_decay=0.1)
    assert {name: [c["strength"] for c in own] for name, own in found.items()} == {"b": [0.0, 10.0]}
    assert series(cells, qk_norm=True, mlp_decay=0.1) == {}
