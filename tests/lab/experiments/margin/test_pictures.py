"""The pictures of attention in two dimensions: what they are drawn from."""

import numpy as np
import pytest

from rankdecay.lab.experiments.margin.data import draw
from rankdecay.lab.experiments.margin.pictures import PICTURED, picture_data
from rankdecay.lab.store import read_metrics


@pytest.fixture(scope="module")
def arrays(planar):
    with np.load(next((planar / "snapshots").glob("*.npz"))) as file:
        return dict(file)


def test_the_data_and_the_direction_of_w_z(planar, arrays, summary):
    found = picture_data(arrays, summary["arms"], read_metrics(planar))
    assert list(found["sets"]) == ["0", "1", "2", "3"]
    example, course = found["sets"]["2"][1], found["arms"]["separate"]["2"]
    z = arrays["queries"][2, 1]
    assert np.array_equal(example["tokens"], arrays["tokens"][2, 1])
    assert np.array_equal(example["query"], z)
    assert course["selected"].tolist() == arrays["separate_selected"][2].tolist()
    for angle, W in (
        (course["angles"][-1][1], arrays["separate_weights"][-1, 2]),
        (course["nuclear"][1], arrays["separate_nuclear"][2]),
    ):
        x, y = W @ z
        assert angle == pytest.approx(np.arctan2(y, x))
    assert np.isnan(course["angles"][0]).all()  # W begins at zero
    assert course["margin"][0] == 0
    assert course["margin"][-1] == pytest.approx(summary["arms"][1]["each"]["margin"][2])
    assert "1" not in found["arms"]["diagonal"]
    assert (np.diff(course["step"]) > 0).all()


def test_other_dimensions_have_no_picture(summary):
    data = draw("generic", range(4), 2, 3, 5, 4.0)
    assert picture_data(vars(data), summary["arms"], []) is None
    assert picture_data({}, summary["arms"], []) is None


def test_some_of_many_examples_are_pictured(arrays, summary):
    many = {name: np.repeat(arrays[name], 10, 1) for name in ("tokens", "queries", "labels")}
    found = picture_data(arrays | many, summary["arms"][:1], [])
    assert len(found["sets"]["0"]) == PICTURED
    assert len(found["arms"]["merged"]["0"]["angles"][0]) == PICTURED
