"""Strengths that an arm's best result at the edge of its grid adds."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from rankdecay.lab.experiment import load, run
from rankdecay.lab.experiments.boundary.settings import Boundary

#: A threshold that is reached at once, so that the best strength is where ties put it: an edge.
EDGE = Boundary(
    task="subtract",
    modulus=5,
    arms=("smooth",),
    strengths=("smooth=1,2",),
    fractions=(0.5, 0.8),
    seeds=2,
    steps=40,
    evaluate_every=20,
    batch_size=8,
    width=8,
    mlp_width=8,
    threshold=1e-9,
    validation=0,  # half of the test set is too few to have one right answer
    widen=2,
    precision="float32",
    quiet=True,
)


def go(settings: Boundary) -> dict[str, Any]:
    return run(load("boundary"), settings, "")


def rows(directory: Path) -> list[str]:
    return (directory / "metrics.jsonl").read_text().splitlines()


def test_the_same_command_again_finds_the_strengths_that_it_added(tmp_path):
    """Strengths that a user types leave those of an earlier widening aside, until it comes to them again."""
    settings = dataclasses.replace(EDGE, out=tmp_path / "run")
    summary = go(settings)
    before = rows(tmp_path / "run")
    assert {json.loads(row)["strength"] for row in before} > {1.0, 2.0}
    assert go(settings) == json.loads(json.dumps(summary))
    assert rows(tmp_path / "run") == before
