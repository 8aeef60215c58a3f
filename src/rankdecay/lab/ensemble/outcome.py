"""Outcome of one run from its evaluations, and the key of its row in a sweep.

Importing this module imports neither torch nor numpy: statistics and reports read rows without what trained them.
"""

import math
from collections.abc import Sequence

from rankdecay.lab.settings import Record

Key = tuple[str, float, float, float, int]
KEY = ("arm", "strength", "rest_decay", "train_fraction", "seed")  # unique within a sweep
FIGURES = (  # of a run's last evaluation: what its row keeps, and what is averaged over seeds
    "test_accuracy",
    "train_accuracy",
    "stable_rank",
    "effective_rank",
    "product_stable_rank",
    "product_effective_rank",
    "query_norm",
    "key_norm",
    "angular_step",
    "tangential_share",
)
MEMORISED = 0.99  # training accuracy that counts as having fitted the training set
LATER_FIGURES = ("angular_step_after", "rotation", "validation_accuracy")  # that rows of earlier versions do not have
ROSE = 0.5  # test accuracy that counts as having started to generalise
FELL = 0.5  # of the stable rank at initialisation that counts as having lost rank


def key_of(row: Record) -> Key:
    """The key of the trial a stored row belongs to."""
    return tuple(row[name] for name in KEY)  # type: ignore[return-value]


def deciding(records: Sequence[Record]) -> str:
    """The accuracy that decides when a run has generalised: validation's where there is one, else the test's."""
    return "validation_accuracy" if records and "validation_accuracy" in records[0] else "test_accuracy"


def steps_to_hold(records: Sequence[Record], threshold: float) -> int | None:
    """The first evaluated step at which the accuracy that decides reaches ``threshold`` and the next one holds it."""
    key = deciding(records)
    reached = [record[key] is not None and record[key] >= threshold for record in records]
    for record, now, then in zip(records, reached, reached[1:], strict=False):
        if now and then:
            return record["step"]
    return None


def diverged(record: Record) -> bool:
    """Whether a run's loss or weights are no longer finite numbers."""
    return any(record[key] is None for key in ("train_loss", "test_loss", "query_norm", "rest_norm"))


def first_step(records: Sequence[Record], key: str, above: float = -math.inf, below: float = math.inf) -> int | None:
    """The first evaluated step at which a figure is within bounds."""
    return next((r["step"] for r in records if r[key] is not None and above <= r[key] <= below), None)
