"""Selection: values followed by a token that names two positions; the answer is the sum of the two named values.

The attention must choose, so a network whose attention is uniform cannot solve it: this is the task on which a decay
of the attention's rank has to prove itself. The space of sequences is far larger than any training set (modulus⁴ × 6
by default), so the test set is drawn fresh, and examples that occur in the training set are not used for testing.
"""

from itertools import combinations

import numpy as np

from rankdecay.lab.errors import SettingError
from rankdecay.lab.tasks.base import Dataset, random_generator

ORDINALS = ("1st", "2nd", "3rd", "4th", "5th", "6th", "7th", "8th", "9th")


def selection(modulus: int, train_examples: int, seed: int, *, values: int = 4, test_examples: int = 1000) -> Dataset:
    """Random sequences of ``values`` residues and one of the ``values·(values−1)/2`` pair tokens.

    Args:
        modulus: p, at least 2; the residues and the answers.
        train_examples: number of distinct training sequences.
        seed: decides both sets.
        values: number of residues before the pair token, 2 to 9.
        test_examples: number of distinct test sequences, none of them a training sequence.

    Raises:
        SettingError: if an argument is out of range or there are fewer sequences than examples asked for.
    """
    if modulus < 2:
        raise SettingError(f"--modulus {modulus} is too small: choose at least 2")
    if not 2 <= values <= len(ORDINALS):
        raise SettingError(f"--values {values} is outside 2 to {len(ORDINALS)}: how many residues to choose from")
    if train_examples < 1:
        raise SettingError(f"--train-examples {train_examples} is too small: choose at least 1")
    pairs = list(combinations(range(values), 2))
    total = modulus**values * len(pairs)
    wanted = train_examples + test_examples
    if wanted > total // 2:
        raise SettingError(
            f"--train-examples {train_examples} with {test_examples} test examples is more than half of all {total} "
            f"sequences at --modulus {modulus}: choose fewer examples or a larger modulus"
        )
    generator = random_generator(seed, "selection")
    codes = np.empty(0, dtype=np.int64)
    while len(codes) < wanted:  # a sequence is one integer, so distinct sequences are distinct integers
        drawn = np.concatenate([codes, generator.integers(0, total, 2 * wanted)])
        codes = drawn[np.sort(np.unique(drawn, return_index=True)[1])]
    codes = codes[:wanted]
    residues = codes[:, None] // len(pairs) // modulus ** np.arange(values) % modulus  # (examples, values)
    pair = codes % len(pairs)
    tokens = np.concatenate([residues, modulus + pair[:, None]], axis=1)
    first, second = np.array(pairs)[pair].T
    rows = np.arange(wanted)
    targets = (residues[rows, first] + residues[rows, second]) % modulus
    return Dataset(
        tokens[:train_examples],
        targets[:train_examples],
        tokens[train_examples:],
        targets[train_examples:],
        vocabulary=modulus + len(pairs),
        outputs=modulus,
        positions=(*(f"{ORDINALS[i]} value" for i in range(values)), "pair"),
        groups={modulus + n: f"{ORDINALS[i]} + {ORDINALS[j]}" for n, (i, j) in enumerate(pairs)},
    )
