import pytest

from rankdecay.lab.experiments.boundary.maps import DataAxis, by_boundary, data_axis, phase_maps
from rankdecay.lab.experiments.boundary.read import merged


def test_positions_are_even_for_rows_and_logarithmic_between():
    axis = DataAxis([0.1, 0.2, 0.8])
    assert [axis.position(fraction) for fraction in axis.fractions] == pytest.approx([0, 1, 2])
    assert axis.position(0.4) == pytest.approx(1.5)
    assert axis.position(0.05) == -0.5  # kept within half a row
    assert axis.position(3.0) == 2.5
    assert axis.position(0.0) == -0.5
    assert [DataAxis([0.3]).position(fraction) for fraction in (0.2, 0.3, 0.4)] == [-0.5, 0, 0.5]


def test_amounts_are_shares_or_examples():
    assert DataAxis([0.2, 0.375]).ticks == ["20 %", "37.5 %"]
    axis = DataAxis([0.0004, 0.001234], 1_000_000)
    assert axis.ticks == ["400", "1,234"]
    assert axis.amount(0.001236, unit=True) == "1,240 examples"
    assert axis.span(0.00007, 0.0123456) == "70–12,300"
    assert axis.span(None, 0.1) is None


@pytest.mark.parametrize(
    ("task", "title"), [("add", "share of all"), ("selection", "examples"), ("recall", "examples")]
)
def test_sampled_tasks_count_examples(make_sweep, task, title):
    summary = merged([make_sweep(["prox"], task=task)]).summary
    assert summary is not None
    axis = data_axis(summary)
    assert title in axis.title
    assert axis.ticks[0] == ("150,000" if task != "add" else "15 %")


def test_a_map_per_arm_and_decay_of_the_rest(make_sweep):
    summary = merged([make_sweep(["none", "prox"], rest_decays=[0.5, 1.0])]).summary
    assert summary is not None
    maps = phase_maps(summary, data_axis(summary))
    assert [(item.arm, item.rest) for item in maps] == [
        ("none", "0.5"), ("none", "1"), ("prox", "0.5"), ("prox", "1")
    ]  # fmt: skip
    assert [item.has_strengths for item in maps] == [False, False, True, True]
    assert len(maps[2].cells) == 25
    assert [fit.column for fit in maps[2].fits] == [0, 1, 2, 3, 4]


def test_an_arm_that_sets_the_decay_of_the_rest_itself_has_one_map():
    cells = [
        {"strength": s, "rest_decay": s, "train_fraction": f, "seeds": 1, "generalised": 0}
        for s in (1.0, 3.0)
        for f in (0.2, 0.4)
    ]
    fits = [{"strength": s, "rest_decay": s, "train_fraction": 0.3, "low": None, "high": 0.35} for s in (1.0, 3.0)]
    summary = {"arms": [{"name": "l2_all", "cells": cells, "boundaries": fits}], "settings": {"task": "add"}}
    (item,) = phase_maps(summary, data_axis(summary))
    assert (item.rest, item.strengths, len(item.cells), len(item.fits)) == ("its own", [1.0, 3.0], 4, 2)


def test_lines_break_where_the_boundary_lies_beyond_the_grid():
    outside = {"censored": "above", "train_fraction": 0.4, "low": 0.35, "high": None}
    inside = {"censored": None, "train_fraction": 0.3, "low": 0.25, "high": 0.35}
    cells = [
        {"strength": s, "rest_decay": 1.0, "train_fraction": f, "seeds": 1, "generalised": 0}
        for s in range(4)
        for f in (0.2, 0.4)
    ]
    fits = [{"strength": s, "rest_decay": 1.0, **(outside if s == 1 else inside)} for s in range(4)]
    summary = {"arms": [{"name": "l2", "cells": cells, "boundaries": fits}], "settings": {}}
    (item,) = phase_maps(summary, data_axis(summary))
    assert [[column for column, _ in segment] for segment in item.segments()] == [[0], [2, 3]]
    assert item.neighbours() == [[0, 1, 2, 3]]
    assert (item.fits[1].at, item.fits[1].high) == (None, 1.5)


def test_arms_are_ordered_by_their_boundary_with_bounds_outside():
    def arm(name, fraction, censored=None):
        return {"name": name, "boundary": {"train_fraction": fraction, "censored": censored}}

    arms = [
        arm("a", 0.5, "above"),
        arm("b", 0.3),
        arm("c", 0.1, "below"),
        arm("d", 0.2),
        {"name": "e", "boundary": None},
    ]
    assert [item["name"] for item in by_boundary({"arms": arms})] == ["c", "d", "b", "a"]
    assert by_boundary(None) == []
