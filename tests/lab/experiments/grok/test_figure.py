import pytest

from rankdecay.lab.experiments.grok.figure import figure


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_every_format(make_run, tmp_path, suffix):
    path = figure(make_run(), tmp_path / f"figure.{suffix}")
    start = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[suffix]
    assert path.read_bytes().startswith(start)


def test_the_same_run_gives_the_same_bytes(make_run, tmp_path):
    run = make_run(["l2", "low_rank"])
    first, second = figure(run, tmp_path / "a.svg"), figure(run, tmp_path / "b.svg")
    assert first.read_bytes() == second.read_bytes()
    assert b"low-rank decay" in first.read_bytes() or b"<use" in first.read_bytes()


def test_a_run_without_snapshots_or_summary(make_run, tmp_path):
    assert figure(make_run(["low_rank"], summary=False, snapshots=False), tmp_path / "figure.png").is_file()
