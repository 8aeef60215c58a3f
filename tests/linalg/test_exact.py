"""Functions of singular values by decomposition: against a float64 SVD, and where a decomposition fails."""

import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matrices import by_svd, conditioned, gaussian, relative_error, with_spectrum

from rankdecay.linalg import polar, record_backends, shrink
from rankdecay.linalg.exact import NULL_TOLERANCE, apply_exact, eigenvectors, inverse
from rankdecay.linalg.stack import prepare


def ones(sigma):
    return torch.ones_like(sigma)


@given(
    sigma=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=8),
    rows=st.integers(0, 5),
    seed=st.integers(0, 1000),
    complement=st.booleans(),
)
def test_a_function_of_singular_values_acts_on_each(sigma, rows, seed, complement):
    k = len(sigma)
    W = with_spectrum((k + rows, k), torch.tensor(sigma, dtype=torch.float64), seed)
    prepared = prepare(W, torch.float64)
    got = apply_exact(prepared, lambda s, null: 1 / (1 + s), torch.float64, complement=complement) * prepared.scale
    scale = float(prepared.scale)
    expected = by_svd(W, lambda s: s / (1 + s / scale))
    torch.testing.assert_close(got, W - expected if complement else expected, rtol=1e-9, atol=1e-9 * max(sigma))


def test_the_complement_of_everything_is_exactly_zero():
    prepared = prepare(gaussian(3, 6, 4, dtype=torch.float64), torch.float64)
    assert not apply_exact(prepared, lambda s, null: torch.ones_like(s), torch.float32, complement=True).any()


def test_null_directions_are_those_below_the_rounding_of_the_input():
    sigma = torch.tensor([2.0, 1.0, 3 * NULL_TOLERANCE, NULL_TOLERANCE], dtype=torch.float64)
    seen = {}
    for dtype in (torch.float32, torch.float64):
        prepared = prepare(with_spectrum((6, 4), sigma), torch.float64)
        apply_exact(prepared, lambda s, null, dtype=dtype: seen.setdefault(dtype, (s > null).sum()) * s, dtype)
    assert (int(seen[torch.float32]), int(seen[torch.float64])) == (3, 4)
    assert inverse(torch.tensor([2.0, 0.5, 0.0]), torch.tensor([1.0])).tolist() == [0.5, 0.0, 0.0]


@pytest.mark.parametrize("n", [1, 5, 40])
def test_eigenvectors_are_trusted_when_they_are_right(n):
    W = gaussian(3, n + 2, n, dtype=torch.float64)
    G = W.mT @ W
    lam, V, good = eigenvectors(G)
    assert good.all()
    torch.testing.assert_close((V * lam[..., None, :]) @ V.mT, G, rtol=0, atol=1e-11 * n)


def counting(name, real, calls):
    def counted(*args, **kwargs):
        calls.append(name)
        return real(*args, **kwargs)

    return counted


def test_reported_backend_is_the_one_that_ran(monkeypatch):
    """Each decomposition is counted where torch does it; the record must agree with the count."""
    calls = []
    for name in ("eigh", "svd"):
        real = getattr(torch.linalg, name)
        monkeypatch.setattr(torch.linalg, name, counting(name, real, calls))
    good, ill = gaussian(8, 8, dtype=torch.float64), conditioned((8, 8), 1e8, torch.float64)
    for W, backend, decompositions, names in [
        (good, "exact", ["eigh"], ["exact"]),
        (ill, "exact", ["eigh", "svd"], ["exact", "svd"]),
        (good, "matmul", [], ["matmul"]),
    ]:
        calls.clear()
        with record_backends() as ran:
            polar(W, backend)
        assert ran == names
        assert calls == decompositions


def test_wrong_eigenvectors_fall_back_to_svd(monkeypatch):
    """Seen on CUDA (pytorch #192483): eigenvectors that are not orthonormal, and no error."""
    real = torch.linalg.eigh

    def broken(G):
        lam, V = real(G)
        V[-1] += 1e-3 * V[-1].roll(1, -1)
        return lam, V

    monkeypatch.setattr(torch.linalg, "eigh", broken)
    W = gaussian(4, 40, 40)
    with record_backends() as ran:
        got = polar(W, "exact")
    assert ran == ["exact", "svd"]
    assert relative_error(got, by_svd(W, ones)) < 1e-6


def test_eigh_that_does_not_converge_falls_back_to_svd(monkeypatch):
    def refuses(G):
        raise torch.linalg.LinAlgError("no convergence")

    monkeypatch.setattr(torch.linalg, "eigh", refuses)
    W = gaussian(2, 12, 9)
    with record_backends() as ran:
        got = polar(W, "exact")
    assert ran == ["exact", "svd"]
    assert relative_error(got, by_svd(W, ones)) < 1e-6


@pytest.mark.parametrize("rule", ["prox", "smooth"])
def test_large_matrices_are_decomposed_side_by_side_as_one_by_one(rule):
    """And the number of threads is afterwards what it was, also in a thread that is started then."""
    W = torch.randn(5, 260, 300, generator=torch.Generator().manual_seed(0))
    W[3, 7, 7] = torch.nan
    threads, seen = torch.get_num_threads(), []
    try:
        torch.set_num_threads(2)
        together = shrink(W, 0.01, rule, relative=True, backend="exact")
        with torch.inference_mode():
            assert torch.equal(shrink(W[:2], 0.01, rule, relative=True, backend="exact"), together[:2])
        later = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        later.start()
        later.join()
        assert seen == [2] == [torch.get_num_threads()]
    finally:
        torch.set_num_threads(threads)
    alone = torch.stack([shrink(each, 0.01, rule, relative=True, backend="exact") for each in W])
    torch.testing.assert_close(together, alone, rtol=0, atol=2e-6, equal_nan=True)
    assert together[3].isnan().all()
    assert not together[[0, 1, 2, 4]].isnan().any()
