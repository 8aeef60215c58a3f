"""What a run takes from the machine at hand: its device, as many processors as it may use, a compiler."""

import os
import subprocess
import sys

import pytest
import torch

from rankdecay.lab import machine
from rankdecay.lab.errors import SettingError
from rankdecay.lab.experiments.attention.recall.experiment import RecallProblem
from rankdecay.lab.experiments.attention.recall.settings import Recall, check
from rankdecay.lab.experiments.attention.runs import all_runs, make_plan
from rankdecay.lab.session import session as training
from rankdecay.lab.session.session import choose_threads
from tests import needs
from tests.waiting import HANG

# --- devices ---


def test_mps_is_refused_by_name_where_float64_is_needed_and_where_there_is_none(monkeypatch):
    with pytest.raises(SettingError, match=r"--device mps has no float64, .*: use --device cpu"):
        machine.resolve_device("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(SettingError, match=r"--device mps is not on this machine \(0 of kind mps\): use --device cpu"):
        machine.resolve_device("mps", needs_float64=False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert machine.resolve_device("mps", needs_float64=False) == "mps"


def test_an_unknown_device_is_refused():
    with pytest.raises(SettingError, match="--device 'cpuu' is unknown"):
        machine.resolve_device("cpuu")


# --- processors ---


def test_torch_takes_no_more_threads_than_a_quota_allows():
    code = (
        "import torch\ntorch.set_num_threads(4)\nfrom rankdecay.lab.machine import available_cpus, respect_cpu_quota\n"
        "respect_cpu_quota()\nprint(available_cpus(), torch.get_num_threads())"
    )
    # joblib counts affinity, the quota of the container, and this variable, which stands for them here
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"LOKY_MAX_CPU_COUNT": "1", "PATH": "", "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
        timeout=HANG,
    )
    assert done.stdout.split() == ["1", "1"]


def test_one_thread_is_for_the_block_alone(threads):
    threads(2)
    with machine.one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize(("pays", "expected"), [(0.0, 2), (1e9, 1)])
def test_all_cores_train_only_where_a_step_is_faster_for_it(threads, monkeypatch, pays, expected):
    threads(2)
    monkeypatch.setattr(training, "THREADS_PAY", pays)
    settings = Recall(pairs=4, queries=2, keys=8, values=4, valid_sequences=8, batch_size=4, precision="float32")
    check(settings)
    plan = make_plan(settings, "cpu")
    choose_threads(all_runs(settings, has_mlp=False)[0], RecallProblem(settings), plan)
    assert torch.get_num_threads() == expected


# --- compiling ---


@needs.compiler
def test_a_folder_of_compiled_code_serves_machines_with_vectors_of_different_width():
    # The folder is the usual one, where other tests have had headers compiled. Three machines, which are forked where
    # nothing has asked for the width yet: importing the compiler takes seconds.
    code = """
import os
import torch
import torch._inductor.compile_fx
from rankdecay.lab.machine import compiled
for capability in ("", "avx2", ""):
    if os.fork() == 0:
        if capability:
            os.environ["ATEN_CPU_CAPABILITY"] = capability
        x = torch.linspace(-1, 1, 1000)
        f = compiled(lambda x: (x.exp() * x).cumsum(0).softmax(0).sum() + (x * x).sin().sum())
        print(torch.backends.cpu.get_cpu_capability(), float(f(x)), flush=True)
        os._exit(0)
    os.wait()
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
        timeout=HANG,
    )
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == 3, done.stderr
    answers = {}
    for name, value in lines:
        answers.setdefault(name, []).append(float(value))
    x = torch.linspace(-1, 1, 1000, dtype=torch.float64)
    exact = float((x.exp() * x).cumsum(0).softmax(0).sum() + (x * x).sin().sum())
    for values in answers.values():
        assert values == pytest.approx([exact] * len(values), rel=1e-5)
