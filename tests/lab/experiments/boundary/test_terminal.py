"""What a person sees while a sweep runs, in a terminal and without one."""

import io
from dataclasses import dataclass

import pytest
from rich.console import Console

from rankdecay.lab.ensemble.members import Member
from rankdecay.lab.ensemble.outcome import KEY
from rankdecay.lab.ensemble.sweep import Trial
from rankdecay.lab.ensemble.transformer import TransformerConfig
from rankdecay.lab.experiments.boundary import terminal as module
from rankdecay.lab.experiments.boundary.terminal import PLAIN_EVERY, SHADES, WAITING, PhaseProgress, phase_map

NETWORK = TransformerConfig(6, 3, 5, width=8, depth=1, heads=2, mlp_width=8)


def trial(arm: str, strength: float, fraction: float, seed: int = 0, rest: float = 1.0) -> Trial:
    return Trial(strength, fraction, Member(arm, seed, None, rest), NETWORK, {})


def row(of: Trial, generalised: bool) -> dict:
    return dict(zip(KEY, of.key, strict=True)) | {"outcome": "generalised" if generalised else "budget"}


TRIALS = [
    trial(arm, s, f, seed) for seed in (0, 1) for arm in ("none", "smooth") for f in (0.3, 0.5) for s in (1.0, 2.0)
]


@dataclass
class Clock:
    now: float = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(module.time, "monotonic", found.monotonic)
    return found


# --- the characters --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seeds", "shade"),
    [
        ([], WAITING),
        ([False], "·"),
        ([False] * 9, "·"),
        ([True] + [False] * 9, "░"),
        ([True, False, False, False], "░"),
        ([True, False, False], "▒"),
        ([True, False], "▒"),
        ([True, True, False], "▓"),
        ([True, True, True, False], "▓"),
        ([True] * 9 + [False], "█"),
        ([True], "█"),
        ([True] * 7, "█"),
    ],
)
def test_the_character_of_a_cell(seeds, shade):
    assert phase_map("arm", {(1.0, 0.5, 2.0): seeds}).plain == f"arm\n{shade * 2}"


def test_more_seeds_are_never_a_lighter_character():
    order = WAITING + SHADES
    for count in range(1, 9):
        shades = [phase_map("a", {(0, 0, 0): [True] * k + [False] * (count - k)}).plain[-1] for k in range(count + 1)]
        assert shades[0] == SHADES[0]
        assert shades[-1] == SHADES[-1]
        assert SHADES[0] not in shades[1:]
        assert [order.index(s) for s in shades] == sorted(order.index(s) for s in shades)


def test_fractions_go_upward_and_strengths_to_the_right():
    cells = {
        (1.0, 0.5, 1.0): [True],
        (1.0, 0.5, 10.0): [False],
        (1.0, 0.3, 1.0): [],
        (1.0, 0.3, 10.0): [True, False],
        (1.0, 0.7, 3.0): [True],  # a strength that only one fraction has
    }
    assert phase_map("smooth", cells).plain.split("\n") == ["smooth", "  ██  ", "██  ··", "    ▒▒"]


def test_several_rest_decays_are_blocks_below_each_other():
    cells = {(rest, fraction, 1.0): [rest > 1, fraction > 0.4] for rest in (3.0, 0.1) for fraction in (0.3, 0.5)}
    assert phase_map("l2", cells).plain.split("\n") == ["l2", "▒▒", "··", "██", "▒▒"]


# --- without a terminal ----------------------------------------------------------------------------------------------


def finish(progress: PhaseProgress, trials, clock: Clock, seconds: float) -> None:
    for index, one in enumerate(trials):
        clock.now += seconds
        progress.update(row(one, index % 2 == 0))


def test_plain_lines_say_what_begins_what_has_ended_and_when_it_will_end(clock, capsys):
    progress = PhaseProgress("add · 2 arms", ["none", "smooth"], quiet=False, to_stderr=False)
    done = [row(one, True) for one in TRIALS[:4]]
    progress.begin(done, TRIALS[4:])
    with progress:
        finish(progress, TRIALS[4:], clock, 40.0)
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert err == ""
    assert lines[0] == "add · 2 arms: 12 runs to do, 4 done"
    assert len(lines) == 14
    assert lines[2] == "expected time: 8:00 min"
    assert lines[1] == "1 of 12 runs, 5 of all generalised  ETA 7:20 min"
    assert lines[-1].strip() == "12 of 12 runs, 10 of all generalised"


def test_plain_lines_are_few_when_runs_end_fast(clock, capsys):
    progress = PhaseProgress("add", ["none", "smooth"], quiet=False, to_stderr=True)
    progress.begin([], TRIALS * 50)
    with progress:
        finish(progress, TRIALS * 50, clock, 0.5)
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == ""
    assert lines[0] == "add: 800 runs to do"
    assert 800 * 0.5 / PLAIN_EVERY - 2 <= len(lines) - 3 <= 800 * 0.5 / PLAIN_EVERY
    assert [line for line in lines if line.startswith("expected")] == ["expected time: 6:40 min"]
    assert lines[-1].startswith("800 of 800 runs, 400 of all generalised")


def test_nothing_to_do_says_nothing(clock, capsys):
    progress = PhaseProgress("add", ["none"], quiet=False, to_stderr=False)
    progress.begin([row(one, True) for one in TRIALS], [])
    with progress:
        pass
    assert capsys.readouterr() == ("", "")


def test_quiet_says_nothing_but_notices_on_standard_error(clock, capsys):
    progress = PhaseProgress("add", ["none", "smooth"], quiet=True, to_stderr=False)
    progress.begin([], TRIALS)
    with progress:
        finish(progress, TRIALS, clock, 100.0)
        assert capsys.readouterr() == ("", "")
        progress.notice("[bold] is text here")
    assert capsys.readouterr() == ("", "[bold] is text here\n")


def test_a_notice_goes_where_progress_goes(capsys):
    PhaseProgress("add", [], quiet=False, to_stderr=True).notice("one")
    PhaseProgress("add", [], quiet=False, to_stderr=False).notice("[two]")
    assert capsys.readouterr() == ("[two]\n", "one\n")


def test_rows_of_arms_that_were_left_out_are_not_counted(clock, capsys):
    progress = PhaseProgress("add", ["smooth"], quiet=False, to_stderr=False)
    smooth = [one for one in TRIALS if one.member.arm == "smooth"]
    progress.begin([row(one, True) for one in TRIALS[:2]], smooth)  # of the arm none
    with progress:
        finish(progress, smooth, clock, 1.0)
    assert capsys.readouterr().out.splitlines()[-1].startswith("8 of 8 runs, 4 of all generalised")


def test_a_second_beginning_counts_anew(clock, capsys):
    """Widening a grid: what is there, and what is still to do, have changed."""
    progress = PhaseProgress("add", ["none", "smooth"], quiet=False, to_stderr=False)
    progress.begin([], TRIALS)
    with progress:
        finish(progress, TRIALS, clock, 1.0)
        wider = [trial("smooth", 4.0, f) for f in (0.3, 0.5)]
        progress.begin([row(one, i % 2 == 0) for i, one in enumerate(TRIALS)], wider)
        finish(progress, wider, clock, 1.0)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2:] == ["add: 2 runs to do, 16 done", "2 of 2 runs, 9 of all generalised  "]


# --- in a terminal ---------------------------------------------------------------------------------------------------


@pytest.fixture
def terminal(monkeypatch) -> io.StringIO:
    screen = io.StringIO()

    def console(**options) -> Console:
        return Console(
            file=screen, force_terminal=True, width=100, height=40, highlight=False, _environ={"TERM": "xterm"}
        )

    monkeypatch.setattr("rankdecay.lab.progress.Console", console)
    return screen


def test_a_terminal_shows_every_map_as_it_fills(terminal, clock):
    progress = PhaseProgress("add · 2 arms", ["none", "smooth"], quiet=False, to_stderr=False)
    progress.begin([row(TRIALS[0], True)], TRIALS[1:])
    assert terminal.getvalue().strip("\x1b[?25lh\r\n ") == "", "nothing before it runs"
    with progress:
        finish(progress, TRIALS[1:9], clock, 1.0)
        shown = terminal.getvalue()
        assert all(text in shown for text in ("add · 2 arms", "none", "smooth", "9/16", "ETA 7 s", "██", "··"))
        assert "runs to do" not in shown
        progress.notice("a notice")
    assert "a notice" in terminal.getvalue()


def test_a_quiet_terminal_stays_empty(terminal, clock):
    progress = PhaseProgress("add", ["none", "smooth"], quiet=True, to_stderr=False)
    progress.begin([], TRIALS)
    with progress:
        finish(progress, TRIALS, clock, 100.0)
    assert terminal.getvalue() == ""


def test_a_terminal_shows_a_complete_sweep_that_is_widened(terminal, clock):
    progress = PhaseProgress("add", ["smooth"], quiet=False, to_stderr=False)
    there = [row(one, True) for one in TRIALS if one.member.arm == "smooth"]
    wider = [trial("smooth", 4.0, f) for f in (0.3, 0.5)]
    progress.begin(there, [])
    with progress:
        progress.begin(there, wider)
        finish(progress, wider, clock, 1.0)
    assert all(text in terminal.getvalue() for text in ("smooth", "10/10", "██"))


def test_the_cursor_comes_back_after_an_error(terminal, clock):
    progress = PhaseProgress("add", ["none", "smooth"], quiet=False, to_stderr=False)
    progress.begin([], TRIALS)
    with pytest.raises(KeyboardInterrupt), progress:
        raise KeyboardInterrupt
    assert terminal.getvalue().rstrip().endswith("\x1b[?25h")
