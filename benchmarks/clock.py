"""Seconds that work takes, on CUDA from an idle device to an idle device."""

import time
from collections.abc import Callable

import torch


def now(device: str = "cpu") -> float:
    """Seconds on a clock, once the device is idle."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter()


def seconds_of(work: Callable[[], object], device: str = "cpu", repeats: int = 1) -> float:
    """Seconds of a call, a mean over repeats."""
    start = now(device)
    for _ in range(repeats):
        work()
    return (now(device) - start) / repeats


class Clock:
    """Times a block."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.seconds = 0.0

    def __enter__(self) -> "Clock":
        self.start = now(self.device)
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = now(self.device) - self.start
