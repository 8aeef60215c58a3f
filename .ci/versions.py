"""Run some tests on other versions of Python, torch and transformers, and write docs/reference/versions.md.

    python .ci/versions.py                      # every combination; `make versions`
    python .ci/versions.py 3.11/2.13.0/5.0.0    # these alone; the other rows of the table stay

Each combination gets an environment of its own in a folder that is removed, with the package built from this tree. A
Python that is not on the path, or packages that cannot be installed, make a row that says so.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "reference" / "versions.md"
#: Python, torch, transformers; the first of each Python are those of `constraints.txt`.
COMBINATIONS = (
    "3.11/2.13.0/5.23.0",
    "3.11/2.13.0/5.0.0",
    "3.11/2.13.0/4.57.6",
    "3.11/2.6.0/5.23.0",
    "3.12/2.13.0/5.23.0",
    "3.13/2.13.0/5.23.0",
)
#: What depends on the versions most, in about three minutes of one thread, so that a busy machine ends them too.
TESTS = (
    "tests/test_public.py",
    "tests/linalg/test_shrink.py",
    "tests/decay/test_attach.py",
    "tests/decay/test_attach_by_roles.py",
    "tests/decay/test_torch_optimizers.py",
    "tests/attention/test_products.py",
    "tests/test_cli_inspect.py",
    "tests/compress/test_compression.py",
    "tests/integrations/test_transformers.py",
)
#: Beside torch and transformers; of the lab what the tests of `inspect` import.
NEEDED = ("accelerate", "pytest", "hypothesis", "psutil", "pyyaml")
INSTALL_SECONDS, TEST_SECONDS = 1800, 1200
HEADING = "| Python | torch | transformers | tests | when |\n|---|---|---|---|---|\n"


def constraints(folder: Path, torch: str, transformers: str) -> Path:
    """Write the constraints of this tree with other versions of torch and transformers, without what goes with them."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    tied = ("torch", "transformers", "torchvision", "torchao", "numpy", "accelerate")
    kept = [line for line in lines if re.split("==", line)[0] not in tied]
    path = folder / "constraints.txt"
    path.write_text("\n".join([*kept, f"torch=={torch}", f"transformers=={transformers}", ""]))
    return path


def interpreter(version: str) -> str | None:
    """Return a Python of a version such as 3.12: on the path, or one that pyenv has; None if there is none."""
    pyenv = Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser()
    found = sorted(map(str, pyenv.glob(f"versions/{version}.*/bin/python")))
    for program in filter(None, [shutil.which(f"python{version}"), *found]):
        said = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)
        if said.stdout.startswith(f"Python {version}."):  # a shim of pyenv may be of none
            return program
    return None


def tried(combination: str) -> tuple[str, str, str]:
    """Install one combination and run the tests in it; return the versions it really had, as ``torch/transformers``.

    Returns:
        torch, transformers, and what came of the tests.
    """
    python, torch, transformers = combination.split("/")
    program = interpreter(python)
    if program is None:
        return torch, transformers, f"not run: no python{python} on this machine"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        environment = {n: v for n, v in os.environ.items() if not n.startswith(("PYTHON", "PIP_CONSTRAINT"))}
        environment |= {"PIP_CONSTRAINT": str(constraints(folder, torch, transformers)), "OMP_NUM_THREADS": "1"}

        def run(*command: str | Path, seconds: int) -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                list(map(str, command)), cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
                timeout=seconds,
            )  # fmt: skip

        inside = folder / "venv" / "bin" / "python"
        run(program, "-m", "venv", folder / "venv", seconds=120)
        try:
            install = (inside, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile")
            packages = [f"torch=={torch}", f"transformers=={transformers}", *NEEDED]
            done = run(*install, ROOT, *packages, seconds=INSTALL_SECONDS)
            if done.returncode:
                reason = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["no reason given"]
                return torch, transformers, f"not run: cannot be installed ({reason[0][:120]})"
            found = run(
                inside, "-c", "import torch, transformers as t; print(torch.__version__, t.__version__)", seconds=300
            )
            if found.returncode:
                return torch, transformers, f"not run: {found.stderr.strip().splitlines()[-1][:120]}"
            tests = run(
                inside, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", *TESTS, seconds=TEST_SECONDS
            )
        except subprocess.TimeoutExpired as late:
            return torch, transformers, f"not run to the end: more than {late.timeout:.0f} s"
        print(tests.stdout[-3000:] if tests.returncode else "", file=sys.stderr)
        last = tests.stdout.strip().splitlines()[-1] if tests.stdout.strip() else "no output"
        counts = ", ".join(re.findall(r"\d+ (?:passed|failed|skipped|errors?)", last))
        torch, transformers = found.stdout.split()
        return torch, transformers, counts or last[:120]


def rows() -> dict[str, str]:
    """Return the rows that the page has, by combination."""
    table = PAGE.read_text(encoding="utf-8").partition("<!-- versions -->")[2].partition("<!-- /versions -->")[0]
    found = {}
    for line in table.splitlines()[1:]:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 5 and cells[0][:1].isdigit():
            found["/".join([cells[0], cells[1].partition("+")[0], cells[2]])] = line
    return found


def main(chosen: Sequence[str]) -> None:
    """Try the combinations and write the table."""
    for combination in chosen or COMBINATIONS:
        torch, transformers, came = tried(combination)
        today = datetime.now(UTC).date().isoformat()
        line = f"| {combination.partition('/')[0]} | {torch} | {transformers} | {came} | {today} |"
        print(line, flush=True)
        known = rows() | {combination: line}  # read again: another process may have added to it
        order = sorted(known, key=lambda key: (COMBINATIONS.index(key) if key in COMBINATIONS else 99, key))
        text = PAGE.read_text(encoding="utf-8")
        before, _, rest = text.partition("<!-- versions -->")
        table = HEADING + "\n".join(known[key] for key in order)
        after = rest.partition("<!-- /versions -->")[2]
        PAGE.write_text(f"{before}<!-- versions -->\n{table}\n<!-- /versions -->{after}", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
