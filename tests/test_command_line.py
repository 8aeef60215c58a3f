"""What is the same for every command: examples in the help, exit codes, pages that open, colours, Ctrl-C, progress."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import webbrowser
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest

from rankdecay import cli
from rankdecay.browser import show_page
from rankdecay.commands.compress import COMPRESS_EXAMPLES
from rankdecay.commands.inspect import INSPECT_EXAMPLES
from tests import needs
from tests.compress.small import saved, text_tokenizer
from tests.terminal import in_a_terminal
from tests.waiting import HANG, until

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "command-line.md"
TINY_FACTOR = ["factor", "--seeds", "2", "--steps", "40", "--strengths", "0", "--out", "run"]
EXAMPLES = [*INSPECT_EXAMPLES, *COMPRESS_EXAMPLES]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that has what the examples name."""
    torch = needs.package("torch")
    needs.package("transformers")
    folder = tmp_path_factory.mktemp("here")
    for seed, name in enumerate(("model", "first", "second", "last")):
        saved(folder / name, seed=seed)
    text_tokenizer(folder / "model")
    (folder / "text.txt").write_text(" ".join(f"w{3 + i * i % 40}" for i in range(1024)))
    weights = {f"layers.0.self_attn.{name}_proj.weight": torch.randn(16, 16) for name in "qkvo"}
    torch.save(weights, folder / "weights.pt")
    stored = Path(__file__).parents[1] / "docs" / "data" / "grok_default"
    (folder / "runs").mkdir()
    (folder / "runs" / "grok").symlink_to(stored)
    return folder


# --- help, examples, exit codes ---


@pytest.mark.parametrize("line", EXAMPLES)
def test_an_example_of_the_help_runs(
    line: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    opened: list[Path] = []
    monkeypatch.setattr("rankdecay.commands.inspect.show_page", opened.append)
    monkeypatch.chdir(here)
    program, *arguments = shlex.split(line)
    assert program == "rankdecay"
    assert cli.main(arguments) == 0
    said = capsys.readouterr()
    assert said.out
    assert "Traceback" not in said.err
    assert opened == ([Path("model.html")] if "--open" in line else [])


@pytest.mark.parametrize("command", ["inspect", "compress", "factor", "report"])
def test_the_help_ends_with_its_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    shown = capsys.readouterr().out.partition("\nexamples:\n")[2]
    assert f"\n  rankdecay {command} " in f"\n{shown}"


def test_exit_codes_are_in_the_help_and_on_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    rows = dict(re.findall(r"^\| (\d+) \| (.*) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE))
    assert rows == {str(code): meaning for code, meaning in cli.EXIT_CODES.items()}
    for code, meaning in cli.EXIT_CODES.items():
        assert re.search(rf"^  {code} +{re.escape(meaning)}$", shown, re.MULTILINE)


# --- pages ---


@pytest.fixture
def browser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A browser that writes down what it is asked to open."""
    record = tmp_path / "opened.txt"
    program = tmp_path / "browser.py"
    program.write_text(f"import sys\nopen({str(record)!r}, 'a').write(sys.argv[1] + '\\n')\n")
    monkeypatch.setenv("BROWSER", f"{sys.executable} {program} %s")
    monkeypatch.setattr(webbrowser, "_tryorder", None)  # what it found before is forgotten
    return record


def opened(record: Path) -> list[Path]:
    """Return the files that the browser was asked for."""
    if not record.exists():
        return []
    return [Path(unquote(urlparse(line).path)) for line in record.read_text().splitlines()]


def test_pages_open_in_the_browser_when_asked(
    here: Path, browser: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(TINY_FACTOR) == 0
    assert "run/report.html  is the page to open (--open does)" in capsys.readouterr().out
    assert opened(browser) == []
    assert cli.main([*TINY_FACTOR, "--open", "--json"]) == 0
    assert cli.main(["report", "run", "--open", "--out", "other page.html"]) == 0
    assert cli.main(["inspect", str(here / "model"), "--html", "model.html", "--open"]) == 0
    pages = ["run/report.html", "other page.html", "model.html"]
    assert opened(browser) == [tmp_path.resolve() / page for page in pages]
    assert cli.main(["report", "run", "--figure", "figure.svg", "--open"]) == 2
    assert "--figure" in capsys.readouterr().err


def test_a_machine_without_a_browser_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(webbrowser, "open", lambda address: False)
    show_page(tmp_path / "page.html")
    assert "no browser could be started: open" in capsys.readouterr().err


# --- colours ---

_SEQUENCE = re.compile(r"\x1b\[([\d;]*)m")


def colours(text: str) -> set[str]:
    """Return the escape sequences of a text that set a colour; bold and dim are none."""
    codes = {code for codes in _SEQUENCE.findall(text) for code in codes.split(";") if code}
    return {code for code in codes if int(code) >= 30}


@pytest.mark.parametrize("arguments", [["factor", "--help"], TINY_FACTOR], ids=["help", "run"])
def test_colours_are_for_a_terminal_that_wants_them(arguments: list[str], tmp_path: Path) -> None:
    assert colours(in_a_terminal(*arguments, cwd=tmp_path, environment={}))
    other = [*arguments[:-1], "plain"] if "--out" in arguments else arguments
    assert not colours(in_a_terminal(*other, cwd=tmp_path, environment={"NO_COLOR": "1"}))


def test_a_pipe_gets_no_escape_sequence(tmp_path: Path) -> None:
    wanted = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
    for arguments in (["factor", "--help"], ["factor", "--stps", "3"], TINY_FACTOR):
        done = subprocess.run(
            [sys.executable, "-m", "rankdecay", *arguments],
            cwd=tmp_path, env=wanted | {"TERM": "xterm-256color"}, capture_output=True, text=True, timeout=HANG,
            check=False,
        )  # fmt: skip
        assert "\x1b" not in done.stdout + done.stderr
        assert done.stdout or done.returncode == 2


@pytest.mark.parametrize(("stream", "said"), [(1, ""), (2, "rankdecay 0")])
def test_a_stream_that_is_closed_is_nothing_to_fail_on(stream: int, said: str) -> None:
    done = subprocess.run(
        ["sh", "-c", f'"$0" -m rankdecay.cli --version {stream}>&-', sys.executable],
        capture_output=True, text=True, timeout=HANG, check=False,
    )  # fmt: skip
    assert done.returncode == 0
    assert done.stdout.startswith(said)
    assert done.stderr == ""


# --- Ctrl-C and progress ---

_HELD = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
def hold(event, arguments):
    if event == "open" and {name!r} in str(arguments[0]) and not os.path.exists({ready!r}):
        open({ready!r}, "w").close()
        time.sleep({longest})
from rankdecay.cli import console
import rankdecay.inspection, rankdecay.compress
sys.addaudithook(hold)
console()
"""


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["inspect", "model"], "model/config.json"),
        (["compress", "model", "--head-dim", "8", "--out", "small er"], "small er.rankdecay-"),
    ],
    ids=["inspect", "compress"],
)
def test_ctrl_c_says_how_to_go_on(arguments: list[str], name: str, here: Path, tmp_path: Path) -> None:
    (tmp_path / "model").symlink_to(here / "model")
    ready = tmp_path / "ready"
    code = _HELD.format(name=name, ready=str(ready), longest=HANG)
    with subprocess.Popen(
        [sys.executable, "-c", code, *arguments], cwd=tmp_path, stderr=subprocess.PIPE, text=True
    ) as process:
        until(ready.exists, process)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=HANG)
    assert process.returncode == 130, error
    assert f"rankdecay: interrupted; to start over, run: {shlex.join(['rankdecay', *arguments])}" in error
    assert "Traceback" not in error
    assert {path.name for path in tmp_path.iterdir()} == {"model", "ready"}


def test_a_long_inspection_says_how_much_is_left(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("rankdecay.commands.progress.PATIENCE", 0.0)
    assert cli.main(["inspect", str(here / "model")]) == 0
    said = capsys.readouterr().err
    assert re.search(r"model: 1 of 2 layers, .*ETA ", said)
    assert cli.main(["inspect", str(here / "model"), "--quiet"]) == 0
    assert capsys.readouterr().err == ""
