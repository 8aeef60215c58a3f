"""timm beside a CPU build of torch.

The registry's torchvision is built for CUDA: its compiled operators do not load, and `import torchvision` fails on the
first one that is missing. The test declares them, since timm's vision transformers never call one. `make` keeps timm
and torchvision in a folder of their own, because transformers imports a torchvision that it can see, and would fail.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

FOLDER = Path(sys.prefix) / "timm"
_OPERATORS = ("nms", "qnms", "roi_align", "_roi_align_backward", "roi_pool", "_roi_pool_backward", "ps_roi_align",
              "_ps_roi_align_backward", "ps_roi_pool", "_ps_roi_pool_backward", "deform_conv2d",
              "_deform_conv2d_backward")  # fmt: skip


@pytest.fixture(scope="module")
def timm() -> Iterator[ModuleType]:
    transformers_utils = pytest.importorskip("transformers.utils")
    transformers_utils.is_torchvision_available()  # settled, and remembered, before the folder is on the path
    library = torch.library.Library("torchvision", "DEF")
    for name in _OPERATORS:
        library.define(f"{name}(Tensor x) -> Tensor")
    sys.path.insert(0, str(FOLDER))
    importlib.invalidate_caches()
    try:
        yield pytest.importorskip("timm", reason="timm is not installed: `make test` puts it beside the environment")
    finally:
        sys.path.remove(str(FOLDER))
        library._destroy()
