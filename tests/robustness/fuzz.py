"""Damaged checkpoints and run directories, given to every command that reads them: no traceback, no wait, no flood.

    python -m tests.robustness.fuzz --cases 10000

Case N of a seed is always the same. ``--only N`` runs one and shows what it was and what came of it; ``--keep`` leaves
its files.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import gc
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from random import Random
from typing import NamedTuple

import torch

from rankdecay.files import PARTIAL
from tests.robustness import damage
from tests.robustness.forked import SECONDS, Ended, forked
from tests.robustness.samples import Sample, samples

#: What a terminal would obey, or take for another line.
CONTROL = re.compile(rb"[\x00-\x08\x0b-\x1f\x7f]|\xc2[\x80-\x9f]|\xe2\x80[\xaa-\xae]|\xe2\x81[\xa6-\xa9]")


class Case(NamedTuple):
    """One case: what was damaged how, and the command.

    Attributes:
        number: of the case, which with the seed decides the rest.
        sample: its name.
        said: what was damaged.
        command: the command line, in a directory that stands there as ``CASE``.
    """

    number: int
    sample: str
    said: tuple[str, ...]
    command: tuple[str, ...]


class Finding(NamedTuple):
    """What is wrong with the end of a case: its kind, and the last lines of what was said."""

    kind: str
    text: str


class Fuzzer:
    """Makes cases from a seed, and runs them.

    Args:
        where: directory for the samples and the copies.
        seed: of all cases.
        seconds: after which a case is ended.
    """

    def __init__(self, where: Path, seed: int = 0, seconds: float = SECONDS) -> None:
        self.seed, self.seconds = seed, seconds
        self._samples = samples(where / "samples")
        self._where = where / "cases"
        self._where.mkdir()
        warm(self._samples, where)

    def case(self, number: int) -> tuple[Case, Path]:
        """Make a case: a damaged copy, and the command."""
        rng = Random(f"{self.seed}:{number}")
        run = rng.random() < 0.45
        sample = rng.choice([sample for sample in self._samples if bool(sample.again) == run])
        root = self._where / str(number)
        shutil.copytree(sample.root, root, symlinks=True)
        damages = damage.OF_RUNS if sample.again else damage.OF_CHECKPOINTS
        said: list[str] = []
        for _ in range(rng.choice([1, 1, 1, 2, 3])):
            for _ in range(20):
                with contextlib.suppress(
                    OSError, ValueError, RecursionError
                ):  # of a file that an earlier damage left empty, say
                    if text := rng.choice(damages)(rng, root):
                        said.append(text)
                        break
        command = of_run(rng, sample, root) if sample.again else of_checkpoint(rng, root / sample.given, root)
        shown = tuple(word.replace(str(root), "CASE") for word in command)
        return Case(number, sample.name, tuple(said), shown), root

    def run(self, number: int, keep: bool = False) -> tuple[Case, Ended, Finding | None]:
        """Run a case and judge it."""
        case, root = self.case(number)
        before = _contents(root)
        command = [word.replace("CASE", str(root)) for word in case.command]
        ended = forked(lambda: run_command(command), self.seconds)
        finding = judge(case, ended, before, _contents(root), root)
        if not keep:
            shutil.rmtree(root)
        return case, ended, finding


def warm(made: list[Sample], where: Path) -> None:
    """Import what commands import, so that no child has to."""
    torch.set_num_threads(1)
    import matplotlib.figure  # noqa: F401
    import plotly.offline

    from rankdecay import cli
    from rankdecay.lab.report import page, run_page  # noqa: F401

    plotly.offline.get_plotlyjs()
    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing), contextlib.redirect_stderr(nothing):
        for sample in made:
            if sample.again:
                copy = where / "warm" / sample.name
                shutil.copytree(sample.root, copy)
                cli.main(["report", str(copy / "run")])
                cli.main(["report", str(copy / "run"), "--figure", str(copy / "figure.svg")])
                cli.main(_again(sample, copy))
            else:
                cli.main(["inspect", str(sample.root / sample.given), "--json"])
    gc.collect()
    gc.freeze()  # a collection in a child would copy every page that it looks at


def run_command(command: list[str]) -> int:
    """Run a command as the console script would."""
    from rankdecay import cli

    return cli.main(command)


def of_checkpoint(rng: Random, given: Path, root: Path) -> list[str]:
    """Return a command that reads a checkpoint."""
    more = rng.choice(
        [
            [],
            [],
            ["--json"],
            ["--list"],
            ["--csv", f"{root}/out.csv"],
            ["--html", f"{root}/out.html"],
            ["--state", "model"],
            ["--num-heads", "4"],
            ["--list", "--num-heads", "4"],
            ["--compare", str(given)],
            ["--state", "model", "--csv", f"{root}/out.csv"],
        ]
    )
    return ["inspect", str(given), *more]


def of_run(rng: Random, sample: Sample, root: Path) -> list[str]:
    """Return a command that reads a run directory, or continues it."""
    out = str(root / sample.given)
    kind = rng.choice(["report", "report", "report", "figure", "inspect", "again", "again", "out"])
    if kind == "figure":
        return ["report", out, "--figure", str(root / "figure.svg")]
    if kind == "out":
        return ["report", out, "--out", str(root / "page.html")]
    if kind == "again":
        return _again(sample, root)
    return [kind, out]


def _again(sample: Sample, root: Path) -> list[str]:
    """Return the command that wrote a run directory, for a copy of it."""
    places = {"OUT": str(root / sample.given), "TEXT": str(root / "text.txt")}
    return [places.get(word, word) for word in sample.again]


def judge(case: Case, ended: Ended, before: dict[str, object], after: dict[str, object], root: Path) -> Finding | None:
    """Return what is wrong with how a case ended; None if nothing is."""
    tail = ended.err.decode("utf-8", "replace")
    if ended.how != "exit":
        return Finding(ended.how, tail)
    if ended.code not in (0, 2, 3):
        return Finding("code", f"{ended.code}: {tail}")
    if b"Traceback (most recent call last)" in ended.err:
        return Finding("raised", tail)
    if CONTROL.search(ended.out.replace(b"\n", b"")) or CONTROL.search(ended.err.replace(b"\n", b"")):
        return Finding("control", repr((ended.out + ended.err)[-1500:]))
    if ended.code == 2:
        last = [line for line in tail.splitlines() if line.startswith("rankdecay: error:")]
        if len(last) != 1 or not tail.rstrip("\n").splitlines()[-1].startswith("rankdecay: error:"):
            return Finding("lines", tail)
        # a short part of the path is enough: long messages may be about a file by its name alone
        if not any(name in last[0] for name in (str(root), *(Path(name).name for name in before), "/run")):
            return Finding("unnamed", tail)
    if left := sorted(name for name in after if name not in before and name.endswith(PARTIAL)):
        return Finding("left", f"{left}: {tail}")
    if case.command[0] == "inspect":
        new = {f"{name}" for name in after if after[name] != before.get(name)} - {"out.csv", "out.html"}
        if new:
            return Finding("touched", f"{new}")
    return None


def _contents(root: Path) -> dict[str, object]:
    """Return size and time of every file below a directory."""
    found: dict[str, object] = {}
    for folder, _, names in os.walk(root):
        for name in names:
            stat = os.lstat(os.path.join(folder, name))
            found[os.path.relpath(os.path.join(folder, name), root)] = (stat.st_mode, stat.st_size, stat.st_mtime_ns)
    return found


def report(fuzzer: Fuzzer, numbers: range, most: int) -> int:
    """Run cases, print the findings as they come and the counts at the end, and return the exit code."""
    counts: collections.Counter[str] = collections.Counter()
    signs: collections.Counter[str] = collections.Counter()
    start, slowest, largest = time.monotonic(), 0.0, 0
    try:
        for case, ended, finding in map(fuzzer.run, numbers):
            kind = finding.kind if finding else {0: "result", 2: "refused", 3: "result"}[ended.code]
            counts[kind] += 1
            slowest, largest = max(slowest, ended.seconds), max(largest, ended.grown)
            if finding is None:
                continue
            last = (finding.text.strip().splitlines() or [""])[-1]
            where = (re.findall(r'File "[^"]*?/(?:src/)?(rankdecay/[^"]+)", line (\d+)', finding.text) or [("", "")])[
                -1
            ]
            sign = f"{kind} {':'.join(where)} {re.sub(r'[0-9]+', '#', last)[:90]}"
            signs[sign] += 1
            if signs[sign] <= most:
                print(f"{kind}: {case}\n    {last[:250]} {':'.join(where)}", flush=True)
    finally:
        counted = ", ".join(f"{count} {kind}" for kind, count in counts.most_common())
        print(f"{sum(counts.values())} cases in {time.monotonic() - start:.0f} s: {counted}")
        print(f"slowest {slowest:.1f} s, largest {largest / 2**20:.0f} MiB")
        for sign, count in signs.most_common(60):
            print(f"{count:5d} {sign}")
    return int(bool(set(counts) - {"result", "refused"}))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=SECONDS)
    parser.add_argument("--only", type=int)
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--show", type=int, default=3, help="findings of a kind that are shown whole")
    given = parser.parse_args()
    where = Path(tempfile.mkdtemp(prefix="fuzz-"))
    try:
        fuzzer = Fuzzer(where, given.seed, given.seconds)
        if given.only is not None:
            case, ended, finding = fuzzer.run(given.only, given.keep)
            print(case, f"in {where}" if given.keep else "")
            print(ended.how, ended.code, f"{ended.seconds:.2f} s, {ended.grown / 2**20:.0f} MiB")
            print(
                ended.out.decode("utf-8", "replace")[:2000],
                ended.err.decode("utf-8", "replace")[-6000:],
                finding,
                sep="\n---\n",
            )
            return int(finding is not None)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        return report(fuzzer, range(given.start, given.start + given.cases), given.show)
    finally:
        if not given.keep:
            shutil.rmtree(where, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
