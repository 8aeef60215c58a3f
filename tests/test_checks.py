"""Checks of names and numbers: what they let through, and one grammar of messages."""

import math
import subprocess
import sys

import numpy as np
import pytest

from rankdecay.checks import check_name, check_number, given, suggestion


class Refused(ValueError):
    """An error of a caller's own."""


def test_a_known_name_is_returned():
    assert check_name("rule", "prox", ("prox", "smooth")) == "prox"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("rule", "smoth", "rule='smoth' is unknown: did you mean 'smooth'? (known: prox, smooth)"),
        ("--rule", "smoth", "--rule 'smoth' is unknown: did you mean 'smooth'? (known: prox, smooth)"),
        ("rule", "qqq", "rule='qqq' is unknown: (known: prox, smooth)"),
        ("rule", None, "rule=None is unknown: (known: prox, smooth)"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(name, value, message):
    with pytest.raises(Refused) as raised:
        check_name(name, value, iter(("prox", "smooth")), Refused)
    assert str(raised.value) == message


@pytest.mark.parametrize(
    ("value", "bounds"),
    [
        (0, {"at_least": 0}),
        (1e-300, {"above": 0}),
        (1, {"above": 0, "at_most": 1}),
        (0.999, {"at_least": 0, "below": 1}),
        (3, {"whole": True, "at_least": 1}),
        (np.int64(3), {"whole": True}),
        (np.float32(0.5), {}),
    ],
)
def test_a_number_within_its_bounds_is_returned(value, bounds):
    assert check_number("x", value, **bounds) is value


@pytest.mark.parametrize(
    ("value", "bounds", "message"),
    [
        (-1.0, {"at_least": 0}, "x=-1.0 must be a finite number >= 0"),
        (0, {"above": 0}, "x=0 must be a finite number > 0"),
        (1, {"above": 0, "below": 1}, "x=1 must be a finite number > 0 and < 1"),
        (1.5, {"above": 0, "at_most": 1}, "x=1.5 must be a finite number > 0 and <= 1"),
        (math.nan, {}, "x=nan must be a finite number"),
        (math.inf, {"at_least": 0}, "x=inf must be a finite number >= 0"),
        (True, {"at_least": 0}, "x=True must be a finite number >= 0"),
        ("3", {}, "x='3' must be a finite number"),
        (None, {}, "x=None must be a finite number"),
        (2.0, {"whole": True, "at_least": 1}, "x=2.0 must be a whole number >= 1"),
        (0, {"whole": True, "at_least": 1, "remedy": "100 is usual"}, "x=0 must be a whole number >= 1; 100 is usual"),
    ],
)
def test_any_other_number_is_refused_with_its_bounds(value, bounds, message):
    with pytest.raises(Refused) as raised:
        check_number("x", value, **bounds, error=Refused)
    assert str(raised.value) == message


def test_an_option_is_quoted_as_it_was_typed():
    assert given("--lr", 0.0) == "--lr 0.0"
    assert given("lr", 0.0) == "lr=0.0"


def test_nothing_near_is_no_suggestion():
    assert suggestion("qqq", ["prox"]) == ""
    assert suggestion("porx", ["smooth", "prox"]) == "did you mean 'prox'? "


def test_it_does_not_import_torch():
    code = "import sys, rankdecay.checks; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
