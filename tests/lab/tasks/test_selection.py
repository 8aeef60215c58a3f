"""Selection: the last token names two of the values, and the answer is their sum."""

import re
from collections import Counter
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankdecay.lab.errors import SettingError
from rankdecay.lab.tasks.selection import selection


def sequences(data, side):
    return [tuple(row) for row in getattr(data, f"{side}_tokens").tolist()]


@settings(deadline=None, max_examples=40)
@given(
    modulus=st.integers(5, 40),
    values=st.integers(3, 6),
    train=st.integers(1, 90),
    test=st.integers(1, 90),
    seed=st.integers(0, 1000),
)
def test_the_answer_is_the_sum_of_the_two_named_values(modulus, values, train, test, seed):
    data = selection(modulus, train, seed, test_examples=test, values=values)
    assert len(data.train_targets) == train
    assert len(data.test_targets) == test
    assert data.vocabulary == modulus + values * (values - 1) // 2
    every = sequences(data, "train") + sequences(data, "test")
    assert len(set(every)) == train + test  # distinct, and none on both sides
    targets = [*data.train_targets.tolist(), *data.test_targets.tolist()]
    for (*residues, pair), target in zip(every, targets, strict=True):
        assert all(0 <= r < modulus for r in residues)
        first, second = (int(n) - 1 for n in re.findall(r"\d+", data.groups[pair]))
        assert first < second
        assert target == (residues[first] + residues[second]) % modulus


def test_every_pair_and_every_value_occurs_about_equally_often():
    data = selection(31, 6000, 0)
    named = Counter(data.groups[row[-1]] for row in sequences(data, "train"))
    ordinals = ["1st", "2nd", "3rd", "4th"]
    assert set(named) == {f"{i} + {j}" for i, j in combinations(ordinals, 2)} == set(data.groups.values())
    assert all(abs(count - 1000) < 150 for count in named.values())
    for position in range(4):
        residues = Counter(row[position] for row in sequences(data, "train"))
        assert len(residues) == 31
        assert all(abs(count - 6000 / 31) < 75 for count in residues.values())


@pytest.mark.parametrize("modulus", [1, 0, -2])
def test_moduli_below_two_are_refused(modulus):
    with pytest.raises(SettingError, match=f"--modulus {modulus} is too small: choose at least 2"):
        selection(modulus, 10, 0)


@pytest.mark.parametrize("examples", [0, -5])
def test_no_training_examples_are_refused(examples):
    with pytest.raises(SettingError, match=f"--train-examples {examples} is too small"):
        selection(31, examples, 0)


@pytest.mark.parametrize(("modulus", "examples"), [(2, 2500), (7, 9000), (31, 10**7)])
def test_more_examples_than_sequences_are_refused(modulus, examples):
    with pytest.raises(SettingError, match=rf"--train-examples {examples} .* --modulus {modulus}: choose fewer"):
        selection(modulus, examples, 0)
