"""Functions of a matrix that act on its singular values. Knows nothing of models or training.

* :mod:`~rankdecay.linalg.polar`: the polar factor and its smoothed form; the backends.
* :mod:`~rankdecay.linalg.shrink`: soft threshold, spectral clip, and every decay rule.
* :mod:`~rankdecay.linalg.minimax`: the polynomials behind the matmul-only backend.
"""

from rankdecay.linalg.backend import Backend, choose_backend, record_backends
from rankdecay.linalg.polar import polar, smooth_polar
from rankdecay.linalg.shrink import Rule, newton_schulz, shrink, soft_threshold, spectral_clip

__all__ = [
    "Backend",
    "Rule",
    "choose_backend",
    "newton_schulz",
    "polar",
    "record_backends",
    "shrink",
    "smooth_polar",
    "soft_threshold",
    "spectral_clip",
]
