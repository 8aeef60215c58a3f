"""S5 against compositions written out letter by letter."""

from itertools import permutations

import numpy as np

from rankdecay.lab.tasks.permutations import composition_table, permutation_composition

ELEMENTS = list(permutations(range(5)))


def test_every_composition():
    index = {element: i for i, element in enumerate(ELEMENTS)}
    expected = [[index[tuple(g[h[i]] for i in range(5))] for h in ELEMENTS] for g in ELEMENTS]
    np.testing.assert_array_equal(composition_table(), expected)


def test_it_is_the_symmetric_group():
    table = composition_table()
    every = np.arange(120)
    assert (np.sort(table, axis=0) == every[:, None]).all()
    assert (np.sort(table, axis=1) == every).all()
    identity = ELEMENTS.index((0, 1, 2, 3, 4))
    np.testing.assert_array_equal(table[identity], every)
    np.testing.assert_array_equal(table[:, identity], every)
    assert (table != table.T).any()


def test_the_dataset_holds_every_ordered_pair():
    data = permutation_composition(0.4, 0)
    tokens = np.concatenate([data.train_tokens, data.test_tokens])
    targets = np.concatenate([data.train_targets, data.test_targets])
    assert len(data.train_targets) == round(0.4 * 14400)
    assert {(g, h) for g, h, _ in tokens.tolist()} == {(g, h) for g in range(120) for h in range(120)}
    assert (tokens[:, 2] == 120).all()
    assert (data.vocabulary, data.outputs) == (121, 120)
    np.testing.assert_array_equal(targets, composition_table()[tokens[:, 0], tokens[:, 1]])
