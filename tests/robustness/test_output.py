"""One hostile name through every output, and places that cannot be written."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import rankdecay as rd
from rankdecay import cli, files
from rankdecay.attention.listing import listing
from rankdecay.lab import experiment
from rankdecay.lab.errors import SettingError
from rankdecay.lab.progress import Screen
from rankdecay.lab.report.terminal import print_summary
from tests import needs
from tests.robustness.samples import LLAMA, RUNS, llama

#: Clears the screen, fakes a line, is a formula, turns the direction, ends a script, and is half a character.
NAME = "=HYPERLINK(1)\x1b[2J\nrankdecay: error: faked\x07\r\u202e</script><b>[red]$x$\x85"
OBEYED = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]|\n ?rankdecay: error: faked")


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A checkpoint of hostile names in a directory of one."""
    root = tmp_path / NAME.replace("/", "")
    root.mkdir()
    (root / "config.json").write_text(json.dumps(LLAMA))
    tensors = {name.replace("model.", f"{NAME.replace('.', '')}."): tensor for name, tensor in llama().items()}
    tensors[f"{NAME.replace('.', '')}.other.query_proj.weight"] = torch.ones(3, 3)
    tensors[f"{NAME.replace('.', '')}.other.key_proj.weight"] = torch.ones(3, 3)
    save_file(tensors, root / "model.safetensors")
    return root


def check(text: str) -> None:
    assert text.strip()
    found = OBEYED.search(text)
    assert not found, text[max(0, found.start() - 40) : found.end() + 40].encode("unicode_escape")


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--json",),
        ("--list",),
        ("--list", "--json"),
        ("--compare", "SELF"),
        ("--layers", "99"),
        ("--state", "x"),
        ("--html", "OUT"),
        ("--csv", "OUT"),
    ],
)
def test_what_inspect_prints(
    options: tuple[str, ...], hostile: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"SELF": str(hostile), "OUT": str(hostile / f"out{options[0] if options else ''}")}
    cli.main(["inspect", str(hostile), *(places.get(option, option) for option in options)])
    said = capsys.readouterr()
    check(said.out + said.err)
    if "--json" in options:
        assert json.dumps(NAME)[1:-1] in said.out


def test_what_the_library_says(hostile: Path) -> None:
    check(str(rd.inspect(hostile)))
    check(str(listing(hostile)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rd.find_attention(hostile)
    check("".join(str(warning.message) for warning in caught))


def test_a_cell_of_a_table_is_text_or_a_number(hostile: Path) -> None:
    rows = list(csv.reader(io.StringIO(rd.inspect(hostile).to_csv())))
    for row in rows[1:]:
        for cell in row:
            assert not OBEYED.search(cell)
            if cell.startswith(("=", "+", "-", "@")):
                float(cell)
    assert any(cell.startswith("'=HYPERLINK") for row in rows for cell in row)


def test_pages_hold_it_as_text(hostile: Path, tmp_path: Path) -> None:
    from rankdecay.lab.report.inspection import inspection_page

    page = inspection_page([rd.inspect(hostile)], tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<b>[red]" not in page
    assert "</script><b>" not in page


@pytest.fixture
def renamed(tmp_path: Path) -> Path:
    """A complete run whose arms have hostile names."""
    out = tmp_path / "run"
    shutil.copytree(RUNS / "factor", out)
    for name in ("config.json", "summary.json", "metrics.jsonl"):
        text = (out / name).read_text()
        (out / name).write_text(
            text.replace('"nuclear"', json.dumps(NAME)).replace('"frobenius"', json.dumps(NAME + "2"))
        )
    return out


def test_what_the_lab_shows(renamed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary: dict[str, Any] = json.loads((renamed / "summary.json").read_text())
    for arm in summary["arms"]:
        arm["name"] = NAME
    print_summary(experiment.load("factor"), summary)
    check(capsys.readouterr().out)
    assert cli.main(["report", str(renamed)]) == 0
    assert cli.main(["report", str(renamed), "--figure", str(tmp_path / "figure.svg")]) == 0
    check(capsys.readouterr().out)
    assert "\x1b" not in (tmp_path / "figure.svg").read_text(encoding="utf-8")


def test_what_a_run_tells(capsys: pytest.CaptureFixture[str]) -> None:
    for quiet in (True, False):
        Screen(quiet=quiet, to_stderr=False).notice(NAME)
    said = capsys.readouterr()
    check(said.out + said.err)


def test_half_a_character_in_a_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "\udcff"
    try:
        shutil.copytree(RUNS / "factor", out)
    except OSError:
        pytest.skip(needs.ODD_NAMES)
    assert cli.main(["report", str(out)]) == 0
    save_file(llama(), tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").rename(out / "model.safetensors")
    assert (
        cli.main(["inspect", str(out / "model.safetensors"), "--num-heads", "4"]) == 2
    )  # safetensors has no such paths
    said = capsys.readouterr()
    assert r"\udcff" in said.out
    assert r"\udcff" in said.err


# --- places that cannot be written --------------------------------------------------------------------------


def commands(hostile: Path, run: Path, place: Path) -> list[list[str]]:
    return [
        ["inspect", str(hostile), "--csv", str(place.with_suffix(".csv"))],
        ["inspect", str(hostile), "--html", str(place.with_suffix(".html"))],
        ["report", str(run), "--out", str(place.with_suffix(".html"))],
        ["report", str(run), "--figure", str(place.with_suffix(".svg"))],
    ]


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("kind", ["missing", "directory", "full", "long"])
def test_the_message_names_the_path_and_nothing_is_left(
    kind: str,
    number: int,
    hostile: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if kind == "full" and needs.full_disk.args[0]:
        pytest.skip(needs.FULL_DISK)
    run = shutil.copytree(RUNS / "factor", tmp_path / "run")
    there = tmp_path / "there"
    there.mkdir()
    name = {"missing": "missing/out", "long": "x" * 300}.get(kind, "out")
    command = commands(hostile, run, there / name)[number]
    out = Path(command[-1])
    if kind == "directory":
        out.mkdir()
    elif kind == "full":
        out.write_text("what was there")
        monkeypatch.setattr(files, "fresh", lambda part: open("/dev/full", "wb"))  # noqa: SIM115 - the caller closes it
    assert cli.main(command) == 2
    said = capsys.readouterr().err
    assert str(out) in said
    assert said.count("\n") == 1
    assert [path.name for path in there.rglob("*")] == ([out.name] if kind in ("directory", "full") else [])
    if kind == "full":
        assert out.read_text() == "what was there"
        assert "disk is full" in said


@pytest.mark.parametrize("place", ["", ".", "a\0b", "/"])
@pytest.mark.parametrize("option", ["--csv", "--html", "--out"])
def test_a_place_that_is_no_name_of_a_file(
    option: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file(llama(), tmp_path / "model.safetensors")
    shutil.copytree(RUNS / "factor", tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    what = ["report", "run"] if option == "--out" else ["inspect", "model.safetensors", "--num-heads", "4"]
    before = sorted(tmp_path.rglob("*"))
    assert cli.main([*what, option, place]) == 2
    said = capsys.readouterr().err
    assert said.startswith("rankdecay: error: ")
    assert said.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("number", ["²", "١", "9" * 5000, "-1"])
def test_a_number_of_names_that_is_none(number: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file(llama(), tmp_path / "model.safetensors")
    names = f"query=q_proj,key=k_proj,num_heads={number}"
    assert cli.main(["inspect", str(tmp_path), "--names", names]) == 2
    assert "must be a whole number" in capsys.readouterr().err


def test_a_run_that_cannot_write_its_page_names_it(tmp_path: Path) -> None:
    run = shutil.copytree(RUNS / "factor", tmp_path / "run")
    (run / "report.html").mkdir()
    with pytest.raises((OSError, SettingError), match=r"report\.html"):
        experiment.write_report(run)
