"""How numbers are said."""

import pytest

from rankdecay.lab.report.words import wilson_interval


def test_wilson_interval():
    assert wilson_interval(3, 3) == pytest.approx((0.4385, 1.0), abs=1e-3)
    assert wilson_interval(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-3)
    assert wilson_interval(0, 0) == (0.0, 1.0)
