"""The library's command line: help, version, and what cannot be read. Its `inspect` is in test_cli_inspect.py."""

import subprocess
import sys

import pytest

from rankdecay.cli import _lab_commands, main
from tests.waiting import HANG


def refused(capsys, arguments: list[str]) -> str:
    """Runs a command that must be refused with exit code 2 and one line; returns the line."""
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("rankdecay: error: ")
    return line


def test_help_lists_every_command(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: rankdecay COMMAND [options]")
    listed = [
        line.split()[0]
        for line in out.partition("exit codes:")[0].splitlines()
        if line.startswith("  ") and line[2] not in " -"
    ]
    assert listed == ["inspect", "compress", "These", *_lab_commands()]
    assert "pip install 'rankdecay[lab]'" in out


def test_no_command_shows_the_help_and_fails(capsys):
    assert main([]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("usage: rankdecay COMMAND [options]")


@pytest.mark.parametrize(
    "arguments", [[], ["--help"], ["--version"], ["inspect", "--help"], ["compress", "--help"]], ids=" ".join
)
def test_an_answer_about_the_command_itself_loads_neither_torch_nor_an_extra(arguments):
    code = (
        "import sys\nfrom rankdecay import cli\n"
        "try:\n    cli.main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'numpy', 'tyro', 'rich', 'plotly', 'matplotlib', 'scipy'} & set(sys.modules)\n"
        "print(sorted(heavy), file=sys.stderr)\nsys.exit(bool(heavy))"
    )
    call = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(call, capture_output=True, text=True, check=False, timeout=HANG)
    assert done.returncode == 0, done.stderr


def test_the_version_is_that_of_the_installed_package(capsys):
    from importlib.metadata import version

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"rankdecay {version('rankdecay')}\n"


def test_inspect_explains_every_option(capsys):
    with pytest.raises(SystemExit) as leaving:
        main(["inspect", "--help"])
    assert not leaving.value.code
    out = capsys.readouterr().out
    for option in ("--json", "--csv", "--html", "--compare", "--layers", "--heads", "--num-heads", "--names"):
        assert option in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("grokk", ["unknown command 'grokk'", "did you mean 'grok'?", "rankdecay --help"]),
        ("zzz", ["unknown command 'zzz'", "rankdecay --help"]),
        ("--versoin", ["unknown option '--versoin'", "did you mean '--version'?"]),
        ("inspect", ["needs the PATH", "rankdecay inspect model", "rankdecay inspect --help"]),
        ("compress", ["needs the PATH", "--head-dim 64 --out smaller", "--dry-run", "rankdecay compress --help"]),
        ("inspect --json", ["PATH", "rankdecay inspect --help"]),
        ("inspect a --open", ["--open", "--html page.html"]),
        ("inspect a b", ["unknown argument 'b'", "rankdecay inspect --help"]),
        ("inspect a --jsn", ["unknown argument '--jsn'", "did you mean '--json'?"]),
        ("inspect a --num-head=4", ["unknown argument '--num-head=4'", "did you mean '--num-heads'?"]),
        ("inspect a --layers one", ["--layers", "'one'", "rankdecay inspect --help"]),
        ("inspect a --html", ["--html", "rankdecay inspect --help"]),
    ],
)
def test_what_cannot_be_read_is_one_line_with_a_remedy(arguments, words, capsys):
    line = refused(capsys, arguments.split())
    assert all(word in line for word in words), line
