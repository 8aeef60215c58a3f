"""Binary operations modulo p: the sequence is (a, b, =) and the answer a ∘ b, read at the equals sign.

A commutative operation leaks through a random split of *ordered* pairs: (a, b) in the training set gives away (b, a) in
the test set, and accuracy then plateaus at the train fraction without any generalisation. The split is therefore by
unordered pair; ``split="ordered"`` exists only to replicate published work.
"""

from collections.abc import Callable
from typing import Literal

import numpy as np

from rankdecay.lab.errors import SettingError
from rankdecay.lab.tasks.base import Dataset, check_modulus, split_by_class

Split = Literal["unordered", "ordered"]


def _inverses(p: int) -> np.ndarray:
    return np.array([pow(b, -1, p) if b else 0 for b in range(p)])


OPERATIONS: dict[str, Callable[[np.ndarray, np.ndarray, int], np.ndarray]] = {
    "add": lambda a, b, p: (a + b) % p,
    "subtract": lambda a, b, p: (a - b) % p,
    "multiply": lambda a, b, p: (a * b) % p,
    "divide": lambda a, b, p: (a * _inverses(p)[b]) % p,
    "quadratic": lambda a, b, p: (a * a + a * b + b * b) % p,  # symmetric in a and b, though not a group law
}
COMMUTATIVE = {"add", "multiply", "quadratic"}


def _is_prime(p: int) -> bool:
    return p > 1 and all(p % d for d in range(2, int(p**0.5) + 1))


def _second_operands(operation: str, modulus: int) -> np.ndarray:
    return np.arange(1 if operation == "divide" else 0, modulus)


def modular_sequences(operation: str, modulus: int) -> int:
    """Number of sequences: ordered pairs, without the divisor 0."""
    return modulus * len(_second_operands(operation, modulus))


def pair_classes(tokens: np.ndarray, operation: str, split: Split) -> np.ndarray:
    """A label for each sequence (a, b, =): one for (a, b) and (b, a) if they commute and the split is unordered."""
    a, b = tokens[:, 0], tokens[:, 1]
    size = int(tokens.max()) + 1
    mirrored = operation in COMMUTATIVE and split == "unordered"
    return np.minimum(a, b) * size + np.maximum(a, b) if mirrored else a * size + b


def modular(operation: str, modulus: int, train_fraction: float, seed: int, split: Split = "unordered") -> Dataset:
    """All pairs of residues under one operation.

    Args:
        operation: one of `OPERATIONS`.
        modulus: p; prime for ``divide``, at least 2 otherwise. Division leaves out b = 0.
        train_fraction: share of the pairs (of the unordered pairs, for a commutative operation) used for training.
        seed: decides the split.
        split: ``"unordered"`` keeps (a, b) and (b, a) on one side; ``"ordered"`` does not, and leaks.

    Raises:
        SettingError: For a modulus the operation does not allow, or a fraction that empties a side.
    """
    check_modulus(modulus)
    if operation == "divide" and not _is_prime(modulus):
        raise SettingError(f"`modulus` {modulus} is not prime, so division is not defined: choose a prime such as 97")
    operands = np.arange(modulus), _second_operands(operation, modulus)
    a, b = (axis.ravel() for axis in np.meshgrid(*operands, indexing="ij"))
    tokens = np.stack([a, b, np.full_like(a, modulus)], axis=1)
    targets = OPERATIONS[operation](a, b, modulus)
    return Dataset(
        *split_by_class(tokens, targets, pair_classes(tokens, operation, split), train_fraction, seed),
        vocabulary=modulus + 1,
        outputs=modulus,
        positions=("a", "b", "="),
        groups={modulus: "="},
    )
