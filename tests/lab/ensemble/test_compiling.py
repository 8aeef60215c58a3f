"""A compiler where it pays, by the time of a few steps."""

import pytest

from rankdecay.lab.ensemble import compiling


class Counted:
    """Stands for an ensemble: what matters here is how long its steps take."""

    def __init__(self) -> None:
        self.trained = 0

    def train(self, steps: int) -> None:
        self.trained += steps


def test_compiling_is_decided_by_the_time_of_the_first_steps(monkeypatch):
    monkeypatch.setattr(compiling, "compiler_available", lambda device: True)
    made: list[Counted] = []
    clock = iter([0.0, 2.0, 0.0, 2.0])  # a second a step
    monkeypatch.setattr(compiling.time, "perf_counter", lambda: next(clock))

    def make():
        made.append(Counted())
        return made[-1]

    assert compiling.worth_compiling("auto", "cpu", make, compiling.COMPILE_FROM + 1)
    assert not compiling.worth_compiling("auto", "cpu", make, compiling.COMPILE_FROM - 1)
    assert [one.trained for one in made] == [1 + compiling.PROBED] * 2


@pytest.mark.parametrize(
    ("wanted", "device", "available", "expected"),
    [
        ("on", "cpu", True, True),
        ("off", "cuda", True, False),
        ("auto", "cuda:0", True, True),
        ("on", "cpu", False, False),
    ],
)
def test_an_order_needs_no_measurement(monkeypatch, wanted, device, available, expected):
    monkeypatch.setattr(compiling, "compiler_available", lambda device: available)
    assert compiling.worth_compiling(wanted, device, lambda: pytest.fail("measured"), 1e9) == expected
