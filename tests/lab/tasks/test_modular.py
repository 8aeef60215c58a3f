"""Modular arithmetic recomputed number by number, and the split that leaks nothing."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankdecay.lab.errors import SettingError
from rankdecay.lab.tasks.base import Dataset
from rankdecay.lab.tasks.modular import modular

OPERATIONS = ["add", "subtract", "multiply", "divide", "quadratic"]
COMMUTATIVE = ["add", "multiply", "quadratic"]
PRIMES = [2, 3, 5, 7, 11, 13]


def is_answer(operation: str, a: int, b: int, c: int, p: int) -> bool:
    """Whether c = a ∘ b, stated without inverses or tables."""
    if operation == "divide":
        return b % p != 0 and (c * b - a) % p == 0
    value = {"add": a + b, "subtract": a - b, "multiply": a * b, "quadratic": a**2 + a * b + b**2}[operation]
    return (c - value) % p == 0


def pairs(data: Dataset, side: str) -> set[tuple[int, int]]:
    return {(int(a), int(b)) for a, b, _ in getattr(data, f"{side}_tokens")}


@settings(deadline=None, max_examples=60)
@given(
    operation=st.sampled_from(OPERATIONS),
    modulus=st.integers(3, 12),
    fraction=st.floats(0.2, 0.8),
    seed=st.integers(0, 1000),
    split=st.sampled_from(["unordered", "ordered"]),
)
def test_every_pair_once_with_the_right_answer(operation, modulus, fraction, seed, split):
    if operation == "divide" and modulus not in PRIMES:
        with pytest.raises(SettingError, match=f"--modulus {modulus} is not prime"):
            modular(operation, modulus, fraction, seed, split)
        return
    data = modular(operation, modulus, fraction, seed, split)
    tokens = np.concatenate([data.train_tokens, data.test_tokens])
    targets = np.concatenate([data.train_targets, data.test_targets])
    assert (tokens[:, 2] == modulus).all()
    assert data.vocabulary == modulus + 1
    for (a, b, _), c in zip(tokens.tolist(), targets.tolist(), strict=True):
        assert 0 <= c < modulus
        assert is_answer(operation, a, b, c, modulus)
    divisors = range(1, modulus) if operation == "divide" else range(modulus)
    assert sorted(map(tuple, tokens[:, :2].tolist())) == [(a, b) for a in range(modulus) for b in divisors]


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("modulus", [1, 0, -3])
def test_moduli_below_two_are_refused(operation, modulus):
    with pytest.raises(SettingError, match=f"--modulus {modulus} is too small: choose at least 2"):
        modular(operation, modulus, 0.5, 0)


@pytest.mark.parametrize("modulus", [4, 6, 9, 10, 15, 91, 121])
def test_division_needs_a_prime(modulus):
    with pytest.raises(SettingError, match=f"--modulus {modulus} is not prime.*choose a prime"):
        modular("divide", modulus, 0.5, 0)


@pytest.mark.parametrize("operation", ["add", "subtract", "multiply", "quadratic"])
def test_the_others_do_not(operation):
    assert modular(operation, 10, 0.5, 0).outputs == 10


# --- the leak ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operation", COMMUTATIVE)
@pytest.mark.parametrize("fraction", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("seed", [0, 1])
def test_no_test_pair_has_its_mirror_in_training(operation, fraction, seed):
    data = modular(operation, 31, fraction, seed)
    assert not {(b, a) for a, b in pairs(data, "test")} & pairs(data, "train")


@pytest.mark.parametrize(("modulus", "groups"), [(113, 6441), (97, 4753)])
@pytest.mark.parametrize("operation", COMMUTATIVE)
def test_the_split_counts_unordered_pairs(operation, modulus, groups):
    data = modular(operation, modulus, 0.5, 0)
    train, test = ({frozenset(pair) for pair in pairs(data, side)} for side in ("train", "test"))
    assert len(train | test) == groups
    assert not train & test
    assert len(train) == round(0.5 * groups)


@pytest.mark.parametrize("fraction", [0.3, 0.5, 0.7])
def test_an_ordered_split_leaks_about_the_fraction(fraction):
    data = modular("add", 113, fraction, 0, "ordered")
    train = pairs(data, "train")
    test = [(a, b) for a, b in pairs(data, "test") if a != b]
    leaked = np.mean([(b, a) in train for a, b in test])
    assert leaked == pytest.approx(fraction, abs=0.02)
    assert len(train) == round(fraction * 113**2)


@pytest.mark.parametrize("operation", ["subtract", "divide"])
def test_where_the_order_matters_pairs_are_split_one_by_one(operation):
    """Their mirrors give nothing away, so nothing is held back for them: the two splits are one."""
    unordered, ordered = (modular(operation, 31, 0.5, 0, split) for split in ("unordered", "ordered"))
    np.testing.assert_array_equal(unordered.train_tokens, ordered.train_tokens)
    mirrored = [(b, a) in pairs(unordered, "train") for a, b in pairs(unordered, "test") if a != b]
    assert np.mean(mirrored) == pytest.approx(0.5, abs=0.1)
