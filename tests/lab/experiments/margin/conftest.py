"""A small real run in two dimensions; a diagonal W can select the optimal tokens of three of its four data sets."""

import json

import pytest

from rankdecay.lab.experiment import run
from rankdecay.lab.experiments.margin.experiment import EXPERIMENT
from rankdecay.lab.experiments.margin.settings import Margin

ARMS = ("merged", "separate", "diagonal", "low_rank")


@pytest.fixture(scope="session")
def planar(tmp_path_factory):
    """The directory of the run, not to be written to."""
    out = tmp_path_factory.mktemp("margin") / "run"
    settings = Margin(
        parametrisation=ARMS, dimension=2, tokens=3, examples=2, datasets=4, margin=1e3, rate=0.03, steps=600,
        evaluate_every=20, out=out, quiet=True, device="cpu",
    )  # fmt: skip
    run(EXPERIMENT, settings, "rankdecay margin")
    return out


@pytest.fixture
def summary(planar):
    """The summary of the run, to be changed at will."""
    return json.loads((planar / "summary.json").read_text())
