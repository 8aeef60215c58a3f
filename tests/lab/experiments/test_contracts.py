"""What every experiment does in the same way, also one that another package registers.

A newcomer's experiment is in `tests/lab/toy`: one folder, found by a real entry point.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rankdecay import cli
from rankdecay.lab import experiment
from rankdecay.lab.errors import SettingError
from rankdecay.lab.settings import NOT_IDENTITY, REPORT_EXAMPLES, option
from rankdecay.lab.store import RunDirectory, read_metrics
from tests.comparing import sorted_rows, timeless
from tests.held import held
from tests.waiting import HANG, until

ATTENTION = "--width 16 --heads 2 --steps 4 --warmup 1 --evaluate-every 2 --save none --strengths l2=0.1 low_rank=1"
#: A command of seconds for every experiment, and an option that makes it another run.
TINY = {
    "grok": "--modulus 7 --train-examples 200 --width 16 --mlp-width 16 --batch-size 64 --seeds 2 --arms none low_rank "
    "--steps 20 --evaluate-every 10 --precision float32 | --lr 0.01",
    "boundary": "--task subtract --modulus 5 --arms none l2 --strengths l2=1 --fractions 0.5 0.8 --seeds 2 --steps 40 "
    "--evaluate-every 20 --batch-size 8 --width 8 --mlp-width 8 --precision float32 | --lr 0.01",
    "factor": "--seeds 2 --steps 40 --strengths 0 0.1 | --lr 0.05",
    "rotary": "--planes 2 --width 3 --offsets 8 --seeds 2 --steps 40 --evaluate-every 20 | --lr 0.05",
    "margin": "--datasets 2 --steps 200 --dimension 6 --parametrisation merged separate --margin 10 | --rate 0.001",
    "recall": f"--pairs 3 --queries 2 --keys 4 --values 4 --batch-size 16 --valid-sequences 64 --arms l2 low_rank "
    f"--precision float32 --qk-norm off {ATTENTION} | --lr 0.01",
    "language": f"--text TEXT --depth 1 --mlp-width 16 --context 16 --valid-windows 4 --arms l2 low_rank "
    f"--precision float32 {ATTENTION} | --lr 0.01",
    "vision": f"--depth 1 --mlp-width 16 --arms l2 low_rank --precision float32 {ATTENTION} | --lr 0.01",
    "toy": "--seeds 3 | --decay 0.5",
}
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module", autouse=True)
def entry_point(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The toy as another package: what pip would install of it, on the path."""
    site = tmp_path_factory.mktemp("site")
    metadata = site / "toy-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[{experiment.ENTRY_POINTS}]\ntoy = tests.lab.toy\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(site))
        experiment._folders.cache_clear()
        yield site
    experiment._folders.cache_clear()


def command(name: str, out: Path, *more: str) -> list[str]:
    """The tiny command of an experiment."""
    text = out.parent / "text.txt"
    if not text.exists():
        text.write_text("\n".join(f"the {i}th line of a text that is learnt, {i * i}" for i in range(400)))
    options = TINY[name].partition("|")[0].replace("TEXT", str(text))
    return [name, *shlex.split(options), "--device", "cpu", "--out", str(out), *more]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A complete run of every experiment that was asked for, made once."""
    return {"": tmp_path_factory.mktemp("contracts")}


@pytest.fixture(params=TINY)
def done(request: pytest.FixtureRequest, finished: dict[str, Path]) -> tuple[str, Path]:
    name = request.param
    if name not in finished:
        out = finished[""] / name
        assert cli.main(command(name, out, "--quiet")) == 0
        finished[name] = out
    return name, finished[name]


def test_there_is_a_contract_for_every_experiment() -> None:
    assert set(experiment.names()) == set(TINY)


@pytest.mark.parametrize("name", TINY)
def test_help_needs_no_torch(name: str, entry_point: Path) -> None:
    code = f"""
import sys
sys.path[:0] = [{str(entry_point)!r}, {str(ROOT)!r}]
from rankdecay.cli import main
try:
    main([{name!r}, "--help"])
except SystemExit:
    pass
heavy = sorted({{"torch", "numpy", "matplotlib", "scipy"}} & set(sys.modules))
sys.exit(", ".join(heavy) or 0)
"""
    asked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=HANG)
    assert asked.returncode == 0, asked.stderr
    shown = " ".join(re.sub(r"[│╭╮╰╯─]", " ", asked.stdout).split())
    assert experiment.load(name).question.split("?")[0] in shown
    assert "None" not in shown
    for field in dataclasses.fields(next(iter(experiment.presets(name).values()))):
        assert option(field.name) in shown or f"--no-{option(field.name)[2:]}" in shown


def test_files_and_keys(done: tuple[str, Path]) -> None:
    name, out = done
    summary = json.loads((out / "summary.json").read_text())
    config = json.loads((out / "config.json").read_text())
    assert {"command", "settings", "arms", "wall_seconds"} <= summary.keys()
    assert {"command", "settings", "arms", "versions", "machine", "reproduce", "schema"} <= config.keys()
    assert summary["command"] == config["command"] == name
    assert all({"name", "seeds"} <= arm.keys() for arm in summary["arms"])
    assert all({"name", "description"} <= arm.keys() for arm in config["arms"])
    assert {row["arm"] for row in read_metrics(out)} == {arm["name"] for arm in config["arms"]}
    made = experiment.load(name)
    asked = {field.name for field in dataclasses.fields(next(iter(made.presets.values())))}
    assert set(config["settings"]) >= asked - set(NOT_IDENTITY) - set(made.not_identity)


def test_the_same_command_again_does_nothing(done: tuple[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    name, out = done
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert cli.main(command(name, out, "--json")) == 0
    said = capsys.readouterr()
    assert "is complete" in said.err
    assert json.loads(said.out) == json.loads((out / "summary.json").read_text())
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_the_terminal_has_a_table_and_a_verdict(done: tuple[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    name, out = done
    assert cli.main(command(name, out)) == 0
    shown = capsys.readouterr().out
    for arm in json.loads((out / "summary.json").read_text())["arms"]:
        assert re.search(rf"^ *{arm['name']}\b", shown, re.MULTILINE)
    assert "report.html  is the page to open" in shown.replace("\n", " ")


def test_another_configuration_is_refused(done: tuple[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    name, out = done
    other = shlex.split(TINY[name].partition("|")[2])
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert cli.main(command(name, out, *other)) == 2
    [line] = capsys.readouterr().err.splitlines()
    setting = other[0][2:].replace("-", "_")
    assert re.search(rf"holds another configuration \({setting} is .* there, {other[1]} now\)", line)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_an_interrupted_run_continues(done: tuple[str, Path], tmp_path: Path) -> None:
    name, whole = done
    out, real, count = tmp_path / "run", RunDirectory.append, 0

    def append(self: RunDirectory, records: Any) -> None:
        nonlocal count
        real(self, records)
        count += 1
        if count == 2:
            raise KeyboardInterrupt

    if name == "language":  # the same text, from the same place
        (tmp_path / "text.txt").write_bytes((whole.parent / "text.txt").read_bytes())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rankdecay.lab.store.CHECKPOINT_RARITY", 0)
        patch.setattr(RunDirectory, "append", append)
        code = cli.main(command(name, out, "--quiet"))
    if not experiment.load(name).resumable:
        assert code == 0  # it stores its rows in one piece
        return
    assert code == 130
    assert not (out / "summary.json").exists()
    assert cli.main(["report", str(out)]) == 0  # a page of what is there
    assert cli.main(command(name, out, "--quiet")) == 0
    assert sorted_rows(out) == sorted_rows(whole)
    arms = [json.loads((path / "summary.json").read_text())["arms"] for path in (out, whole)]
    assert timeless(arms[0]) == timeless(arms[1])


@contextlib.contextmanager
def refused(messages: dict[str, str], setting: str) -> Iterator[None]:
    """Notes the message of a `SettingError`."""
    try:
        yield
    except SettingError as error:
        messages[setting] = str(error)


def bad(field: dataclasses.Field[Any], default: Any) -> list[Any]:
    """Values that a number cannot have, of the type of a setting."""
    if isinstance(default, bool):
        return []
    if isinstance(default, int | float):
        return [type(default)(-1)] + ([math.nan] if isinstance(default, float) else [])
    if isinstance(default, tuple) and default and isinstance(default[0], float):
        return [(-1.0,), ()]
    return [("no such arm",)] if field.name in ("arms", "parametrisation") else []


@pytest.mark.parametrize("name", TINY)
def test_a_bad_setting_is_refused_by_its_own_option(name: str) -> None:
    default = next(iter(experiment.presets(name).values()))
    known = {option(field.name) for field in dataclasses.fields(default)}
    refusals: dict[str, str] = {}
    for field in dataclasses.fields(default):
        for value in bad(field, getattr(default, field.name)):
            made = experiment.load(name)
            with refused(refusals, field.name):
                made.arms(made.check(dataclasses.replace(default, **{field.name: value})))
    assert len(refusals) > 3
    for setting, message in refusals.items():
        named = set(re.findall(r"--[a-z][a-z0-9-]*", message))
        assert option(setting) in named, message
        assert named <= known, f"{message}: names an option that {name} does not have"
        assert "\n" not in message


@pytest.mark.parametrize("name", TINY)
def test_a_value_that_is_given_twice_is_refused_by_its_option(name: str, tmp_path: Path) -> None:
    default = dataclasses.replace(next(iter(experiment.presets(name).values())), out=tmp_path)
    lists = [field.name for field in dataclasses.fields(default) if isinstance(getattr(default, field.name), tuple)]
    assert lists or name == "toy"
    for setting in lists:
        value = (*getattr(default, setting), "x", "x")
        with pytest.raises(SettingError, match=rf"{option(setting)} lists .* twice: give it once"):
            experiment.run(experiment.load(name), dataclasses.replace(default, **{setting: value}), "")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", TINY)
def test_every_preset_can_work(name: str) -> None:
    presets = experiment.presets(name)
    assert {"default", "standard"} <= presets.keys()
    for preset in presets.values():
        experiment.load(name).check(preset)
    assert len({preset.out for preset in presets.values()}) > 1 or name == "toy"


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (375, "dark")])
def test_the_page_opens(done: tuple[str, Path], open_page: Any, width: int, scheme: str) -> None:
    _, out = done
    page = open_page(out / "report.html", width=width, scheme=scheme)
    for chart in page.locator(".chart[id]").all():
        if chart.is_visible():
            chart.scroll_into_view_if_needed()
            # one after another: a chart that was scrolled past between two frames is not drawn
            page.wait_for_function("chart => chart.childNodes.length", arg=chart.element_handle())
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for select in page.locator("select").all():
        if select.is_visible() and select.is_enabled():
            select.select_option(index=select.locator("option").count() - 1)


def test_a_page_before_there_is_anything(done: tuple[str, Path], tmp_path: Path, open_page: Any) -> None:
    _, out = done
    (tmp_path / "config.json").write_bytes((out / "config.json").read_bytes())
    assert cli.main(["report", str(tmp_path)]) == 0
    page = open_page(tmp_path / "report.html")
    assert "not complete" in page.locator(".headline").inner_text()


def test_a_static_figure(done: tuple[str, Path], tmp_path: Path) -> None:
    _, out = done
    assert cli.main(["report", str(out), "--figure", str(tmp_path / "figure.svg")]) == 0
    assert (tmp_path / "figure.svg").read_text(encoding="utf-8").startswith("<?xml")


# --- examples of the help ---

#: Options of `TINY` that replace those of an example: sizes alone, so that what an example shows is run.
SIZES = ("--steps", "--seeds", "--width", "--depth", "--datasets")
#: Options of `TINY` that do not go with an option of an example.
WITHOUT = {"--task": "--train-examples", "--arms": "--strengths", "--data": "--dimension"}
EXAMPLES = [line for name in experiment.names() for line in experiment.examples(name)]


def test_every_experiment_has_examples() -> None:
    assert {line.split()[1] for line in EXAMPLES} == set(TINY) - {"toy"}


@pytest.mark.parametrize("line", EXAMPLES)
def test_an_example_of_the_help_runs(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Path] = []
    monkeypatch.setattr("rankdecay.lab.cli.show_page", opened.append)
    monkeypatch.chdir(tmp_path)
    program, name, *given = shlex.split(line)
    assert program == "rankdecay"
    tiny = command(name, tmp_path / "tiny")[1:-2]
    Path("corpus.txt").write_bytes(Path("text.txt").read_bytes())
    pieces = [piece.split() for piece in re.split(r" (?=--)", shlex.join(tiny))]
    kept = [piece for piece in pieces if piece[0] in SIZES or piece[0] not in given]
    kept = [piece for piece in kept if piece[0] not in [WITHOUT.get(word) for word in given]]
    assert cli.main([name, *given, *(word for piece in kept for word in piece), "--quiet"]) == 0
    out = given[given.index("--out") + 1] if "--out" in given else f"runs/{name}"
    preset = "-standard" if "standard" in given else ""
    page = Path(f"{out}{preset}/report.html")
    assert page.exists()
    assert opened == ([page] if "--open" in given else [])


@pytest.mark.parametrize("line", REPORT_EXAMPLES)
def test_an_example_of_report_runs(
    line: str, finished: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "grok" not in finished:
        finished["grok"] = finished[""] / "grok"
        assert cli.main(command("grok", finished["grok"], "--quiet")) == 0
    opened: list[Path] = []
    monkeypatch.setattr("rankdecay.lab.cli.show_page", opened.append)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished["grok"], "runs/grok")
    assert cli.main(shlex.split(line)[1:]) == 0
    assert opened == ([Path("runs/grok/report.html")] if "--open" in line else [])
    assert "--figure" not in line or Path(line.split()[-1]).exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in TINY if name != "toy"])
def test_ctrl_c_says_how_to_go_on_and_it_does(name: str, tmp_path: Path) -> None:
    out = tmp_path / "a run"
    line = command(name, out, "--quiet")
    with subprocess.Popen(
        held(*line, event="open", file="config.json"), cwd=tmp_path, stderr=subprocess.PIPE, text=True
    ) as process:
        until((out / "config.json").exists, process)
        time.sleep(1)  # it may be between the file and the next, before which it is held
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=HANG)
    assert process.returncode == 130, error
    aim = "to continue from the last checkpoint" if experiment.load(name).resumable else "to start over"
    said = error.splitlines()[-1]
    assert said == f"rankdecay: interrupted; {aim}, run: {shlex.join(['rankdecay', *line])}"
    assert "Traceback" not in error
    assert cli.main(shlex.split(said.partition(", run: rankdecay ")[2])) == 0
    assert (out / "report.html").exists()
