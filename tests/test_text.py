"""Figures and tables as text."""

from rankdecay.text import aligned, finite_mean, number


def test_a_mean_is_of_what_is_known():
    assert finite_mean([1.0, None, 3.0]) == 2
    assert finite_mean([None]) is None
    assert finite_mean([]) is None


def test_a_figure_has_three_digits_and_none_is_crossed_out():
    assert number(0.12345) == "0.123"
    assert number(None) == "×"


def test_columns_are_as_wide_as_their_widest_cell():
    assert aligned([["a", "b", "c"], ["long", "", "d"], ["x", "y", ""]]) == ["a     b  c", "long     d", "x     y"]
