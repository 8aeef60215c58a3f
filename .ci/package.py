"""Build the wheel and the source distribution, and use the wheel as a user would, in an environment of its own.

First what the base install promises: the command line, the examples of the reference that need torch alone, `inspect`
with its page, and types that hold in a user's strict check. Then the lab, with the extra, and the same from the source
distribution. `constraints.txt` applies throughout: an unpinned torch brings gigabytes.
"""

import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import time
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BASE = {"torch", "safetensors", "numpy"}
SDIST_MEGABYTES = 2.0
CHECKPOINT = """
import torch
names = [f"layers.{i}.self_attn.{name}_proj.weight" for i in range(2) for name in "qkvo"]
torch.save({name: torch.randn(32, 32) for name in names}, "checkpoint.pt")
"""


def say(words: str) -> None:
    """Print what comes next, and how long it took to get here."""
    print(f"[{time.perf_counter() - START:4.0f} s] {words}", flush=True)


def run(*command: str | Path, cwd: Path = ROOT, code: int = 0, **environment: str) -> str:
    """Run a command and return what it printed; leave with that if it ends with another exit code than expected."""
    settings = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")} | environment
    done = subprocess.run(
        command, cwd=cwd, env=settings, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    )
    if done.returncode != code:
        sys.exit(f"{' '.join(map(str, command))}\nexit code {done.returncode}, expected {code}:\n{done.stdout}")
    return done.stdout


def demand(condition: object, words: str) -> None:
    """Leave with a message unless a condition holds."""
    if not condition:
        sys.exit(f"package check: {words}")


def build(folder: Path) -> tuple[Path, Path]:
    """Build both distributions, the wheel from the source distribution, and check what is in them."""
    constraints = str(ROOT / "constraints.txt")
    run(sys.executable, "-m", "build", "--outdir", folder, ROOT, PIP_CONSTRAINT=constraints)
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    run(sys.executable, "-m", "twine", "check", "--strict", wheel, sdist)
    with zipfile.ZipFile(wheel) as archive:
        inside = set(archive.namelist())
        (metadata,) = (name for name in inside if name.endswith(".dist-info/METADATA"))
        about = Parser().parsestr(archive.read(metadata).decode())
    required = about.get_all("Requires-Dist", [])
    license_file = metadata.replace("METADATA", "licenses/LICENSE")
    demand({"rankdecay/py.typed", license_file} <= inside, f"{wheel.name} lacks py.typed or {license_file}")
    demand(about["License-Expression"] == "Apache-2.0", f"the licence is {about['License-Expression']!r}")
    demand(about["Description-Content-Type"] == "text/markdown", "the README is not rendered as Markdown")
    version = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    demand(version and about["Version"] == version[1], f"the wheel has version {about['Version']}")
    base = {re.match(r"[\w.-]+", line)[0] for line in required if "extra ==" not in line}
    demand(base == BASE, f"the wheel requires {sorted(base)}, and should require {sorted(BASE)}")
    source = ROOT / "src"
    files = [path for path in source.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    missing = {path.relative_to(source).as_posix() for path in files if ".egg-info" not in str(path)} - inside
    demand(not missing, f"files of src are not in the wheel: {sorted(missing)}")
    demand(sdist.stat().st_size < SDIST_MEGABYTES * 1e6, f"{sdist.name} has {sdist.stat().st_size / 1e6:.1f} MB")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    whole = {"README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "pyproject.toml", "tests/test_cli.py"}
    demand(whole <= names, f"{sdist.name} lacks {sorted(whole - names)}")
    return wheel, sdist


def base_examples() -> list[str]:
    """Examples of the reference that import torch and rankdecay alone."""
    text = (ROOT / "docs" / "reference" / "matrices.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    imported = [set(re.findall(r"^(?:import|from) (\w+)", block, re.MULTILINE)) for block in blocks]
    return [block for block, names in zip(blocks, imported, strict=True) if names <= {"torch", "rankdecay"}]


def check_types(python: Path, folder: Path) -> None:
    """Check the script of a user with strict types against the installed wheel, and run it."""
    script = folder / "consumer.py"
    script.write_text((ROOT / ".ci" / "consumer.py").read_text(encoding="utf-8"), encoding="utf-8")
    run(python, "-W", "error", script, cwd=folder)
    strict = {"typeCheckingMode": "strict", "pythonVersion": "3.11", "include": [script.name]}
    (folder / "pyrightconfig.json").write_text(json.dumps(strict), encoding="utf-8")
    checker = (sys.executable, "-m", "basedpyright", "--pythonpath", python)
    print(run(*checker, "--project", folder / "pyrightconfig.json", cwd=folder), end="")


def main() -> None:
    """Build, install and try, in a folder that is removed at the end."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        say("building the wheel and the source distribution")
        wheel, sdist = build(folder / "dist")
        say(f"{wheel.name} {wheel.stat().st_size / 1e6:.2f} MB, {sdist.name} {sdist.stat().st_size / 1e6:.2f} MB")

        say("installing the wheel without an extra")
        venv.create(folder / "venv", with_pip=True)
        scripts = folder / "venv" / ("Scripts" if os.name == "nt" else "bin")
        python, rankdecay, here = scripts / "python", scripts / "rankdecay", folder / "here"
        here.mkdir()
        pip = (python, "-m", "pip", "--quiet", "--disable-pip-version-check")
        install = (*pip, "install", "--no-compile", "-c", ROOT / "constraints.txt")
        run(*install, wheel)

        say("the base install: command line, examples, inspect")
        demand(run(rankdecay, "--version", cwd=here).startswith("rankdecay "), "rankdecay --version")
        demand("inspect" in run(rankdecay, "--help", cwd=here), "rankdecay --help")
        refusal = run(rankdecay, "factor", cwd=here, code=2)
        demand("pip install 'rankdecay[lab]'" in refusal and refusal.count("\n") == 1, refusal)
        examples = base_examples()
        demand(examples, "docs/reference/matrices.md has no example that needs torch alone")
        for example in examples:
            print(run(python, "-W", "error", "-c", example, cwd=here), end="")
        run(python, "-c", CHECKPOINT, cwd=here)
        print(run(rankdecay, "inspect", "checkpoint.pt", "--num-heads", "4", "--html", "page.html", cwd=here), end="")
        page = (here / "page.html").read_text(encoding="utf-8")
        demand(page.startswith("<!doctype html>") and 'id="map-query_key"' in page, "inspect --html made no page")

        say("types, as a user checks them")
        check_types(python, folder / "here")

        say("installing the extra lab")
        run(*install, f"{wheel}[lab]")
        run(*pip, "check")
        say("rankdecay factor")
        run(rankdecay, "factor", "--quiet", "--seeds", "2", "--steps", "100", "--out", "run", cwd=here)
        demand((here / "run" / "report.html").is_file(), "rankdecay factor left no page")
        say("installing the source distribution in place of the wheel")
        run(*pip, "uninstall", "--yes", "rankdecay")
        run(*pip, "install", "--no-compile", "--no-deps", sdist, PIP_CONSTRAINT=str(ROOT / "constraints.txt"))
        demand(
            run(rankdecay, "--version", cwd=here) == f"rankdecay {wheel.name.split('-')[1]}\n", "the sdist's version"
        )
        run(rankdecay, "factor", "--quiet", "--seeds", "2", "--steps", "100", "--out", "again", cwd=here)
        demand((here / "again" / "report.html").is_file(), "rankdecay factor of the sdist left no page")
        say("done")


START = time.perf_counter()
if __name__ == "__main__":
    main()
