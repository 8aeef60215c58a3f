"""The machine a run is on: its name for the record, the device asked for, and the versions that matter."""

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from rankdecay.lab.errors import SettingError, check_name


def resolve_device(name: str) -> str:
    """``auto`` becomes CUDA when there is one; anything else is checked.

    Raises:
        SettingError: for an unknown kind of device or one that is not on this machine.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = name.partition(":")
    check_name("--device", kind, ("auto", "cpu", "cuda"))
    count = torch.cuda.device_count() if kind == "cuda" else 1
    if (index and not index.isdecimal()) or int(index or 0) >= count:
        raise SettingError(f"--device {name} is not on this machine ({count} of kind {kind}): use --device cpu")
    return name


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
    """Versions of what decides the numbers, and the commit of a checkout."""
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
