"""The lab's commands as a user meets them: results, refusals, and a run that no kill can spoil."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from rankdecay import cli, rules
from rankdecay.lab.cli import parse
from rankdecay.lab.experiments.grok.settings import Grok
from rankdecay.lab.store import read_metrics
from tests.comparing import contents, timeless
from tests.held import held
from tests.waiting import HANG, until

TINY = (
    "--task add --modulus 7 --steps 4 --evaluate-every 2 --seeds 2 --batch-size 8 --width 8 --precision float32 "
    "--device cpu"
)
ARMS = ["none", "low_rank"]


def grok(out: Path, *options: str, arms=ARMS) -> list[str]:
    return ["grok", *TINY.split(), "--arms", *arms, "--out", str(out), *options]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "finished"
    assert cli.main(grok(path, "--quiet")) == 0
    return path


# --- results ------------------------------------------------------------------------------------------------------

ARM_KEYS = (
    "name seeds generalised steps_to_generalise test_accuracy train_accuracy stable_rank effective_rank "
    "product_stable_rank product_effective_rank query_norm key_norm radial_share tangential_share decay_size "
    "steps_per_second"
)


def test_a_run_leaves_its_files(finished):
    files = set(contents(finished))
    assert {"config.json", "metrics.jsonl", "summary.json", "report.html"} <= files
    assert {f"snapshots/{step:08d}.npz" for step in (0, 2, 4)} <= files
    assert not any("partial" in name or "checkpoint" in name for name in files)
    config = json.loads((finished / "config.json").read_text())
    assert {"command", "schema", "settings", "arms", "versions", "machine"} <= config.keys()
    assert config["command"] == "grok"
    assert (config["settings"]["modulus"], config["settings"]["width"]) == (7, 8)
    assert [arm["name"] for arm in config["arms"]] == ARMS


def test_summary_has_the_settled_keys(finished):
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["command"] == "grok"
    assert summary["wall_seconds"] > 0
    assert summary["settings"]["steps"] == 4
    assert [arm["name"] for arm in summary["arms"]] == ARMS
    for arm in summary["arms"]:
        assert set(ARM_KEYS.split()) <= arm.keys()
        assert arm["seeds"] == 2
        assert arm["generalised"] in (0, 1, 2)
        assert 0 <= arm["test_accuracy"] <= 1
        assert 1 <= arm["stable_rank"] <= arm["effective_rank"] <= 8


def test_json_is_all_that_is_on_standard_output(tmp_path, capsys):
    assert cli.main(grok(tmp_path / "run", "--json")) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == json.loads((tmp_path / "run" / "summary.json").read_text())
    assert captured.err  # progress
    assert cli.main(grok(tmp_path / "run", "--json")) == 0
    again = capsys.readouterr()
    assert json.loads(again.out) == json.loads(captured.out)


def test_quiet_says_nothing(tmp_path, capsys):
    assert cli.main(grok(tmp_path / "run", "--quiet")) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == ""


def test_quiet_json_says_only_json(tmp_path, capsys):
    assert cli.main(grok(tmp_path / "run", "--quiet", "--json")) == 0
    captured = capsys.readouterr()
    assert {"command", "arms", "wall_seconds"} <= json.loads(captured.out).keys()
    assert captured.err == ""


def test_progress_and_table_for_a_person(tmp_path, capsys):
    assert cli.main(grok(tmp_path / "run")) == 0
    out = capsys.readouterr().out
    for word in (*ARMS, "step", "train", "test", "stable rank", "report.html", "summary.json"):
        assert word in out
    assert "Verdict(" not in out
    assert "Traceback" not in out


def test_a_complete_directory_shows_its_result_and_is_left_alone(finished, capsys):
    before = contents(finished)
    times = {p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.name != ".lock"}
    assert cli.main(grok(finished)) == 0
    out = capsys.readouterr().out
    assert "complete" in out
    assert "generalised" in out
    assert contents(finished) == before
    assert times == {p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.name != ".lock"}


def test_seeds_and_arms_do_not_depend_on_the_company(finished, tmp_path):
    assert cli.main(grok(tmp_path / "run", "--quiet", arms=["low_rank"])) == 0

    def low_rank(path: Path) -> list[dict]:
        return [record for record in timeless(read_metrics(path)) if record["arm"] == "low_rank"]

    assert low_rank(tmp_path / "run") == low_rank(finished)


def test_the_report_can_be_made_again(finished, capsys):
    page = finished / "report.html"
    before = page.read_bytes()
    page.unlink()
    assert cli.main(["report", str(finished)]) == 0
    assert str(page) in capsys.readouterr().out
    assert page.read_bytes() == before


@pytest.mark.parametrize("preset", ["--preset=prototype", "--preset prototype"])
def test_a_preset_supplies_defaults_that_options_override(preset):
    settings = parse(["grok", *preset.split(), "--modulus", "11"])
    assert isinstance(settings, Grok)
    assert (settings.preset, settings.split, settings.qk_norm, settings.modulus) == (
        "prototype",
        "ordered",
        "width",
        11,
    )


# --- help -----------------------------------------------------------------------------------------------------------


def test_help_of_report_answers_without_torch():
    code = (
        "import sys\nfrom rankdecay import cli\n"
        "try:\n    cli.main(sys.argv[1:])\nexcept SystemExit as leaving:\n    code = leaving.code\n"
        "heavy = {'torch', 'numpy', 'plotly', 'matplotlib', 'scipy'} & set(sys.modules)\n"
        "print(sorted(heavy), file=sys.stderr)\nsys.exit(code or bool(heavy))"
    )
    call = [sys.executable, "-c", code, "report", "--help"]
    done = subprocess.run(call, capture_output=True, text=True, check=False, timeout=HANG)
    assert done.returncode == 0, done.stderr
    assert "usage: rankdecay report " in done.stdout


def test_every_option_is_explained(capsys):
    with pytest.raises(SystemExit) as leaving:
        cli.main(["grok", "--help"])
    assert not leaving.value.code
    out = capsys.readouterr().out
    for option in ("--arms", "--seeds", "--out", "--device", "--quiet", "--json", "--train-fraction", "--strength"):
        assert option in out


# --- bad input ------------------------------------------------------------------------------------------------------

REFUSED = [
    ("--train-fraction 1.5", ["--train-fraction 1.5", "(0, 1)"]),
    ("--train-fraction 0", ["--train-fraction 0", "(0, 1)"]),
    ("--modulus 1", ["--modulus 1", "at least 2"]),
    ("--first-seed 99999999999999999999", ["--first-seed 99999999999999999999", "too large", "less than 4294967296"]),
    ("--position-scale inf", ["--position-scale inf", "finite"]),
    ("--task selection --modulus 1", ["--modulus 1", "at least 2"]),
    ("--task divide --modulus 10", ["--modulus 10", "prime"]),
    ("--task selection --train-examples 9999999", ["--train-examples 9999999", "fewer"]),
    ("--batch-size 500", ["--batch-size 500", "give at most"]),
    ("--arms none lowrank", ["--arms 'lowrank'", "did you mean 'low_rank'"]),
    ("--arms", ["--arms", "empty"]),
    ("--task substract", ["--task 'substract'", "did you mean 'subtract'"]),
    ("--device cudda", ["--device 'cudda'", "did you mean 'cuda'"]),
    ("--device cpu:3", ["--device cpu:3", "--device cpu"]),
    ("--strength -1", ["--strength -1", ">= 0"]),
    ("--tuned-strength nan", ["--tuned-strength nan", "finite"]),
    ("--weight-decay inf", ["--weight-decay inf", "finite"]),
    ("--lr 10", ["--lr 10", "stay below"]),
    ("--steps 0", ["--steps 0", "at least 1"]),
    ("--seeds 0", ["--seeds 0", "at least 1"]),
    ("--evaluate-every 0", ["--evaluate-every 0", "at least 1"]),
    ("--width 6", ["--width 6", "multiple"]),
    ("--threshold 2", ["--threshold 2", "(0, 1]"]),
]
if not torch.cuda.is_available():
    REFUSED += [("--device cuda", ["--device cuda", "use --device cpu"]), ("--device cuda:1", ["cuda:1", "cpu"])]


def refused(capsys, arguments: list[str]) -> str:
    """Runs a command that must be refused with exit code 2 and one line; returns the line."""
    code = cli.main(arguments)
    captured = capsys.readouterr()
    assert code == 2
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("rankdecay: error: ")
    return line


@pytest.mark.parametrize(("options", "words"), REFUSED, ids=[options for options, _ in REFUSED])
def test_bad_input_is_one_line_with_a_remedy(tmp_path, capsys, options, words):
    line = refused(capsys, grok(tmp_path / "run", *options.split()))
    assert all(word in line for word in words), line
    assert list(tmp_path.iterdir()) == []  # nothing was written


@pytest.mark.parametrize(
    "arguments",
    [
        ["grok", "--stps", "3"],
        ["grok", "--steps", "many"],
        ["grok", "--rule", "soft"],
        ["grok", "--precision", "float16"],
        ["grok", "extra"],
        ["report"],
    ],
    ids=" ".join,
)
def test_what_cannot_be_read_is_refused_too(tmp_path, capsys, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as leaving:
        sys.exit(cli.main(arguments))
    captured = capsys.readouterr()
    assert leaving.value.code == 2
    assert "Traceback" not in captured.err
    assert captured.err.strip()
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_preset_is_answered_with_the_nearest(capsys):
    line = refused(capsys, ["grok", "--preset", "prototyp"])
    assert "--preset 'prototyp' is unknown: did you mean 'prototype'?" in line
    assert "--size 'gpt3' is unknown: did you mean 'gpt2'?" in refused(capsys, ["language", "--size=gpt3"])


def test_a_preset_that_was_renamed_is_answered_with_its_name_of_today(capsys):
    line = refused(capsys, ["boundary", "--preset", "small"])
    assert "--preset small has another name since rankdecay 0.2: give --preset standard" in line


def test_an_older_name_of_an_arm_works_and_says_its_name_of_today(tmp_path, capsys):
    tiny = "--task subtract --modulus 5 --strengths low_rank=1 --fractions 0.5 --seeds 1 --steps 4 --evaluate-every 2"
    options = [*tiny.split(), "--batch-size", "8", "--width", "8", "--mlp-width", "8", "--precision", "float32"]
    given = ["boundary", *options, "--device", "cpu", "--compile", "off", "--out", str(tmp_path / "run"), "--arms"]
    assert cli.main([*given, "low_rank", "--quiet"]) == 0
    assert "--arms low_rank is an older name of prox, which rankdecay 0.3 will not know" in capsys.readouterr().err
    assert [arm["name"] for arm in json.loads((tmp_path / "run" / "summary.json").read_text())["arms"]] == ["prox"]
    assert cli.main([*given, "prox", "--quiet"]) == 0
    assert "older name" not in capsys.readouterr().err


def test_a_mistyped_option_is_answered_with_the_nearest(capsys):
    with pytest.raises(SystemExit):
        cli.main(["grok", "--train-fractoin", "0.5"])
    assert "--train-fraction" in capsys.readouterr().err


def test_out_with_another_configuration(finished, capsys):
    before = contents(finished)
    line = refused(capsys, grok(finished, "--strength", "0.125"))
    assert all(word in line for word in (str(finished), "another configuration", "strength", "0.125", "choose another"))
    assert contents(finished) == before


def test_out_with_other_files(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    line = refused(capsys, grok(tmp_path))
    assert all(word in line for word in (str(tmp_path), "not a run directory", "choose another"))
    assert contents(tmp_path) == {"notes.txt": b"mine"}


@pytest.mark.parametrize("below", ["file", "file/run"])
def test_out_that_cannot_be_written(tmp_path, capsys, below):
    (tmp_path / "file").write_text("mine")
    line = refused(capsys, grok(tmp_path / below))
    assert all(word in line for word in (str(tmp_path / below), "cannot be written", "choose"))
    assert contents(tmp_path) == {"file": b"mine"}


def test_out_in_use_by_another_process(finished, capsys):
    hold = "import fcntl, sys; f = open(sys.argv[1], 'ab'); fcntl.flock(f, 2); print('held', flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(finished / ".lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        before = contents(finished)
        line = refused(capsys, grok(finished))
        holder.kill()
    assert all(word in line for word in (str(finished), "in use", "choose another"))
    assert contents(finished) == before


@pytest.mark.parametrize("name", ["nowhere", "empty"])
def test_a_report_of_no_run(tmp_path, capsys, name):
    (tmp_path / "empty").mkdir()
    line = refused(capsys, ["report", str(tmp_path / name)])
    assert str(tmp_path / name) in line
    assert contents(tmp_path) == {}


def refused_page(capsys, run: Path, page: Path) -> None:
    before = contents(run)
    assert "is in a run directory" in refused(capsys, ["report", str(run), "--out", str(page)])
    assert contents(run) == before


def test_a_page_is_never_written_over_a_file_of_a_run(finished, tmp_path, capsys):
    run, other = (shutil.copytree(finished, tmp_path / name) for name in ("run", "other"))
    for name in ("metrics.jsonl", "config.json", "summary.json", "snapshots/00000002.npz", "new"):
        refused_page(capsys, run, run / name)
    before = contents(other)
    refused_page(capsys, run, other / "summary.json")
    assert contents(other) == before
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    for page in (run / "page.html", tmp_path / "page", tmp_path / "model" / "page"):
        assert cli.main(["report", str(run), "--out", str(page)]) == 0
        assert page.read_text().startswith("<!doctype html>")
    (tmp_path / "loop.html").symlink_to("loop.html")
    assert cli.main(["report", str(run), "--out", str(tmp_path / "loop.html")]) in (0, 2)


def _emptied(path: Path) -> None:
    path.write_text("")


def _shortened(path: Path) -> None:
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


def _of_nothing(path: Path) -> None:
    path.write_text("{}")


@pytest.mark.parametrize(
    ("name", "damage"),
    [("metrics.jsonl", Path.unlink), ("metrics.jsonl", _emptied), ("metrics.jsonl", _shortened),
     ("summary.json", _of_nothing)],
)  # fmt: skip
def test_a_complete_run_that_was_damaged_since_is_not_shown(finished, tmp_path, capsys, name, damage):
    run = shutil.copytree(finished, tmp_path / "run")
    damage(run / name)
    assert name in refused(capsys, grok(run))


def test_a_snapshot_that_the_page_leaves_out_is_named(finished, tmp_path, capsys):
    run = shutil.copytree(finished, tmp_path / "run")
    newest = max((run / "snapshots").iterdir())
    newest.write_bytes(newest.read_bytes()[:100])
    assert cli.main(["report", str(run)]) == 0
    assert f"note: The newest snapshot, {newest.name}, is left out" in capsys.readouterr().err


def test_a_run_of_a_later_version_is_refused(finished, tmp_path, capsys):
    run = shutil.copytree(finished, tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"schema": 2}))
    assert "has schema 2, and this version reads up to 1" in refused(capsys, ["report", str(run)])


def test_data_that_no_memory_holds(tmp_path, capsys):
    line = refused(capsys, ["factor", "--seeds", "1", "--steps", "1", "--size", "10000000", "--out", str(tmp_path)])
    assert "not enough memory" in line
    assert "choose smaller sizes" in line


@pytest.mark.usefixtures("nothing_stays_registered")
def test_an_arm_is_not_the_name_of_a_rule(tmp_path, capsys):
    rules.register_rule(rules.Rule("relative", "nothing", lambda sigma, null, tau, options: 0 * sigma))
    assert "the decay rule 'relative' has the name of an arm" in refused(
        capsys, grok(tmp_path / "run", arms=["none", "relative"])
    )


# --- kills ----------------------------------------------------------------------------------------------------------

KILLED = (
    "grok --width 16 --steps 60 --evaluate-every 10 --seeds 2 --batch-size 32 --modulus 7 --train-examples 200 "
    "--arms none low_rank --device cpu --precision float32"
)


def start(out: Path, *options: str, **where: Any) -> subprocess.Popen:
    """Starts a run that is held somewhere in its middle: a busy machine may come to kill it late."""
    command = held(*KILLED.split(), "--out", str(out), *options, **where)
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def last_step(out: Path) -> int:
    """The step of the newest stored line, −1 before there is one; a line cut short counts as not there."""
    path = out / "metrics.jsonl"
    whole = path.read_bytes().rpartition(b"\n")[0].splitlines() if path.exists() else []
    return json.loads(whole[-1])["step"] if whole else -1


def results(out: Path) -> tuple[list, list]:
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    arms = json.loads((out / "summary.json").read_text())["arms"]
    return timeless(records), timeless(arms)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("killed") / "whole"
    assert cli.main([*KILLED.split(), "--out", str(out), "--quiet"]) == 0
    return out


def test_kill_9_again_and_again_and_the_result_is_the_same(uninterrupted, tmp_path, capsys):
    out = tmp_path / "run"
    moments = [  # four lines for each step of evaluation
        (lambda: (out / ".lock").exists(), {}),  # at the very beginning
        (lambda: last_step(out) >= 10, {"lines": 8}),
        (lambda: last_step(out) >= 20 and any(out.rglob("*.partial")), {"lines": 12, "event": "os.rename"}),
        (lambda: last_step(out) >= 40, {"lines": 20}),
    ]
    for moment, where in moments:
        with start(out, "--quiet", **where) as process:
            until(moment, process)
            process.kill()
            process.wait()
            assert process.returncode == -signal.SIGKILL
        assert not (out / "summary.json").exists()
    assert cli.main([*KILLED.split(), "--out", str(out)]) == 0
    assert f"continuing {out} at step" in capsys.readouterr().out
    assert results(out) == results(uninterrupted)
    assert set(contents(out)) == set(contents(uninterrupted))


def test_ctrl_c_says_how_to_go_on(uninterrupted, tmp_path, capsys):
    out = tmp_path / "run"
    with start(out, lines=12) as process:
        until(lambda: last_step(out) >= 20, process)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=HANG)
    assert process.returncode == 130
    assert "interrupted" in error
    assert f"--out {out}" in error
    assert "Traceback" not in error
    with safe_open(out / "checkpoint.safetensors", "pt") as file:  # of step 0, where a busy machine saves rarely
        saved = json.loads(file.metadata()["checkpoint"])["step"] > 0
    assert cli.main([*KILLED.split(), "--out", str(out), "--quiet"]) == 0
    assert ("continuing" in capsys.readouterr().err) == saved
    assert results(out) == results(uninterrupted)


@pytest.mark.parametrize(
    ("command", "words"), [("grok", "to continue from the last checkpoint"), ("factor", "to start over")]
)
def test_ctrl_c_says_whether_there_is_a_checkpoint(command, words, tmp_path, monkeypatch, capsys):
    def interrupted(experiment, settings, command):
        raise KeyboardInterrupt

    monkeypatch.setattr("rankdecay.lab.experiment.run", interrupted)
    assert cli.main([command, "--out", str(tmp_path / "run")]) == 130
    assert f"interrupted; {words}, run: rankdecay {command} --out" in capsys.readouterr().err


def test_a_kill_before_the_page_was_made_leaves_it_to_the_next_time(tmp_path, monkeypatch):
    """The summary marks the run complete; the same command must still leave every file that it promises."""

    def interrupted(directory):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("rankdecay.lab.experiment.write_report", interrupted)
        assert cli.main(grok(tmp_path / "run", "--quiet")) == 130
    assert (tmp_path / "run" / "summary.json").exists()
    assert cli.main(grok(tmp_path / "run", "--quiet")) == 0
    assert (tmp_path / "run" / "report.html").exists()


def test_report_draws_a_figure_of_one_run(tmp_path, capsys):
    out = tmp_path / "run"
    options = "--steps 2 --evaluate-every 1 --seeds 1 --width 8 --mlp-width 8 --depth 1 --batch-size 8 --modulus 5"
    arguments = ["grok", *options.split(), "--task", "add", "--arms", "none", "--device", "cpu", "--quiet"]
    assert cli.main([*arguments, "--out", str(out)]) == 0
    picture = tmp_path / "figure.svg"
    assert cli.main(["report", str(out), "--figure", str(picture)]) == 0
    assert picture.read_text(encoding="utf-8").startswith("<?xml")
    other = shutil.copytree(out, tmp_path / "other")
    assert cli.main(["report", str(out), str(other), "--figure", str(picture)]) == 2
    assert "cannot be merged" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--train-fraction 1.5", ["1.5", "(0, 1)"]),  # also for a task that takes no fraction
        ("--train-fraction 0.3", ["0.3", "selection", "--train-examples"]),
        ("--task add --train-examples 100", ["100", "add", "--train-fraction"]),
        ("--task s5 --modulus 7", ["7", "s5", "leave it out"]),
        ("--values 1", ["1", "2 to 9"]),
        ("--every 0", ["--every 0", "at least 1"]),
    ],
)
def test_an_option_that_would_be_ignored_or_cannot_work_is_refused(options, words, tmp_path, capsys):
    assert cli.main(["grok", *options.split(), "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert all(word in error for word in words), error
    assert not (tmp_path / "run").exists()
