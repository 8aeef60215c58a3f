"""Data sets for one-layer attention: tokens, queries and the scores of the tokens.

Three kinds are drawn, each from a seed:

* ``generic``: tokens, queries and head are Gaussian vectors of norm one, labels are random (the set-up of the public
  TF-as-SVM code). Scores differ within an example, so that a locally optimal token may be selected.
* ``equal``: as before, but tokens are shifted along the head so that the best token of each example has score a and all
  others -a: assumption A2 of Sheen et al.
* ``aligned``: assumption A4. Best tokens are orthogonal, queries parallel to them, other tokens come in pairs
  ``c x ± u``. Nuclear and Frobenius SVM then have one solution, known in closed form, so it is a check of the numerics
  and cannot separate the two biases.
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rankdecay.lab.errors import SettingError

ARRAYS = ("tokens", "queries", "heads", "labels")  # of a file
TIE = 1e-9  # of the range of the scores: closer than this, the best token is not unique


@dataclass(frozen=True)
class DataSets:
    """Problems of one shape."""

    tokens: np.ndarray  # x, (sets, n, L, d)
    queries: np.ndarray  # z, (sets, n, d)
    heads: np.ndarray  # v, (sets, d)
    labels: np.ndarray  # y = ±1, (sets, n)

    @property
    def scores(self) -> np.ndarray:
        """γ, shape (sets, n, L)."""
        return self.labels[:, :, None] * np.einsum("bilk,bk->bil", self.tokens, self.heads)

    @property
    def optimal(self) -> np.ndarray:
        """The token with the best score of every example, shape (sets, n)."""
        return self.scores.argmax(-1)

    def only(self, sets: Sequence[int]) -> DataSets:
        """Some of the data sets."""
        return DataSets(*(getattr(self, name)[list(sets)] for name in ARRAYS))

    def __len__(self) -> int:
        return len(self.tokens)


def draw(kind: str, seeds: Sequence[int], examples: int, tokens: int, dimension: int, score: float) -> DataSets:
    """Draw a data set from each seed.

    Args:
        kind: one of `settings.KINDS`.
        seeds: one per data set.
        examples: n.
        tokens: L.
        dimension: d.
        score: a of the kinds ``equal`` and ``aligned``: the score of the best token.
    """
    drawn = []
    for seed in seeds:
        rng = np.random.default_rng([2, seed])
        one = _aligned if kind == "aligned" else _gaussian
        x, z, v, y = one(rng, examples, tokens, dimension, score)
        if kind == "equal":
            x, v = _equalised(x, v, y, rng.integers(tokens, size=examples), score)
        drawn.append((x, z, v, y))
    return DataSets(*(np.stack(part) for part in zip(*drawn, strict=True)))


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def _gaussian(rng: np.random.Generator, n: int, L: int, d: int, score: float) -> tuple[np.ndarray, ...]:
    x, z = _unit(rng.standard_normal((n, L, d))), _unit(rng.standard_normal((n, d)))
    return x, z, _unit(rng.standard_normal(d)), rng.choice([-1.0, 1.0], n)


def _equalised(
    x: np.ndarray, v: np.ndarray, y: np.ndarray, best: np.ndarray, score: float
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens moved along a head of norm 2a until their scores are ±a, which moves each by about half its length."""
    v = 2 * score * v
    wanted = np.where(np.arange(x.shape[1]) == best[:, None], score, -score) * y[:, None]  # v · x
    return x + ((wanted - x @ v) / (v @ v))[:, :, None] * v, v


def _aligned(rng: np.random.Generator, n: int, L: int, d: int, score: float) -> tuple[np.ndarray, ...]:
    frame = np.linalg.qr(rng.standard_normal((d, d)))[0].T
    best, rest = frame[:n], frame[n:]
    y, c = rng.choice([-1.0, 1.0], n), rng.uniform(-0.9, 0.9, n)
    x = np.empty((n, L, d))
    x[:, 0] = best
    for i in range(n):
        u = rng.standard_normal(((L - 1) // 2, d - n)) @ rest  # orthogonal to every best token, and so to the head
        x[i, 1::2], x[i, 2::2] = c[i] * best[i] + u, c[i] * best[i] - u
    return x, rng.choice([-1.0, 1.0], (n, 1)) * best * rng.uniform(0.5, 2, (n, 1)), score * (y @ best), y


def load(path: Path) -> DataSets:
    """Data sets from a NumPy file.

    Args:
        path: an ``.npz`` with ``tokens`` (sets, n, L, d), ``queries`` (sets, n, d), ``heads`` (sets, d) and ``labels``
            (sets, n), which are ±1.

    Raises:
        SettingError: If it is not that.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = [np.asarray(file[name], dtype=np.float64) for name in ARRAYS]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise SettingError(f"--data {path} cannot be read ({error}): give an .npz with {', '.join(ARRAYS)}") from None
    x, z, v, y = arrays
    if x.ndim != 4 or min(x.shape) < 1 or x.shape[2] < 2:
        raise SettingError(f"--data {path}: tokens have shape {x.shape}, not (sets, examples, at least 2 tokens, d)")
    sets, n, _, d = x.shape
    for name, array, shape in (("queries", z, (sets, n, d)), ("heads", v, (sets, d)), ("labels", y, (sets, n))):
        if array.shape != shape:
            raise SettingError(f"--data {path}: {name} have shape {array.shape}; these tokens need {shape}")
    for name, array in zip(ARRAYS, arrays, strict=True):
        if not np.isfinite(array).all():
            raise SettingError(f"--data {path}: {name} are not all finite numbers")
    if not np.isin(y, (-1, 1)).all():
        raise SettingError(f"--data {path}: labels must be -1 or 1")
    return DataSets(x, z, v, y)


def check_scores(data: DataSets) -> None:
    """Raise a `SettingError` that names the first example whose best token is not unique."""
    ordered = np.sort(data.scores, axis=-1)
    tied = ordered[..., -1] - ordered[..., -2] <= TIE * np.abs(ordered).max()
    if tied.any():
        which, example = (int(index) for index in np.argwhere(tied)[0])
        token = np.argsort(data.scores[which, example])
        raise SettingError(
            f"data set {which}, example {example}: tokens {token[-2]} and {token[-1]} have the same best score "
            f"{ordered[which, example, -1]:g}, so no token is optimal: change a token or the head"
        )


def differences(data: DataSets, which: int, selected: Sequence[int] | np.ndarray) -> np.ndarray:
    """The matrices whose inner product with W is a margin: ``(x_{i,s(i)} - x_{il}) z_iᵀ`` for every l ≠ s(i).

    Args:
        data: the data sets.
        which: one of them.
        selected: s, shape (n,).

    Returns:
        Shape (n (L - 1), d, d).
    """
    x, z = data.tokens[which], data.queries[which]
    n, L, _ = x.shape
    chosen = x[np.arange(n), selected][:, None] - x  # (n, L, d)
    others = np.arange(L) != np.asarray(selected)[:, None]
    return np.einsum("ilk,iq->ilkq", chosen, z)[others]
