"""Means over seeds, by numbers worked out by hand."""

import json
import math
import subprocess
import sys

import pytest

from rankdecay.lab.errors import SettingError
from rankdecay.lab.experiment import load, read
from rankdecay.lab.experiments.attention.summary import difference, main_mlp_decay, newest, of, series, summarise


def layer(rank: float | None, imbalance: float = 0.5, *, qk_norm: bool = False) -> dict:
    parts = ("query", "key") if qk_norm else ("query_key",)
    found: dict = {part: {"pseudo_rank": rank} for part in parts}
    if not qk_norm:
        found["query_key"]["imbalance"] = imbalance
    return found | {"value_output": {"pseudo_rank": 0.9, "imbalance": 0.25}}


def rows(losses, *, arm="l2", strength=0.1, seed=0, pace=1.0, ranks=(0.8, 0.4), qk_norm=False, mlp=0.1, accuracy=None):
    """Evaluations every 10 steps; the layers' pseudo ranks are ``ranks`` at step 0 and half of them afterwards."""
    return [
        {
            "arm": arm, "strength": strength, "mlp_decay": mlp, "qk_norm": qk_norm, "seed": seed, "step": 10 * i,
            "tokens": 1000 * i, "seconds": pace * i, "loss": loss, "loss_error": 0.01, "accuracy": accuracy,
            "layers": [layer(rank if i == 0 else rank / 2, qk_norm=qk_norm) for rank in ranks],
        }
        for i, loss in enumerate(losses)
    ]  # fmt: skip


def diverged(**which) -> list[dict]:
    [first, *_] = rows([4.0], **which)
    return [
        first,
        {k: first[k] for k in ("arm", "strength", "mlp_decay", "qk_norm", "seed")} | {"step": 7, "diverged": True},
    ]


def test_one_seed():
    [cell] = summarise(rows([4.0, 3.0, 2.0], accuracy=0.5), "tokens")
    assert (cell["name"], cell["strength"], cell["mlp_decay"], cell["qk_norm"]) == ("l2", 0.1, 0.1, False)
    assert (cell["seeds"], cell["diverged"]) == (1, 0)
    assert (cell["loss"], cell["loss_error"], cell["accuracy"]) == (2.0, 0.01, 0.5)
    assert (cell["per_second"], cell["loss_at_equal_time"]) == (1000.0, 2.0)
    assert [part["query_key"]["pseudo_rank"] for part in cell["layers"]] == [0.4, 0.2]
    assert [part["query_key"]["pseudo_rank"] for part in cell["untrained"]] == [0.8, 0.4]
    assert cell["mean"]["query_key"] == pytest.approx({"pseudo_rank": 0.3, "imbalance": 0.5})
    assert cell["untrained_mean"]["query_key"]["pseudo_rank"] == pytest.approx(0.6)
    assert cell["mean"]["value_output"] == {"pseudo_rank": 0.9, "imbalance": 0.25}


def test_several_seeds_have_a_mean_and_its_standard_error():
    records = [
        r for seed, loss in enumerate((2.0, 3.0, 7.0)) for r in rows([8.0, loss], seed=seed, accuracy=0.1 * seed)
    ]
    [cell] = summarise(records, "tokens")
    assert cell["seeds"] == 3
    assert cell["loss"] == pytest.approx(4.0)
    assert cell["loss_error"] == pytest.approx(math.sqrt(7 / 3))  # variance (4 + 1 + 9) / 2 = 7, of three
    assert cell["accuracy"] == pytest.approx(0.1)


def test_equal_time_is_that_of_the_quickest_run():
    quick = rows([8.0, 4.0, 2.0], arm="l2")  # 2 s in all
    slow = rows([8.0, 4.0, 2.0], arm="low_rank", pace=1.5)  # at 2 s a third of the way from 4 to 2
    cells = {cell["name"]: cell for cell in summarise(quick + slow, "tokens")}
    assert cells["l2"]["loss_at_equal_time"] == 2.0
    assert cells["low_rank"]["loss_at_equal_time"] == pytest.approx(4 - 2 / 3)
    assert cells["low_rank"]["per_second"] == pytest.approx(2000 / 3)


def test_runs_that_diverged_are_counted_and_left_out():
    records = rows([8.0, 2.0]) + diverged(seed=1) + diverged(strength=10.0) + diverged(strength=10.0, seed=1)
    some, none = summarise(records, "tokens")
    assert (some["seeds"], some["diverged"], some["loss"], some["loss_error"]) == (2, 1, 2.0, 0.01)
    assert (none["seeds"], none["diverged"]) == (2, 2)
    assert [none[k] for k in ("loss", "loss_error", "accuracy", "per_second", "loss_at_equal_time")] == [None] * 5
    assert (none["layers"], none["untrained"], none["mean"], none["untrained_mean"]) == ([], [], {}, {})
    json.dumps([some, none], allow_nan=False)


def test_the_cells_are_told_apart_by_everything_but_the_seed():
    records = rows([8.0, 2.0]) + rows([8.0, 3.0], qk_norm=True) + rows([8.0, 4.0], mlp=1.0) + rows([8.0, 5.0], mlp=None)
    assert [(c["qk_norm"], c["mlp_decay"], c["loss"]) for c in summarise(records, "tokens")] == [
        (False, 0.1, 2.0), (True, 0.1, 3.0), (False, 1.0, 4.0), (False, None, 5.0),
    ]  # fmt: skip
    assert summarise([], "tokens") == []


def test_with_qk_norm_a_product_is_its_two_matrices():
    [cell] = summarise(rows([8.0, 2.0], qk_norm=True), "tokens")
    assert set(cell["mean"]) == {"query", "key", "value_output"}
    assert of(cell, "query_key", "pseudo_rank") == pytest.approx(0.3)
    assert of(cell, "query_key", "imbalance") is None
    assert of(cell, "value_output", "imbalance") == 0.25
    assert of({}, "query_key", "pseudo_rank") is None


def test_a_number_that_is_not_known_is_left_out_of_a_mean():
    [cell] = summarise(rows([8.0, 2.0]) + rows([8.0, 2.0], seed=1), "tokens")
    known = cell["layers"][0]["query_key"]["pseudo_rank"]
    records = rows([8.0, 2.0]) + rows([8.0, 2.0], seed=1)
    records[-1]["layers"][0]["query_key"]["pseudo_rank"] = None
    records[-1]["layers"][1]["query_key"]["pseudo_rank"] = records[1]["layers"][1]["query_key"]["pseudo_rank"] = None
    [cell] = summarise(records, "tokens")
    assert cell["layers"][0]["query_key"]["pseudo_rank"] == known
    assert cell["layers"][1]["query_key"]["pseudo_rank"] is None
    assert cell["mean"]["query_key"]["pseudo_rank"] == known


def test_a_run_too_short_for_the_clock_has_a_rate():
    [cell] = summarise(rows([8.0, 2.0], pace=0.0), "tokens")
    assert math.isfinite(cell["per_second"])
    assert cell["loss_at_equal_time"] in (8.0, 2.0)


def test_a_reader_of_rows_needs_neither_torch_nor_numpy():
    code = "import rankdecay.lab.experiments.attention.summary, sys; print({'torch', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_a_difference_is_taken_piece_by_piece_or_seed_by_seed():
    """What is hard for both says nothing of how they differ."""
    hard = {"seeds": 1, "loss": 2.0, "loss_error": 0.5, "sample": [1.0, 2.0, 3.0]}
    better = {"seeds": 1, "loss": 1.9, "loss_error": 0.5, "sample": [0.9, 1.9, 2.9]}
    distance, error = difference(hard, better)
    assert distance == pytest.approx(0.1)
    assert error == pytest.approx(0.0, abs=1e-12)
    other = better | {"sample": [0.8, 1.9, 3.0]}
    assert difference(hard, other) == pytest.approx((0.1, 0.1 / 3**0.5))
    for unpaired in ({"sample": []}, {"sample": [1.0, 2.8]}, {"seeds": 3}):  # another validation set, or seeds lost
        assert difference(hard, better | unpaired) == pytest.approx((0.1, 0.5 * 2**0.5))
    assert difference(hard, better | {"sample": [], "loss_error": None}) == (pytest.approx(0.1), None)
    a, b = hard | {"averaged_seeds": [0, 1, 2]}, better | {"averaged_seeds": [0, 1, 3]}  # another seed diverged in each
    assert difference(a, b) == pytest.approx((0.1, 0.5 * 2**0.5))
    assert difference(a, b | {"averaged_seeds": [0, 1, 2]}) == pytest.approx((0.1, 0.0), abs=1e-12)


# --- reading what is stored ---


def stored_run(directory):
    return read(load("language"), [directory])


def test_what_the_real_code_writes_is_the_same_without_its_summary(trained):
    summary = stored_run(trained).summary
    assert len(summary["arms"]) == 3 * 2 * 2
    (trained / "summary.json").rename(trained / "kept.json")
    try:
        again = stored_run(trained)  # computed from the evaluations alone
    finally:
        (trained / "kept.json").rename(trained / "summary.json")
    assert not again.complete
    assert again.summary["unit"] == "tokens"
    assert again.summary["arms"] == summary["arms"]


def test_only_the_runs_that_ended_count_while_it_goes_on(make_experiment):
    stored = stored_run(make_experiment(runs=3))
    assert [(cell["name"], cell["strength"]) for cell in stored.summary["arms"]] == [("l2", 0.0), ("l2", 0.1)]
    assert {row["strength"] for row in stored.rows} == {0.0, 0.1, 1.0}
    assert stored.notices == ["Ended so far: 2 runs."]
    assert stored_run(make_experiment(runs=1)).summary is None


def test_a_step_measured_again_counts_once():
    before = rows([8.0, 2.0])
    assert [row["loss"] for row in newest([*before, before[0] | {"loss": 9.0}])] == [9.0, 2.0]


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
        stored_run(directory)


def test_a_loss_that_is_not_finite_ends_a_run_as_divergence_does(make_experiment):
    directory = make_experiment(("l2",), strengths={"l2": (0.0, 1.0)}, seeds=1, summary=False)
    path = directory / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[4]["loss"] = lines[3]["loss"] = float("nan")
    path.write_text("".join(json.dumps(row) + "\n" for row in lines))
    cells = stored_run(directory).summary["arms"]
    assert [(cell["diverged"], cell["loss"] is None) for cell in cells] == [(1, True), (0, False)]


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
