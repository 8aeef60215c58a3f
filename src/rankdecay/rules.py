"""Decay rules by name, and how to add one. Importing this module does not import torch.

A rule is one :class:`Rule`. There are three ways to make it known; then :class:`rankdecay.LowRank`, optimizers in one
process or many, the lab's ensembles and the option ``--rule`` take its name:

* a file in :mod:`rankdecay.linalg.rules`, named like the rule, that defines ``RULE``;
* :func:`register_rule`, called in every process before the name is used;
* an entry point of a package, in the group ``rankdecay.rules``, named like the rule and pointing to it.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rankdecay.checks import check_name

if TYPE_CHECKING:
    from torch import Tensor

    from rankdecay.linalg.stack import Prepared

_FOLDER = Path(__file__).parent / "linalg" / "rules"
_GROUP = "rankdecay.rules"


class Options(NamedTuple):
    """Options of a step; a rule reads those it needs.

    Attributes:
        smoothing: a fraction of ‖W‖_F, :attr:`rankdecay.LowRank.smoothing`.
        steps: number of iterations, for a rule that is one.
        relative: whether τ was given in units of rms(σ); a rule gets it in the units of σ.
        keep: of how many of the largest singular values the share becomes 0 after the rule.
        preserve_norm: whether the shares are changed after the rule so that ‖W‖_F stays.
    """

    smoothing: float = 0.0
    steps: int = 5
    relative: bool = False
    keep: int = 0
    preserve_norm: bool = False


@dataclass(frozen=True)
class Rule:
    """A decay rule: σ becomes (1 - t) σ. τ comes in the units of the singular values, whatever the decay's scale.

    Attributes:
        name: of the rule, an identifier.
        description: what a singular value becomes, in a few words.
        fraction: the share t(σ, null, τ, options) of all singular values of each matrix, (..., n), of which
            σ ≤ null (..., 1) count as zero, and τ (..., 1), float64. All that a rule needs, on sharded weights too.
        taken_by_products: the part of ``prepared.X`` that a step takes, computed by matrix products alone, from
            (prepared, τ (..., 1, 1) in the units of ``prepared.X``, options). A rule without it is decomposed by every
            backend, which makes a GPU wait.
        products_pay: of the same arguments, a truth value per matrix (...): whether products cost a CPU less than a
            decomposition and within 1e-3 of the step. None: they never are.
        always_products: whether ``shrink`` takes products whatever the backend.
        smoothing: whether the rule reads ``options.smoothing``.
        keep: whether the largest singular values may be spared, which costs a decomposition on every backend.
        homogeneous: whether t depends on ratios alone, t(cσ, cτ) = t(σ, τ). It is then asked in units of a power of two
            near the largest entry, where nothing overflows; any other rule in the units of W.
    """

    name: str
    description: str
    fraction: Callable[[Tensor, Tensor, Tensor, Options], Tensor]
    taken_by_products: Callable[[Prepared, Tensor, Options], Tensor] | None = None
    products_pay: Callable[[Prepared, Tensor, Options], Tensor] | None = None
    always_products: bool = False
    smoothing: bool = False
    keep: bool = False
    homogeneous: bool = False


_registered: dict[str, Rule] = {}


def register_rule(rule: Rule) -> Rule:
    """Make a rule known by its name, in this process, and return it.

    Raises:
        ValueError: If the name is not an identifier, or belongs to another rule; or if its fraction cannot be called,
            or gives no share of each singular value.
    """
    if not rule.name.isidentifier():
        raise ValueError(f"a rule's name must be an identifier, such as 'log_penalty'; got {rule.name!r}")
    if rule.name == "frobenius" or rule.name in _built_in() or _registered.get(rule.name, rule) is not rule:
        raise ValueError(f"{rule.name!r} is the name of another rule; choose another name")
    _check_fraction(rule)
    return _registered.setdefault(rule.name, rule)


def _check_fraction(rule: Rule) -> None:
    import torch

    sigma = torch.tensor([[4.0, 2.0, 1.0], [1.0, 1.0, 0.5]], dtype=torch.float64)
    tau = torch.full((2, 1), 0.25, dtype=torch.float64)
    try:
        share = rule.fraction(sigma, torch.zeros_like(tau), tau, Options(smoothing=0.1 if rule.smoothing else 0.0))
    except Exception as error:
        raise ValueError(
            f"the fraction of rule {rule.name!r} fails ({type(error).__name__}: {error}); it is called with "
            "(sigma, null, tau, options)"
        ) from error
    numbers = isinstance(share, torch.Tensor) and share.is_floating_point() and not share.isnan().any()
    if not numbers or share.shape not in (sigma.shape, tau.shape):
        raise ValueError(
            f"the fraction of rule {rule.name!r} must return a share for each of sigma {tuple(sigma.shape)}, or one of "
            f"each matrix {tuple(tau.shape)}, got {share!r}"
        )


def rule_names() -> tuple[str, ...]:
    """Return the names of all rules, without importing them."""
    return tuple(dict.fromkeys([*_loaders(), *_registered]))


def get_rule(name: str) -> Rule:
    """Return the rule of a name; imports it on first use.

    Raises:
        ValueError: If no rule has the name.
    """
    check_name("rule", name, rule_names())
    if name not in _registered:
        rule = _loaders()[name]()
        if not isinstance(rule, Rule) or rule.name != name:
            raise ValueError(f"the entry point {name!r} of {_GROUP} must be a Rule of that name, got {rule!r}")
        if name not in _built_in():
            _check_fraction(rule)
        _registered[name] = rule
    return _registered[name]


def check_keep(rule: str, keep: int) -> None:
    """Raise a `ValueError` if singular values are to be spared by a rule that cannot."""
    if keep and not get_rule(rule).keep:
        raise ValueError(f"keep={keep} is not possible with rule={rule!r}; use rule='prox' or 'smooth', or keep=0")


def _built_in() -> list[str]:
    return [file.name for file in pkgutil.iter_modules([str(_FOLDER)])]


@cache
def _loaders() -> dict[str, Callable[[], Any]]:
    """Return the loader of each rule of this package and of others."""
    others = {point.name: point.load for point in entry_points(group=_GROUP)}
    return others | {name: partial(_load, name) for name in _built_in()}


def _load(name: str) -> Rule:
    return import_module(f"rankdecay.linalg.rules.{name}").RULE
