import os
import sys
from pathlib import Path

from hypothesis import HealthCheck, settings

# Before torch is imported, and inherited by the commands that tests start: tiny models gain nothing from threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A draw may be slow for reasons of the machine, or of hypothesis itself, which reads all our modules first.
settings.register_profile("noisy machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("noisy machine")

# `--import-mode=importlib` puts no test directory on the path; tests of models and of ensembles share reference.py.
sys.path.insert(0, str(Path(__file__).parent / "lab" / "models"))
