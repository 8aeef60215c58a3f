import sys
from pathlib import Path

# `--import-mode=importlib` puts no test directory on the path; these tests share the catalogue ../matrices.py.
sys.path.insert(0, str(Path(__file__).parents[1]))
