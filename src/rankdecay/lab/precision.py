"""Chooses the precision of a run's matrix products from what the device at hand does well.

Torch cannot be asked: it says that a processor has bfloat16 where the products are emulated and a hundred times slower
than those of float32. So on a CPU products of the run's own shape are timed in both. The choice is made once, stored
with the run, and kept when the run is continued elsewhere.

Importing this module does not import torch.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rankdecay.lab.errors import SettingError, option
from rankdecay.lab.settings import Record

if TYPE_CHECKING:
    import torch

S = TypeVar("S")
WORTHWHILE = 1.3  # times as fast as float32 that bfloat16 products must be, for half the digits
PAIRS = 5  # of timings, one in each precision
SHORTEST = 2e-3  # seconds of float32 products in a timing: well above the resolution of the clock
CAPABILITY = (8, 0)  # of the first NVIDIA GPUs with bfloat16
FORMATS = {  # the dtype of the products under each precision
    "float32": "float32",
    "mixed": "bfloat16",
    "bfloat16": "bfloat16",
    "float16": "float16",
    "float64": "float64",
}


@dataclasses.dataclass(frozen=True)
class Products:
    """The shape of a run's largest matrix products: ``(batch, rows, inner) @ (batch, inner, columns)``."""

    batch: int
    rows: int
    inner: int
    columns: int

    def __str__(self) -> str:
        return f"{self.batch} × ({self.rows}×{self.inner})·({self.inner}×{self.columns})"


@dataclasses.dataclass(frozen=True)
class Choice:
    """The precision of a run.

    Attributes:
        asked: the value of ``--precision``.
        value: the precision of the run.
        reason: why, in words for a person.
    """

    asked: str
    value: str
    reason: str


def resolve(
    settings: S,
    command: str,
    device: str,
    notice: Callable[[str], None],
    *,
    narrow: str,
    products: Products | None = None,
) -> tuple[S, Choice]:
    """Return the settings with a precision in place of ``auto``, and why it is that one.

    Args:
        settings: of the experiment, with ``precision`` and ``out``.
        command: name of the experiment; a directory of another one does not count.
        device: on which it will run.
        notice: told what a user should know: a precision that is slow here, or could not be measured.
        narrow: the name of the choice that multiplies in bfloat16.
        products: what the run multiplies, to be timed on a CPU. None takes float32 there without timing anything.

    Raises:
        SettingError: For a precision that the device cannot multiply in.
    """
    from rankdecay.lab.store import read_json

    asked: str = settings.precision  # pyright: ignore[reportAttributeAccessIssue]
    out: Path = settings.out  # pyright: ignore[reportAttributeAccessIssue]
    stored = read_json(out / "config.json") or {}
    found = _stored(stored) if stored.get("command") == command else None
    if asked != "auto":
        found = asked, "as asked"
    choice = Choice(asked, *(found or _measured(device, notice, narrow, products)))
    if found is not None:
        _check(choice.value, device)
        if not os.path.exists(out / "summary.json"):  # a complete run is only shown
            warn_if_slow(choice, out, device, notice, products)
    return dataclasses.replace(settings, precision=choice.value), choice  # type: ignore[type-var]


def warn_if_slow(
    choice: Choice, out: Path, device: str, notice: Callable[[str], None], products: Products | None
) -> None:
    """Warn that bfloat16, asked for or kept from an earlier run, is slower here than float32, and how many times.

    Args:
        choice: of `resolve`.
        out: the run directory.
        device: on which it will run.
        notice: told so, if it is slower.
        products: what the run multiplies.
    """
    if FORMATS[choice.value] != "bfloat16" or device != "cpu":
        return
    kept = choice.asked == "auto"
    why = f"{out} continues in {choice.value}, as it began" if kept else f"{option('precision')} {choice.asked}"
    try:
        gain = bfloat16_gain(products or Products(1, 512, 512, 512))
    except RuntimeError as error:
        notice(f"{why}: bfloat16 products could not be timed ({str(error).splitlines()[0]})")
        return
    if gain < 1:
        notice(f"{why}: on this machine bfloat16 products take {1 / gain:.3g} times as long as float32 ones")


def _stored(config: Record) -> tuple[str, str] | None:
    """Return the precision that a directory started in, and why; None if its configuration has none."""
    settings, choice = config.get("settings"), config.get("precision")
    value = settings.get("precision") if isinstance(settings, dict) else None
    if not isinstance(value, str) or value not in FORMATS:
        return None
    return value, choice["reason"] if isinstance(choice, dict) else "as the directory began"


def _measured(device: str, notice: Callable[[str], None], narrow: str, products: Products | None) -> tuple[str, str]:
    """Return the precision that suits a device, and the reason."""
    import torch

    kind = device.partition(":")[0]
    if kind == "cuda":
        capability = torch.cuda.get_device_capability(device)
        name = f"{torch.cuda.get_device_name(device)}, compute capability {capability[0]}.{capability[1]},"
        if capability >= CAPABILITY:
            return narrow, f"{name} multiplies in bfloat16"
        return "float32", f"{name} has no bfloat16, which begins with {CAPABILITY[0]}.{CAPABILITY[1]}"
    if kind != "cpu" or products is None:
        return "float32", f"always float32 on {kind}"
    try:
        gain = bfloat16_gain(products)
    except RuntimeError as error:
        reason = f"bfloat16 products could not be timed ({str(error).splitlines()[0]})"
        named = option("precision")
        notice(f"{named} auto: {reason}: float32 is used; {named} {narrow} would insist")
        return "float32", reason
    measured = f"bfloat16 products of {products} run {gain:.3g} times as fast as float32 ones here"
    return (narrow, measured) if gain >= WORTHWHILE else ("float32", f"{measured}; {WORTHWHILE:g} would be worth it")


def bfloat16_gain(products: Products) -> float:
    """Speed of bfloat16 products over that of float32 ones on this processor, as a median of interleaved pairs.

    In processor time on one core, which other work on the machine hardly changes.

    Raises:
        RuntimeError: If torch cannot multiply in bfloat16 at all.
    """
    import torch

    from rankdecay.lab.machine import one_thread

    generator = torch.Generator().manual_seed(0)
    left = torch.randn(products.batch, products.rows, products.inner, generator=generator)
    right = torch.randn(products.batch, products.inner, products.columns, generator=generator)
    pairs = {dtype: (left.to(dtype), right.to(dtype)) for dtype in (torch.float32, torch.bfloat16)}

    def seconds(dtype: torch.dtype, times: int = 1) -> float:
        start = time.thread_time()
        for _ in range(times):
            torch.bmm(*pairs[dtype])
        return max(time.thread_time() - start, 1e-9)

    with one_thread():
        for dtype in pairs:  # the first call of a shape compiles its kernel
            seconds(dtype)
        times = max(1, round(SHORTEST / seconds(torch.float32)))
        return statistics.median(seconds(torch.float32, times) / seconds(torch.bfloat16, times) for _ in range(PAIRS))


def _check(precision: str, device: str) -> None:
    """Raise a `SettingError` unless the device can multiply in a precision."""
    import torch

    try:
        ones = torch.ones(8, 8, device=device, dtype=getattr(torch, FORMATS[precision]))
        (ones @ ones).sum().item()
    except (RuntimeError, TypeError) as error:
        raise SettingError(
            f"`precision` {precision}: {device} cannot multiply in {FORMATS[precision]} "
            f"({str(error).splitlines()[0]}): give `precision` float32"
        ) from None


def check_resolved(precision: str, known: Sequence[str]) -> None:
    """Raise a `ValueError` unless training knows the precision; it does not know ``auto``."""
    if precision not in known:
        raise ValueError(f"precision {precision!r} must be one of {', '.join(known)}")


def described(holder: Mapping[str, Any]) -> str | None:
    """The precision in a configuration or summary and its reason; None where there was no choice."""
    choice = holder.get("precision")
    return f"{choice['value']}: {choice['reason']}" if choice else None
