"""A sweep over a real Ray cluster, of three nodes on this machine, gives the rows of one without, whatever dies."""

import contextlib
import dataclasses
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import psutil
import pytest

from rankdecay import cli
from rankdecay.lab.ensemble import cluster, sweep
from rankdecay.lab.ensemble.outcome import key_of
from rankdecay.lab.ensemble.sweep import Trial
from rankdecay.lab.errors import SettingError
from rankdecay.lab.experiments.boundary.arms import make_arms
from rankdecay.lab.experiments.boundary.experiment import make_plan, trials
from rankdecay.lab.experiments.boundary.settings import Boundary, check
from rankdecay.lab.store import read_metrics
from tests import needs
from tests.held import held
from tests.waiting import HANG, no_hang, until

# Before Ray is imported, and inherited by the commands that tests start: a cluster that serves only who has its token,
# and does not touch the user's own.
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
PATIENCE = {"RAY_gcs_server_port_wait_time_s": str(int(HANG))}
os.environ.update(cluster.ENVIRONMENT | TOKEN | PATIENCE)
ray = needs.package("ray")
Cluster = needs.package("ray.cluster_utils").Cluster

# In double precision, where a row has the same digits whatever ran beside it.
OPTIONS = (
    "--task=add --modulus=7 --batch-size=8 --width=16 --mlp-width=16 --steps=120 --seeds=2 --fractions 0.5 0.7 "
    "--arms none l2 smooth --strengths l2=1,10 smooth=1,10 --widen=0 --precision=float64 --device=cpu --compile=off"
)
SETTINGS = check(
    Boundary(
        task="add",
        modulus=7,
        fractions=(0.5, 0.7),
        batch_size=8,
        width=16,
        mlp_width=16,
        steps=120,
        seeds=2,
        arms=("none", "l2", "smooth"),
        strengths=("l2=1,10", "smooth=1,10"),
        precision="float64",
        compile="off",
    )
)
TRIALS = [t for arm in make_arms(SETTINGS) for t in trials(SETTINGS, arm, arm.strengths or (0.0,))]
# One place each, so that the rows of a task come one by one and a worker that dies has some left to lose.
PLAN = dataclasses.replace(make_plan(SETTINGS, "cpu", TRIALS), places=1)
# A machine that is gone fails its checks at once, one after another; one that is merely slow has time to answer.
HEALTH_CHECKS = {
    "health_check_period_ms": 1000,
    "health_check_failure_threshold": 5,
    "health_check_timeout_ms": int(HANG * 1000),
}
NODE = {"num_cpus": 1, "object_store_memory": cluster.MEMORY}


class Nodes:
    """A head that trains nothing, and two machines that do."""

    def __init__(self) -> None:
        head = NODE | {"num_cpus": 0, "include_dashboard": False, "_system_config": HEALTH_CHECKS}
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        self.address = self._cluster.address
        self.machines = [self._cluster.add_node(**NODE) for _ in range(2)]
        self._cluster.wait_for_nodes(HANG)

    def busy(self) -> Iterator[tuple[object, psutil.Process]]:
        """Each machine that trains now, with a worker that does."""
        for machine in self.machines:
            raylet = psutil.Process(machine.all_processes["raylet"][0].process.pid)
            for process in raylet.children():
                with contextlib.suppress(psutil.Error, IndexError):
                    if process.cmdline()[0].startswith("ray::_train"):
                        yield machine, process

    def remove(self, machine: object) -> None:
        """Pulls the plug: the processes of a machine end at once, its workers too."""
        self.machines.remove(machine)
        workers = psutil.Process(machine.all_processes["raylet"][0].process.pid).children(recursive=True)
        self._cluster.remove_node(machine, allow_graceful=False)
        for process in workers:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def add(self) -> None:
        self.machines.append(self._cluster.add_node(**NODE))
        self._cluster.wait_for_nodes(HANG)

    def shutdown(self) -> None:
        """Ends all processes, and fails if one stays."""
        pids = [p.process.pid for node in self._cluster.list_all_nodes() for p in chain(*node.all_processes.values())]
        started = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
        started += [child for process in started for child in process.children(recursive=True)]
        self._cluster.shutdown()
        _, left = psutil.wait_procs(started, timeout=HANG)
        for process in left:
            process.kill()
        assert not left


@pytest.fixture(autouse=True)
def _no_hang() -> Iterator[None]:
    """A sweep that waits for ever fails instead."""
    with no_hang():
        yield


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    nodes = Nodes()
    try:
        # One connection for all tests, whose workers need not start again; the commands below make their own.
        ray.init(nodes.address, log_to_driver=False, logging_level="ERROR")
        yield nodes
    finally:
        ray.shutdown()
        nodes.shutdown()


@pytest.fixture(scope="module")
def expected() -> dict:
    return by_key(sweep.train(sweep.TrialQueue(TRIALS), PLAN))


def by_key(rows) -> dict:
    """Rows by their key; fails if one comes twice."""
    found = {}
    for row in rows:
        assert key_of(row) not in found
        found[key_of(row)] = {k: v for k, v in row.items() if k != "seconds"}
    return found


def rows(address: str, some: list[Trial] = TRIALS, notice=print) -> Iterator[dict]:
    return cluster.rows(some, PLAN, address, 1.0, notice)


def arguments(out: Path, address: str) -> list[str]:
    return ["boundary", *OPTIONS.split(), "--out", str(out), "--ray", address, "--quiet"]


def test_tasks_hold_trials_of_one_network_in_order() -> None:
    others = [dataclasses.replace(t, config=dataclasses.replace(t.config, qk_norm="none")) for t in TRIALS]
    mixed = [trial for pair in zip(TRIALS, others, strict=True) for trial in pair]
    found = cluster.tasks(mixed, PLAN, slots=2)
    assert all(len({trial.config for trial in task}) == 1 for task in found)
    assert [task[0] for task in found] == sorted((task[0] for task in found), key=mixed.index)
    assert sorted((trial for task in found for trial in task), key=mixed.index) == mixed


def test_tasks_are_few_for_a_gpu_and_never_long() -> None:
    training = dataclasses.replace(PLAN.training, device="cuda:0")
    on_gpu = dataclasses.replace(PLAN, training=training, places=64)
    assert [len(task) for task in cluster.tasks(TRIALS * 10, on_gpu, slots=2)] == [100, 100]
    assert max(len(task) for task in cluster.tasks(TRIALS * 100, on_gpu, slots=1)) == cluster.ROUNDS * 64
    assert max(len(task) for task in cluster.tasks(TRIALS * 100, PLAN, slots=2)) == cluster.ROUNDS * PLAN.places
    assert [len(task) for task in cluster.tasks(TRIALS[:3], PLAN, slots=100)] == [1, 1, 1]


def test_rows_are_those_of_a_sweep_without_ray(nodes: Nodes, expected: dict) -> None:
    assert by_key(rows(nodes.address)) == expected


def test_a_killed_worker_loses_and_repeats_nothing(nodes: Nodes, expected: dict) -> None:
    notices: list[str] = []
    ended = rows(nodes.address, notice=notices.append)
    first = next(ended)
    until(lambda: next(nodes.busy(), None))[1].kill()
    assert by_key([first, *ended]) == expected
    assert any("a worker was lost" in text for text in notices)


def test_a_removed_machine_loses_and_repeats_nothing(nodes: Nodes, expected: dict) -> None:
    notices: list[str] = []
    ended = rows(nodes.address, notice=notices.append)
    first = next(ended)
    nodes.remove(until(lambda: next(nodes.busy(), None))[0])
    found = by_key([first, *ended])
    nodes.add()
    assert found == expected
    assert any("a worker was lost" in text for text in notices)


def test_a_killed_driver_resumes(nodes: Nodes, expected: dict, tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    driver = subprocess.Popen(held(*arguments(tmp_path, nodes.address), lines=2))
    try:
        until(lambda: metrics.exists() and metrics.read_bytes().count(b"\n") >= 2, driver)
    finally:
        driver.kill()
        driver.wait()
    before = metrics.read_bytes()
    assert before.count(b"\n") < len(expected)
    assert cli.main(arguments(tmp_path, nodes.address)) == 0  # over the connection and with the workers that are there
    assert metrics.read_bytes().startswith(before[: before.rindex(b"\n") + 1])
    assert by_key(read_metrics(tmp_path)) == expected
    assert json.loads((tmp_path / "summary.json").read_text())["command"] == "boundary"


def test_closing_ends_what_runs(nodes: Nodes) -> None:
    ended = rows(nodes.address)
    next(ended)
    ended.close()
    until(lambda: not list(nodes.busy()))


def test_errors_in_a_task_surface_as_what_they_are(nodes: Nodes) -> None:
    unknown = dataclasses.replace(TRIALS[0], data=TRIALS[0].data | {"task": "ad"})
    with pytest.raises(SettingError, match=r"^--task 'ad' is unknown"):
        list(rows(nodes.address, [unknown]))
    tiny = dataclasses.replace(TRIALS[0], data=TRIALS[0].data | {"train_fraction": 0.1})
    with pytest.raises(ValueError, match=r"^batch_size 8 exceeds the smallest training set"):
        list(rows(nodes.address, [tiny]))


class Bomb:
    """Ends the process that unpickles it."""

    def __reduce__(self):
        return os._exit, (1,)


def test_trials_that_kill_their_workers_are_given_up(nodes: Nodes, monkeypatch) -> None:
    monkeypatch.setattr(cluster, "LOSSES", 1)
    deadly = dataclasses.replace(TRIALS[0], data={"task": Bomb()})
    with pytest.raises(SettingError, match=r"1 unfinished run lost 2 workers in a row \(WorkerCrashedError\)"):
        list(rows(nodes.address, [deadly]))


def test_a_cluster_without_gpus_is_refused(nodes: Nodes) -> None:
    on_gpu = dataclasses.replace(PLAN, training=dataclasses.replace(PLAN.training, device="cuda"))
    with pytest.raises(SettingError, match="the cluster has no GPU: use --device cpu"):
        list(cluster.rows(TRIALS, on_gpu, nodes.address, 1.0, print))


@pytest.mark.parametrize("address", ["cluster", "ray://127.0.0.1:10001", "127.0.0.1:port", ":6379"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(SettingError, match=f"--ray {address} is not an address: give local, auto or host:port"):
        list(rows(address))


def test_an_address_where_nothing_answers_is_refused_at_once() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"  # bound, but nobody listens
        with pytest.raises(SettingError, match=f"--ray {address}: nothing answers there .*: give the address"):
            list(rows(address))


def test_without_ray_the_remedy_is_named(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SettingError, match=r"--ray auto needs the package: pip install 'rankdecay\[ray\]'"):
        list(rows("auto"))


def test_a_cluster_of_its_own(expected: dict, tmp_path: Path) -> None:
    driver = subprocess.Popen([sys.executable, "-m", "rankdecay.cli", *arguments(tmp_path, "local")])
    started: list[psutil.Process] = []
    try:
        until(lambda: (tmp_path / "metrics.jsonl").exists(), driver)
        started = psutil.Process(driver.pid).children(recursive=True)
        assert driver.wait(HANG) == 0
    finally:
        if driver.poll() is None:
            driver.send_signal(signal.SIGKILL)
            driver.wait()
    assert by_key(read_metrics(tmp_path)) == expected
    assert started
    assert not psutil.wait_procs(started, timeout=HANG)[1]
