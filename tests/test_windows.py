"""On Windows every module is imported and a run directory is locked, simulated by hiding what Windows does not have."""

import subprocess
import sys
from pathlib import Path

from tests.waiting import HANG

ROOT = Path(__file__).resolve().parents[1]

# Other packages are imported before: they look for themselves which system they are on.
PACKAGES = """
import asyncio, concurrent.futures, multiprocessing
import cvxpy, matplotlib.figure, numpy, plotly.offline, rich.live, safetensors.torch, scipy.stats, sklearn, tyro
import torch.distributed.tensor
from lightning.pytorch import Callback
from transformers import Trainer
"""
#: Its package is beside the environment, and its own test imports it.
NOT_HERE = {"rankdecay.integrations.axolotl"}
WINDOWS = """
import fcntl, os, shutil, signal, subprocess, sys
import numpy

for name in ("fcntl", "grp", "pwd", "resource", "termios", "tty", "pty"):
    sys.modules[name] = None
for name in ("fork", "getuid", "geteuid", "getloadavg", "killpg", "nice", "sched_getaffinity", "uname"):
    delattr(os, name)
for name in ("SIGALRM", "SIGHUP", "SIGKILL", "SIGQUIT", "SIGUSR1", "SIGUSR2", "alarm", "setitimer"):
    delattr(signal, name)
"""
RUN = """
from pathlib import Path
from rankdecay.lab.errors import SettingError
from rankdecay.lab.store import RunDirectory

def open_run():
    config = {"command": "grok", "settings": {}, "arms": []}
    return RunDirectory.open(Path(sys.argv[1]), config, print)
"""
# As the documentation of msvcrt has it; the module itself is on Windows alone.
MSVCRT = """
import types

def locking(descriptor, mode, count):
    assert (mode, count) == (msvcrt.LK_NBLCK, 1)
    assert os.lseek(descriptor, 0, os.SEEK_CUR) == 0  # the byte that every process locks
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)

msvcrt = types.SimpleNamespace(LK_NBLCK=2, locking=locking)
sys.modules["msvcrt"] = msvcrt
"""


def _python(code: str, *arguments: object) -> str:
    call = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(call, capture_output=True, text=True, check=False, timeout=HANG)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_module_is_imported():
    files = [file.relative_to(ROOT / "src").with_suffix("") for file in (ROOT / "src" / "rankdecay").rglob("*.py")]
    modules = sorted({".".join(file.parts).removesuffix(".__init__") for file in files} - NOT_HERE)
    assert {"rankdecay.lab.store", "rankdecay.lab.ensemble.cluster", "rankdecay.lab.session.parallel"} <= set(modules)
    _python(PACKAGES + WINDOWS + "for name in sys.argv[1:]:\n    __import__(name)", *modules)


def test_a_run_directory_is_locked_by_msvcrt(tmp_path):
    code = """
with open_run():
    try:
        open_run()
    except SettingError as error:
        print(error)
open_run()
"""
    assert "is in use by another process" in _python(WINDOWS + MSVCRT + RUN + code, tmp_path / "run")


def test_a_python_that_cannot_lock_is_told_so(tmp_path):
    code = """
try:
    open_run()
except SettingError as error:
    print(error)
"""
    out = _python(WINDOWS + RUN + code, tmp_path / "run")
    assert f"--out {tmp_path / 'run'} cannot be locked" in out
    assert "neither fcntl nor msvcrt" in out
