"""What every task promises: right answers, a split that depends on the seed alone, and refusals that say the remedy."""

from itertools import combinations, permutations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankdecay.lab.errors import SettingError
from rankdecay.lab.tasks import SAMPLED, TASKS, Dataset, make_dataset, sequences
from rankdecay.lab.tasks.base import split_by_class
from rankdecay.lab.tasks.recall import recall
from rankdecay.lab.tasks.selection import selection

SMALL = {"modulus": 7, "train_examples": 300}


def examples(data: Dataset, side: str) -> list[tuple[tuple[int, ...], int]]:
    tokens, targets = getattr(data, f"{side}_tokens"), getattr(data, f"{side}_targets")
    return [(tuple(map(int, t)), int(y)) for t, y in zip(tokens, targets, strict=True)]


@pytest.mark.parametrize("task", TASKS)
def test_a_dataset_is_what_its_fields_say(task):
    data = make_dataset(task, 0, **SMALL)
    train, test = examples(data, "train"), examples(data, "test")
    assert train
    assert test
    assert not {t for t, _ in train} & {t for t, _ in test}
    assert len({t for t, _ in train + test}) == len(train) + len(test)
    for tokens, target in train + test:
        assert len(tokens) == data.length == len(data.positions)
        assert all(0 <= token < data.vocabulary for token in tokens)
        assert 0 <= target < data.outputs
        assert tokens[-1] in data.groups
    assert data.train_tokens.dtype == data.train_targets.dtype == np.int64
    assert len(set(data.groups.values())) == len(data.groups)


@pytest.mark.parametrize("task", TASKS)
def test_the_seed_alone_decides(task):
    first, again, other = (make_dataset(task, seed, **SMALL) for seed in (3, 3, 4))
    for name in ("train_tokens", "train_targets", "test_tokens", "test_targets"):
        np.testing.assert_array_equal(getattr(first, name), getattr(again, name))
    assert examples(first, "train") != examples(other, "train")


@pytest.mark.parametrize("task", [task for task in TASKS if task not in SAMPLED])
@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5, 1.5, float("nan")])
def test_fractions_outside_the_open_interval_are_refused(task, fraction):
    with pytest.raises(SettingError, match=rf"--train-fraction {fraction} .*(0, 1).*: give"):
        make_dataset(task, 0, modulus=7, train_fraction=fraction)


@pytest.mark.parametrize(("fraction", "side"), [(1e-4, "training"), (1 - 1e-4, "test")])
def test_a_fraction_that_empties_a_side_is_refused(fraction, side):
    with pytest.raises(SettingError, match=f"leaves the {side} set empty"):
        make_dataset("subtract", 0, modulus=5, train_fraction=fraction)


def test_an_unknown_task_is_refused_with_the_nearest_name():
    with pytest.raises(SettingError, match="--task 'substract' is unknown: did you mean 'subtract'"):
        make_dataset("substract", 0)
    with pytest.raises(SettingError, match="--task 'substract' is unknown: did you mean 'subtract'"):
        sequences("substract", modulus=7, values=4, named=2)


# --- the tasks whose examples are drawn --------------------------------------------------------------------------


@pytest.mark.parametrize("build", [selection, recall])
@settings(deadline=None, max_examples=40)
@given(
    modulus=st.integers(4, 12),
    values=st.integers(2, 4),
    train=st.integers(1, 5),
    test=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_as_many_distinct_sequences_are_drawn_as_asked_for(build, modulus, values, train, test, seed):
    data = build(modulus, train, seed, test_examples=test, values=values)
    sides = [{tokens for tokens, _ in examples(data, side)} for side in ("train", "test")]
    assert (len(data.train_targets), len(data.test_targets)) == (train, test)
    assert len(sides[0] | sides[1]) == train + test  # distinct, and none on both sides


@pytest.mark.parametrize("build", [selection, recall])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *(({"modulus": n}, f"--modulus {n} is too small: choose at least 2") for n in (1, 0, -2)),
        *(({"values": n}, f"--values {n} is outside 2 to 9: how many ") for n in (1, 0, 10)),
        *(({"train_examples": n}, f"--train-examples {n} is too small") for n in (0, -5)),
    ],
)
def test_numbers_that_no_drawn_task_can_have_are_refused(build, changes, message):
    with pytest.raises(SettingError, match=message):
        build(**{"modulus": 31, "train_examples": 10, "seed": 0} | changes)


# --- how many sequences there are --------------------------------------------------------------------------------


@pytest.mark.parametrize(("modulus", "values", "named"), [(2, 2, 1), (2, 3, 3), (3, 3, 2), (4, 2, 2), (3, 4, 3)])
def test_selection_is_counted(modulus, values, named):
    every = product(product(range(modulus), repeat=values), combinations(range(values), named))
    assert sequences("selection", modulus=modulus, values=values, named=named) == len(list(every))


@pytest.mark.parametrize(("modulus", "values"), [(2, 2), (3, 2), (3, 3), (4, 3)])
def test_recall_is_counted(modulus, values):
    every = product(permutations(range(modulus), values), product(range(modulus), repeat=values), range(values))
    assert sequences("recall", modulus=modulus, values=values, named=2) == len(list(every))


@pytest.mark.parametrize(
    ("task", "build", "total"), [("selection", selection, 3**2 * 1), ("recall", recall, 6 * 3**2 * 2)]
)
def test_no_sampled_sequence_is_out_of_reach(task, build, total):
    """Half of the sequences, drawn again and again, are in the end all of them and nothing beyond."""
    assert sequences(task, modulus=3, values=2, named=2) == total
    draws = [build(3, total // 2, seed, values=2, test_examples=0) for seed in range(40)]
    assert len({tokens for data in draws for tokens, _ in examples(data, "train")}) == total


@pytest.mark.parametrize("task", [task for task in TASKS if task not in SAMPLED])
@pytest.mark.parametrize("modulus", [3, 5, 7])
def test_a_split_divides_what_is_counted(task, modulus):
    data = make_dataset(task, 0, modulus=modulus)
    total = len(data.train_targets) + len(data.test_targets)
    assert sequences(task, modulus=modulus, values=4, named=2) == total


def test_named_reaches_selection_and_is_two_by_default():
    assert len(make_dataset("selection", 0, named=3, values=5, **SMALL).groups) == 10
    assert len(make_dataset("selection", 0, **SMALL).groups) == 6


@settings(deadline=None, max_examples=50)
@given(
    classes=st.lists(st.integers(0, 12), min_size=2, max_size=60),
    fraction=st.floats(0.01, 0.99),
    seed=st.integers(0, 2**31),
)
def test_a_class_is_never_on_both_sides(classes, fraction, seed):
    labels = np.array(classes)
    tokens, targets = np.arange(len(labels))[:, None], labels * 3
    total = len(set(classes))
    if round(fraction * total) in (0, total):
        with pytest.raises(SettingError, match="set empty"):
            split_by_class(tokens, targets, labels, fraction, seed)
        return
    train, train_targets, test, test_targets = split_by_class(tokens, targets, labels, fraction, seed)
    assert sorted([*train[:, 0], *test[:, 0]]) == list(range(len(labels)))
    assert not set(labels[train[:, 0]]) & set(labels[test[:, 0]])
    assert len(set(labels[train[:, 0]])) == round(fraction * total)
    assert (train_targets == labels[train[:, 0]] * 3).all()
    assert (test_targets == labels[test[:, 0]] * 3).all()


# --- a third set ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["selection", "recall"])
def test_a_drawn_validation_set_leaves_the_other_two_as_they_are(task):
    how = {"modulus": 7, "train_examples": 60}
    two, three = make_dataset(task, 3, **how), make_dataset(task, 3, **how, validation=40)
    for name in ("train_tokens", "train_targets", "test_tokens", "test_targets"):
        np.testing.assert_array_equal(getattr(three, name), getattr(two, name))
    assert two.validation_tokens is None
    assert three.validation_tokens is not None
    rows = [tuple(row) for row in np.concatenate([three.train_tokens, three.test_tokens, three.validation_tokens])]
    assert len(rows) == len(set(rows)) == 60 + 1000 + 40


@pytest.mark.parametrize(("task", "mirrored"), [("add", True), ("subtract", False), ("s5", False)])
def test_a_validation_set_of_a_split_task_is_taken_from_the_test_set_by_class(task, mirrored):
    two, three = (make_dataset(task, 3, modulus=11, train_fraction=0.4, validation=count) for count in (0, 20))
    np.testing.assert_array_equal(three.train_tokens, two.train_tokens)
    assert three.validation_tokens is not None
    assert three.validation_targets is not None
    assert 20 <= len(three.validation_targets) <= 21
    sides = [set(map(tuple, tokens.tolist())) for tokens in (three.validation_tokens, three.test_tokens)]
    assert not sides[0] & sides[1]
    assert sides[0] | sides[1] == set(map(tuple, two.test_tokens.tolist()))
    if mirrored:
        assert {(b, a, end) for a, b, end in sides[0]} == sides[0]


@pytest.mark.parametrize("task", ["subtract", "add", "selection"])
def test_a_validation_set_is_as_large_as_can_be(task):
    """At most half of the pairs that are not trained on, by class, or what sequences there are beside the test set."""
    data = make_dataset(task, 0, modulus=5, train_fraction=0.6, train_examples=800, validation=1000)
    assert data.validation_targets is not None
    if task == "selection":
        assert (len(data.test_targets), len(data.validation_targets)) == (1000, 5**4 * 6 // 2 - 800 - 1000)
    else:
        assert 0 < len(data.validation_targets) <= len(data.test_targets)


def test_a_validation_set_that_cannot_be_is_refused():
    alone = {"modulus": 3, "train_fraction": 0.84}
    assert len(make_dataset("subtract", 0, **alone).test_targets) == 1
    with pytest.raises(SettingError, match=r"--validation 60 leaves no test set of the 1 examples .*: give 0"):
        make_dataset("subtract", 0, **alone, validation=60)
    with pytest.raises(SettingError, match="--validation: there are no sequences left beside 875 training and 1000"):
        make_dataset("selection", 0, modulus=5, train_examples=875, validation=60)
    with pytest.raises(SettingError, match="--validation -1 is negative"):
        make_dataset("add", 0, modulus=11, validation=-1)
