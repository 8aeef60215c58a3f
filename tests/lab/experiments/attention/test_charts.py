import json
import re

import pytest
from rankdecay.lab.experiments.attention.experiment import print_summary
from rankdecay.lab.experiments.attention.read import read_grid

from rankdecay.lab.experiments.attention import page
from rankdecay.lab.report import write_report

EVIL = "<img src=x onerror=window.owned=1></script><b>%{y}$"


def visible(text):
    """A page without its scripts and styles."""
    return re.sub(r"<(script|style).*?</\1>", "", text, flags=re.DOTALL)


def data_of(text):
    return json.loads(re.search(r'id="run-data">(.*?)</script>', text, re.DOTALL)[1])


@pytest.mark.parametrize("command", ["recall", "language", "vision"])
def test_the_three_commands_have_this_page(make_experiment, command):
    text = write_report(make_experiment(command=command)).read_text()
    assert f"rankdecay {command}" in visible(text)
    assert 'id="rank-chart"' in text


def test_the_words_and_the_table_are_there_without_a_script(make_experiment):
    directory = make_experiment(norms=(False, True), diverged=[("l2", 10.0, 1)])
    text = visible(page.render(directory))
    assert "Decay of attention lowered the pseudo rank" in text
    assert text.count("<tr>") - 1 >= 14
    cell = read_grid(directory).cells[0]
    assert f"{cell['loss']:.4f} <small>± {cell['loss_error']:.4f}</small>" in text
    assert "untrained 0.880" in text
    assert "1 diverged" in text
    assert "<small>W_Q, W_K</small>" in text
    assert "Tokens per second" in text
    assert "{{" not in text


def test_columns_and_choices_of_what_varies_alone(make_experiment):
    text = visible(page.render(make_experiment(("l2",), accuracy=False, layers=1)))
    assert "Accuracy" not in text
    assert "accuracy</option>" not in text
    assert 'data-state="layer"' not in text
    assert 'data-state="norm"' not in text
    assert 'data-state="mlp"' not in text
    assert 'id="mlp" hidden' in text
    several = visible(page.render(make_experiment(mlp_decays=(0.0, 0.1), norms=(False, True))))
    for state in ("layer", "norm", "mlp", "mapped", "trained", "part", "measure"):
        assert f'data-state="{state}"' in several
    assert '<option value="0.1" selected>' in several


def test_the_charts_have_the_numbers_of_the_summary(make_experiment):
    directory = make_experiment()
    data = data_of(page.render(directory))
    cells = {(data["arms"][cell["arm"]]["name"], cell["strength"]): cell for cell in data["cells"]}
    for expected in read_grid(directory).cells:
        cell = cells[expected["name"], expected["strength"]]
        assert cell["loss"] == pytest.approx(expected["loss"], rel=1e-3)
        assert cell["words"].startswith(f"{expected['loss']:.4f}")
        ranks = [expected["mean"], *expected["layers"]]
        assert cell["ends"]["query_key"]["pseudo_rank"] == pytest.approx(
            [row["query_key"]["pseudo_rank"] for row in ranks], rel=1e-3
        )
        curve = cell["over"]["query_key"]["pseudo_rank"]
        assert [line[-1] for line in curve] == cell["ends"]["query_key"]["pseudo_rank"]
        assert [line[0] for line in curve] == cell["untrained"]["query_key"]["pseudo_rank"]
        assert cell["step"] == [0, 50, 100, 150, 200]
    assert "imbalance" not in cells["l2", 0.0]["ends"]["query"]
    assert data["layers"] == 3


def test_a_curve_is_of_the_seeds_that_ended(make_experiment):
    data = data_of(page.render(make_experiment(diverged=[("l2", 10.0, 1)])))
    lost = next(cell for cell in data["cells"] if cell["diverged"])
    assert (lost["seeds"], lost["diverged"], lost["step"][-1]) == (2, 1, 200)
    steps = [cell["step"] for cell in data_of(page.render(make_experiment(runs=3)))["cells"]]
    assert steps == [[0, 50, 100, 150, 200]] * 2 + [[0, 50, 100, 150]]  # the third is under way


def test_too_many_evaluations_are_thinned_and_it_is_said(make_experiment, monkeypatch):
    monkeypatch.setattr(page, "NUMBERS", 1)
    directory = make_experiment(("l2",), steps=tuple(range(0, 200, 10)))
    text = page.render(directory)
    steps = data_of(text)["cells"][0]["step"]
    assert (len(steps), steps[0], steps[-1]) == (page.FEWEST_STEPS, 0, 190)
    assert "8 of up to 20 evaluations" in visible(text)


def test_an_experiment_that_has_only_begun(make_experiment):
    directory = make_experiment(summary=False)
    (directory / "metrics.jsonl").unlink()
    text = visible(page.render(directory))
    assert "not complete" in text
    assert "nothing to show before the first evaluation" in text
    assert 'id="charts" hidden' in text


def test_an_experiment_that_goes_on(make_experiment):
    text = visible(page.render(make_experiment(runs=3)))
    assert "2 runs have ended" in text
    assert text.count('<th scope="row">L2</th>') == 2


def test_names_are_only_ever_text(make_experiment):
    text = page.render(make_experiment(("l2", EVIL)))
    assert EVIL not in text
    assert "<img" not in text.replace("plotly", "")[: text.index('id="run-data"')]
    assert EVIL in [arm["name"] for arm in data_of(text)["arms"]]


def test_what_the_real_code_writes(trained, capsys):
    text = (trained / "report.html").read_text()  # written at the end of the run
    data = data_of(text)
    assert len(data["cells"]) == 12
    assert data["layers"] == 2
    assert all(cell["step"] == [0, 2, 4] for cell in data["cells"])
    assert 'id="mlp">' in text
    summary = json.loads((trained / "summary.json").read_text())
    print_summary(summary)
    assert "pseudo rank" in capsys.readouterr().out
