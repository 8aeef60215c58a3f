"""Scores by frequency, as `benchmarks/mechanism.py` measures them, and a run of it."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import boundary_findings
import mechanism

P = 11


def test_the_basis_is_orthonormal_and_of_frequencies():
    basis = mechanism.fourier_basis(P)
    torch.testing.assert_close(basis @ basis.T, torch.eye(P, dtype=torch.float64))
    shifted = basis.roll(1, 1)  # a shift of the integers mixes the cosine and the sine of one frequency alone
    mixed = (shifted @ basis.T)[1:, 1:].unflatten(0, (-1, 2)).unflatten(2, (-1, 2)).square().sum((1, 3))
    torch.testing.assert_close(mixed, 2 * torch.eye(P // 2, dtype=torch.float64), atol=1e-12, rtol=0)


def test_scores_of_one_frequency_have_its_energy_alone():
    basis = mechanism.fourier_basis(P)
    embedding = basis.T * 2.0  # token a has coordinate f equal to wave f at a; the rows have one norm
    query = torch.zeros(P, P, dtype=torch.float64)
    query[0, 3] = 1.0  # the cosine of frequency 2
    key = torch.zeros(P, P, dtype=torch.float64)
    key[0, 6] = 5.0  # the sine of frequency 3
    energies = mechanism.score_energies(query, key, embedding, heads=1)
    expected = torch.zeros(P // 2, P // 2, dtype=torch.float64)
    expected[1, 2] = 1.0
    torch.testing.assert_close(energies, expected, atol=1e-12, rtol=0)
    assert mechanism.structure(energies) == {"equal_frequencies": 0.0, "pairs": 1}
    even = torch.full((5, 5), 1 / 25, dtype=torch.float64)
    assert mechanism.structure(even) == {"equal_frequencies": 0.2, "pairs": 24}


def test_heads_are_added_and_not_mixed():
    generator = torch.Generator().manual_seed(0)
    query, key, embedding = (torch.randn(n, 8, generator=generator).double() for n in (8, 8, P))
    both = mechanism.score_energies(query, key, embedding, heads=2)
    unit = embedding / embedding.square().mean(1, keepdim=True).sqrt()
    basis, each = mechanism.fourier_basis(P), []
    for rows in (slice(4), slice(4, 8)):
        scores = basis @ (unit @ query[rows].T @ key[rows] @ unit.T) @ basis.T
        each.append(scores[1:, 1:].unflatten(0, (-1, 2)).unflatten(2, (-1, 2)).square().sum((1, 3)))
    torch.testing.assert_close(both, sum(each) / sum(each).sum())


@pytest.mark.parametrize("arm", mechanism.ARMS)
def test_a_run_is_one_of_the_sweep(arm, tmp_path, capsys):
    row = mechanism.run(arm, mechanism.ARMS[arm], 0.4, 0)
    [first] = row["curve"]
    assert len(first) == len(mechanism.CURVE)
    assert row["best"] == row["end"]  # nothing is learnt yet
    assert first[-2:] == [row["end"]["equal_frequencies"], row["end"]["pairs"]]
    assert len(row["end"]["singular_values"]["key"]) == 2
    assert len(row["end"]["energies"]) == 48
    (tmp_path / "m.json").write_text(json.dumps({"rows": [row]}))
    boundary_findings.main(["mechanism", str(tmp_path / "m.json")])
    assert f"| 0.4 | {arm} " in capsys.readouterr().out
