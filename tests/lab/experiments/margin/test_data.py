"""The data sets: what they promise of scores and geometry, and what is refused."""

import numpy as np
import pytest

from rankdecay.lab.errors import SettingError
from rankdecay.lab.experiments.margin.data import DataSets, check_scores, differences, draw, load


def save(path, data: DataSets, **changes):
    arrays = {"tokens": data.tokens, "queries": data.queries, "heads": data.heads, "labels": data.labels} | changes
    np.savez(path, **arrays)
    return path


def test_generic_data_are_unit_vectors_and_a_seed_is_a_data_set():
    data = draw("generic", range(3), 4, 5, 6, 4.0)
    for vectors in (data.tokens, data.queries, data.heads):
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=-1), 1)
    assert set(np.unique(data.labels)) <= {-1, 1}
    more = draw("generic", range(5), 4, 5, 6, 4.0)
    np.testing.assert_array_equal(more.tokens[:3], data.tokens)
    np.testing.assert_array_equal(more.only([2]).tokens, data.tokens[2:])
    assert len(more) == 5


def test_equal_data_meet_assumption_A2():
    data = draw("equal", range(3), 4, 5, 6, 2.5)
    scores = np.sort(data.scores, axis=-1)
    np.testing.assert_allclose(scores[..., -1], 2.5)
    np.testing.assert_allclose(scores[..., :-1], -2.5)
    assert len(np.unique(data.optimal)) > 1


def test_aligned_data_meet_assumption_A4():
    data = draw("aligned", range(3), 3, 5, 6, 4.0)
    best = data.tokens[:, :, 0]
    np.testing.assert_array_equal(data.optimal, 0)
    np.testing.assert_allclose(best @ best.transpose(0, 2, 1), np.tile(np.eye(3), (3, 1, 1)), atol=1e-12)
    cosines = np.einsum("bik,bik->bi", best, data.queries) / np.linalg.norm(data.queries, axis=-1)
    np.testing.assert_allclose(abs(cosines), 1)
    pairs = data.tokens[:, :, 1::2], data.tokens[:, :, 2::2]
    np.testing.assert_allclose(np.einsum("bik,bilk->bil", best, pairs[0] - pairs[1]), 0, atol=1e-12)
    c = np.einsum("bik,bilk->bil", best, pairs[0])
    np.testing.assert_allclose(pairs[0] + pairs[1], 2 * c[..., None] * best[:, :, None], atol=1e-12)
    np.testing.assert_allclose(data.scores[:, :, 1:], 4 * np.repeat(c, 2, axis=2), atol=1e-12)


def test_differences_have_the_margins_as_inner_products():
    data = draw("generic", range(2), 3, 4, 5, 4.0)
    W, selected = np.random.default_rng(0).standard_normal((5, 5)), np.array([3, 0, 1])
    found = (differences(data, 1, selected) * W).sum((1, 2)).reshape(3, 3)
    for i, s in enumerate(selected):
        logits = data.tokens[1, i] @ W @ data.queries[1, i]
        np.testing.assert_allclose(found[i], logits[s] - np.delete(logits, s))


def test_equal_best_scores_are_named():
    data = draw("generic", range(2), 3, 4, 5, 4.0)
    check_scores(data)
    best = int(data.optimal[1, 2])
    other = (best + 1) % 4
    data.tokens[1, 2, other] = data.tokens[1, 2, best]
    with pytest.raises(SettingError, match=r"data set 1, example 2: tokens . and . have the same best score"):
        check_scores(data)


def test_a_file_is_read_as_it_was_written(tmp_path):
    data = draw("generic", range(2), 3, 4, 5, 4.0)
    read = load(save(tmp_path / "data.npz", data))
    np.testing.assert_array_equal(read.tokens, data.tokens)
    np.testing.assert_allclose(read.scores, data.scores)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"queries": np.ones((2, 3, 4))}, r"queries have shape \(2, 3, 4\); these tokens need \(2, 3, 5\)"),
        ({"labels": np.full((2, 3), 2.0)}, "labels must be -1 or 1"),
        ({"heads": np.full((2, 5), np.nan)}, "heads are not all finite"),
        ({"tokens": np.ones((2, 3, 5))}, r"tokens have shape \(2, 3, 5\), not"),
        ({"tokens": np.ones((2, 3, 1, 5))}, r"at least 2 tokens"),
    ],
)
def test_a_file_that_is_no_data_set_is_refused(tmp_path, changes, message):
    path = save(tmp_path / "data.npz", draw("generic", range(2), 3, 4, 5, 4.0), **changes)
    with pytest.raises(SettingError, match=message):
        load(path)


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    (tmp_path / "text.npz").write_text("no arrays")
    np.savez(tmp_path / "part.npz", tokens=np.ones((1, 1, 2, 2)))
    for name in ("text.npz", "part.npz", "missing.npz"):
        with pytest.raises(SettingError, match="cannot be read"):
            load(tmp_path / name)
