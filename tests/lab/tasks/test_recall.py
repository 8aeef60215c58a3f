"""Recall: the last token is one of the keys, and the answer is the value beside it."""

from collections import Counter
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankdecay.lab.errors import SettingError
from rankdecay.lab.tasks.recall import _arrangements, recall
from tests.comparing import sequences


@settings(deadline=None, max_examples=60)
@given(
    values=st.integers(2, 6),
    more=st.integers(0, 10),
    train=st.integers(1, 5),
    test=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_the_answer_is_the_value_beside_the_key_that_is_asked_for(values, more, train, test, seed):
    modulus = values + more
    data = recall(modulus, train, seed, test_examples=test, values=values)
    assert (data.vocabulary, data.outputs, data.length) == (2 * modulus, modulus, 2 * values + 1)
    every = sequences(data, "train") + sequences(data, "test")
    targets = [*data.train_targets.tolist(), *data.test_targets.tolist()]
    for (*pairs, query), target in zip(every, targets, strict=True):
        keys, answers = pairs[::2], pairs[1::2]
        assert len(set(keys)) == values
        assert all(0 <= key < modulus for key in keys)
        assert all(modulus <= answer < 2 * modulus for answer in answers)
        assert target == answers[keys.index(query)] - modulus


def test_every_key_value_and_place_occurs_about_equally_often():
    rows = sequences(recall(8, 8000, 0, values=4), "train")
    for position in range(9):
        seen = Counter(row[position] for row in rows)
        assert len(seen) == 8
        assert all(abs(count - 1000) < 150 for count in seen.values())
    asked = Counter(row.index(row[-1]) for row in rows)
    assert set(asked) == {0, 2, 4, 6}
    assert all(abs(count - 2000) < 200 for count in asked.values())


@pytest.mark.parametrize(("modulus", "count"), [(2, 2), (5, 3), (4, 4), (6, 1)])
def test_every_number_is_another_arrangement(modulus, count):
    every = list(permutations(range(modulus), count))
    arranged = _arrangements(np.arange(len(every)), modulus, count)
    assert sorted(map(tuple, arranged.tolist())) == every


def test_positions_and_groups_are_named():
    data = recall(3, 5, 0, values=2, test_examples=5)
    assert data.positions == ("1st key", "1st value", "2nd key", "2nd value", "query")
    assert data.groups == {0: "key 0", 1: "key 1", 2: "key 2"}


def test_more_pairs_than_keys_are_refused():
    with pytest.raises(SettingError, match=r"--values 5 needs .* --modulus 4 has fewer: choose fewer values"):
        recall(4, 10, 0, values=5)


def test_more_examples_than_sequences_are_refused():
    with pytest.raises(SettingError, match=r"--train-examples 193 .* all 384 sequences at --modulus 4: choose fewer"):
        recall(4, 193, 0, values=2, test_examples=0)
    assert len(recall(4, 192, 0, values=2, test_examples=0).train_targets) == 192


def test_more_sequences_than_can_be_numbered_are_refused():
    with pytest.raises(SettingError, match=r"--modulus 31 gives .* sequences.*choose a smaller modulus or fewer"):
        recall(31, 10, 0, values=9)
