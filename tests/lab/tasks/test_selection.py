"""Selection: the last token names some of the values, and the answer is their sum."""

import re
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankdecay.lab.errors import SettingError
from rankdecay.lab.tasks.base import random_generator
from rankdecay.lab.tasks.selection import selection
from tests.comparing import sequences


@settings(deadline=None, max_examples=60)
@given(
    modulus=st.integers(5, 40),
    values=st.integers(3, 6),
    train=st.integers(1, 30),
    test=st.integers(1, 30),
    seed=st.integers(0, 1000),
    draw=st.data(),
)
def test_the_answer_is_the_sum_of_the_named_values(modulus, values, train, test, seed, draw):
    named = draw.draw(st.integers(1, values))
    data = selection(modulus, train, seed, test_examples=test, values=values, named=named)
    assert data.vocabulary == modulus + len(list(combinations(range(values), named)))
    every = sequences(data, "train") + sequences(data, "test")
    targets = [*data.train_targets.tolist(), *data.test_targets.tolist()]
    for (*residues, group), target in zip(every, targets, strict=True):
        assert all(0 <= r < modulus for r in residues)
        chosen = [int(n) - 1 for n in re.findall(r"\d+", data.groups[group])]
        assert chosen == sorted(set(chosen))
        assert len(chosen) == named
        assert target == sum(residues[i] for i in chosen) % modulus


@pytest.mark.parametrize(
    ("named", "first", "last"),
    [(1, "1st", "4th"), (2, "1st + 2nd", "3rd + 4th"), (3, "1st + 2nd + 3rd", "2nd + 3rd + 4th")],
)
def test_groups_are_named_by_their_positions(named, first, last):
    data = selection(31, 10, 0, named=named)
    names = list(data.groups.values())
    assert (names[0], names[-1]) == (first, last)
    assert list(data.groups) == list(range(31, data.vocabulary))
    assert "1st + 2nd + 4th" in selection(31, 10, 0, named=3).groups.values()
    assert data.positions == ("1st value", "2nd value", "3rd value", "4th value", "pair" if named == 2 else "named")


@pytest.mark.parametrize(("modulus", "values", "seed", "train"), [(31, 4, 0, 3000), (7, 5, 3, 200), (5, 3, 1, 1)])
def test_two_named_values_are_drawn_as_they_were_before_there_was_a_choice(modulus, values, seed, train):
    """The data of every run from before ``named`` existed: a change here makes old and new runs incomparable."""
    pairs = list(combinations(range(values), 2))
    total, wanted = modulus**values * len(pairs), train + 40
    generator = random_generator(seed, "selection")
    codes: dict[int, None] = {}  # in the order they were first drawn
    while len(codes) < wanted:
        codes |= dict.fromkeys(generator.integers(0, total, 2 * wanted).tolist())
    expected, answers = [], []
    for code in list(codes)[:wanted]:
        rest, pair = divmod(code, len(pairs))
        residues = [rest // modulus**i % modulus for i in range(values)]
        expected.append((*residues, modulus + pair))
        answers.append(sum(residues[i] for i in pairs[pair]) % modulus)
    for data in (
        selection(modulus, train, seed, values=values, test_examples=40),
        selection(modulus, train, seed, values=values, test_examples=40, named=2),
    ):
        assert sequences(data, "train") + sequences(data, "test") == expected
        assert np.concatenate([data.train_targets, data.test_targets]).tolist() == answers
        assert data.positions[-1] == "pair"


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


@pytest.mark.parametrize(("named", "values"), [(0, 4), (-1, 4), (5, 4), (3, 2)])
def test_naming_none_or_more_than_there_are_is_refused(named, values):
    with pytest.raises(SettingError, match=f"--named {named} is outside 1 to --values {values}"):
        selection(31, 10, 0, values=values, named=named)


@pytest.mark.parametrize(("modulus", "examples"), [(2, 2500), (7, 9000), (31, 10**7)])
def test_more_examples_than_sequences_are_refused(modulus, examples):
    with pytest.raises(SettingError, match=rf"--train-examples {examples} .* --modulus {modulus}: choose fewer"):
        selection(modulus, examples, 0)


def test_more_sequences_than_can_be_numbered_are_refused():
    with pytest.raises(SettingError, match=r"--modulus 113 gives 1\.1e\+20 sequences.*choose a smaller modulus"):
        selection(113, 10, 0, values=9)
