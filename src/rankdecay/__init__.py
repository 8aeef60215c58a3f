"""Weight decay that decays rank: control, measure and explain the rank of a transformer's attention.

Names are loaded on first use, so that the command line can answer without importing torch.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rankdecay.attention import AttentionLayer, AttentionNames, MatrixView, find_attention
    from rankdecay.audit import AuditReport, AuditRow, audit
    from rankdecay.compress import Compression, compress
    from rankdecay.decay.attach import attach
    from rankdecay.decay.attachment import Attachment
    from rankdecay.decay.groups import param_groups
    from rankdecay.decay.policy import Frobenius, LowRank, Planes
    from rankdecay.decay.settings import decays
    from rankdecay.inspection import Inspection, inspect
    from rankdecay.linalg import polar, soft_threshold
    from rankdecay.monitor import Monitor, RankCollapseWarning
    from rankdecay.spectrum import Spectrum, spectrum

_NAMES = {
    "attention": ("AttentionLayer", "AttentionNames", "MatrixView", "find_attention"),
    "audit": ("AuditReport", "AuditRow", "audit"),
    "compress": ("Compression", "compress"),
    "decay.attach": ("attach",),
    "decay.attachment": ("Attachment",),
    "decay.groups": ("param_groups",),
    "decay.policy": ("Frobenius", "LowRank", "Planes"),
    "decay.settings": ("decays",),
    "inspection": ("Inspection", "inspect"),
    "linalg": ("polar", "soft_threshold"),
    "monitor": ("Monitor", "RankCollapseWarning"),
    "spectrum": ("Spectrum", "spectrum"),
}
_HOME = {name: f"rankdecay.{module}" for module, names in _NAMES.items() for name in names}

__all__ = [
    "Attachment",
    "AttentionLayer",
    "AttentionNames",
    "AuditReport",
    "AuditRow",
    "Compression",
    "Frobenius",
    "Inspection",
    "LowRank",
    "MatrixView",
    "Monitor",
    "Planes",
    "RankCollapseWarning",
    "Spectrum",
    "attach",
    "audit",
    "compress",
    "decays",
    "find_attention",
    "inspect",
    "param_groups",
    "polar",
    "soft_threshold",
    "spectrum",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'rankdecay' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__


class _Package(ModuleType):
    """Keeps `rankdecay.spectrum` the function: importing the submodule of that name would bind the module over it."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
