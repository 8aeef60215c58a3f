"""Run directories that lost something: what is said of each file, and nothing goes on in silence."""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from rankdecay import cli
from rankdecay.lab import store, stored
from rankdecay.lab.errors import SettingError
from rankdecay.lab.store import Checkpoint, RunDirectory, read_metrics
from rankdecay.lab.stored import read_run, read_snapshot
from tests import needs
from tests.lab.disk import full_for
from tests.lab.interruption import interrupt
from tests.robustness.kills import COMMANDS, contents
from tests.robustness.samples import RUNS, runs
from tests.robustness.test_files import put

GROK = [
    "grok",
    "--task",
    "add",
    "--modulus",
    "5",
    "--steps",
    "6",
    "--evaluate-every",
    "2",
    "--seeds",
    "1",
    "--batch-size",
    "8",
    "--width",
    "8",
    "--arms",
    "none",
    "low_rank",
    "--precision",
    "float32",
    "--device",
    "cpu",
    "--quiet",
]
CONFIG = {"command": "x", "settings": {}, "arms": []}
ROWS = [{"step": i, "arm": "none", "seed": 0, "loss": 0.5} for i in range(4)]


def opened(path: Path) -> RunDirectory:
    return RunDirectory.open(path, CONFIG, lambda text: None)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interrupted run of grok, and beside it a complete one."""
    root = tmp_path_factory.mktemp("runs")
    interrupt(GROK, root / "interrupted", checkpoints=2)
    assert cli.main([*GROK, "--out", str(root / "complete")]) == 0
    return root


@pytest.fixture
def interrupted(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made / "interrupted", tmp_path / "run")


@pytest.fixture
def complete(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made / "complete", tmp_path / "run")


def refusal(command: list[str], capsys: pytest.CaptureFixture[str], *words: str) -> None:
    capsys.readouterr()
    assert cli.main(command) == 2
    said = capsys.readouterr().err
    line = said.strip().splitlines()[-1]
    assert line.startswith("rankdecay: error: ")
    assert all(word in line for word in words), line


# --- lines -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("how", ["missing", "changed", "swapped", "twice", "foreign", "list"])
def test_a_line_that_was_changed_is_noticed(number: int, how: str, tmp_path: Path) -> None:
    with opened(tmp_path / "run") as run:
        run.append(ROWS[:2])
        run.append(ROWS[2:])
    path = tmp_path / "run" / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    i = number - 1
    if how == "missing":
        del lines[i]
    elif how == "changed":
        lines[i] = lines[i].replace(b"0.5", b"0.6")
    elif how == "swapped":
        lines[i], lines[i + 1] = lines[i + 1], lines[i]
    elif how == "twice":
        lines.insert(i, lines[i])
    else:
        lines[i] = b"{}\n" if how == "foreign" else b"[1]\n"
    path.write_bytes(b"".join(lines))
    with pytest.raises(SettingError, match=r"metrics\.jsonl, line \d .*restore the file"):
        read_metrics(tmp_path / "run")


@pytest.mark.parametrize(
    "value", ['{"step": "x"}', '{"step": [1]}', '{"arm": 3}', '{"seconds": "x"}', "3", "null", "[" * 5000]
)
def test_older_lines_are_checked_for_meaning(value: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{value}\n{{"step": 2}}\n')
    with pytest.raises(SettingError, match="line 2"):
        read_metrics(tmp_path)


def test_lines_with_a_checksum_follow_older_ones(tmp_path: Path) -> None:
    with opened(tmp_path / "run") as run:
        (run.path / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1}\n')
        run.append(ROWS[2:])
    with opened(tmp_path / "run") as run:
        run.append(ROWS[:1])
    assert read_metrics(tmp_path / "run") == [{"step": 0}, {"step": 1}, *ROWS[2:], ROWS[0]]


def test_lines_lost_behind_a_checkpoint_are_noticed(interrupted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = interrupted / "metrics.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:2]))
    refusal(
        [*GROK, "--out", str(interrupted)], capsys, "metrics.jsonl has 2 lines", "checkpoint.safetensors", "restore"
    )


def test_all_lines_lost_behind_a_checkpoint(interrupted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (interrupted / "metrics.jsonl").unlink()
    refusal([*GROK, "--out", str(interrupted)], capsys, "metrics.jsonl has 0 lines")


def test_lines_lost_from_a_complete_run(complete: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = complete / "metrics.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-2]))
    refusal(["report", str(complete)], capsys, "metrics.jsonl", "summary.json was made from")


def test_a_run_of_sessions_notices_lost_lines_too(tmp_path: Path) -> None:
    from rankdecay.lab.session.run_store import RunStore

    key = {"arm": "none", "strength": 1.0, "mlp_decay": None, "qk_norm": True, "seed": 0}
    with opened(tmp_path / "run") as run:
        run.append([row | key | {"wall": 1.0} for row in ROWS])
        run.save_checkpoint(Checkpoint(3, {"a": torch.ones(2)}, {"run": key}))
    (tmp_path / "run" / "metrics.jsonl").unlink()
    with opened(tmp_path / "run") as run, pytest.raises(SettingError, match="0 lines and had 4"):
        RunStore(run)


# --- other files -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", [0.05, 0.5, 0.99])
def test_a_checkpoint_with_a_changed_byte_is_refused(
    where: float, interrupted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = interrupted / "checkpoint.safetensors"
    data = bytearray(path.read_bytes())
    data[int(where * len(data))] ^= 1
    path.write_bytes(data)
    refusal([*GROK, "--out", str(interrupted)], capsys, "checkpoint.safetensors", "damaged", "remove it")


@pytest.mark.parametrize("content", [b"", b"PK\3\4", b"no archive"])
def test_a_damaged_last_snapshot(content: bytes, complete: Path, capsys: pytest.CaptureFixture[str]) -> None:
    last = sorted((complete / "snapshots").glob("*.npz"))[-1]
    last.write_bytes(content)
    refusal(["inspect", str(complete)], capsys, last.name, "restore it")
    assert cli.main(["report", str(complete)]) == 0
    assert last.name in (complete / "report.html").read_text(encoding="utf-8")


def test_a_damaged_first_snapshot_is_named_by_inspect(complete: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = min((complete / "snapshots").glob("*.npz"))
    first.write_bytes(first.read_bytes()[:100])
    assert cli.main(["inspect", str(complete)]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert first.name in shown.err
    assert "restore it, or remove it" in shown.err
    first.unlink()
    assert cli.main(["inspect", str(complete)]) == 0


def test_a_snapshot_that_unpacks_to_too_much_is_refused_from_its_header(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored, "LARGEST_SNAPSHOT", 2**22)
    path = tmp_path / "00000001.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.npy", b"\0" * (2**22 + 1))
    monkeypatch.setattr(np, "load", None)
    with pytest.raises(SettingError, match="unpacks to 4194305 bytes"):
        read_snapshot(path)


def test_arrays_that_do_not_fit_together(tmp_path: Path) -> None:
    np.savez(tmp_path / "00000001.npz", arms=np.array(["a", "b"]), product=np.ones((3, 2)))
    with pytest.raises(SettingError, match="members"):
        read_snapshot(tmp_path / "00000001.npz")


@pytest.mark.parametrize("kind", ["pipe", "directory", "circle", "device", "missing", "cut"])
@pytest.mark.parametrize(
    "name", ["config.json", "metrics.jsonl", "summary.json", "checkpoint.safetensors", "snapshots", ".lock"]
)
def test_another_thing_in_the_place_of_a_file(
    kind: str, name: str, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One clear line, or a result where nothing is needed of the file; neither a wait nor a traceback."""
    for state in ("complete", "interrupted"):
        run = shutil.copytree(made / state, tmp_path / state)
        path = run / name
        held = path.read_bytes() if path.is_file() else b""
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        if kind == "cut":
            path.write_bytes(held[: len(held) // 2])
        elif kind != "missing":
            put(kind, path)
        reading = [["report", str(run)]] if name in ("summary.json", "snapshots") else [["inspect", str(run)]]
        for command in reading if state == "complete" else [[*GROK, "--out", str(run)]]:
            capsys.readouterr()
            code = cli.main(command)
            said = capsys.readouterr().err
            assert code in (0, 2), said
            if code == 2:
                assert said.strip().splitlines()[-1].startswith("rankdecay: error: "), said
                assert str(run) in said
            if code == 0 and command[0] == "grok" and kind in ("pipe", "circle", "device"):
                raise AssertionError(f"{name}, {kind}: the run went on")


@needs.full_disk
@pytest.mark.parametrize("threads", [1, 2])
def test_a_sweep_on_a_disk_that_fills_and_empties_again(threads: int, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    text = COMMANDS["boundary"]
    try:
        torch.set_num_threads(threads)
        for place, full in (("whole", ()), ("filled", ("config.json", "under_way-0.safetensors", "summary.json"))):
            out = tmp_path / place
            out.mkdir()
            command = text.replace("OUT", str(out)).split()
            for name in full:  # each is full once, and the next run goes on
                with full_for(out / "run" / f"{name}.partial"):
                    assert cli.main(command) in (0, 2)
            assert cli.main(command) == 0
    finally:
        torch.set_num_threads(before)
    assert contents(tmp_path / "filled") == contents(tmp_path / "whole")


def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    with opened(tmp_path / "run") as run:
        (run.path / "summary.json.partial").symlink_to(victim)
        run.finish({"arms": []})
    (tmp_path / "run" / "metrics.jsonl").symlink_to(victim)
    with pytest.raises(SettingError, match=r"metrics\.jsonl is a link"):
        opened(tmp_path / "run")
    assert victim.read_text() == "mine"


def test_a_link_to_a_file_elsewhere_is_not_read(complete: Path, tmp_path: Path) -> None:
    (complete / "metrics.jsonl").rename(tmp_path / "elsewhere")
    (complete / "metrics.jsonl").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SettingError, match="leads out"):
        read_run(complete)


def without_array(run: Path) -> None:
    path = run / "snapshots" / "00000000.npz"
    with np.load(path) as held:
        arrays = {name: held[name] for name in held.files if name != "seeds"}
    np.savez(path, **arrays)


def edited(name: str, key: str, value: object) -> Callable[[Path], None]:
    """A damage: another value of every key of that name in a JSON file, or in one line of the metrics."""
    name, _, line = name.partition(":")

    def change(run: Path) -> None:
        lines = (run / name).read_text().splitlines(keepends=True) if line else [(run / name).read_text()]
        number = int(line or 1) - 1
        record = json.loads(lines[number])
        found = 0
        holders = [record]
        while holders:
            holder = holders.pop()
            if isinstance(holder, dict) and key in holder:
                holder[key] = value
                found += 1
            holders += holder.values() if isinstance(holder, dict) else holder if isinstance(holder, list) else []
        assert found
        lines[number] = json.dumps(record) + "\n"
        (run / name).write_text("".join(lines))

    return change


#: Files that are whole by themselves and fit nothing else, of directories whose lines have no checksums.
UNFIT: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "fuzz 20396": ("grok", without_array, "snapshots/00000000.npz"),
    "fuzz 20952": ("vision", edited("summary.json", "arms", [{"name": "l2"}]), "summary.json"),
    "fuzz 21243": ("margin", edited("metrics.jsonl:4", "nuclear_excess", "x"), "metrics.jsonl, line 4"),
    "fuzz 21156": ("factor", edited("config.json", "penalty", "x"), "config.json"),
    "fuzz 21530": ("margin", edited("summary.json", "settings", {}), "summary.json"),
    "settings": ("grok", edited("config.json", "threshold", [1]), "config.json"),
    "layer": ("vision", edited("metrics.jsonl:2", "stable_rank", "x"), "metrics.jsonl, line 2"),
    "text": ("factor", edited("metrics.jsonl:5", "imbalance", "x"), "metrics.jsonl, line 5"),
    "list": ("grok", edited("metrics.jsonl:3", "stable_rank", [1.0]), "metrics.jsonl, line 3"),
    "in a list": ("margin", edited("metrics.jsonl:3", "rank", ["x"]), "metrics.jsonl, line 3"),
    "cell": ("vision", edited("summary.json", "strength", "x"), "summary.json"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_a_file_that_fits_no_other_is_named(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sample, change, name = UNFIT[case]
    run = shutil.copytree(RUNS / sample, tmp_path / "run")
    change(run)
    refusal(["report", str(run)], capsys, f"{run}/{name}", "restore")
    assert not (run / "report.html.part").exists()


def test_a_figure_names_it_too_and_is_not_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = shutil.copytree(RUNS / "margin", tmp_path / "run")
    edited("metrics.jsonl:4", "nuclear_excess", "x")(run)
    out = tmp_path / "figure.svg"
    refusal(["report", str(run), "--figure", str(out)], capsys, f"{run}/metrics.jsonl, line 4")
    assert not out.exists()


def test_a_line_of_another_run_is_named_before_training_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Found by the fuzzer, case 21424."""
    found = next(sample for sample in runs(tmp_path) if sample.name == "recall")
    out = found.root / "run"
    lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    (out / "metrics.jsonl").write_text("".join(['{"step": 1}\n', *lines[1:]]))
    refusal([word.replace("OUT", str(out)) for word in found.again], capsys, f"{out}/metrics.jsonl", "line 1")


# --- nothing left ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["again", "report", "figure", "inspect"])
def test_what_a_kill_left_is_removed_by_the_next_command(command: str, complete: Path) -> None:
    before = {str(path.relative_to(complete)) for path in complete.rglob("*")}
    shutil.copy(RUNS / "grok" / "checkpoint.safetensors", complete / "checkpoint.safetensors")
    for name in (
        "under_way-3.safetensors",
        "under_way-3.safetensors.partial",
        "summary.json.partial",
        "report.html.part",
    ):
        (complete / name).write_bytes(b"half")
    (complete / "snapshots" / "00000002.npz.partial").write_bytes(b"half")
    (complete / "models" / "x.partial").mkdir(parents=True)
    commands = {
        "again": [*GROK, "--out", str(complete)],
        "report": ["report", str(complete)],
        "figure": ["report", str(complete), "--figure", str(complete.parent / "figure.svg")],
        "inspect": ["inspect", str(complete)],
    }
    assert cli.main(commands[command]) == 0
    after = {str(path.relative_to(complete)) for path in complete.rglob("*")}
    assert after - {"models", "report.html.part"} == before


def test_a_run_that_is_open_is_not_tidied(tmp_path: Path) -> None:
    from rankdecay.lab.store import tidy

    with opened(tmp_path / "run") as run:
        (run.path / "metrics.jsonl.partial").write_bytes(b"being written")
        tidy(run.path)
        assert (run.path / "metrics.jsonl.partial").exists()
    tidy(tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl.partial").exists()


def test_inspect_leaves_a_run_alone_that_is_at_work_or_cannot_be_written(
    complete: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = complete / "under_way-3.safetensors"
    left.write_bytes(b"half")
    with (complete / ".lock").open("ab") as lock:
        assert store._lock(lock)
        assert cli.main(["inspect", str(complete)]) == 0
        assert left.exists()

    def refused(path: Path, missing_ok: bool = False) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refused)  # a file system that is mounted to be read
        assert cli.main(["inspect", str(complete)]) == 0
    assert left.exists()
    assert cli.main(["inspect", str(complete)]) == 0
    assert not left.exists()


@pytest.mark.parametrize("config", [None, {"model_type": "llama", "schema": 1}])
def test_a_directory_that_is_no_run_is_not_tidied(config: dict[str, object] | None, tmp_path: Path) -> None:
    for name in (".lock", "checkpoint.safetensors", "metrics.jsonl.partial"):
        (tmp_path / name).write_bytes(b"mine")
    (tmp_path / "summary.json").write_text("{}")
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    assert cli.main(["inspect", str(tmp_path)]) == 2
    assert (tmp_path / "checkpoint.safetensors").exists()
    assert (tmp_path / "metrics.jsonl.partial").exists()


def test_a_file_of_somebody_else_is_left_alone(complete: Path) -> None:
    (complete / "notes.partial").write_text("mine")
    (complete / "model.safetensors").write_text("mine")
    assert cli.main(["report", str(complete)]) == 0
    assert (complete / "notes.partial").exists()
    assert (complete / "model.safetensors").exists()


# --- clocks ----------------------------------------------------------------------------------------------------


def test_durations_do_not_depend_on_the_clock_of_the_wall(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = time.time, 0

    def back() -> float:
        nonlocal calls
        calls += 1
        return real() - 1e6 * calls

    monkeypatch.setattr(time, "time", back)
    monkeypatch.setattr(time, "time_ns", lambda: int(back() * 1e9))
    assert cli.main([*GROK, "--out", str(tmp_path / "run")]) == 0
    rows = read_metrics(tmp_path / "run")
    assert [row["seconds"] for row in rows] == sorted(row["seconds"] for row in rows)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert 0 <= summary["wall_seconds"] < 600
    assert all(0 < row["step_seconds"] < 600 for row in rows if row["step_seconds"] is not None)
    assert os.path.exists(tmp_path / "run" / "report.html")


def test_a_setting_that_nobody_knows_and_is_null_is_a_difference_with_a_name(tmp_path: Path) -> None:
    """Found by the fuzzer, case 6668: a key of the settings was changed, and its value is null."""
    there, now = {"settings": {"width": 16, "imagf_size": None}}, {"settings": {"width": 16}}
    with pytest.raises(SettingError, match="imagf_size is None there"):
        store._refuse_other_configuration(tmp_path, there, now, ["settings"], {})


@pytest.mark.parametrize("name", ["config.json", "summary.json"])
def test_values_inside_of_values_are_refused(name: str, complete: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Found by the fuzzer, case 8004."""
    path = complete / name
    path.write_text(path.read_text().replace("{", '{"deep": ' + "[" * 400 + "]" * 400 + ", ", 1))
    assert cli.main(["report", str(complete)]) == 2
    assert f"{name} is nested more than" in capsys.readouterr().err
