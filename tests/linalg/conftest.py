import sys
from pathlib import Path

# `--import-mode=importlib` puts no directory on the path. These tests share the catalogue matrices.py, and compare
# tables with their generator, benchmarks/minimax.py.
sys.path.insert(0, str(Path(__file__).parent))
sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
