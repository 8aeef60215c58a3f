"""Functions of a matrix that act on its singular values, without models or training.

* :mod:`~rankdecay.linalg.polar`: the polar factor and its smoothed form.
* :mod:`~rankdecay.linalg.shrink`: one decay step by a rule's name; :mod:`~rankdecay.linalg.rules`: a file per rule.
* :mod:`~rankdecay.linalg.gram`: the same step from a Gram matrix alone, for sharded weights.
* :mod:`~rankdecay.linalg.exact`, :mod:`~rankdecay.linalg.matmul`: the two backends; :mod:`~rankdecay.linalg.backend`
  chooses.
"""

from rankdecay.linalg.backend import Backend, choose_backend, record_backends
from rankdecay.linalg.polar import polar, smooth_polar
from rankdecay.linalg.shrink import newton_schulz, power_step, shrink, soft_threshold, spectral_clip
from rankdecay.rules import Rule

__all__ = [
    "Backend",
    "Rule",
    "choose_backend",
    "newton_schulz",
    "polar",
    "power_step",
    "record_backends",
    "shrink",
    "smooth_polar",
    "soft_threshold",
    "spectral_clip",
]
