import pytest

from rankdecay.cli import main
from rankdecay.lab.errors import SettingError
from rankdecay.lab.experiments.attention.figure import figure


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_every_format_from_the_command_line(make_experiment, tmp_path, suffix, capsys):
    path = tmp_path / f"figure.{suffix}"
    assert main(["report", str(make_experiment()), "--figure", str(path)]) in (0, None)
    start = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[suffix]
    assert path.read_bytes().startswith(start)
    assert str(path) in capsys.readouterr().out


def test_the_same_run_gives_the_same_bytes(make_experiment, tmp_path):
    run = make_experiment()
    first, second = figure(run, tmp_path / "a.svg"), figure(run, tmp_path / "b.svg")
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize(
    "options",
    [
        {"norms": (False, True), "mlp_decays": (0.0, 0.1)},
        {"strengths": {"l2": (0.0,), "low_rank": (1.0,)}},
        {"mlp_decays": (None,), "accuracy": False, "seeds": 1},
        {"runs": 3},
        {"diverged": [("l2", 10.0, 0), ("l2", 10.0, 1)]},
    ],
)
def test_whatever_the_grid(make_experiment, tmp_path, options):
    directory = make_experiment(("l2", "low_rank", "costs $5"), **options)
    assert figure(directory, tmp_path / "figure.svg").is_file()


def test_what_the_real_code_writes(trained, tmp_path):
    assert figure(trained, tmp_path / "figure.png").is_file()


def test_nothing_to_draw(make_experiment, tmp_path):
    with pytest.raises(SettingError, match="nothing to draw"):
        figure(make_experiment(runs=1), tmp_path / "figure.png")
