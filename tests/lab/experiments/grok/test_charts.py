"""What the page and the figure are made from, and the page of a run in every state."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from rankdecay.lab.errors import SettingError
from rankdecay.lab.experiment import draw_figure, load, read, write_report
from rankdecay.lab.experiments.grok import charts
from rankdecay.lab.report.chart import Chart

EVIL = "</script><script>window.owned=1</script><img src=x onerror=window.owned=1>&{{js}}"


def stored(directory):
    return read(load("grok"), [directory])


def drawn(directory):
    parts = [part for section in charts.sections(stored(directory)) for part in section.parts]
    return {part.name: part for part in parts if isinstance(part, Chart)}


class Page(HTMLParser):
    """Tag counts, element texts by id, and the attributes that could fetch something."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.by_id, self.fetched, self._open = [], {}, [], None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self._open = dict(attrs).get("id")
        self.fetched += [(tag, name) for name, _ in attrs if name in ("src", "srcset", "poster", "onerror")]

    def handle_data(self, data):
        if self._open:
            self.by_id[self._open] = self.by_id.get(self._open, "") + data


# --- chart data ---


def test_a_thin_line_per_seed_and_a_bold_median(make_run):
    chart = drawn(make_run(["l2", "low_rank"], seeds=3))["accuracy"]
    lines = [line for line in chart.lines if line.where == {"accuracy": "test_accuracy"} and line.arm == "low_rank"]
    assert [line.mark for line in lines] == ["thin", "thin", "thin", "line"]
    assert {line.label for line in lines} == {"low-rank decay, smooth"}
    *seeds, middle = lines
    assert middle.x == [0, 200, 400, 600, 800]
    assert middle.y == np.median([line.y for line in seeds], axis=0).tolist()
    assert middle.words[2].endswith(", 3 seeds)")


def test_one_seed_is_its_own_median(make_run):
    lines = drawn(make_run(["low_rank"], seeds=1))["accuracy"].lines
    assert {line.mark for line in lines} == {"line"}
    assert "seeds" not in lines[0].words[0]


def test_only_what_was_measured_is_offered(make_run):
    directory = make_run(["none", "l2"])
    offered = {name: list(chart.choices[0].options) for name, chart in drawn(directory).items()}
    assert offered == {
        "accuracy": ["test_accuracy", "train_accuracy"],
        "rank": list(charts.RANKS),
        "share": ["tangential_share", "radial_share"],
    }
    assert {line.arm for line in drawn(directory)["share"].lines} == {"l2"}  # without decay there is no line
    share = drawn(make_run(["none"]))["share"]
    assert not share.lines
    assert "not recorded" in share.empty


@pytest.mark.parametrize(
    ("settings", "label"),
    [
        ({"rule": "prox"}, "low-rank decay, prox"),
        ({"rule": "newton_schulz"}, "low-rank decay, Newton–Schulz"),
        ({"rule": "sharp"}, "low-rank decay, sharp"),
        ({}, "low-rank decay"),
    ],
)
def test_the_label_of_low_rank_states_its_rule(settings, label):
    assert charts.styles(settings)["low_rank"].label == label


# --- through time ---


def test_a_frame_per_snapshot_and_a_row_per_member(make_run):
    time = charts.time_data(stored(make_run()))
    assert time["steps"] == [0, 200, 400, 600, 800]
    assert time["groups"] == ["1st + 2nd", "1st + 3rd", "2nd + 4th"]
    assert time["members"][:3] == [{"arm": 0, "seed": 0}, {"arm": 0, "seed": 1}, {"arm": 1, "seed": 0}]
    assert np.shape(time["frames"][0]["singular_values"]) == (12, 2, 2, 16)
    assert time["attention_shape"] == [2, 2, 3, 5]


def test_a_member_that_left_early_is_null_in_later_frames(make_run):
    directory = make_run(["l2", "low_rank"], seeds=1)
    path = directory / "snapshots" / "00000800.npz"
    with np.load(path) as file:
        shorter = {name: file[name][1:] if name not in ("groups", "positions") else file[name] for name in file}
    np.savez(path, **shorter)
    time = charts.time_data(stored(directory))
    assert time["members"] == [{"arm": 0, "seed": 0}, {"arm": 1, "seed": 0}]
    assert time["frames"][-1]["singular_values"][0] is None
    assert time["frames"][-1]["singular_values"][1] is not None
    assert set(charts.final_spectrum(stored(directory))) == {"l2", "low_rank"}  # each at its own last snapshot


def test_too_many_snapshots_are_thinned_with_a_notice(make_run, monkeypatch):
    monkeypatch.setattr(charts, "SNAPSHOT_NUMBERS", 1200)
    run = stored(make_run(["low_rank"]))
    assert charts.time_data(run)["steps"] == [0, 400, 800]
    assert "3 of the 5 snapshots" in run.notices[0]


def test_only_the_newest_snapshot_may_be_unreadable(make_run):
    directory = make_run(["l2"])
    (directory / "snapshots" / "00000800.npz").write_bytes(b"PK half a file")
    run = stored(directory)
    assert charts.time_data(run)["steps"] == [0, 200, 400, 600]
    assert "00000800.npz" in run.notices[0]
    (directory / "snapshots" / "00000200.npz").write_bytes(b"PK half a file")
    with pytest.raises(SettingError, match=r"00000200\.npz"):
        charts.time_data(stored(directory))


# --- the page ---


def test_one_file_with_its_data(make_run):
    directory = make_run()
    page = Page(write_report(directory).read_text(encoding="utf-8"))
    assert page.fetched == []
    assert "link" not in page.tags
    data = json.loads(page.by_id["run-data"])
    assert [arm["label"] for arm in data["arms"]][2:4] == ["tuned L2", "low-rank decay, smooth"]
    assert data["time"]["steps"] == [0, 200, 400, 600, 800]


def test_a_name_with_markup_stays_text(make_run):
    page = Page(write_report(make_run(["low_rank", EVIL])).read_text(encoding="utf-8"))
    assert page.tags.count("script") == 3  # data, plotly, the page's own
    assert "img" not in page.tags
    assert json.loads(page.by_id["run-data"])["arms"][1]["name"] == EVIL


def test_null_figures_show_as_a_dash(make_run):
    text = write_report(make_run(["none", "low_rank"])).read_text(encoding="utf-8")
    row = re.search(r'<tr><th scope="row">no decay</th>(.*?)</tr>', text)
    assert row is not None
    assert row[1].startswith("<td>0 of 2 <small>0–66 %</small></td><td>—</td><td>8.0%</td>")


def test_a_run_in_progress_shows_what_was_measured(make_run):
    directory = make_run(["none", "low_rank"], summary=False, snapshots=False)
    with (directory / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1000, "arm": "l2", "se')
    text = write_report(directory).read_text(encoding="utf-8").split("<script")[0]
    assert "This run is not complete" in text
    assert "cut short" in text
    assert "Low-rank decay, smooth, generalised in 2 of 2 seeds (median 600 steps) within 800 steps" in text
    assert "<td>99.0%</td>" in text
    assert "step-slider" not in text
    assert "no snapshots" in text


def test_a_run_that_has_only_begun(tmp_path):
    (tmp_path / "config.json").write_text('{"command": "grok"}')
    text = write_report(tmp_path).read_text(encoding="utf-8")
    assert "Nothing is measured yet." in text
    assert "Does low-rank decay make" in text
    with pytest.raises(SettingError, match="nothing to draw yet"):
        draw_figure([tmp_path], tmp_path / "figure.png")


def test_a_row_of_something_else_is_refused(make_run):
    directory = make_run(["l2"])
    with (directory / "metrics.jsonl").open("a") as file:
        file.write('{"arm": "l2", "loss": 1.0}\n')
    with pytest.raises(SettingError, match=r"metrics\.jsonl, line 11: not a row"):
        stored(directory)


# --- the figure ---


def test_final_spectrum_is_normalised_and_a_matrix_held_at_zero_has_none(make_run):
    found = charts.final_spectrum(stored(make_run(["low_rank", "uniform_attention"])))
    assert list(found) == ["low_rank"]
    assert found["low_rank"].shape == (16,)
    assert found["low_rank"][0] == 1


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_every_format(make_run, tmp_path, suffix):
    path = draw_figure([make_run()], tmp_path / f"figure.{suffix}")
    start = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[suffix]
    assert path.read_bytes().startswith(start)


def test_the_same_run_gives_the_same_bytes(make_run, tmp_path):
    run = make_run(["l2", "low_rank"])
    first, second = (draw_figure([run], tmp_path / name) for name in ("a.svg", "b.svg"))
    assert first.read_bytes() == second.read_bytes()


@pytest.fixture
def panels(monkeypatch):
    """The charts of every figure that is drawn."""
    from rankdecay.lab.report import figure

    found = []
    monkeypatch.setattr(figure, "draw", lambda charts, styles, path: found.append(charts) or path)
    return found


def test_the_figure_has_accuracy_rank_and_spectra(make_run, tmp_path, panels):
    draw_figure([make_run(["l2", "low_rank"])], tmp_path / "figure.png")
    assert [chart.title.partition(",")[0] for chart in panels[0]] == [
        "Test accuracy",
        "Stable rank of W_Q",
        "Singular values at the end",
    ]
    for chart in panels[0]:
        assert [line.arm for line in chart.lines] == ["l2", "low_rank"]
    assert panels[0][0].lines[0].low is not None


def test_the_figure_of_a_run_without_snapshots_or_summary(make_run, tmp_path, panels):
    draw_figure([make_run(["low_rank"], summary=False, snapshots=False)], tmp_path / "figure.png")
    assert [chart.y.title for chart in panels[0]] == ["Test accuracy", "Stable rank of W_Q, W_K"]
