"""Recall: pairs of a key and a value, then one of the keys; the answer is its value.

A pair is two tokens side by side, (key, value, key, value, …, query), so nothing but attention can tell which value
belongs to which key: one layer must copy each key to the value beside it, the next must find the query among them.
One token per pair would ask less: the sum of such tokens still says which pairs are there, and a network whose
attention is uniform learned to read the answer from it.
"""

from math import perm

import numpy as np

from rankdecay.lab.errors import SettingError
from rankdecay.lab.tasks.base import (
    ORDINALS,
    TEST_EXAMPLES,
    Dataset,
    base_digits,
    check_modulus,
    check_values,
    draw_distinct,
    split_drawn,
)


def recall_sequences(modulus: int, values: int) -> int:
    """Number of sequences: distinct keys in any order, any values, any of the keys as the query."""
    return values * modulus**values * perm(modulus, values)


def _arrangements(codes: np.ndarray, modulus: int, count: int) -> np.ndarray:
    """The arrangements (of ``count`` distinct residues, in order) with numbers ``codes``, ``(examples, count)``.

    Digit i of a number, in base modulus − i, counts the residues that are skipped among those not yet taken.
    """
    chosen = np.empty((len(codes), 0), dtype=np.int64)
    for position in range(count):
        codes, residue = np.divmod(codes, modulus - position)
        for taken in np.sort(chosen, axis=1).T:
            residue = residue + (residue >= taken)
        chosen = np.concatenate([chosen, residue[:, None]], axis=1)
    return chosen


def recall(
    modulus: int,
    train_examples: int,
    seed: int,
    *,
    values: int = 4,
    test_examples: int = TEST_EXAMPLES,
    validation: int = 0,
) -> Dataset:
    """Random sequences of ``values`` pairs (key, value) and a query.

    Args:
        modulus: number of distinct keys, and of distinct values and answers; at least ``values``.
        train_examples: number of distinct training sequences.
        seed: decides both sets.
        values: number of pairs before the query, 2 to 9.
        test_examples: number of distinct test sequences, none of them a training sequence.
        validation: number of further test sequences, or as many as there are.

    Returns:
        Tokens below ``modulus`` are keys, the query among them; those from there on are values.

    Raises:
        SettingError: If an argument is out of range or there are fewer sequences than examples asked for.
    """
    check_modulus(modulus)
    check_values(values, "how many pairs to recall from")
    if values > modulus:
        raise SettingError(
            f"`values` {values} needs as many distinct keys, `modulus` {modulus} has fewer: "
            "choose fewer values or a larger modulus"
        )
    total = recall_sequences(modulus, values)
    codes = draw_distinct("recall", total, train_examples, test_examples, validation, seed, modulus)
    codes, asked = np.divmod(codes, values)
    answers = base_digits(codes, modulus, values)  # (examples, values)
    keys = _arrangements(codes // modulus**values, modulus, values)
    pairs = np.stack([keys, modulus + answers], axis=2).reshape(len(codes), 2 * values)
    rows = np.arange(len(codes))
    tokens = np.concatenate([pairs, keys[rows, asked][:, None]], axis=1)
    targets = answers[rows, asked]
    return Dataset(
        *split_drawn(tokens, targets, train_examples),
        vocabulary=2 * modulus,
        outputs=modulus,
        positions=(*(f"{ORDINALS[i]} {part}" for i in range(values) for part in ("key", "value")), "query"),
        groups={key: f"key {key}" for key in range(modulus)},
    )
