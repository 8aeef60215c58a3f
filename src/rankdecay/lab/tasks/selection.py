"""Selection: values followed by a token that names some of their positions; the answer is the sum of the named values.

The attention must choose, so a network whose attention is uniform cannot solve it: this is the task on which a decay
of the attention's rank has to prove itself. The space of sequences is far larger than any training set (modulus⁴ × 6
by default), so the test set is drawn fresh, and examples that occur in the training set are not used for testing.
"""

from itertools import combinations
from math import comb

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


def selection_sequences(modulus: int, values: int, named: int) -> int:
    """Number of sequences: any residues, any group of positions."""
    return modulus**values * comb(values, named)


def selection(
    modulus: int,
    train_examples: int,
    seed: int,
    *,
    values: int = 4,
    named: int = 2,
    test_examples: int = TEST_EXAMPLES,
    validation: int = 0,
) -> Dataset:
    """Random sequences of ``values`` residues and one token for a group of ``named`` positions.

    Args:
        modulus: p, at least 2; the residues and the answers.
        train_examples: number of distinct training sequences.
        seed: decides both sets.
        values: number of residues before the last token, 2 to 9.
        named: how many of them the last token names, 1 to ``values``. All of them leaves nothing to choose: a control.
        test_examples: number of distinct test sequences, none of them a training sequence.
        validation: number of further test sequences, or as many as there are.

    Raises:
        SettingError: If an argument is out of range or there are fewer sequences than examples asked for.
    """
    check_modulus(modulus)
    check_values(values, "how many residues to choose from")
    if not 1 <= named <= values:
        raise SettingError(f"`named` {named} is outside 1 to `values` {values}: how many of the residues to add")
    total = selection_sequences(modulus, values, named)
    codes = draw_distinct("selection", total, train_examples, test_examples, validation, seed, modulus)
    groups = np.array(list(combinations(range(values), named)))  # (groups, named)
    group = codes % len(groups)
    residues = base_digits(codes // len(groups), modulus, values)  # (examples, values)
    tokens = np.concatenate([residues, modulus + group[:, None]], axis=1)
    targets = np.take_along_axis(residues, groups[group], axis=1).sum(1) % modulus
    return Dataset(
        *split_drawn(tokens, targets, train_examples),
        vocabulary=modulus + len(groups),
        outputs=modulus,
        positions=(*(f"{ORDINALS[i]} value" for i in range(values)), "pair" if named == 2 else "named"),
        groups={modulus + n: " + ".join(ORDINALS[i] for i in chosen) for n, chosen in enumerate(groups)},
    )
