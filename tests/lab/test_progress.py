"""What a person sees of runs that follow one another."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from rankdecay.lab.progress import ArmBar, Promise, RunsProgress


@pytest.fixture
def clock(monkeypatch):
    """The time, in seconds, as a list of one that a test moves on."""
    now = [100.0]
    monkeypatch.setattr("rankdecay.lab.progress.time.monotonic", lambda: now[0])
    return now


def progress(**options) -> RunsProgress:
    return RunsProgress("language · 2 runs", "tokens", **{"quiet": False, "to_stderr": False} | options)


def evaluated(its: RunsProgress, step: int, accuracy: float | None = 0.5) -> None:
    its.evaluated(
        "l2 0.1, seed 0", {"step": step, "tokens": 500 * step, "seconds": 2.0, "loss": 1.5, "accuracy": accuracy}
    )


def seconds_left(text: str) -> list[float]:
    return [float(found) for found in re.findall(r"ETA (\d+) s", text)]


def test_a_log_has_a_line_per_evaluation_and_the_time_left_falls(clock, capsys):
    its = progress()
    with its.working(work=40, done=0):
        for _ in range(2):
            its.begins(0)
            for step in range(1, 21):
                clock[0] += 0.5
                its.at(step)
                if step % 10 == 0:
                    evaluated(its, step)
            its.ended()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "language · 2 runs"
    assert lines[1] == "expected time: 20 s"
    assert lines[2] == "l2 0.1, seed 0  step 10  loss 1.5000  accuracy 50.0%  2,500 tokens/s  ETA 15 s"
    assert len(lines) == 6
    assert seconds_left("\n".join(lines)) == [15, 10, 5]
    assert lines[-1].endswith("tokens/s  ")


def test_steps_made_before_or_never_are_no_measure_of_the_speed(clock, capsys):
    its = progress()
    with its.working(work=60, done=20):  # the first of three runs is there; the second was interrupted at 10
        its.begins(10)
        clock[0] += 5.0
        its.at(15)  # one step a second
        evaluated(its, 15)
        its.ended(missed=5)  # it diverged
        its.begins(0)
        clock[0] += 10.0
        its.at(10)
        evaluated(its, 10, accuracy=None)
    out = capsys.readouterr().out
    assert seconds_left(out) == [25, 10]
    assert out.splitlines()[3] == "l2 0.1, seed 0  step 10  loss 1.5000  2,500 tokens/s  ETA 10 s"


def test_quiet_says_notices_alone_and_on_standard_error(capsys):
    its = progress(quiet=True)
    with its.working(work=20, done=0):
        its.begins(0)
        its.at(10)
        evaluated(its, 10)
        its.notice("a notice")
        its.ended()
    assert capsys.readouterr() == ("", "a notice\n")


def test_standard_output_is_free_for_json(capsys):
    its = progress(to_stderr=True)
    with its.working(work=20, done=0):
        its.begins(0)
        its.at(10)
        evaluated(its, 10)
    said = capsys.readouterr()
    assert said.out == ""
    assert "step 10" in said.err


def test_a_terminal_has_a_live_bar_and_no_lines(monkeypatch, clock):
    screen = io.StringIO()
    terminal = Console(force_terminal=True, file=screen, width=100, highlight=False)
    monkeypatch.setattr("rankdecay.lab.progress.Console", lambda **_: terminal)
    its = progress()
    assert its.is_live
    with its.working(work=20, done=0):
        its.begins(0)
        clock[0] += 5.0
        its.at(10)
        evaluated(its, 10)
        its.notice("[bold] is only text")
        its.at(20)
        its.ended()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    assert "step 10  loss 1.5000" in text
    assert "━" in text
    assert "[bold] is only text" in text


# --- the expected time ---


def expected(clock, capsys, seconds_per_step: float, **options) -> list[str]:
    bar = ArmBar("margin", 1000, **{"quiet": False, "to_stderr": False} | options)
    with bar:
        for step in range(1, 11):
            clock[0] += seconds_per_step
            bar.at("merged", step)
    out, err = capsys.readouterr()
    return [line for line in (out + err).splitlines() if "expected" in line]


def test_the_expected_time_is_said_once_from_the_first_steps(clock, capsys):
    assert expected(clock, capsys, 0.3) == ["expected time: 5:00 min"]


def test_twice_what_the_help_promises_names_the_option_that_shortens_it(clock, capsys):
    promise = Promise(3, "fewer --steps")
    assert expected(clock, capsys, 0.36, promise=promise) == ["expected time: 6:00 min"]
    [line] = expected(clock, capsys, 0.37, promise=promise)
    assert line == ("expected time: 6:10 min, more than twice the default's 3 min; use fewer --steps to shorten it")


def test_quiet_says_nothing_of_the_time(clock, capsys):
    assert expected(clock, capsys, 100.0, quiet=True, promise=Promise(3, "fewer --steps")) == []
