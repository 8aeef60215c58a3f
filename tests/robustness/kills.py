"""Commands that are killed before a chosen file operation, and run again: the result is that of one which was not.

    python -m tests.robustness.kills --kills 200

Kill N of a seed is always the same, but for threads that take turns as the machine has it. A third of the kills leaves
a line of the metrics torn, and a quarter is followed by a second kill of the run that continues.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import torch

from tests.comparing import timeless
from tests.robustness.forked import Ended, forked
from tests.robustness.fuzz import run_command
from tests.robustness.samples import RUNS, llama

WRITING = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"}
TINY = "--device cpu --precision float32 --quiet"
SESSION = "--width 8 --heads 2 --steps 4 --warmup 1 --evaluate-every 2 --arms l2 --strengths l2=0.1 --batch-size 8"
# ruff: noqa: E501 - command lines
#: Every command that writes; ``OUT`` is the directory that is compared.
COMMANDS: dict[str, str] = {
    "grok": f"grok --task add --modulus 5 --steps 4 --evaluate-every 2 --seeds 1 --batch-size 8 --width 8 --arms none low_rank "
    f"{TINY} --out OUT/run",
    "boundary": "boundary --task subtract --modulus 5 --arms none l2 --strengths l2=1 --fractions 0.5 --seeds 2 --steps 20 "
    f"--evaluate-every 10 --batch-size 8 --width 8 --mlp-width 8 {TINY} --out OUT/run",
    "factor": "factor --seeds 1 --steps 20 --strengths 0.1 --device cpu --quiet --out OUT/run",
    "margin": "margin --datasets 1 --steps 100 --dimension 4 --parametrisation merged --margin 10 --device cpu --quiet "
    "--out OUT/run",
    "recall": f"recall --pairs 3 --queries 2 --keys 4 --values 4 --valid-sequences 16 --qk-norm off {SESSION} {TINY} --out OUT/run",
    "language": f"language --text TEXT --depth 1 --mlp-width 8 --context 8 --valid-windows 2 {SESSION} {TINY} --out OUT/run",
    "vision": f"vision --depth 1 --mlp-width 8 {SESSION} {TINY} --out OUT/run",
    "report": "report OUT/run",
    "page": "report OUT/run --out OUT/page.html",
    "figure": "report OUT/run --figure OUT/figure.svg",
    "csv": "inspect OUT/model.safetensors --num-heads 4 --csv OUT/rows.csv",
    "html": "inspect OUT/model.safetensors --num-heads 4 --html OUT/page.html",
}
ON_TWO = ("boundary", "grok")  # that train in a thread per core


class Killed(NamedTuple):
    """One kill: the command, the operation it came before, and what came after; ``wrong`` is empty if all is well."""

    number: int
    name: str
    fatal: tuple[int, ...]
    wrong: str


class Kills:
    """Runs every command once, and then with kills.

    Args:
        where: directory of everything.
        seed: of all kills.
    """

    def __init__(self, where: Path, seed: int = 0) -> None:
        torch.set_num_threads(1)
        self._where, self._seed = where, seed
        self._whole: dict[str, tuple[int, dict[str, Any]]] = {}
        for name in COMMANDS:  # here, so that no child has to import anything
            out = self._prepared(name, f"first-{name}")
            with (
                open(os.devnull, "w") as nothing,
                contextlib.redirect_stdout(nothing),
                contextlib.redirect_stderr(nothing),
            ):
                assert run_command(self._command(name, out)) == 0, name
            shutil.rmtree(out)

    def kill(self, number: int) -> Killed:
        """Kill a command, run it again, and compare."""
        rng = Random(f"{self._seed}:{number}")
        name = list(COMMANDS)[number % len(COMMANDS)]
        threads = 2 if name in ON_TWO and rng.random() < 0.5 else 1
        operations, expected = self._uninterrupted(name)
        out = self._prepared(name, str(number))
        fatal = [rng.randrange(1, operations + 1)]
        if rng.random() < 0.25:
            fatal.append(rng.randrange(1, operations + 1))
        torn = rng.random() < 1 / 3
        for operation in fatal:
            ended = self._run(name, out, threads, operation, torn)
            if not (ended.how == "signal" and ended.code == signal.SIGKILL) and not (
                ended.how == "exit" and ended.code == 0
            ):
                return Killed(number, name, tuple(fatal), f"killed: {ended.how} {ended.code} {ended.err[-500:]!r}")
        ended = self._run(name, out, threads)
        if ended.how != "exit" or ended.code:
            return Killed(number, name, tuple(fatal), f"again: {ended.how} {ended.code} {ended.err[-500:]!r}")
        found = contents(out)
        wrong = "" if found == expected else difference(expected, found)
        shutil.rmtree(out)
        return Killed(number, name, tuple(fatal), wrong)

    def _uninterrupted(self, name: str) -> tuple[int, dict[str, Any]]:
        """The number of file operations of a command, and what it leaves."""
        if name not in self._whole:
            out = self._prepared(name, f"whole-{name}")
            counted = self._where / f"count-{name}"
            ended = forked(lambda: counting(out, lambda: run_command(self._command(name, out)), counted))
            assert (ended.how, ended.code) == ("exit", 0), ended
            self._whole[name] = int(counted.read_text()), contents(out)
        return self._whole[name]

    def _run(self, name: str, out: Path, threads: int, fatal: int = 0, torn: bool = False) -> Ended:
        def act() -> int:
            torch.set_num_threads(threads)
            if fatal:
                sys.addaudithook(killer(out, fatal, torn))
            return run_command(self._command(name, out))

        return forked(act)

    def _command(self, name: str, out: Path) -> list[str]:
        return [word.replace("OUT", str(out)).replace("TEXT", str(out / "text.txt")) for word in COMMANDS[name].split()]

    def _prepared(self, name: str, place: str) -> Path:
        out = self._where / place / "out"  # the last name is in pages
        out.mkdir(parents=True)
        if name in ("report", "page", "figure"):
            shutil.copytree(RUNS / "factor", out / "run")
        elif name in ("csv", "html"):
            from safetensors.torch import save_file

            save_file(llama(), out / "model.safetensors")
        else:
            shutil.copy(RUNS / "text.txt", out / "text.txt")
        return out


def is_writing(event: str, arguments: tuple[Any, ...], out: Path) -> bool:
    """Whether an audit event is a file operation in a directory that changes something."""
    if event not in WRITING or not str(arguments[0]).startswith(str(out)):
        return False
    if event == "open":
        mode, flags = arguments[1], arguments[2]
        return bool(flags & (os.O_WRONLY | os.O_RDWR)) if isinstance(flags, int) else mode not in (None, "r", "rb")
    return True


def killer(out: Path, fatal: int, torn: bool) -> Callable[[str, tuple[Any, ...]], None]:
    """Return an audit hook that kills this process before an operation, perhaps with a torn line of the metrics."""
    count = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if count < 0 or not is_writing(event, arguments, out):
            return
        count += 1
        if count == fatal:
            count = -1
            metrics = out / "run" / "metrics.jsonl"
            if torn and metrics.exists() and not (out / "run" / "summary.json").exists():
                with metrics.open("ab") as file:
                    file.write(b'{"step": 2, "arm": "no')
            os.kill(os.getpid(), signal.SIGKILL)

    return hook


def counting(out: Path, act: Callable[[], int], where: Path) -> int:
    """Run a function and write down how many file operations it took."""
    count = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        count += is_writing(event, arguments, out)

    sys.addaudithook(hook)
    code = act()
    where.write_text(str(count))
    return code


def contents(out: Path) -> dict[str, Any]:
    """Return what a command left: rows and summary without times, other files as their bytes, those of runs by name."""
    found: dict[str, Any] = {}
    for path in sorted(out.rglob("*")):
        name = str(path.relative_to(out))
        if path.name == "metrics.jsonl":
            rows = [timeless(json.loads(line)) for line in path.read_bytes().splitlines()]
            found[name] = sorted(map(json.dumps, rows))
        elif path.name == "summary.json":
            found[name] = json.dumps(timeless(json.loads(path.read_text()))).replace(str(out), "OUT")
        elif path.name == "config.json" or path.is_dir():
            found[name] = ""
        elif path.suffix in (".npz", ".html") and path.parent.name in ("run", "snapshots"):
            found[name] = ""  # times are in them
        else:
            found[name] = path.read_bytes().replace(str(out).encode(), b"OUT")
    return found


def difference(expected: dict[str, Any], found: dict[str, Any]) -> str:
    names = [name for name in {**expected, **found} if expected.get(name) != found.get(name)]
    return f"differ: {names[:5]}; {str(expected.get(names[0]))[:300]} | {str(found.get(names[0]))[:300]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=24)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    where = Path(tempfile.mkdtemp(prefix="kills-"))
    start, done, wrong = time.monotonic(), 0, 0
    try:
        kills = Kills(where, given.seed)
        for number in range(given.start, given.start + given.kills):
            killed = kills.kill(number)
            done += 1
            if killed.wrong:
                wrong += 1
                print(killed, flush=True)
    finally:
        print(f"{done} kills in {time.monotonic() - start:.0f} s: ", end="")
        print(f"{done - wrong} resumed to equal results, {wrong} did not", flush=True)
        shutil.rmtree(where, ignore_errors=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
