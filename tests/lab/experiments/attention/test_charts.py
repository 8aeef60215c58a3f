"""The charts of the page: their lines are the numbers of the summary and the rows, and each choice is offered."""

import json
import re

import pytest

from rankdecay.cli import main
from rankdecay.lab.errors import SettingError
from rankdecay.lab.experiment import Chart, Html, draw_figure, load, read, write_report
from rankdecay.lab.experiments.attention.charts import _shade, make_sections

EVIL = "<img src=x onerror=window.owned=1></script><b>%{y}$"


def stored_run(directory, command="language"):
    return read(load(command), [directory])


def charts_of(directory) -> dict[str, Chart]:
    parts = [part for section in make_sections(stored_run(directory)) for part in section.parts]
    return {part.name: part for part in parts if isinstance(part, Chart)}


def lines_at(chart: Chart, **state: str):
    """The lines that a reader sees after some choices."""
    first = {choice.name: choice.first for choice in chart.choices} | state
    return [line for line in chart.lines if all(first[name] == at for name, at in line.where.items())]


def offered(chart: Chart) -> list[str]:
    return [choice.name for choice in chart.offered]


def visible(text):
    """A page without its scripts and styles."""
    return re.sub(r"<(script|style).*?</\1>", "", text, flags=re.DOTALL)


def test_ranks_and_losses_are_those_of_the_summary(make_experiment):
    directory = make_experiment()
    cells = json.loads((directory / "summary.json").read_text())["arms"]
    charts = charts_of(directory)
    untrained, *arms = lines_at(charts["rank"], part="value_output", measure="effective_rank", layer="2")
    assert [line.arm for line in arms] == ["l2", "low_rank"]
    assert list(untrained.y) == pytest.approx([cells[0]["untrained"][1]["value_output"]["effective_rank"]] * 2)
    for line in arms:
        own = [cell for cell in cells if cell["name"] == line.arm]
        assert line.x == [cell["strength"] for cell in own]
        assert line.y == [cell["layers"][1]["value_output"]["effective_rank"] for cell in own]
    line = lines_at(charts["quality"])[0]
    own = [cell for cell in cells if cell["name"] == "l2"]
    assert line.y == [cell["loss"] for cell in own]
    assert line.low == pytest.approx([cell["loss"] - cell["loss_error"] for cell in own])
    assert line.words[0].startswith(f"loss {own[0]['loss']:.4f} ± {own[0]['loss_error']:.4f}, accuracy ")
    line = lines_at(charts["cost"], quality="accuracy")[1]
    assert line.x == [cell["mean"]["query_key"]["pseudo_rank"] for cell in own]
    assert line.y == [cell["accuracy"] for cell in own]
    assert line.tags == ["0", "0.1", "1", "10"]
    assert not lines_at(charts["rank"], part="query", measure="imbalance")  # a matrix has none


def test_curves_go_from_the_untrained_value_to_the_last(make_experiment):
    directory = make_experiment()
    cell = json.loads((directory / "summary.json").read_text())["arms"][1]
    charts = charts_of(directory)
    assert set(charts) == {"rank", "quality", "cost", "curve", "layer-0", "layer-1", "layer-2", "layer-3"}
    line = lines_at(charts["layer-0"])[1]
    assert line.label == "decay 0.1"
    assert line.x == [0, 50, 100, 150, 200]
    ends = [cell[when]["query_key"]["pseudo_rank"] for when in ("untrained_mean", "mean")]
    assert [line.y[0], line.y[-1]] == pytest.approx(ends)
    assert lines_at(charts["layer-3"])[1].y[-1] == pytest.approx(cell["layers"][2]["query_key"]["pseudo_rank"])
    assert lines_at(charts["curve"], curve="train_loss")[0].y[0] is None  # nothing is trained before step 1
    assert charts["layer-1"].y == charts["layer-2"].y  # on one scale


def test_a_curve_is_of_the_seeds_that_ended(make_experiment):
    chart = charts_of(make_experiment(diverged=[("l2", 10.0, 1)]))["curve"]
    assert lines_at(chart)[-1].x[-1] == 200
    assert [line.x[-1] for line in lines_at(charts_of(make_experiment(runs=3))["curve"])] == [200, 200, 150]


def test_only_what_varies_is_a_choice(make_experiment):
    charts = charts_of(make_experiment(("l2",), accuracy=False, layers=1))
    assert [offered(charts[name]) for name in charts] == [["part", "measure"], [], ["part", "measure"], ["curve"],
                                                         ["part", "measure"]]  # fmt: skip
    directory = make_experiment(mlp_decays=(0.0, 0.1), norms=(False, True))
    charts = charts_of(directory)
    assert offered(charts["rank"]) == ["part", "measure", "layer", "norm", "mlp"]
    assert offered(charts["cost"]) == ["part", "measure", "layer", "norm", "mlp", "quality"]
    assert offered(charts["layer-1"]) == ["trained", "norm", "mlp", "part", "measure"]
    assert charts["rank"].choices[-1].first == "0.1"
    text = visible(write_report(directory).read_text())
    layers = text[text.index('id="layers"') : text.index('id="figures"')]
    assert layers.count('data-state="part"') == 1  # what its charts share is asked once


def test_strengths_go_from_grey_to_warm():
    assert [_shade(strength, (0.0, 0.1, 1.0, 10.0)) for strength in (0.0, 0.1, 1.0, 10.0)] == pytest.approx(
        [0, 1 / 3, 2 / 3, 1]
    )


def test_the_map_has_every_pair_of_decays(make_experiment):
    directory = make_experiment(mlp_decays=(0.0, 0.1), diverged=[("l2", 10.0, 0), ("l2", 10.0, 1)])
    [html] = [
        part for section in make_sections(stored_run(directory)) if section.name == "mlp" for part in section.parts
    ]
    assert isinstance(html, Html)
    cells = html.data["map"]
    assert len(cells) == 14
    assert [cell["quality"] for cell in cells if cell["loss"] is None] == ["diverged"] * 2
    assert "mlp-chart" not in visible(write_report(make_experiment()).read_text())


@pytest.mark.parametrize("command", ["recall", "language", "vision"])
def test_words_and_table_are_there_without_a_script(make_experiment, command):
    directory = make_experiment(command=command, norms=(False, True), diverged=[("l2", 10.0, 1)])
    text = visible(write_report(directory).read_text())
    cell = json.loads((directory / "summary.json").read_text())["arms"][0]
    assert f"rankdecay {command}" in text
    assert "Decay of attention lowered the pseudo rank" in text
    assert f"{cell['loss']:.4f} <small>± {cell['loss_error']:.4f}</small>" in text
    for words in ("untrained 0.880", "1 diverged", "untrained 0.935 W_Q, W_K", "low-rank decay (prox, per head)"):
        assert words in text
    assert "{{" not in text


def test_an_experiment_that_goes_on(make_experiment):
    text = visible(write_report(make_experiment(runs=3)).read_text())
    assert "not complete" in text
    assert "Ended so far: 2 runs." in text
    assert text.count('<th scope="row">L2</th>') == 2
    directory = make_experiment(summary=False)
    (directory / "metrics.jsonl").unlink()
    assert "Nothing is measured yet" in visible(write_report(directory).read_text())


def test_names_are_only_ever_text(make_experiment):
    text = write_report(make_experiment(("l2", EVIL), mlp_decays=(0.0, 0.1))).read_text()
    assert EVIL not in text
    assert "<img" not in visible(text)


# --- the figure ---


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_every_format_from_the_command_line(make_experiment, tmp_path, suffix, capsys):
    path = tmp_path / f"figure.{suffix}"
    assert main(["report", str(make_experiment()), "--figure", str(path)]) in (0, None)
    assert path.read_bytes().startswith({"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[suffix])
    assert str(path) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "panels"),
    [
        ({"norms": (False, True), "mlp_decays": (0.0, 0.1)}, 6),
        ({"strengths": {"l2": (0.0,), "low_rank": (1.0,)}}, 3),
        ({"mlp_decays": (None,), "accuracy": False, "seeds": 1}, 3),
        ({"runs": 3}, 3),
        ({"diverged": [("l2", 10.0, 0), ("l2", 10.0, 1)]}, 3),
    ],
)
def test_whatever_the_grid_the_figure_is_the_same_twice(make_experiment, tmp_path, options, panels):
    directory = make_experiment(("l2", "low_rank", "costs $5"), **options)
    first, second = (draw_figure([directory], tmp_path / name).read_bytes() for name in ("a.svg", "b.svg"))
    assert first == second
    assert first.count(b'id="axes_') == panels


def test_nothing_to_draw(make_experiment, tmp_path):
    with pytest.raises(SettingError, match="nothing to draw"):
        draw_figure([make_experiment(runs=1)], tmp_path / "figure.png")
