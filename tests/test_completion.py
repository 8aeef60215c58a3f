"""Completion of the command line, in the shells themselves, and that it knows every option there is."""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rankdecay.cli import _commands, main
from rankdecay.completion import SHELLS, of_settings
from rankdecay.lab import experiment
from rankdecay.lab.settings import Report
from tests import needs
from tests.waiting import HANG

#: What is typed, and what must and must not be offered for it.
TYPED = [
    ("rankdecay ins", {"inspect"}, {"grok"}),
    ("rankdecay --vers", {"--version"}, {"--help"}),
    ("rankdecay --completion ", set(SHELLS), {"inspect"}),
    ("rankdecay grok --qk-norm ", {"head", "width", "none"}, {"--steps"}),
    ("rankdecay inspect --num", {"--num-heads"}, {"--names"}),
    ("rankdecay compress --head", {"--head-dim"}, {"--heads"}),
    ("rankdecay report --fig", {"--figure"}, {"--out"}),
    ("rankdecay vision --lib", {"--library"}, {"--size"}),
    ("rankdecay inspect che", {"checkpoint.pt"}, {"text.txt", "inspect"}),
]


def shell(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        pytest.skip(needs.SHELL.format(name))
    return path


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the script of each shell, and two files to be completed."""
    folder = tmp_path_factory.mktemp("completion")
    for name in SHELLS:
        done = subprocess.run(
            [sys.executable, "-m", "rankdecay.cli", "--completion", name],
            capture_output=True, text=True, check=True, timeout=HANG,
        )  # fmt: skip
        (folder / f"script.{name}").write_text(done.stdout)
        assert done.stderr == ""
    (folder / "checkpoint.pt").write_text("")
    (folder / "text.txt").write_text("")
    return folder


def offered(name: str, program: str, typed: str, folder: Path) -> set[str]:
    """Return what a shell offers for what is typed."""
    if name == "fish":
        code = f"source script.fish; complete -C '{typed}'"
        environment = os.environ | {"HOME": str(folder), "XDG_CONFIG_HOME": str(folder)}
        out = subprocess.run(
            [program, "--no-config", "-c", code], cwd=folder, env=environment, capture_output=True, text=True,
            check=True, timeout=HANG,
        ).stdout  # fmt: skip
        return {line.partition("\t")[0] for line in out.splitlines()}
    words = typed.split(" ")
    code = f"""
source script.bash
COMP_WORDS=({" ".join(repr(word) for word in words)}); COMP_CWORD={len(words) - 1}
_rankdecay
((${{#COMPREPLY[@]}})) || COMPREPLY=($(compgen -f -- {words[-1]!r}))  # what `-o default` does
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    out = subprocess.run([program, "--norc", "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    return set(out.stdout.split())


@pytest.mark.parametrize("name", ["bash", "fish"])
def test_a_shell_offers_commands_options_values_and_files(name: str, scripts: Path) -> None:
    program = shell(name)
    for typed, wanted, unwanted in TYPED:
        found = offered(name, program, typed, scripts)
        assert wanted <= found, (typed, found)
        assert not unwanted & found, (typed, found)


def test_zsh_completes_what_is_typed(scripts: Path) -> None:
    """zsh completes at its prompt alone: a terminal, keys, and what it echoes."""
    program = shell("zsh")
    process, terminal = pty.fork()
    if process == 0:
        os.chdir(scripts)
        os.environ.update(TERM="dumb", PS1="ready> ", HOME=str(scripts), COLUMNS="300")
        os.execv(program, ["zsh", "-f", "-i"])
    said = ""

    def until(pattern: str) -> None:
        nonlocal said
        end = time.monotonic() + HANG
        while not re.search(pattern, said):
            assert time.monotonic() < end, said
            if select.select([terminal], [], [], 1.0)[0]:
                said += os.read(terminal, 4096).decode(errors="replace")

    try:
        until("ready> ")
        os.write(terminal, b"autoload -U compinit; compinit -u -d dump; source script.zsh; print lo'aded'\n")
        until("\nloaded")
        for typed, wanted in [
            ("rankdecay ins", "rankdecay inspect "),
            ("rankdecay inspect --num", "--num-heads"),
            ("rankdecay grok --qk-norm wi", "--qk-norm width"),
            ("rankdecay inspect che", "inspect checkpoint.pt"),
        ]:
            said = ""
            os.write(terminal, typed.encode() + b"\t")
            until(re.escape(wanted))
            os.write(terminal, b"\x15\n")  # the line is emptied
    finally:
        os.write(terminal, b"\x15exit\n")
        os.close(terminal)
        os.waitpid(process, 0)


@pytest.mark.parametrize("name", [*experiment.names(), "report"])
def test_the_options_are_those_of_the_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([name, "--help"])
    shown = re.findall(r"^[│ ]*(?:-h, )?(--[a-z][\w-]*)", capsys.readouterr().out, re.MULTILINE)
    options = of_settings(Report if name == "report" else type(next(iter(experiment.presets(name).values()))))
    assert {option.name for option in options} == {*shown, "--help"}
    assert all(option.text for option in options)


def test_every_command_is_in_every_script(scripts: Path) -> None:
    for name in SHELLS:
        text = (scripts / f"script.{name}").read_text()
        assert all(command in text for command in _commands())


def test_an_unknown_shell_is_answered_with_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    for given in (["--completion", "tcsh"], ["--completion"], ["--completion=tcsh"]):
        assert main(given) == 2
        assert "bash, zsh, fish" in capsys.readouterr().err


def test_a_script_is_made_without_torch_or_an_extra() -> None:
    code = (
        "import sys\nfrom rankdecay import cli\ncli.main(['--completion', 'zsh'])\n"
        "heavy = {'torch', 'numpy', 'tyro', 'rich', 'plotly', 'matplotlib', 'scipy'} & set(sys.modules)\n"
        "sys.exit(', '.join(sorted(heavy)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=HANG)
    assert done.returncode == 0, done.stderr
