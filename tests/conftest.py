import os
import sys
from pathlib import Path

# Before torch is imported, and inherited by the commands that tests start: tiny models gain nothing from threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# `--import-mode=importlib` puts no test directory on the path; tests of models and of ensembles share reference.py.
sys.path.insert(0, str(Path(__file__).parent / "lab" / "models"))
