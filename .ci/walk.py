r"""Follow the README and the guides word by word: every block of them, unedited, from a clean clone.

    python .ci/walk.py                              # a clone, an environment made by `make`, every page
    python .ci/walk.py --venv .venv --jobs 2        # an environment that exists, in place of a new one
    python .ci/walk.py README.md docs/quickstart.md --long

Each page is walked in a clone of its own, which is the working directory, in the order of its blocks. Python blocks of
a page share an interpreter, as in a notebook; shell blocks are scripts of bash that stop at the first failure. Nothing
is reached through the network. What `rankdecay COMMAND --help` gives as examples is run as well, as the page `help`.

Every block is counted, and those that are not run are listed with the reason. A comment before a block says so, which
no reader of the page sees:

    <!-- walk: long 3 min of training -->           run with --long only
    <!-- walk: elsewhere REASON -->                 cannot run here: another machine, another package, another file
    <!-- walk: file NAME -->                        a part of a file: appended to it
    <!-- walk: printed -->                          what the block before printed, but for the last digits of numbers;
                                                    a line of … alone stands for lines that are left out

Blocks of Python (`python`) and of the shell (`sh`) are run; those of any other language are shown only.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
#: Seconds for one block, and, with ``--long``, for one of those marked so: against what hangs, not what is slow.
SECONDS, LONG_SECONDS = 1200, 3600
RUN, SHOWN = ("python", "sh"), ("text", "yaml", "toml", "diff", "json", "math")
#: The page of the examples that `rankdecay COMMAND --help` shows, and what of them takes seconds.
HELP, QUICK = "help", ("inspect", "compress", "report", "factor --seeds")
#: What the examples name, beside what the guide on compressing makes first.
NAMED = """
import shutil

for name in ("first", "second", "last"):
    model.save_pretrained(name)
torch.save({f"layers.0.self_attn.{name}_proj.weight": torch.randn(16, 16) for name in "qkvo"}, "weights.pt")
shutil.copytree("docs/data/grok_default", "runs/grok")
"""
KINDS = ("long", "elsewhere", "file", "printed")
FENCE = re.compile(
    r"(?:^<!-- walk: (?P<kind>\w+)(?P<note>.*?) -->\n)?^```(?P<language>[^\n]*)\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")


@dataclass(frozen=True)
class Block:
    """One fenced block.

    Attributes:
        line: where its code begins.
        language: ``"python"``, ``"sh"``, or that of what is shown only.
        code: as it stands on the page.
        kind: of the comment before it: one of `KINDS`, or ``""``.
        note: what the comment says more.
    """

    line: int
    language: str
    code: str
    kind: str = ""
    note: str = ""

    def runs(self, long: bool) -> bool:
        """Whether the walk runs it."""
        runnable = self.language in RUN and self.kind != "elsewhere" and (long or self.kind != "long")
        return runnable or self.kind == "file"


def blocks(text: str) -> list[Block]:
    """The fenced blocks of a page.

    Raises:
        ValueError: If one has no language, or a mark that means nothing.
    """
    found = []
    for match in FENCE.finditer(text):
        line = text.count("\n", 0, match.start("code")) + 1
        language, kind, note = match["language"].strip(), match["kind"] or "", (match["note"] or "").strip()
        if language not in RUN + SHOWN:
            raise ValueError(f"line {line}: a block of {language!r} is neither run nor shown: {', '.join(RUN + SHOWN)}")
        if kind and (kind not in KINDS or (not note and kind != "printed")):
            raise ValueError(f"line {line}: walk: {kind} {note} is none of {', '.join(KINDS)}, or says no reason")
        found.append(Block(line, language, match["code"], kind, note))
    if text.count("<!-- walk:") != sum(bool(block.kind) for block in found):
        raise ValueError("a comment <!-- walk: ... --> does not stand directly before a block")
    return found


def pages() -> list[Path]:
    """What is walked: README, the quickstart and the guides, and pages of reference that show code."""
    docs = ROOT / "docs"
    return [
        ROOT / "README.md",
        *sorted(docs.glob("*.md")),
        *sorted(docs.glob("guides/*.md")),
        *sorted(docs.glob("reference/*.md")),
    ]


def help_blocks(venv: Path) -> list[Block]:
    """The examples of every command's help, after what makes the files that they name."""

    def shown(*arguments: str) -> str:
        command = [str(venv / "bin" / "rankdecay"), *arguments, "--help"]
        return subprocess.run(
            command, env=environment(venv, ROOT), capture_output=True, text=True, check=True, timeout=SECONDS
        ).stdout

    guide = (ROOT / "docs" / "guides" / "compress.md").read_text(encoding="utf-8")
    made = next(block.code for block in blocks(guide) if block.language == "python")
    found = [Block(1, "python", made + NAMED)]
    for command in re.findall(r"^  ([a-z]+) {2,}", shown(), re.MULTILINE):
        examples = re.findall(
            rf"^  (rankdecay {command} .*)$", shown(command).partition("\nexamples:\n")[2], re.MULTILINE
        )
        if not examples:
            raise ValueError(f"rankdecay {command} --help has no examples")
        for example in examples:
            quick = example.startswith(tuple(f"rankdecay {start}" for start in QUICK))
            kind, note = ("", "") if quick else ("long", f"{example}: training; the tests run it at a small size")
            found.append(Block(len(found) + 1, "sh", f"{example}\n", kind, note))
    return found


def same(shown: str, printed: str) -> bool:
    """Whether a page shows what was printed: the same words, and numbers within a quarter of each other.

    A bar, `▁` to `█`, is a number as well, and may have another height. A line of `…` stands for any lines, or none.
    """
    shown, printed = (re.sub("[▁-█]", "█", text) for text in (shown, printed))
    number = f"({NUMBER.pattern})"
    parts = [re.split(number, " ".join(part.split())) for part in re.split(r"^…$", shown, flags=re.MULTILINE)]
    patterns = ["".join(number if at % 2 else re.escape(words) for at, words in enumerate(part)) for part in parts]
    found = re.fullmatch(".*?".join(patterns), " ".join(printed.split()))
    if found is None:
        return False
    pairs = zip((words for part in parts for words in part[1::2]), found.groups(), strict=True)
    numbers = [(float(a.replace(",", "")), float(b.replace(",", ""))) for a, b in pairs]
    return all(abs(a - b) <= 0.25 * max(abs(a), abs(b)) + 1e-6 for a, b in numbers)


# --- inside the page's own process ---


@contextlib.contextmanager
def _bounded(seconds: float) -> Iterator[None]:
    def late(*_: object) -> None:
        raise TimeoutError(f"took more than {seconds:g} s")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(int(seconds))
    try:
        yield
    finally:
        signal.alarm(0)


def _shell(code: str, seconds: float) -> None:
    with subprocess.Popen(["bash", "-euo", "pipefail", "-c", code], start_new_session=True) as process:
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise TimeoutError(f"took more than {seconds:g} s") from None
    if process.returncode:
        raise RuntimeError(f"exit code {process.returncode}")


def walk_page(page: str, todo: list[Block], long: bool) -> None:
    """Run blocks one after the other, in this process, and report each in a line of JSON."""
    report = os.fdopen(int(os.environ["WALK_REPORT"]), "w")
    namespace: dict[str, object] = {"__name__": "__main__"}
    sys.path[0] = ""  # as in an interpreter that was started in the clone
    out = Path(os.environ["WALK_OUTPUT"])
    last = ""
    for block in todo:
        start, error = time.monotonic(), ""
        seconds = LONG_SECONDS if block.kind == "long" else SECONDS
        sys.stdout.flush()
        at = out.stat().st_size
        try:
            if block.kind == "printed":
                if not same(block.code, last):
                    raise RuntimeError(f"the page shows what was not printed. Printed was:\n{last}")
            elif not block.runs(long):
                pass
            elif block.kind == "file":
                Path(block.note).parent.mkdir(parents=True, exist_ok=True)
                with Path(block.note).open("a", encoding="utf-8") as file:
                    file.write(block.code)
            elif block.language == "sh":
                _shell(block.code, seconds)
            else:
                with _bounded(seconds):
                    # Blank lines first, so that a traceback has the line of the page.
                    exec(compile("\n" * (block.line - 1) + block.code, page, "exec"), namespace)
        except BaseException as caught:
            import traceback

            traceback.print_exc()
            error = f"{type(caught).__name__}: {caught}"
        sys.stdout.flush()
        if block.runs(long) and block.kind != "file":
            with out.open(encoding="utf-8", errors="replace") as file:
                file.seek(at)
                last = file.read()
        report.write(json.dumps({"line": block.line, "seconds": time.monotonic() - start, "error": error}) + "\n")
        report.flush()
        if error:
            sys.exit(1)


# --- the walk ---


@dataclass
class Result:
    """What became of a page: rows of its blocks that were reached, and what it printed if it failed."""

    page: str
    blocks: list[Block]
    rows: list[dict]
    said: str
    seconds: float

    def error(self) -> str:
        """What went wrong, or nothing."""
        failed = [row for row in self.rows if row["error"]]
        if failed:
            return f"line {failed[0]['line']}: {failed[0]['error'].splitlines()[0]}"
        return "" if len(self.rows) == len(self.blocks) else "the process ended before the last block"


def environment(venv: Path, clone: Path) -> dict[str, str]:
    """Variables of a page: the environment's programs first, the clone's sources, and no way into the network."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PIP_", "VIRTUAL_ENV"))}
    nowhere = "http://127.0.0.1:9"
    proxies = {f"{kind}_proxy": nowhere for kind in ("http", "https", "HTTP", "HTTPS", "all")}
    return {
        **kept,
        **proxies,
        "no_proxy": "127.0.0.1,localhost",
        "PATH": f"{venv / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(clone / "src"),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "offline",
        "PIP_NO_INDEX": "1",
        "BROWSER": "true %s",  # what --open opens is looked at elsewhere
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }


def clone_to(folder: Path) -> Path:
    """A clean clone of what is committed."""
    subprocess.run(["git", "clone", "--quiet", "--shared", str(ROOT), str(folder)], check=True)
    return folder


def walk(page: str, todo: list[Block], venv: Path, long: bool) -> Result:
    """Walk one page in a process of its own, in a clone of its own."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="walk-") as folder:
        clone = clone_to(Path(folder, "rankdecay"))
        said, reported, given = (Path(folder, name) for name in ("output.txt", "report.jsonl", "blocks.json"))
        given.write_text(json.dumps([asdict(block) for block in todo]), encoding="utf-8")
        with said.open("w") as output, reported.open("w") as report:
            variables = environment(venv, clone) | {"WALK_REPORT": str(report.fileno()), "WALK_OUTPUT": str(said)}
            command = [str(venv / "bin" / "python"), str(Path(__file__).resolve()), "--page", page, str(given)]
            with subprocess.Popen(
                [*command, *(["--long"] if long else [])],
                cwd=clone, env=variables, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                pass_fds=[report.fileno()], start_new_session=True,
            ) as process:  # fmt: skip
                process.wait()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # whatever it left behind
        rows = [json.loads(line) for line in reported.read_text(encoding="utf-8").splitlines()]
        return Result(page, todo, rows, said.read_text(encoding="utf-8", errors="replace"), time.monotonic() - start)


def summary(results: list[Result], long: bool) -> str:
    """A line per page, and every block that was not run with its reason."""
    lines, left = [], []
    for result in results:
        reached = result.blocks[: len(result.rows)]
        counts = Counter(
            "ran" if block.runs(long) else block.kind if block.language in RUN else block.kind or "shown"
            for block in reached
        )
        counts["not reached"] = len(result.blocks) - len(reached)
        said = ", ".join(f"{count} {what}" for what, count in sorted(counts.items()) if count) or "no blocks"
        lines.append(f"{result.error() or 'ok':4}  {result.page}: {said}, {result.seconds:.0f} s")
        left += [
            f"  {result.page}:{block.line}: {block.kind}: {block.note}"
            for block in result.blocks
            if block.language in RUN and not block.runs(long)
        ]
    ran = sum(block.runs(long) for result in results for block in result.blocks[: len(result.rows)])
    return "\n".join([*lines, "", f"{ran} blocks ran; {len(left)} did not:", *left])


def main() -> int:
    """Walk; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", help="pages to walk, or help; all of them if none is given")
    parser.add_argument(
        "--venv", type=Path, help="environment that `make` has made; without, make makes one in a clone"
    )
    parser.add_argument("--long", action="store_true", help="run blocks marked long too")
    parser.add_argument("--jobs", type=int, default=1, help="pages at a time")
    parser.add_argument("--page", nargs=2, help=argparse.SUPPRESS)
    settings = parser.parse_args()
    if settings.page:
        page, given = settings.page
        walk_page(page, [Block(**block) for block in json.loads(Path(given).read_text())], settings.long)
        return 0
    todo = {}
    asked = [page for page in settings.pages if page != HELP]
    for path in ([] if settings.pages else pages()) + [Path(page).resolve() for page in asked]:
        name = str(path.relative_to(ROOT))
        try:
            todo[name] = blocks(path.read_text(encoding="utf-8"))
        except ValueError as error:
            sys.exit(f"{name}: {error}")
    todo = {name: found for name, found in todo.items() if any(block.language in RUN for block in found)}
    with tempfile.TemporaryDirectory(prefix="walk-") as folder:
        venv = settings.venv
        if venv is None:
            clone = clone_to(Path(folder, "rankdecay"))
            print("making the environment", flush=True)
            subprocess.run(["make", ".venv/installed"], cwd=clone, check=True)
            venv = clone / ".venv"
        if shutil.which("python", path=str(venv.absolute() / "bin")) is None:
            sys.exit(f"--venv {venv} has no bin/python: make test makes one, .venv")
        if not settings.pages or HELP in settings.pages:
            todo[HELP] = help_blocks(venv.absolute())
        results = []
        with ThreadPoolExecutor(settings.jobs) as pool:
            for result in pool.map(lambda page: walk(page, todo[page], venv.absolute(), settings.long), todo):
                print(f"{result.page}: {result.error() or 'ok'} ({result.seconds:.0f} s)", flush=True)
                if result.error():
                    print(result.said[-6000:], flush=True)
                results.append(result)
    print(f"\n{summary(results, settings.long)}")
    return 1 if any(result.error() for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
