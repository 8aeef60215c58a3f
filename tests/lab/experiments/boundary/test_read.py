import json

import pytest

from rankdecay.lab.ensemble.outcome import key_of
from rankdecay.lab.errors import SettingError
from rankdecay.lab.experiments.boundary.read import merged


def _counts(sweep):
    return {arm["name"]: arm["runs"] for arm in sweep.summary["arms"]}


def _rewrite(directory, change):
    config = json.loads((directory / "config.json").read_text())
    change(config)
    (directory / "config.json").write_text(json.dumps(config))


def test_one_directory_has_the_summary_it_wrote(make_sweep):
    directory = make_sweep(["l2", "prox"])
    sweep = merged([directory])
    assert sweep.complete
    assert sweep.arms == ["l2", "prox"]
    assert sweep.summary == json.loads((directory / "summary.json").read_text())
    assert len(sweep.rows) == 2 * 5 * 5 * 3
    assert sweep.notices == []


def test_a_sweep_still_running_is_summarised_from_its_rows(make_sweep):
    written = merged([make_sweep(["l2", "prox"])]).summary
    directory = make_sweep(["l2", "prox"], name="running", summary=False)
    sweep = merged([directory])
    assert not sweep.complete
    assert sweep.summary is not None
    assert written is not None
    assert sweep.summary["arms"] == written["arms"]
    assert sweep.summary["differences"] == written["differences"]
    assert sweep.summary["threshold"] == 0.99


def test_a_sweep_that_has_only_begun(make_sweep):
    directory = make_sweep(["prox"], summary=False)
    (directory / "metrics.jsonl").unlink()
    sweep = merged([directory])
    assert (sweep.summary, sweep.complete, sweep.rows) == (None, False, [])


def test_an_arm_without_runs_yet(make_sweep):
    directory = make_sweep(["prox"], summary=False)
    _rewrite(directory, lambda config: config["arms"].append({"name": "l2", "description": "", "control": None}))
    assert _counts(merged([directory])) == {"prox": 75, "l2": 0}


def test_directories_are_merged_over_every_axis(make_sweep):
    first = make_sweep(["prox"], name="a", seeds=[0, 1], strengths=[0.1], rest_decays=[1.0])
    second = make_sweep(["l2", "prox"], name="b", seeds=[2], strengths=[0.1, 0.3], rest_decays=[2.0])
    third = make_sweep(["prox"], name="c", seeds=[0], strengths=[0.1], fractions=[0.6])
    sweep = merged([first, second, third])
    assert sweep.arms == ["prox", "l2"]
    assert len(sweep.rows) == 5 * 2 + 2 * 2 * 5 + 1
    assert _counts(sweep) == {"prox": 21, "l2": 10}
    assert sweep.config["settings"]["strengths"] == [0.1, 0.3]
    assert sweep.config["settings"]["rest_decays"] == [1.0, 2.0]
    assert sweep.config["settings"]["fractions"][-1] == 0.6
    assert sweep.complete
    assert sweep.notices == []
    assert sweep.summary is not None
    assert sweep.summary["wall_seconds"] == 300


def test_merging_gives_what_one_sweep_would_have(make_sweep):
    parts = [make_sweep(["l2", "prox"], name=f"seed{seed}", seeds=[seed]) for seed in range(3)]
    together, whole = merged(parts).summary, merged([make_sweep(["l2", "prox"], summary=False)]).summary
    assert together is not None
    assert whole is not None
    for key in ("cells", "boundary", "boundaries"):
        assert [arm[key] for arm in together["arms"]] == [arm[key] for arm in whole["arms"]]


def test_a_run_in_two_directories_counts_once_and_is_said(make_sweep):
    first = make_sweep(["prox"], name="a", seeds=[0, 1], strengths=[0.1])
    second = make_sweep(["prox"], name="b", seeds=[1, 2], strengths=[0.1])
    rows = [json.loads(line) for line in (second / "metrics.jsonl").read_text().splitlines()]
    changed = next(row for row in rows if row["seed"] == 1 and row["outcome"] == "generalised")
    changed |= {"outcome": "budget", "steps_to_generalise": None}
    (second / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sweep = merged([first, second])
    assert len(sweep.rows) == 15
    assert next(row for row in sweep.rows if key_of(row) == key_of(changed))["outcome"] == "generalised"
    assert "5 runs stood there more than once" in sweep.notices[0]
    assert "1 came out differently" in sweep.notices[0]


def test_the_same_directory_twice_is_one_directory(make_sweep):
    directory = make_sweep(["prox"])
    assert merged([directory, directory]).notices == []


@pytest.mark.parametrize(("name", "value"), [("task", "subtract"), ("steps", 5000), ("lr", 0.01)])
def test_another_setting_is_refused_by_name(make_sweep, name, value):
    first, second = make_sweep(["prox"], name="a"), make_sweep(["l2"], name="b", settings={name: value})
    with pytest.raises(SettingError, match=rf"^{name} is .* in .*a, {value!r} in .*b: only sweeps"):
        merged([first, second])


def test_settings_say_the_axes_where_the_configuration_does_not(make_sweep):
    first, second = make_sweep(["prox"], name="a"), make_sweep(["l2"], name="b")
    for directory in (first, second):
        _rewrite(directory, lambda config: config.pop("fixed"))
    assert merged([first, second]).arms == ["prox", "l2"]
    _rewrite(second, lambda config: config["settings"].update(width=32))
    with pytest.raises(SettingError, match=r"^width is None"):
        merged([first, second])


def test_another_arm_of_the_same_name_is_refused(make_sweep):
    first, second = make_sweep(["prox"], name="a"), make_sweep(["prox"], name="b")
    _rewrite(second, lambda config: config["arms"][0].update(rule="polar"))
    _rewrite(first, lambda config: config["arms"][0].update(rule="smooth"))
    with pytest.raises(SettingError, match=r"rule of the arm prox is 'smooth' in .*, 'polar' in"):
        merged([first, second])


def test_another_experiment_is_refused(make_sweep, tmp_path):
    (tmp_path / "config.json").write_text('{"command": "grok"}')
    with pytest.raises(SettingError, match="is a run of 'grok', not of 'boundary'"):
        merged([make_sweep(["prox"]), tmp_path])
    with pytest.raises(SettingError, match=r"has no config\.json"):
        merged([tmp_path / "nowhere"])


@pytest.mark.parametrize(
    "change",
    [
        {"outcome": "perhaps"},
        {"strength": None},
        {"train_fraction": "much"},
        {"seed": None},
        {"train_examples": None},
        {"outcome": "generalised", "steps_to_generalise": None},
        {"rest_decay": float("nan")},
    ],
)
def test_a_damaged_line_is_named(make_sweep, change):
    path = make_sweep(["prox"]) / "metrics.jsonl"
    lines = path.read_text().splitlines()
    lines[2] = json.dumps(json.loads(lines[2]) | change)
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(SettingError, match=r"metrics\.jsonl, line 3: not a row of this experiment"):
        merged([path.parent])


def test_a_last_line_cut_short_is_left_out_with_a_notice(make_sweep):
    path = make_sweep(["prox"], summary=False) / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + b'{"arm": "pro')
    sweep = merged([path.parent])
    assert len(sweep.rows) == 75
    assert "cut short" in sweep.notices[0]


def test_rows_of_an_older_name_are_those_of_the_arm_today(make_sweep):
    directory = make_sweep(["l2", "prox"])
    for name in ("config.json", "metrics.jsonl", "summary.json"):
        path = directory / name
        path.write_text(path.read_text().replace('"prox"', '"low_rank"'))
    sweep = merged([directory])
    assert sweep.arms == ["l2", "prox"]
    assert [arm["name"] for arm in sweep.summary["arms"]] == ["l2", "prox"]
    assert sweep.summary["differences"][0]["reference"] == "prox"
