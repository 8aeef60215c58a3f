"""`rankdecay report` of sweeps, as a user meets it."""

import json

import pytest

from rankdecay import cli


def _refused(capsys, *arguments):
    assert cli.main(["report", *map(str, arguments)]) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert captured.out == ""
    return line


def test_one_directory_gets_its_page(make_sweep, capsys):
    directory = make_sweep(["prox"])
    assert cli.main(["report", str(directory)]) == 0
    assert capsys.readouterr().out.strip() == str(directory / "report.html")


def test_several_directories_get_one_page_here_or_where_asked(make_sweep, tmp_path, monkeypatch, capsys):
    first, second = make_sweep(["prox"], name="a"), make_sweep(["l2"], name="b")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["report", str(first), str(second)]) == 0
    assert capsys.readouterr().out.strip() == "merged-report.html"
    assert cli.main(["report", str(first), str(second), "--out", "other.html"]) == 0
    assert (tmp_path / "other.html").read_bytes() == (tmp_path / "merged-report.html").read_bytes()
    assert not (first / "report.html").exists()


def test_a_merged_figure(make_sweep, tmp_path):
    first, second = make_sweep(["prox"], name="a"), make_sweep(["l2"], name="b")
    assert cli.main(["report", str(first), str(second), "--figure", str(tmp_path / "figure.pdf")]) == 0
    assert (tmp_path / "figure.pdf").read_bytes().startswith(b"%PDF")


def test_what_cannot_be_merged_is_one_line(make_sweep, tmp_path, capsys):
    first, second = make_sweep(["prox"], name="a"), make_sweep(["l2"], name="b", settings={"steps": 9})
    assert _refused(capsys, first, second).startswith("rankdecay: error: steps is 4000 in")
    (tmp_path / "config.json").write_text(json.dumps({"command": "grok"}))
    assert "is a run of 'grok', not of 'boundary': report it by itself" in _refused(capsys, first, tmp_path)
    assert not list(tmp_path.glob("*.html"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--figure", "figure.bmp"], ".png, .svg or .pdf"),
        (["--figure", "figure.svg", "--out", "page.html"], "give one of them"),
        (["--out", "nowhere/page.html"], "nowhere/page.html cannot be written"),
        (["--out", "."], "--out . is a directory: give a file"),
        (["--figure", "nowhere/figure.svg"], "nowhere/figure.svg cannot be written"),
    ],
)
def test_where_it_cannot_be_written(make_sweep, tmp_path, monkeypatch, capsys, options, words):
    monkeypatch.chdir(tmp_path)
    assert words in _refused(capsys, make_sweep(["prox"]), *options)
