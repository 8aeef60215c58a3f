"""Run directories: what is refused, what a kill or a full disk may cost, and what the files hold."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from rankdecay.lab.errors import SettingError
from rankdecay.lab.store import EXTENSIBLE_IDENTITY, Checkpoint, RunDirectory, read_json, read_metrics
from tests import needs
from tests.comparing import contents
from tests.lab.disk import full_for

CONFIG = {
    "command": "grok",
    "settings": {"width": 16, "lr": 0.001, "task": "add", "arms": ("none", "low_rank")},
    "arms": [{"name": "none", "decay": None}],
    "versions": {"torch": "2.13.0"},
}
RECORDS = [{"step": step, "arm": "none", "seed": 0, "test_loss": 0.1 * step} for step in (0, 10, 20)]


def opened(path: Path, config=CONFIG, notices: list[str] | None = None) -> RunDirectory:
    return RunDirectory.open(path, config, (notices if notices is not None else []).append)


def snapshots(path: Path) -> list[tuple[int, dict[str, np.ndarray]]]:
    return [(int(p.stem), dict(np.load(p, allow_pickle=False))) for p in sorted((path / "snapshots").glob("*.npz"))]


def one_line(error) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


# --- what is refused ------------------------------------------------------------------------------------------


def test_a_new_directory_holds_its_configuration(tmp_path):
    path = tmp_path / "deep" / "run"
    with opened(path) as run:
        assert run.summary is None
        assert run.metrics() == []
        assert run.resume() is None
    stored = json.loads((path / "config.json").read_text())
    assert stored["schema"] == 1
    assert stored == json.loads(json.dumps({"schema": 1, **CONFIG}))


def test_the_same_configuration_is_opened_again(tmp_path):
    opened(tmp_path / "run").__exit__()
    before = contents(tmp_path)
    with opened(tmp_path / "run", CONFIG | {"versions": {"torch": "9.9"}, "machine": "another"}):
        pass
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"settings": CONFIG["settings"] | {"width": 32}}, ["width", "16", "32"]),
        ({"settings": CONFIG["settings"] | {"lr": 0.1}}, ["lr", "0.001", "0.1"]),
        ({"settings": {k: v for k, v in CONFIG["settings"].items() if k != "task"}}, ["task", "'add'", "None"]),
        ({"command": "boundary"}, ["command", "'grok'", "'boundary'"]),
        ({"arms": [{"name": "none", "decay": "L2"}]}, ["arms"]),
        ({"schema": 2}, ["schema", "1", "2"]),
    ],
)
def test_another_configuration_is_refused_by_naming_the_difference(tmp_path, changes, words):
    opened(tmp_path / "run").__exit__()
    before = contents(tmp_path)
    with pytest.raises(SettingError) as error:
        opened(tmp_path / "run", CONFIG | changes)
    message = one_line(error)
    assert all(word in message for word in [*words, str(tmp_path / "run"), "another directory"])
    assert contents(tmp_path) == before


def test_a_directory_with_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(SettingError) as error:
        opened(tmp_path)
    assert all(word in one_line(error) for word in (str(tmp_path), "not a run directory", "choose another"))
    assert contents(tmp_path) == {"thesis.tex": b"years of work"}


@pytest.mark.parametrize("text", ['{"command": "gr', "[]", ""])
def test_a_damaged_configuration_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(SettingError) as error:
        opened(tmp_path)
    assert all(word in one_line(error) for word in ("config.json", "JSON", "another --out"))


def test_a_directory_in_use_is_refused(tmp_path):
    path = tmp_path / "run"
    opened(path).__exit__()
    hold = "import fcntl, sys; f = open(sys.argv[1], 'ab'); fcntl.flock(f, 2); print('held', flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(path / ".lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        before = contents(path)
        with pytest.raises(SettingError) as error:
            opened(path)
        assert all(word in one_line(error) for word in (str(path), "in use", "another directory"))
        assert contents(path) == before
        holder.kill()
    with opened(path):  # a process that is gone, however it went, holds nothing
        pass


def test_a_directory_is_free_again_when_closed(tmp_path):
    with opened(tmp_path / "run"), pytest.raises(SettingError, match="in use"):
        opened(tmp_path / "run")
    with opened(tmp_path / "run"):
        pass


@pytest.mark.parametrize("below", ["run", "deep/run"])
def test_a_path_below_a_file_is_refused(tmp_path, below):
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingError) as error:
        opened(tmp_path / "file" / below)
    assert all(word in one_line(error) for word in (str(tmp_path / "file" / below), "cannot be written", "choose"))


def test_a_path_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SettingError, match="cannot be written"):
        opened(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_file_system_that_takes_no_directories_is_refused():
    with pytest.raises(SettingError, match=r"--out /proc/rankdecay cannot be written \(.+\): choose"):
        opened(Path("/proc/rankdecay"))


@needs.ordinary_user
def test_a_directory_without_permission_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(SettingError, match="cannot be written"):
        opened(tmp_path / "run")
    tmp_path.chmod(0o700)


# --- metrics --------------------------------------------------------------------------------------------------


def test_metrics_are_lines_a_person_can_read(tmp_path):
    with opened(tmp_path / "run") as run:
        run.append(RECORDS[:1])
        run.append(RECORDS[1:])
        assert run.metrics() == RECORDS
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [{k: v for k, v in json.loads(line).items() if k != "crc"} for line in lines] == RECORDS
    assert read_metrics(tmp_path / "run") == RECORDS
    assert read_metrics(tmp_path / "nowhere") == []


@pytest.mark.parametrize("newline", [b"", b"\n"])
@pytest.mark.parametrize("cut", [1, 7, -2])
def test_a_last_line_cut_short_is_dropped_with_a_notice(tmp_path, cut, newline):
    notices = []
    with opened(tmp_path / "run", notices=notices) as run:
        run.append(RECORDS)
        path = tmp_path / "run" / "metrics.jsonl"
        lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join(lines[:-1]) + lines[-1].rstrip()[:cut] + newline)
        assert run.metrics() == RECORDS[:-1]
    assert len(notices) == 1
    assert all(word in notices[0] for word in ("metrics.jsonl", "damaged last line"))


def test_a_last_line_of_noise_is_dropped_too(tmp_path):
    with opened(tmp_path / "run") as run:
        run.append(RECORDS)
        with (tmp_path / "run" / "metrics.jsonl").open("ab") as file:
            file.write(b"\x00\xff\xfe\x00")
        assert run.metrics() == RECORDS


@pytest.mark.parametrize("number", [1, 2])
def test_a_damaged_line_in_the_middle_is_refused(tmp_path, number):
    with opened(tmp_path / "run") as run:
        run.append(RECORDS)
        path = tmp_path / "run" / "metrics.jsonl"
        lines = path.read_bytes().splitlines(keepends=True)
        lines[number - 1] = lines[number - 1][:9] + b"\n"
        path.write_bytes(b"".join(lines))
        with pytest.raises(SettingError) as error:
            run.metrics()
    assert all(word in one_line(error) for word in ("metrics.jsonl", f"line {number}", "damaged", "remove"))


# --- checkpoints ----------------------------------------------------------------------------------------------


def checkpoint(step: int) -> Checkpoint:
    generator = torch.Generator().manual_seed(step)
    tensors = {
        "0.weights": torch.randn(2, 5, generator=generator, dtype=torch.float64),
        "1.mean": torch.randn(3, generator=generator).to(torch.bfloat16),
    }
    return Checkpoint(step, tensors, {"members": [[["none", 0]]], "seconds": 1.5})


def snapshot(step: int) -> dict[str, np.ndarray]:
    return {"arms": np.array(["none"]), "singular_values": np.full((1, 2), step, dtype=np.float32)}


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    with opened(tmp_path / "run") as run:
        run.save_checkpoint(checkpoint(5))
        run.save_checkpoint(checkpoint(10))
        stored = run.resume()
    assert stored is not None
    expected = checkpoint(10)
    assert (stored.step, stored.extra) == (10, expected.extra)
    assert stored.tensors.keys() == expected.tensors.keys()
    for name, tensor in expected.tensors.items():
        assert stored.tensors[name].dtype == tensor.dtype
        assert torch.equal(stored.tensors[name], tensor)


def test_resuming_removes_what_came_after_the_checkpoint(tmp_path):
    with opened(tmp_path / "run") as run:
        for record in RECORDS:
            run.append([record])
            run.save_snapshot(record["step"], snapshot(record["step"]))
            if record["step"] == 10:
                run.save_checkpoint(checkpoint(10))
        run.resume()
        assert run.metrics() == RECORDS[:2]
        assert [step for step, _ in snapshots(tmp_path / "run")] == [0, 10]


def test_without_a_checkpoint_a_run_begins_again(tmp_path):
    with opened(tmp_path / "run") as run:
        run.append(RECORDS)
        run.save_snapshot(0, snapshot(0))
        assert run.resume() is None
        assert run.metrics() == []
        assert snapshots(tmp_path / "run") == []


def test_a_damaged_checkpoint_is_one_clear_error(tmp_path):
    with opened(tmp_path / "run") as run:
        run.save_checkpoint(checkpoint(10))
        (path,) = (p for p in (tmp_path / "run").rglob("*checkpoint*") if p.is_file())
        path.write_bytes(path.read_bytes()[:-7])
        with pytest.raises(SettingError) as error:
            run.resume()
    assert all(word in one_line(error) for word in (str(path), "damaged", "--out"))


def test_a_finished_run_has_its_summary_and_no_checkpoint(tmp_path):
    with opened(tmp_path / "run") as run:
        run.save_checkpoint(checkpoint(10))
        run.finish({"command": "grok", "arms": [], "wall_seconds": 1.0})
        assert run.summary == {"command": "grok", "arms": [], "wall_seconds": 1.0}
    assert set(contents(tmp_path / "run")) == {".lock", "config.json", "summary.json"}
    assert read_json(tmp_path / "run" / "nothing.json") is None


def test_snapshots_come_back_in_order_without_pickles(tmp_path):
    with opened(tmp_path / "run") as run:
        for step in (20, 0, 100000):
            run.save_snapshot(step, snapshot(step))
    steps, arrays = zip(*snapshots(tmp_path / "run"), strict=True)
    assert steps == (0, 20, 100000)
    assert [float(a["singular_values"][0, 0]) for a in arrays] == [0, 20, 100000]
    assert arrays[0]["arms"].tolist() == ["none"]


# --- kills and full disks ---------------------------------------------------------------------------------------


def test_a_kill_while_the_configuration_was_written_does_no_harm(tmp_path):
    (tmp_path / ".lock").touch()
    (tmp_path / "config.json.partial").write_bytes(b'{"command": "g')
    with opened(tmp_path):
        pass
    assert json.loads((tmp_path / "config.json").read_text())["command"] == "grok"


def test_what_a_kill_left_half_written_is_never_read(tmp_path):
    with opened(tmp_path / "run") as run:
        run.append(RECORDS[:1])
        run.save_snapshot(0, snapshot(0))
        run.save_checkpoint(checkpoint(0))
        before = contents(tmp_path / "run")
        for name in before:
            (tmp_path / "run" / f"{name}.partial").write_bytes(b"half")
        stored = run.resume()
        assert stored is not None
        assert stored.step == 0
        assert run.metrics() == RECORDS[:1]
        assert [step for step, _ in snapshots(tmp_path / "run")] == [0]


def assert_says_disk_full(error, name: str) -> None:
    assert all(word in one_line(error) for word in ("disk is full", name, "free", "again"))


@needs.full_disk
def test_a_full_disk_while_metrics_are_appended(tmp_path):
    path = tmp_path / "run"
    with opened(path) as run:
        run.append(RECORDS[:2])
        run.save_checkpoint(checkpoint(10))
        metrics = path / "metrics.jsonl"
        metrics.rename(path / "aside")
        before = contents(path)
        metrics.symlink_to("/dev/full")
        with pytest.raises(SettingError) as error:
            run.append(RECORDS[2:])
        assert_says_disk_full(error, "metrics.jsonl")
        metrics.unlink()
        assert contents(path) == before
        (path / "aside").rename(metrics)
        assert run.metrics() == RECORDS[:2]


@needs.full_disk
@pytest.mark.parametrize("name", ["checkpoint.safetensors", "snapshots/00000010.npz", "summary.json"])
def test_a_full_disk_while_a_file_is_replaced_leaves_the_old_one(tmp_path, name):
    path = tmp_path / "run"

    def write(run: RunDirectory) -> None:
        run.save_snapshot(10, snapshot(10))
        run.save_checkpoint(checkpoint(10))
        run.finish({"arms": []})

    with opened(path) as run:
        run.append(RECORDS[:2])
        run.save_snapshot(10, snapshot(10))
        run.save_checkpoint(checkpoint(10))
        before = contents(path)
        with full_for(path / f"{name}.partial"), pytest.raises(SettingError) as error:
            write(run)
        assert_says_disk_full(error, name)
        after = contents(path)
        assert set(after) == set(before)  # no half-written file is left
        assert after.get(name) == before.get(name)
        write(run)  # once there is space
        assert run.summary == {"arms": []}


def test_permission_lost_during_a_run_is_one_clear_error(tmp_path):
    path = tmp_path / "run"
    with opened(path) as run:
        (path / "metrics.jsonl").mkdir()
        with pytest.raises(SettingError) as error:
            run.append(RECORDS)
        assert all(word in one_line(error) for word in ("metrics.jsonl", "a directory", "remove it"))


# --- directories that grow ----------------------------------------------------------------------------------------

SWEEP = {
    "command": "boundary",
    "fixed": {"task": "add", "lr": 0.001},
    "settings": {"seeds": 1},
    "arms": [{"name": "none", "every": 1}],
}


def grown(path: Path, config=SWEEP, notices: list[str] | None = None) -> RunDirectory:
    return RunDirectory.open(path, config, (notices if notices is not None else []).append, EXTENSIBLE_IDENTITY)


def test_only_what_is_fixed_decides_whether_a_directory_is_the_same(tmp_path):
    grown(tmp_path / "run").__exit__()
    more = SWEEP | {"settings": {"seeds": 3}, "arms": [{"name": "none"}, {"name": "l2"}]}
    with grown(tmp_path / "run", more) as run:
        assert run.config == {"schema": 1, **SWEEP}  # opening changes nothing
        run.save_config(more)
        assert run.config == {"schema": 1, **more}
        run.save_config(
            {**run.config, "arms": [{"name": name} for name in ("none", "l2", "smooth")]}
        )  # one that was read has a schema already
    with grown(tmp_path / "run") as run:
        assert run.config == {"schema": 1, **more, "arms": [{"name": name} for name in ("none", "l2", "smooth")]}
    with pytest.raises(SettingError, match="seeds is 3 there, 1 now"):
        opened(tmp_path / "run", SWEEP)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"fixed": {"task": "add", "lr": 0.01}}, ["lr", "0.001", "0.01"]),
        ({"fixed": {"task": "add", "lr": 0.001, "new": 1}}, ["new", "None", "1"]),
        ({"command": "grok"}, ["command", "'boundary'", "'grok'"]),
        ({"schema": 2}, ["schema", "1", "2"]),
        ({"arms": [{"name": "l2"}, {"name": "none", "every": 4}]}, ["its arm none differs"]),
    ],
)
def test_what_is_fixed_may_not_change(tmp_path, changes, words):
    grown(tmp_path / "run").__exit__()
    before = contents(tmp_path)
    with pytest.raises(SettingError) as error:
        grown(tmp_path / "run", SWEEP | changes)
    assert all(word in one_line(error) for word in [*words, "another directory"])
    assert contents(tmp_path) == before


def test_a_directory_of_another_command_is_refused(tmp_path):
    opened(tmp_path / "run").__exit__()  # of one that has nothing "fixed"
    with pytest.raises(SettingError, match="command is 'grok' there, 'boundary' now"):
        grown(tmp_path / "run")


def test_a_complete_directory_is_opened_again_to_go_on(tmp_path):
    with grown(tmp_path / "run") as run:
        run.append(RECORDS)
        run.finish({"arms": []})
        (run.path / "report.html").touch()
        run.reopen()
        assert run.summary is None
        run.finish({"arms": []})
        assert not (run.path / "report.html").exists(), "it was of the smaller sweep"
        run.reopen()
        assert run.metrics() == RECORDS
        run.reopen()  # of one that is open already


@pytest.mark.parametrize("end", ["", "\n", '{"step": 3', '{"step": 3\n', "\x00\x00", '{"task": "ä'])
def test_more_follows_a_last_line_that_was_cut_short(tmp_path, end):
    notices = []
    with grown(tmp_path / "run", notices=notices) as run:
        assert run.drop_damaged_line() == []
        assert not (tmp_path / "run" / "metrics.jsonl").exists()
        run.append(RECORDS[:2])
        path = tmp_path / "run" / "metrics.jsonl"
        path.write_bytes(path.read_bytes() + end.encode()[: -1 if end.endswith("ä") else None])
        assert run.drop_damaged_line() == RECORDS[:2]
        assert len(notices) == (1 if end.strip() else 0)
        run.append(RECORDS[2:])
        assert run.metrics() == RECORDS
        assert run.drop_damaged_line() == RECORDS
        assert len(path.read_bytes().splitlines()) == 3
        assert len(notices) == (1 if end.strip() else 0)


def test_a_last_line_that_lacks_its_end_alone_is_kept(tmp_path):
    with grown(tmp_path / "run") as run:
        run.append(RECORDS[:2])
        path = tmp_path / "run" / "metrics.jsonl"
        path.write_bytes(path.read_bytes()[:-1])
        assert run.drop_damaged_line() == RECORDS[:2]
        run.append(RECORDS[2:])
        assert run.metrics() == RECORDS


def test_an_undamaged_file_is_not_written_again(tmp_path):
    with grown(tmp_path / "run") as run:
        run.append([{"task": "größer", "value": 1e-30, "none": None}])
        before = (tmp_path / "run" / "metrics.jsonl").stat()
        run.drop_damaged_line()
        assert (tmp_path / "run" / "metrics.jsonl").stat() == before


def test_several_checkpoints_are_kept_by_name_until_the_end(tmp_path):
    with grown(tmp_path / "run") as run:
        for name, step in (("under_way-0", 5), ("under_way-1", 10), ("checkpoint", 15)):
            run.save_checkpoint(checkpoint(step), name)
        run.save_checkpoint(checkpoint(20), "under_way-1")
        steps = {}
        for name in ("under_way-0", "under_way-1", "checkpoint"):
            stored = run.load_checkpoint(name)
            assert stored is not None
            steps[name] = stored.step
            assert torch.equal(stored.tensors["0.weights"], checkpoint(stored.step).tensors["0.weights"])
        assert steps == {"under_way-0": 5, "under_way-1": 20, "checkpoint": 15}
        assert run.load_checkpoint("under_way-2") is None
        run.save_checkpoint(Checkpoint(0, {}, {"runs": []}), "under_way-0")  # nothing under way any more
        empty = run.load_checkpoint("under_way-0")
        assert empty == Checkpoint(0, {}, {"runs": []})
        run.finish({})
    assert set(contents(tmp_path / "run")) == {".lock", "config.json", "summary.json"}


def test_a_sound_file_that_is_no_checkpoint_is_refused(tmp_path):
    from safetensors.torch import save

    with grown(tmp_path / "run") as run:
        for metadata in (None, {"other": "{}"}, {"checkpoint": "{"}, {"checkpoint": "[]"}, {"checkpoint": "{}"}):
            path = tmp_path / "run" / "checkpoint.safetensors"
            path.write_bytes(save({"a": torch.zeros(2)}, metadata=metadata))
            with pytest.raises(SettingError) as error:
                run.load_checkpoint()
            assert all(word in one_line(error) for word in (str(path), "damaged", "remove it"))


def test_a_model_is_kept_whole_or_not_at_all(tmp_path):
    with opened(tmp_path / "run") as run:
        run.save_model("first", lambda path: (path / "weights").write_bytes(b"old") and None)

        def interrupted(path: Path) -> None:
            (path / "weights").write_bytes(b"ne")
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run.save_model("first", interrupted)
        assert (run.path / "models" / "first" / "weights").read_bytes() == b"old"
        run.save_model("first", lambda path: (path / "other").write_bytes(b"new") and None)  # what was left is gone
        assert contents(run.path / "models") == {"first/other": b"new"}
    with opened(tmp_path / "other") as run:
        (run.path / "models").write_text("a file is in the way")
        with pytest.raises(SettingError) as error:
            run.save_model("first", lambda path: None)
        assert "models/first cannot be written" in one_line(error)


def test_a_checkpoint_is_dropped_where_another_run_follows(tmp_path):
    with opened(tmp_path / "run") as run:
        run.drop_checkpoint()  # none is there
        run.save_checkpoint(Checkpoint(10, {"w": torch.ones(2)}, {}))
        run.save_checkpoint(Checkpoint(20, {"w": torch.ones(2)}, {}), "kept")
        run.drop_checkpoint()
        assert run.load_checkpoint() is None
        assert run.load_checkpoint("kept") is not None


def test_metrics_can_be_written_again(tmp_path):
    with opened(tmp_path / "run") as run:
        run.append(RECORDS)
        run.replace_metrics(RECORDS[:2])
        assert run.metrics() == RECORDS[:2]
        run.append(RECORDS[2:])
        assert run.metrics() == RECORDS
