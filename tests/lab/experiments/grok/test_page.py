import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np

from rankdecay.lab import report
from rankdecay.lab.experiments.grok import page
from rankdecay.lab.experiments.grok.read import read_run
from rankdecay.lab.report import write_report
from rankdecay.lab.report.style import _KNOWN, DARK_BACKGROUND, LIGHT_BACKGROUND, arm_styles

EVIL = "</script><script>window.owned=1</script><img src=x onerror=window.owned=1>&{{js}}"


class _Page(HTMLParser):
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


def _parse(directory):
    return _Page(write_report(directory).read_text(encoding="utf-8"))


def test_one_file_with_its_data(make_run):
    directory = make_run()
    assert write_report(directory) == directory / "report.html"
    parsed = _parse(directory)
    assert parsed.fetched == []
    assert "link" not in parsed.tags
    data = json.loads(parsed.by_id["run-data"])
    assert [arm["label"] for arm in data["arms"]][2:4] == ["tuned L2", "low-rank decay"]
    frames = json.loads(parsed.by_id["snapshot-data"])
    assert frames["steps"] == [0, 200, 400, 600, 800]
    assert np.shape(frames["frames"][0]["singular_values"]) == (12, 2, 2, 16)


def test_a_name_with_markup_stays_text(make_run):
    parsed = _parse(make_run(["low_rank", EVIL]))
    assert parsed.tags.count("script") == 4  # two of data, plotly, the page's own
    assert "img" not in parsed.tags
    assert json.loads(parsed.by_id["run-data"])["arms"][1]["name"] == EVIL


def test_null_figures_show_as_a_dash(make_run):
    text = write_report(make_run(["none", "low_rank"])).read_text(encoding="utf-8")
    row = re.search(r'<tr><th scope="row">no decay</th>(.*?)</tr>', text)
    assert row is not None
    assert row[1].startswith("<td>0 of 2 <small>0–66 %</small></td><td>—</td><td>0.080</td>")


def test_without_snapshots_the_page_says_so(make_run):
    text = write_report(make_run(snapshots=False)).read_text(encoding="utf-8")
    assert "step-slider" not in text.split("<script")[0]
    assert "no snapshots" in text
    assert 'id="accuracy-chart"' in text
    assert 'id="spectra-chart"' not in text


def test_a_run_in_progress_shows_what_was_measured(make_run):
    text = write_report(make_run(["low_rank"], summary=False)).read_text(encoding="utf-8")
    assert "This run is not complete." in text
    assert "0.990" in text  # the last test accuracy stands in the table


def test_a_run_that_has_only_begun(tmp_path):
    (tmp_path / "config.json").write_text('{"command": "grok"}')
    text = write_report(tmp_path).read_text(encoding="utf-8")
    assert "Nothing has been measured yet." in text
    assert "Does low-rank decay make" in text


def test_a_member_that_left_early_is_null_in_later_frames(make_run):
    directory: Path = make_run(["l2", "low_rank"], seeds=1)
    path = directory / "snapshots" / "00000800.npz"
    with np.load(path) as file:
        shorter = {name: file[name][1:] if name not in ("groups", "positions") else file[name] for name in file}
    np.savez(path, **shorter)
    frames = page.snapshot_data(read_run(directory))
    assert frames["members"] == [{"arm": 0, "seed": 0}, {"arm": 1, "seed": 0}]
    assert frames["frames"][-1]["singular_values"][0] is None
    assert frames["frames"][-1]["singular_values"][1] is not None


def test_too_many_snapshots_are_thinned_with_a_notice(make_run, monkeypatch):
    monkeypatch.setattr(page, "SNAPSHOT_NUMBERS", 1200)
    frames = page.snapshot_data(read_run(make_run(["low_rank"])))
    assert frames["steps"] == [0, 400, 800]
    assert "3 of the 5 snapshots" in frames["notices"][0]


def test_arm_colours_stand_out_from_both_backgrounds():
    for name, look in arm_styles([*_KNOWN, *"abcde"]).items():
        assert _contrast(look.light, LIGHT_BACKGROUND) >= 3, name
        assert _contrast(look.light, "#ffffff") >= 3, name
        assert _contrast(look.dark, DARK_BACKGROUND) >= 3, name


def test_an_unknown_arm_keeps_its_name_and_gets_a_colour_of_its_own():
    looks = arm_styles(["no_qk_norm", "new_arm", "low_rank", "newer_arm"])
    assert looks["new_arm"].label == "new_arm"
    assert len({look.light for look in looks.values()}) == 4


def test_the_page_has_the_backgrounds_the_colours_were_chosen_for():
    css = (Path(report.__file__).parent / "assets" / "page.css").read_text()
    assert f"--background: {LIGHT_BACKGROUND}" in css
    assert f"--background: {DARK_BACKGROUND}" in css


def _contrast(first, second):
    def luminance(colour):
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted([luminance(first), luminance(second)], reverse=True)
    return (high + 0.05) / (low + 0.05)
