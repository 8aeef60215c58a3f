"""What `make findings` makes: text between comments, claims that their rows bear out, E1 as far as it is run."""

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from rankdecay.lab.report.chart import Axis, Chart, Line

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import accelerators
import accelerators_findings
import boundary_findings
import claims
import findings
import margin_findings
import pictures
import schedule
import schedule_findings
import stored
import tuning

# --- text between comments ---


@pytest.fixture
def made(monkeypatch):
    monkeypatch.setitem(findings.NUMBERS, "twice", lambda word: word * 2)
    findings.made.cache_clear()
    yield findings.remade
    findings.made.cache_clear()


def test_a_number_is_made_on_its_line_and_a_table_on_lines_of_its_own(made):
    assert made("a <!-- findings: twice x -->old<!-- end --> b") == "a <!-- findings: twice x -->xx<!-- end --> b"
    assert made("<!-- findings: twice y -->\n<!-- end -->") == "<!-- findings: twice y -->\nyy\n<!-- end -->"
    text = made("<!-- findings: twice 'a b' -->\nold\nlines\n<!-- end -->")
    assert text == "<!-- findings: twice 'a b' -->\na ba b\n<!-- end -->"
    assert made(text) == text


def test_words_that_nothing_is_made_from_are_named(made):
    with pytest.raises(ValueError, match=r"'thrice'.*choose of .*twice"):
        made("<!-- findings: thrice x --><!-- end -->")


def test_rows_that_are_not_there_are_named(capsys, tmp_path):
    with pytest.raises(SystemExit):
        stored.command_line("", stored.store, {"table": print}, arguments=["table", str(tmp_path / "nothing")])
    assert "nothing: there is no such file or folder" in capsys.readouterr().err


def test_cells_say_how_many_seeds_they_are_of_where_these_differ(capsys, tmp_path):
    """Two seeds of one cell, one of which holds; one of another; none of the last."""
    runs = [(0.5, 1.0, 0, 0.98, 300), (0.5, 1.0, 1, 0.5, None), (0.5, 2.0, 0, 0.25, None), (0.8, 1.0, 0, 1.0, 100)]
    keys = ("train_fraction", "strength", "seed", "best_test_accuracy", "steps_to_generalise")
    (tmp_path / "config.json").write_text(
        json.dumps({"arms": [{"name": "l2"}], "settings": {"task": "add", "threshold": 0.95}})
    )
    rows = (json.dumps({"arm": "l2", "rest_decay": 1.0, **dict(zip(keys, run, strict=True))}) for run in runs)
    (tmp_path / "metrics.jsonl").write_text("".join(f"{row}\n" for row in rows))
    printed = []
    for table in (boundary_findings.cells, boundary_findings.steps):
        table(SimpleNamespace(directories=[tmp_path], rest=None, arms=None))
        printed.append(capsys.readouterr().out.splitlines()[-2:])
    assert printed == [
        ["| 0.8 | 1.00 |  |", "| 0.5 | 0.74 (2 of 2) | 0.25 |"],
        ["| 0.8 | 100 |  |", "| 0.5 | 300 (1 of 2) | — |"],
    ]


@pytest.fixture
def grid(tmp_path):
    """Two arms: one soonest at a strength with fewer runs, the other with a run that never held."""
    keys = ("arm", "strength", "train_fraction", "seed", "best_test_accuracy", "steps_to_generalise")
    runs = [
        *(("new", 1.0, size, seed, 0.99, 200) for size in (0.4, 0.5) for seed in (0, 1)),
        ("new", 2.0, 0.5, 0, 1.0, 100),
        ("new", 1.0, 0.3, 0, 0.1, None),
        ("new", 1.0, 0.3, 1, 0.1, None),
        *(("old", 3.0, 0.5, seed, 0.96, steps) for seed, steps in ((0, 400), (1, None))),
        *(("old", 3.0, 0.4, seed, 0.5, None) for seed in (0, 1)),
        *(("old", 3.0, 0.3, seed, 0.5, None) for seed in (0, 1)),
    ]
    arms = [{"name": "new"}, {"name": "old"}]
    (tmp_path / "config.json").write_text(json.dumps({"arms": arms, "settings": {"task": "add", "threshold": 0.95}}))
    rows = (json.dumps({"rest_decay": 1.0, "budget": 1000, **dict(zip(keys, run, strict=True))}) for run in runs)
    (tmp_path / "metrics.jsonl").write_text("".join(f"{row}\n" for row in rows))
    return boundary_findings.Sweep([tmp_path])


def test_steps_are_compared_over_the_same_seeds_and_a_run_that_never_held_counts_with_its_budget(grid):
    assert boundary_findings.fullest(grid, "new") == 1.0
    assert boundary_findings.alike(grid, "old", "new") == {0.4: 2000 / 400, 0.5: 1400 / 400}


def test_the_smallest_size_is_that_of_the_strength_with_the_most_seeds(grid):
    assert boundary_findings.reaching(grid, "new", 0.95) == (0.4, 1.0)
    assert boundary_findings.reaching(grid, "old", 0.95) == (0.5, 3.0)
    assert boundary_findings.reaching(grid, "old", 0.97) is None
    assert boundary_findings.smallest(grid, "new", 0.95, 2.0) == 0.5


# --- claims ---

CLAIM = claims.Claim("Group", "It holds", "in {twice 3}", "{twice 4}", "rankdecay grok", ("there",), "page.md", "holds")


@pytest.fixture
def rows(monkeypatch, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "config.json").write_text(json.dumps({"versions": {"commit": "abc1234"}}))
    monkeypatch.setattr(claims, "DATA", tmp_path)

    def index(*some):
        monkeypatch.setattr(claims, "CLAIMS", some)
        return claims.index(lambda words: f"<{words}>")

    return index


def test_a_claim_is_a_row_with_what_it_stands_on(rows):
    line = rows(CLAIM, replace(CLAIM, status="open", data=("lacking",))).splitlines()
    assert line[4].split(" | ")[0] == "| [It holds](page.md)"
    assert line[4].split(" | ")[1:4] == ["in <twice 3>", "<twice 4>", "`rankdecay grok`"]
    assert line[4].endswith(" | [there](../data/there) | abc1234 | **holds** |")
    assert "| `lacking` | — | **open** |" in line[5]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"evidence": "in 9 of {twice 3}"}, "a number that is typed"),
        ({"interval": "0.5"}, "a number that is typed"),
        ({"data": ("there", "lacking")}, "said to be 'holds' without rows: lacking"),
        ({"when": lambda: False}, "do not bear out 'It holds' as 'holds'"),
        ({"status": "true"}, "choose of holds"),
    ],
)
def test_a_claim_that_its_rows_do_not_bear_out_is_refused(rows, change, words):
    with pytest.raises(ValueError, match=words):
        rows(replace(CLAIM, **change))


def test_every_directory_says_its_commit_or_is_named(rows):
    commits = {"b": "def5678", "a": None}
    for name, commit in commits.items():
        (claims.DATA / "there" / name).mkdir()
        said = json.dumps({"versions": {"commit": commit} if commit else None})
        (claims.DATA / "there" / name / "config.json").write_text(said)
    assert "| def5678, abc1234, not recorded (there/a) | **holds** |" in rows(CLAIM)


def test_names_with_digits_are_no_numbers(rows):
    assert "L2 of GPT-2" in rows(replace(CLAIM, evidence="L2 of GPT-2"))


# --- arms at equal margins ---


def test_arms_are_compared_in_the_data_sets_that_both_have_at_a_margin(monkeypatch, tmp_path):
    def write(run, arm, sets, cosines):
        at = {"margin": 100.0, "sets": sets, "each": {"cosine_nuclear": cosines}}
        (tmp_path / run).mkdir()
        (tmp_path / run / "summary.json").write_text(json.dumps({"arms": [{"name": arm, "at": [at]}]}))

    monkeypatch.setattr(margin_findings, "DATA", tmp_path)
    write("finite", "separate", [0, 1, 3], [0.9, 0.8, 0.7])
    write("adam", "adam", [1, 2, 3], [0.7, 0.1, 0.5])
    assert margin_findings.differences("adam", "adam", 1e2) == pytest.approx([-0.1, -0.2])
    assert margin_findings.differences("adam", "adam", 1e3) == []
    assert stored.interval([1.0, 2.0, 3.0]) == "2.000 ± 2.484"  # 4.303 / √3


# --- E1, as far as it is run ---

PROTOCOL = replace(schedule.TINY, horizons=(40, 80))


def _write(directory, stage, rows):
    (directory / stage).mkdir(parents=True, exist_ok=True)
    (directory / stage / "config.json").write_text("{}")
    (directory / stage / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _row(arm, seed, size):
    """A run that holds after 20 steps and a few; smooth is as quick as the ramp and the radial part."""
    steps = 20 + seed % 10 + (20 if arm in ("l2", "raise_rank") else 0)
    return {
        "arm": arm, "seed": seed, "train_examples": size, "strength": 1.0, "rest_decay": 2.0,
        "steps_to_generalise": steps, "test_accuracy": 0.99, "stable_rank": 2.0, "query_norm": 0.3,
        "angular_step": 0.01, "angular_step_after": 0.02, "rotation": 0.1,
    }  # fmt: skip


def _shown(capsys, table, directory):
    schedule_findings.main([table, str(directory)])
    return capsys.readouterr().out


@pytest.fixture
def e1(tmp_path, monkeypatch):
    monkeypatch.setattr(schedule_findings, "DATA", tmp_path)
    schedule_findings.result.cache_clear()
    return tmp_path


def test_before_and_while_tuning_nothing_is_claimed(e1, capsys):
    assert "Not run yet" in _shown(capsys, "state", e1)
    _write(e1, "tune", [_row("smooth", 100, 60)])
    assert "under way: 1 runs" in _shown(capsys, "state", e1)
    for table in ("tuned", "test", "contrasts", "secondary"):
        assert _shown(capsys, table, e1).startswith("(")
    assert schedule_findings.words("status") == "open"
    assert schedule_findings.words("l2_ramp/l2") == "—"


def test_contrasts_are_printed_when_every_held_out_run_of_theirs_is_there_and_not_before(e1, capsys):
    arms = {
        arm: {
            "name": arm, "strength": 1.0, "rest_decay": 2.0, "restricted_mean_time": 30.0,
            "strengths": [0.5, 1.0] if arm == "l2" else [0.5, 1.0, 2.0],
        }
        for arm in schedule.GRIDS
    }  # fmt: skip
    frozen = {"protocol": asdict(PROTOCOL), "low_rank": "smooth", "arms": arms}
    (e1 / "tuned.json").write_text(json.dumps(frozen))
    _write(e1, "tune", [_row("smooth", 100, 60)])
    rows = [_row(arm, seed, size) for arm in arms for seed in PROTOCOL.test_seeds for size in PROTOCOL.test_sizes]
    of_l2 = next(row for row in rows if row["arm"] == "l2")
    _write(e1, "test", [row for row in rows if row is not of_l2])
    assert f"Of {len(rows)} held-out runs {len(rows) - 1} are there" in _shown(capsys, "state", e1)
    assert "| l2 | 0.5, 1 | 1 | 2 | 30 | no: strength |" in _shown(capsys, "tuned", e1)
    assert _shown(capsys, "contrasts", e1).startswith("(")
    assert schedule_findings.words("headline") == "not run to the end"
    _write(e1, "test", [row for row in rows if row["arm"] != "yoked"])  # which no contrast names
    assert "not run to the end: `yoked`." in _shown(capsys, "state", e1)
    assert schedule_findings.words("status") == "holds"
    schedule_findings.result.cache_clear()
    _write(e1, "test", rows)
    table = _shown(capsys, "contrasts", e1)
    assert "| 80 | smooth / l2_ramp | 1.000 (1.000–1.000) |" in table
    assert table.count("\n") == 2 + 4 * 2
    assert "0.01 | 0.02 | 0.1 |" in _shown(capsys, "test", e1)
    assert schedule_findings.words("status") == "holds"
    assert schedule_findings.words("low_rank/raise_rank").startswith("0.5")

    assert "| yoked | 1.000 (1.000–1.000) |" in _shown(capsys, "others", e1)
    assert "l2_ramp" not in _shown(capsys, "others", e1)
    assert _shown(capsys, "secondary", e1).startswith("(")
    half = [_row("elastic", seed, PROTOCOL.secondary_size) for seed in PROTOCOL.test_seeds]
    _write(e1, "secondary", [row | {"steps_to_generalise": row["steps_to_generalise"] / 2} for row in half])
    assert "| elastic | smooth | 0.50 (0.50–0.50) |" in _shown(capsys, "secondary", e1)
    assert schedule_findings.words("variant:elastic") == "0.50 (0.50–0.50)"


# --- accelerators, as far as they are run ---


def test_an_accelerator_is_claimed_by_its_contrast_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(accelerators_findings, "DATA", tmp_path)
    directory = tmp_path / "selection"
    directory.mkdir()

    def shown(table):
        accelerators_findings.result.cache_clear()
        accelerators_findings.main([table, str(directory)])
        return capsys.readouterr().out

    def status(arm, against="learning_rate"):
        return accelerators_findings.words("status", arm, against)

    assert "Not run yet" in shown("state")
    assert all(shown(table).startswith("(") for table in ("tuned", "test", "contrasts", "cost"))
    assert status("muon") == "open"
    steps = {"learning_rate": 800, "muon": 400, "orthograd": 1200, "l2": 700, "smooth": 790}
    own = {"rest_decay": 2.0, "restricted_mean_time": 30.0}
    arms = {arm: {"name": arm, "strength": 1.0, "strengths": [1.0], **own} for arm in steps}
    protocol = replace(accelerators.PROTOCOLS["selection"], test_seeds=tuple(range(200, 205)))
    frozen = {"protocol": asdict(protocol), "arms": arms}
    (directory / "tuned.json").write_text(json.dumps(frozen))
    rows = [
        {
            "arm": arm,
            "strength": 1.0,
            "rest_decay": 2.0,
            "seed": seed,
            "train_examples": 1250,
            "steps_to_generalise": at + 40 * (seed % 3) + (200 * (seed % 2) if arm == "l2" else 0),
            "test_accuracy": 0.99 if arm != "muon" else 0.5,
        }
        for arm, at in steps.items()
        for seed in protocol.test_seeds
    ]
    _write(directory, "test", rows[:-1])  # the last run of smooth lacks
    assert "5 of 14 arms; held-out runs are all there of 4." in shown("state")
    assert "| muon | 1 | 2 | 5 | " in shown("test")
    assert "smooth" not in shown("test")
    assert [status(arm) for arm in ("muon", "orthograd", "l2", "smooth", "grokfast_ema")] == [
        "holds with a condition", "contradicted", "open", "open", "open"
    ]  # fmt: skip
    assert accelerators_findings.words("still", "muon") == "0 of 5"
    assert accelerators_findings.words("still") == "15 of 20"
    assert accelerators_findings.words("lost") == accelerators_findings.words("lost", "all") == "5 of 20"
    assert accelerators_findings.words("lost", "muon") == "5 of 5"
    assert accelerators_findings.words("time", "smooth") == accelerators_findings.words("ratio", "smooth") == "—"
    assert "| muon / learning_rate | 0.5" in shown("contrasts")
    assert accelerators_findings.words("milliseconds", "muon") == "—"
    _write(directory, "tune", rows[:7])
    assert accelerators_findings.in_tuning("learning_rate", "1") == "5 of 5"
    assert accelerators_findings.in_tuning("learning_rate", "1", "4") == "—"
    cost = {"clock": "thread_time", "places": 4, "arms": {"muon": {"milliseconds": 8.25, "of_adamw": 1.4}}}
    (directory / "cost.json").write_text(json.dumps(cost))
    assert "| muon | 8.25 | 1.40 |" in shown("cost")
    assert accelerators_findings.words("milliseconds", "muon") == "8.2"
    curve = {"step": [760, 800, 840, 880], "test_accuracy": [0.9, 0.96, 0.96, 0.97]}
    both = {"same": 800, "an evaluation later": 840, "not by the other": None}
    _write(directory, "test", [{"steps_to_generalise": steps, "curve": curve} for steps in both.values()])
    shares = [accelerators_findings.if_test_decided(what) for what in ("same", "near", "mean")]
    assert shares == ["33%", "67%", "-20"]


def test_a_strength_at_an_edge_is_one_of_those_tried_at_its_decay_of_the_rest():
    def at_edge(strength, rest, tried):
        rows = [{"arm": "muon", "strength": s, "rest_decay": r} for s, r in tried]
        own = {"name": "muon", "strength": strength, "rest_decay": rest, "strengths": sorted({s for s, _ in tried})}
        return "strength" in tuning.edges(own, rows)

    first = [(1.0, 2.0), (2.0, 2.0), (4.0, 2.0)]
    assert [at_edge(s, 2.0, first) for s in (1.0, 2.0, 4.0)] == [True, False, True]
    assert not at_edge(2.0, 4.0, [*first, (2.0, 4.0)]), "inside where the strengths were compared"
    assert at_edge(1.0, 4.0, [*first, (1.0, 4.0)])
    assert at_edge(2.0, 4.0, [*first, (2.0, 4.0), (4.0, 4.0)]), "the least of those tried at this decay"
    assert not at_edge(0.0, 4.0, [(0.0, 2.0), (0.0, 4.0)]), "an arm without a strength"


# --- pictures ---


def test_the_picture_of_the_accelerators_has_a_row_for_every_arm(monkeypatch, tmp_path):
    monkeypatch.chdir(findings.ROOT)
    charts = pictures.accelerators()
    assert [len({line.arm for line in chart.lines} - {None}) for chart in charts] == [len(accelerators.GRIDS)] * 4
    assert all(0 <= line.x[0] <= 1 for line in charts[1].lines)
    pictures.DRAWN["accelerators"](charts, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 0
    monkeypatch.setattr(pictures.accelerators_findings, "DATA", tmp_path)
    assert pictures.accelerators() == []


def test_a_picture_is_stale_when_its_rows_or_its_file_have_changed(monkeypatch, tmp_path):
    y = [1.0, 2.0]
    chart = Chart("a", "a", Axis("x"), Axis("y"), [Line("l2", [0, 1], y, arm="l2")])
    monkeypatch.setattr(pictures, "RUNS", {})
    monkeypatch.setattr(pictures, "CHARTS", {"a": lambda: [chart], "later": list})
    monkeypatch.setattr(pictures, "MAPS", {})
    monkeypatch.setattr(pictures, "IMAGES", tmp_path)
    monkeypatch.setattr(pictures, "RECORD", tmp_path / "drawn.json")
    path = str(tmp_path / "a.png")
    assert pictures.check() == [path]
    assert pictures.draw_all() == [path]
    assert pictures.check() == pictures.draw_all() == []
    y[1] = 2.00000001  # below what a picture can show
    assert pictures.check() == []
    y[1] = 2.1
    assert pictures.check() == [path]
    pictures.draw_all()
    Path(path).write_bytes(b"drawn by hand")
    assert pictures.check() == [path]
    pictures.draw_all()
    assert pictures.draw_all(["a"]) == [path]
    with pytest.raises(ValueError, match="no picture is called b: choose of a, later"):
        pictures.draw_all(["b"])
    values = [[0.5, 0.0], [0.1, 0.4]]
    monkeypatch.setattr(pictures, "MAPS", {"map": lambda: [("one", values)]})
    assert pictures.check() == [drawn := str(tmp_path / "map.png")]
    assert pictures.draw_all() == [drawn]
    values[1][0] = 0.2
    assert pictures.check() == [drawn]


# --- schedules ---


@pytest.mark.parametrize(
    ("row", "never"),
    [
        ({"arm": "after_memorising", "acted_at": None, "memorised_at": None}, True),
        ({"arm": "truncate", "acted_at": 40, "memorised_at": 40}, False),
        ({"arm": "smooth", "outcome": "budget", "memorised_at": None}, False),
    ],
)
def test_a_schedule_that_never_acted_is_told_by_the_row(row, never):
    assert boundary_findings.never_acted(row) is never
