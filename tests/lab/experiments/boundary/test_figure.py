import pytest

from rankdecay.lab.errors import SettingError
from rankdecay.lab.experiment import draw_figure
from rankdecay.lab.experiments.boundary.figure import _lines
from rankdecay.lab.experiments.boundary.maps import PhaseMap


@pytest.mark.parametrize("suffix", ["svg", "pdf", "png"])
def test_the_same_sweep_gives_the_same_bytes(shared_sweep, tmp_path, suffix):
    first, second = (draw_figure([shared_sweep], tmp_path / f"{name}.{suffix}").read_bytes() for name in "ab")
    assert first == second
    assert first.startswith({"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[suffix])


def test_it_is_vectors_only(shared_sweep, tmp_path):
    assert b"<image" not in draw_figure([shared_sweep], tmp_path / "a.svg").read_bytes()
    assert b"/Subtype /Image" not in draw_figure([shared_sweep], tmp_path / "a.pdf").read_bytes()


def test_titles_are_on_lines_of_their_own(shared_sweep, tmp_path):
    drawn = draw_figure([shared_sweep], tmp_path / "a.svg").read_text()  # text is paths, with itself in a comment
    assert "rest decay: 0.5 -->" in drawn
    assert r"\n" not in drawn


def test_several_directories_are_one_figure(make_sweep, tmp_path):
    seeds = [make_sweep(["l2", "prox"], name=f"seed{i}", seeds=[i]) for i in range(3)]
    whole = make_sweep(["l2", "prox"])
    merged = draw_figure(seeds, tmp_path / "merged.svg").read_bytes()
    assert merged == draw_figure([whole], tmp_path / "whole.svg").read_bytes()


def test_a_sweep_of_examples_still_running_with_bounds(make_sweep, tmp_path):
    sweep = make_sweep(["none", "l2", "prox"], task="recall", summary=False, boundaries={"prox": 0.01})
    assert draw_figure([sweep], tmp_path / "figure.svg").stat().st_size > 1000


def test_nothing_to_draw_is_said(make_sweep, tmp_path):
    directory = make_sweep(["prox"], summary=False)
    (directory / "metrics.jsonl").unlink()
    with pytest.raises(SettingError, match="no finished run yet"):
        draw_figure([directory], tmp_path / "figure.svg")


def test_maps_fill_lines_and_keep_their_order():
    columns = {"a": 1, "b": 12, "c": 12, "d": 12, "e": 40}
    maps = [PhaseMap(name, 1.0, [float(i) for i in range(count)], {}, []) for name, count in columns.items()]
    assert ["".join(item.arm for item in line) for line in _lines(maps)] == ["ab", "cd", "e"]
