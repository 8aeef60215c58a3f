"""What works after `pip install rankdecay` alone, with every package hidden that this does not install.

`.ci/package` does the same in a fresh environment; here it is quick, and every module is imported.
"""

import csv
import json
import re
import subprocess
import sys
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from safetensors.torch import save_file

from rankdecay.cli import LAB_PACKAGES
from tests.waiting import HANG

ROOT = Path(__file__).resolve().parents[1]
INTEGRATIONS = {
    "rankdecay.integrations.axolotl": "axolotl",
    "rankdecay.integrations.lightning": "lightning",
    "rankdecay.integrations.transformers": "transformers",
}

# A module is looked for as always, and those of the packages on standard input are not found: as if not installed.
HIDE = """
import sys
from importlib.machinery import PathFinder

HIDDEN = set(sys.stdin.read().split())

class Installed(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in HIDDEN else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Installed
"""


@pytest.fixture(scope="module")
def hidden() -> str:
    """Names of all installed top-level modules but those of rankdecay and what it requires without an extra."""
    installed, left = set(), ["rankdecay"]
    while left:
        name = left.pop()
        if name in installed:
            continue
        installed.add(name)
        for text in requires(name) or []:
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                left.append(re.sub(r"[-_.]+", "-", requirement.name).lower())

    def base(distributions: list[str]) -> bool:
        return any(re.sub(r"[-_.]+", "-", name).lower() in installed for name in distributions)

    names = {module for module, distributions in packages_distributions().items() if not base(distributions)}
    assert {*LAB_PACKAGES, "pytest"} <= names
    assert not {"torch", "numpy", "safetensors", "rankdecay"} & names
    return " ".join(names)


def _python(hidden: str, code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    call = [sys.executable, "-W", "error", "-c", HIDE + code, *map(str, arguments)]
    return subprocess.run(call, input=hidden, capture_output=True, text=True, check=False, timeout=HANG)


def _rankdecay(hidden: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return _python(hidden, "from rankdecay.cli import main\nsys.exit(main(sys.argv[1:]))", *arguments)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> list[Path]:
    """Two small checkpoints, as tensors alone."""
    torch.manual_seed(0)
    files = [tmp_path_factory.mktemp("checkpoints") / f"{name}.safetensors" for name in ("first", "later")]
    for file in files:
        names = (f"layers.{i}.self_attn.{name}_proj.weight" for i in range(2) for name in "qkvo")
        save_file({name: torch.randn(16, 16) for name in names}, file)
    return files


def test_every_module_of_the_library_is_imported(hidden):
    source = ROOT / "src" / "rankdecay"
    files = [file.relative_to(source.parent).with_suffix("") for file in source.rglob("*.py")]
    modules = {".".join(file.parts).removesuffix(".__init__") for file in files}
    library = sorted(name for name in modules if not name.startswith("rankdecay.lab"))
    code = """
import json
import rankdecay

failed = {}
for name in sys.argv[1:]:
    try:
        __import__(name)
    except ModuleNotFoundError as error:
        failed[name] = error.name
for name in rankdecay.__all__:
    getattr(rankdecay, name)
print(json.dumps([failed, [name for name in sys.modules if name.startswith("rankdecay.lab")]]))
"""
    done = _python(hidden, code, *library)
    assert done.returncode == 0, done.stderr
    failed, of_the_lab = json.loads(done.stdout)
    assert failed == INTEGRATIONS
    assert of_the_lab == []


def test_inspect_has_all_its_options(hidden, checkpoints, tmp_path):
    table, page = tmp_path / "rows.csv", tmp_path / "page.html"
    first, later = checkpoints
    options = ["--num-heads", 2, "--layers", 0, 1, "--compare", later]
    done = _rankdecay(hidden, "inspect", first, *options, "--csv", table, "--html", page)
    assert done.returncode == 0, done.stderr
    assert "2 attention layers" in done.stdout
    assert "Pseudo rank, mean over heads, in the order given" in done.stdout
    lines = list(csv.DictReader(table.read_text(encoding="utf-8").splitlines()))
    assert [line["source"] for line in lines] == [str(first)] * 8 + [str(later)] * 8
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    done = _rankdecay(hidden, "inspect", first, *options, "--json")
    answer = json.loads(done.stdout)
    assert len(answer["rows"]) == len(answer["compare"][0]["rows"]) == 8


@pytest.mark.parametrize(
    ("model_type", "says"),
    [
        ("gpt2", "model type 'gpt2' cannot be compressed: its class takes the size of a head from the width"),
        ("vit", "model type 'vit' cannot be compressed: a smaller head of it has not been compared"),  # in no table
    ],
)
def test_inspect_says_why_no_smaller_head_can_be_made(hidden, checkpoints, tmp_path, model_type, says):
    """Transformers, which would know of some types that they are no language models, is not there to be asked."""
    (tmp_path / "model.safetensors").write_bytes(checkpoints[0].read_bytes())
    config = {"model_type": model_type, "num_attention_heads": 2, "hidden_size": 16}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    done = _rankdecay(hidden, "inspect", tmp_path)
    assert done.returncode == 0, done.stderr
    assert says in done.stdout


def test_inspect_shows_a_run_directory(hidden, tmp_path):
    page = tmp_path / "page.html"
    done = _rankdecay(hidden, "inspect", ROOT / "docs" / "data" / "grok_default", "--html", page)
    assert done.returncode == 0, done.stderr
    assert '<p class="notice">step 600</p>' in page.read_text(encoding="utf-8")


def test_compress_says_what_to_install(hidden, checkpoints):
    done = _rankdecay(hidden, "compress", checkpoints[0].parent, "--dry-run")
    assert done.returncode == 2
    assert "compress needs transformers" in done.stderr
    assert "pip install 'rankdecay[transformers]'" in done.stderr


@pytest.mark.parametrize("command", ["grok --steps 3", "grok --help", "report runs/grok"])
def test_a_command_of_the_lab_says_what_to_install(command, hidden):
    done = _rankdecay(hidden, *command.split())
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"rankdecay: error: rankdecay {command.split()[0]} needs the packages of the lab")
    assert line.endswith("pip install 'rankdecay[lab]'")


def test_one_missing_package_of_the_lab_is_named(hidden):
    done = _rankdecay("cvxpy", "factor", "--quiet")
    assert done.returncode == 2
    assert "cvxpy is not installed: pip install 'rankdecay[lab]'" in done.stderr


def test_the_packages_named_are_those_of_the_extra():
    modules = packages_distributions()
    extra = {
        requirement.name
        for requirement in map(Requirement, requires("rankdecay") or [])
        if requirement.marker and requirement.marker.evaluate({"extra": "lab"}) and requirement.name != "rankdecay"
    } - {Requirement(text).name for text in requires("rankdecay") or [] if "extra" not in text}
    assert {modules[name][0].lower() for name in LAB_PACKAGES} == {name.lower() for name in extra}
