"""The machine a run is on: its name for the record, the device asked for, and the versions that matter."""

import contextlib
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from rankdecay.lab.errors import SettingError, check_name


def resolve_device(name: str, *, needs_float64: bool = True) -> str:
    """Resolve ``auto`` to CUDA when there is one; check any other device.

    Args:
        name: the value of ``--device``.
        needs_float64: whether the experiment computes in float64 on the device, which Apple's ``mps`` cannot.

    Raises:
        SettingError: For an unknown kind of device, one that is not on this machine, or one without float64.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = name.partition(":")
    check_name("`device`", kind, ("auto", "cpu", "cuda", "mps"))
    if kind == "mps" and needs_float64:
        raise SettingError(f"`device` {name} has no float64, in which this experiment computes: use `device` cpu")
    counts = {"cuda": torch.cuda.device_count, "mps": lambda: int(torch.backends.mps.is_available())}
    count = counts[kind]() if kind in counts else 1
    if (index and not index.isdecimal()) or int(index or 0) >= count:
        raise SettingError(f"`device` {name} is not on this machine ({count} of kind {kind}): use `device` cpu")
    return name


def available_cpus() -> int:
    """Number of processors that this process may use: its affinity, and the CPU quota of its container, rounded up."""
    from joblib import cpu_count

    return cpu_count()


def respect_cpu_quota() -> None:
    """Limit torch's threads to the processors of the process: by itself it ignores a container's quota."""
    torch.set_num_threads(min(torch.get_num_threads(), available_cpus()))


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Limit torch to one core, for small matrices.

    Its threads wait for each other longer than such a product takes, and beside other work a thousand times as long.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def compiler_available(device: str) -> bool:
    """Whether `torch.compile` can generate code for ``device`` on this machine."""
    if device.startswith("cuda"):
        from torch.utils._triton import has_triton

        return has_triton()
    if os.environ.get("ATEN_CPU_CAPABILITY") == "default":  # torch 2.13 then writes vector code that does not compile
        return False
    return any(shutil.which(name) for name in ("g++", "clang++"))


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """``torch.compile`` whose cache on disk keeps code for one processor apart from code for another.

    torch 2.13 has no vector width in the key of that cache. A folder that two machines share, or one machine under
    ``ATEN_CPU_CAPABILITY``, then gives the second code for vectors of another width, and training NaN.
    """
    from torch.compiler import config

    capability = torch.backends.cpu.get_cpu_capability()
    if not hasattr(config, "cache_key_tag"):  # before torch 2.7
        import torch._inductor.config as inductor

        inductor.fx_graph_cache = False
    elif capability not in config.cache_key_tag:
        config.cache_key_tag += capability  # a tag that the user has set stays in it
    return torch.compile(function, **options)


def describe_machine(device: str) -> str:
    """A line for the record, e.g. ``"AMD EPYC, 2 threads"`` or ``"NVIDIA H200"``."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{_processor()}, {torch.get_num_threads()} threads"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Versions of Python, torch and rankdecay, and the commit of a checkout."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    try:
        found["rankdecay"] = version("rankdecay")
    except PackageNotFoundError:
        found["rankdecay"] = "unknown"
    checkout = Path(__file__).resolve().parents[3]
    if (checkout / ".git").exists():
        answer = subprocess.run(
            ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
        )
        found["commit"] = answer.stdout.strip() or "unknown"
    return found
