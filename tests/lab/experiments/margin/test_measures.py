"""What is measured, on weights of which it is known."""

import numpy as np
import pytest
import torch

from rankdecay.lab.experiments.margin.data import differences, draw
from rankdecay.lab.experiments.margin.flow import Problem
from rankdecay.lab.experiments.margin.measures import alignment, cosine, margins, measure, selected_tokens
from rankdecay.lab.experiments.margin.svm import max_margin


@pytest.fixture(scope="module")
def solved():
    data = draw("equal", range(2), 3, 3, 6, 4.0)
    solutions = {
        norm: [max_margin(differences(data, b, data.optimal[b]), norm) for b in range(2)]
        for norm in ("nuclear", "frobenius")
    }
    return data, Problem.of(data), solutions


def test_a_solution_itself_has_cosine_one_and_no_excess(solved):
    data, P, solutions = solved
    W = 1e70 * torch.from_numpy(np.stack([one.W for one in solutions["nuclear"]]))  # squares of it are near the range
    selected = selected_tokens(P, W)
    assert selected.tolist() == data.optimal.tolist()
    found = measure(P, W, selected, solutions, "exponential")
    for name, value in (("cosine_nuclear", 1), ("nuclear_excess", 0), ("alignment", 1), ("margin", 1e70)):
        torch.testing.assert_close(found[name], torch.full((2,), value, dtype=torch.float64), atol=1e-5, rtol=1e-5)
    assert bool((found["cosine_frobenius"] < 0.999).all())
    assert found["rank"].tolist() == [one.rank for one in solutions["nuclear"]]
    torch.testing.assert_close(found["loss"], found["loss_infimum"])
    assert bool((found["log10_loss_excess"] < -1e60).all())


def test_what_is_not_defined_is_nan_and_alone_in_it(solved):
    data, P, solutions = solved
    W = torch.from_numpy(np.stack([np.zeros((6, 6)), solutions["frobenius"][1].W]))
    partial = {norm: [None, of[1]] for norm, of in solutions.items()}
    found = measure(P, W, torch.from_numpy(data.optimal), partial, "logistic")
    for name in ("cosine_nuclear", "nuclear_excess", "alignment", "normalised_frobenius"):
        assert found[name].isnan().tolist() == [True, False], name
    assert found["frobenius_excess"][1] == pytest.approx(0, abs=1e-5)


def test_alignment_is_of_the_leading_singular_spaces(solved):
    _, _, solutions = solved
    one = solutions["nuclear"][0]
    U, S, Vh = np.linalg.svd(one.W)
    r = one.rank
    turned = U[:, ::-1] @ np.diag(np.sort(S + 0.1)[::-1]) @ Vh[::-1]  # its first r directions are the last of W
    found = alignment(torch.from_numpy(np.stack([one.W, turned])), [one, one])
    assert found[0] == pytest.approx(1)
    assert found[1] == pytest.approx(max(0, 2 * r - 6) / r, abs=1e-9)
    assert cosine(torch.from_numpy(-one.W)[None], [one]).tolist() == pytest.approx([-1])


def test_margins_are_of_the_tokens_that_are_asked_for(solved):
    data, P, _ = solved
    W = torch.randn(2, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for b in range(2):
        expected = (differences(data, b, data.optimal[b]) * W[b].numpy()).sum((1, 2)).min()
        assert margins(P, W, torch.from_numpy(data.optimal))[b] == pytest.approx(expected)
    assert bool((margins(P, W, selected_tokens(P, W)) > 0).all())
