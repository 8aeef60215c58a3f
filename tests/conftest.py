import gc
import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import HealthCheck, settings

# Before torch is imported, and inherited by the commands that tests start: tiny models gain nothing from threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A pool of processes that each import torch takes longer than the few small graphs that tests have compiled.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

# Thousands of modules of transformers stay alive: looking through them again and again takes a fourteenth of the time.
gc.set_threshold(100_000, 50, 50)


@pytest.fixture(scope="module", autouse=True)
def _imported_modules_are_not_collected() -> None:
    """What lives by now outlives the run; accelerate's full collections, one per training, look at the rest alone."""
    gc.collect()
    gc.freeze()


# A draw may be slow for reasons of the machine, or of hypothesis itself, which reads all our modules first.
settings.register_profile("noisy machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("noisy machine")

# The processes of a test import its module by its name from here.
sys.path.append(str(Path(__file__).parent.parent))
from tests.skipped import pytest_terminal_summary  # noqa: E402, F401 - the end of the run's report

# --- timm beside a CPU build of torch ---
# The registry's torchvision is built for CUDA: its compiled operators do not load, and `import torchvision` fails on
# the first one that is missing. The fixture declares them, since timm's vision transformers never call one. `make`
# keeps timm and torchvision in a folder of their own, because transformers imports a torchvision that it can see, and
# would fail.
_TIMM = Path(sys.prefix) / "timm"
_OPERATORS = ("nms", "qnms", "roi_align", "_roi_align_backward", "roi_pool", "_roi_pool_backward", "ps_roi_align",
              "_ps_roi_align_backward", "ps_roi_pool", "_ps_roi_pool_backward", "deform_conv2d",
              "_deform_conv2d_backward")  # fmt: skip


#: Bytes that a process of tests takes with those that it starts.
MEMORY = 3 * 2**30

#: Files that take long: first, or one process would end with one of them while the other has nothing left to do.
LONG = ["test_cluster.py", "test_parallel.py", "test_distributed.py", "test_sharded.py", "test_training.py"]


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist, which .ci/versions.py does without
def pytest_xdist_auto_num_workers() -> int:
    """Two processes, one for each core of the slowest machine; more where there are cores and memory for them."""
    import psutil
    from joblib import cpu_count  # which knows the quota of a container

    memory = psutil.virtual_memory().total // MEMORY
    return max(2, min(cpu_count(), memory, 8))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


@pytest.fixture
def nothing_stays_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget the decay rules that a test registers."""
    from rankdecay import rules

    monkeypatch.setattr(rules, "_registered", dict(rules._registered))


@pytest.fixture(scope="module")
def timm() -> Iterator[ModuleType]:
    import torch

    from tests import needs

    transformers_utils = needs.package("transformers.utils")
    transformers_utils.is_torchvision_available()  # settled, and remembered, before the folder is on the path
    library = torch.library.Library("torchvision", "DEF")
    for name in _OPERATORS:
        library.define(f"{name}(Tensor x) -> Tensor")
    sys.path.insert(0, str(_TIMM))
    importlib.invalidate_caches()
    try:
        yield needs.timm()
    finally:
        sys.path.remove(str(_TIMM))
        library._destroy()


@pytest.fixture(scope="module")
def diffusers() -> Iterator[ModuleType]:
    from tests import needs

    sys.path.append(str(Path(sys.prefix) / "diffusers"))
    importlib.invalidate_caches()
    try:
        yield needs.diffusers()
    finally:
        sys.path.remove(str(Path(sys.prefix) / "diffusers"))


@pytest.fixture(scope="module")
def optimizers() -> Iterator[Path]:
    """Folder of the optimizers that others publish, on the path."""
    from tests import needs

    folder = needs.optimizers()
    sys.path.append(str(folder))
    importlib.invalidate_caches()
    try:
        yield folder
    finally:
        sys.path.remove(str(folder))
