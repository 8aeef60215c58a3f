import json
from pathlib import Path

import numpy as np
import pytest

from rankdecay.lab.experiments.grok.read import across_seeds, final_spectrum, read_run


def test_a_complete_run(make_run):
    run = read_run(make_run())
    assert run.arms == ["none", "l2", "l2_tuned", "low_rank", "prototype", "uniform_attention"]
    assert run.last_step == 800
    assert [line["step"] for line in run.metrics["low_rank", 1]] == [0, 200, 400, 600, 800]
    assert [snapshot.step for snapshot in run.snapshots] == [0, 200, 400, 600, 800]
    assert run.snapshots[0].members[:3] == [("none", 0), ("none", 1), ("l2", 0)]
    assert run.snapshots[0].groups == ["1st + 2nd", "1st + 3rd", "2nd + 4th"]
    assert run.summary is not None
    assert run.notices == []


def test_a_run_in_progress_has_no_summary_and_may_have_no_snapshots(make_run):
    run = read_run(make_run(["low_rank"], summary=False, snapshots=False))
    assert run.summary is None
    assert run.snapshots == []
    assert run.last_step == 800


def test_a_run_that_has_only_begun(tmp_path):
    (tmp_path / "config.json").write_text('{"command": "grok", "arms": [{"name": "l2"}]}')
    run = read_run(tmp_path)
    assert run.arms == ["l2"]
    assert run.last_step is None


def test_a_last_line_cut_short_is_left_out_with_a_notice(make_run):
    path = make_run(["l2"]) / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"step": 1000, "arm": "l2", "se')
    run = read_run(path.parent)
    assert run.last_step == 800
    assert "cut short" in run.notices[0]


def test_a_broken_line_before_the_last_is_an_error(make_run):
    path = make_run(["l2"]) / "metrics.jsonl"
    path.write_bytes(b'{"step": 1000, "arm"\n' + path.read_bytes())
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 1"):
        read_run(path.parent)


def test_a_step_measured_again_after_a_resume_counts_once(make_run):
    path = make_run(["l2"], seeds=1) / "metrics.jsonl"
    with path.open("a") as file:
        file.write(json.dumps({"step": 800, "arm": "l2", "seed": 0, "test_accuracy": 0.5}) + "\n")
    assert across_seeds(read_run(path.parent), "l2", "test_accuracy")[-1] == (800, 0.5, 0.5, 0.5)


def test_only_the_newest_snapshot_may_be_unreadable(make_run):
    directory: Path = make_run(["l2"])
    (directory / "snapshots" / "00000800.npz").write_bytes(b"PK half a file")
    run = read_run(directory)
    assert [snapshot.step for snapshot in run.snapshots] == [0, 200, 400, 600]
    assert "00000800.npz" in run.notices[0]
    (directory / "snapshots" / "00000200.npz").write_bytes(b"PK half a file")
    with pytest.raises(ValueError, match=r"00000200\.npz"):
        read_run(directory)


def test_a_directory_that_is_not_a_run_says_what_to_give(tmp_path):
    with pytest.raises(ValueError, match="--out directory"):
        read_run(tmp_path)


def test_median_and_range_over_seeds(make_run):
    run = read_run(make_run(["low_rank"], seeds=3))
    seeds = [run.metrics["low_rank", seed][2]["test_accuracy"] for seed in range(3)]
    assert across_seeds(run, "low_rank", "test_accuracy")[2] == (
        400,
        sorted(seeds)[1],
        min(seeds),
        max(seeds),
    )
    assert across_seeds(read_run(run.directory), "low_rank", "no_such_metric") == []


def test_final_spectrum_is_normalised_and_zero_for_a_matrix_held_at_zero(make_run):
    run = read_run(make_run(["low_rank", "uniform_attention"]))
    spectrum = final_spectrum(run, "low_rank")
    assert spectrum is not None
    assert spectrum.shape == (16,)
    assert spectrum[0] == 1
    zero = final_spectrum(run, "uniform_attention")
    assert zero is not None
    assert not np.any(zero)
    assert final_spectrum(run, "l2") is None
