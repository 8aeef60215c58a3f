import json
import re
from html.parser import HTMLParser

from rankdecay.lab.experiment import write_merged_report, write_report
from rankdecay.lab.experiments.boundary import charts

MEGABYTE = 1_000_000


class _Page(HTMLParser):
    """Tag counts, the text by id, and the attributes that could fetch something."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.by_id, self.fetched, self.words, self._open = [], {}, [], "", None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self._open = dict(attrs).get("id", tag) if tag in ("script", "style") else None
        self.fetched += [(tag, name) for name, _ in attrs if name in ("src", "srcset", "poster", "onerror")]

    def handle_endtag(self, tag):
        self._open = None

    def handle_data(self, data):
        if self._open:
            self.by_id[self._open] = self.by_id.get(self._open, "") + data
        else:
            self.words += data


def _parse(path):
    page = _Page(path.read_text(encoding="utf-8"))
    return page, json.loads(page.by_id["run-data"])


def _section(path, name):
    text = path.read_text(encoding="utf-8")
    start = text.index(f'<section id="{name}">')
    return text[start : text.index("</section>", start)]


def test_one_file_with_words_tables_and_data(make_sweep):
    directory = make_sweep(["none", "l2", "prox", "uniform_attention"])
    path = write_report(directory)
    assert path == directory / "report.html"
    page, data = _parse(path)
    assert page.fetched == []
    assert "link" not in page.tags
    assert "needed the least data" in page.words
    assert "Whether the queries and keys need any decay." in _section(path, "controls")
    assert "rankdecay boundary --task add" in _section(path, "reproduce")
    assert "a made-up machine" in page.words
    assert [len(m["cells"]) for m in data["maps"]] == [5, 25, 25, 5]
    assert [m["strengths"] for m in data["maps"][:1]] == [[""]]
    assert len(data["runs"]) == 180
    cell = data["maps"][2]["cells"][0]
    assert [data["runs"][i]["seed"] for i in cell["runs"]] == [0, 1, 2]
    assert data["rows"] == ["15 %", "20 %", "27 %", "36 %", "48 %"]


def test_boundaries_are_a_table_with_intervals_bounds_and_edges(make_sweep):
    path = write_report(make_sweep(["none", "l2", "prox"], boundaries={"prox": 0.02}, strengths=[0.1, 0.3]))
    rows = re.findall(r'<tr><th scope="row">([^<]*)</th>(.*?)</tr>', _section(path, "figures"))
    assert [name for name, _ in rows] == ["no decay", "L2", "soft threshold (prox)"]
    cells = [re.findall(r"<td>(.*?)</td>", cells) for _, cells in rows]
    assert cells[2][0] == "≤ 15 %"
    assert cells[2][1].startswith("at most ")
    assert cells[0][0] == "&gt; 48 %"
    assert cells[0][2] == "—"
    assert "<small>the highest tried</small>" in cells[1][2]


def test_differences_name_the_reference_and_the_reading(make_sweep):
    text = _section(write_report(make_sweep(["l2", "prox"])), "differences")
    assert "Data of soft threshold (prox) / its data" in text
    assert "soft threshold (prox) needs less" in text


def test_one_decay_of_the_rest_needs_no_choice(make_sweep, shared_sweep):
    assert 'data-state="rest"' not in _section(write_report(make_sweep(["prox"])), "phase")
    text = _section(write_report(shared_sweep), "phase")
    assert '<option value="0.5">0.5</option>' in text


def test_hostile_names_stay_text(shared_sweep):
    page, data = _parse(write_report(shared_sweep))
    assert page.tags.count("script") == 3
    assert "img" not in page.tags
    assert data["arms"][4]["name"].startswith("<img")


def test_a_page_of_several_directories(make_sweep, tmp_path):
    first, second = make_sweep(["prox"], name="first"), make_sweep(["l2"], name="second", seeds=[0])
    path = write_merged_report([first, second], tmp_path / "merged.html")
    assert path == tmp_path / "merged.html"
    page, data = _parse(path)
    assert "2 directories, merged" in page.words
    assert "--out first" in page.words
    assert "--out second" in page.words
    assert str(second) in _section(path, "reproduce")
    assert [arm["name"] for arm in data["arms"]] == ["prox", "l2"]


def test_a_sweep_still_running(make_sweep):
    page, _ = _parse(write_report(make_sweep(["prox"], summary=False)))
    assert "This run is not complete: these are the results so far" in page.words


def test_a_sweep_that_has_only_begun(make_sweep):
    directory = make_sweep(["prox"], summary=False)
    (directory / "metrics.jsonl").unlink()
    page, data = _parse(write_report(directory))
    assert "This run is not complete." in page.words
    assert data["charts"] == []


def test_it_begins_at_the_boundary_of_the_reference(make_sweep):
    _, data = _parse(write_report(make_sweep(["l2", "prox"])))
    number, index = data["first"]
    assert data["arms"][data["maps"][number]["arm"]]["name"] == "prox"
    assert 0 < data["maps"][number]["cells"][index]["row"] < 4


def test_thousands_of_runs_stay_below_twelve_megabytes(make_sweep):
    path = write_report(make_sweep(seeds=range(12), evaluations=150))
    assert len(_parse(path)[1]["runs"]) == 2520
    assert path.stat().st_size < 12 * MEGABYTE


def test_curves_are_thinned_to_what_fits_with_their_ends(make_sweep, monkeypatch):
    directory = make_sweep(["prox"], strengths=[0.1], evaluations=101)
    _, data = _parse(write_report(directory))
    whole = data["runs"][0]
    monkeypatch.setattr(charts, "NUMBERS", 15 * (32 + 4 * 11))
    page, data = _parse(write_report(directory))
    assert "11 of up to 101 evaluations" in page.words
    thinned = data["runs"][0]
    assert len(data["pools"][thinned["at"]]) == 11
    for name in charts.CURVES:
        assert len(thinned["curves"][name]) == 11
        assert (thinned["curves"][name][0], thinned["curves"][name][-1]) == (
            whole["curves"][name][0], whole["curves"][name][-1]
        )  # fmt: skip


def test_a_run_without_curves_or_spectrum(make_sweep):
    directory = make_sweep(["prox"], strengths=[0.1])
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    short = [{k: v for k, v in row.items() if k not in ("curve", "spectrum", "spectrum_index")} for row in rows]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in short))
    _, data = _parse(write_report(directory))
    assert data["runs"][0]["curves"]["test_accuracy"] is None
    assert data["runs"][0]["spectrum"] == []
