"""Composition in the symmetric group S₅: the sequence is (g, h, =), the answer g∘h. It does not commute: no mirrors."""

from itertools import permutations
from math import factorial

import numpy as np

from rankdecay.lab.tasks.base import Dataset, split_by_class

DEGREE = 5
ELEMENTS = factorial(DEGREE)
SEQUENCES = ELEMENTS**2  # ordered pairs


def composition_table() -> np.ndarray:
    """The (120, 120) table of indices of g∘h, with (g∘h)(i) = g(h(i))."""
    elements = np.array(list(permutations(range(DEGREE))))
    powers = DEGREE ** np.arange(DEGREE)
    order = np.argsort(elements @ powers)
    composed = elements[:, elements]  # [g, h, i] = g(h(i))
    return order[np.searchsorted((elements @ powers)[order], composed @ powers)]


def permutation_composition(train_fraction: float, seed: int) -> Dataset:
    """All 14,400 ordered pairs of permutations of five letters.

    Args:
        train_fraction: share of the pairs used for training, in (0, 1).
        seed: decides the split.
    """
    table = composition_table()
    size = ELEMENTS
    g, h = np.divmod(np.arange(SEQUENCES), size)
    tokens = np.stack([g, h, np.full_like(g, size)], axis=1)
    return Dataset(
        *split_by_class(tokens, table[g, h], g * size + h, train_fraction, seed),
        vocabulary=size + 1,
        outputs=size,
        positions=("g", "h", "="),
        groups={size: "="},
    )
