"""Ranks of attention during training, every k steps, to any callable.

A measurement takes the layers one after another, each head's product by its factors, in float64
(:mod:`rankdecay.attention.products`), and makes plain floats of them. What it logs, for ``query_key`` and the effective
rank:

=============================================  ==============================================================
name                                           value
=============================================  ==============================================================
``rank/query_key/effective_rank``              mean over all heads of the model
``rank/query_key/effective_rank_min``          the least of them
``rank/<layer>/query_key/effective_rank``      mean over the heads of a layer; ``_min`` likewise
``rank/<layer>/query_key/effective_rank_3``    head 3, with ``detail="head"``
=============================================  ==============================================================

A head with a non-finite weight is NaN, and so is every mean and least value that it is part of.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from rankdecay.attention import AttentionLayer, find_attention
from rankdecay.attention.locate import Names
from rankdecay.attention.scale import settled
from rankdecay.checks import check_name, check_number
from rankdecay.dtensor import bare_name, is_first_process, is_sharded, unwrapped, whole
from rankdecay.inspection import BALANCE, check_values, figure, score_parameters
from rankdecay.spectrum import spectrum

Part = Literal["query_key", "value_output", "query", "key", "value", "output"]
Detail = Literal["model", "layer", "head"]
Measure = Literal[
    "effective_rank",
    "stable_rank",
    "nuclear_rank",
    "participation_ratio",
    "pseudo_rank",
    "numerical_rank",
    "nuclear_norm",
    "frobenius_norm",
    "spectral_norm",
    "nuclear_gap",
    "nuclear_ratio",
    "imbalance",
]
_PRODUCTS = ("query_key", "value_output")
_SPECTRA = "singular_values"

_Function = TypeVar("_Function", bound=Callable[..., Any])


def _uncompiled(function: _Function) -> _Function:
    """Keep a function out of compiled graphs: called from compiled code, it runs between them."""
    return torch.compiler.disable(function)  # pyright: ignore[reportReturnType]


class RankCollapseWarning(UserWarning):
    """Warning that the effective rank of a head has fallen below the bound of a :class:`Monitor`."""


class Monitor:
    """Measure the spectra of a model's attention every k steps and hand them to a callable.

    Call :meth:`step` after each optimizer step, or :meth:`attach` it to the optimizer once. Neither touches the graph,
    the gradients or the random generators; under ``torch.compile`` both stay outside compiled code. In a distributed
    run every process counts and the first logs. It alone measures, unless parameters are sharded (DTensors: FSDP2,
    tensor parallelism): then every process measures, since each parameter in turn is gathered from all of them, one
    at a time, and every process has to make the same calls.

    Where neither a module nor its configuration says whether queries and keys are normalised, the gradients of the
    first step tell: the loss then does not depend on the scale of any head.

    Args:
        model: the model; one wrapped by ``torch.compile``, DDP or PEFT is seen through.
        every: steps between two measurements.
        log: takes a dictionary of floats, ``"step"`` among them: ``print``, ``wandb.log``, ``history.append``. One that
            has a true attribute ``takes_spectra``, as those of :mod:`rankdecay.integrations.loggers` have, is given the
            singular values too: a tensor (heads, k) on the CPU by ``<layer>/<part>``.
        measures: names of :class:`rankdecay.Spectrum`'s ranks and norms, and, for products alone, ``"imbalance"``,
            ``"nuclear_gap"`` and ``"nuclear_ratio"`` (:class:`rankdecay.attention.products.Product`).
        of: ``"query_key"`` (W_Kᵀ W_Q) and ``"value_output"`` (W_O W_V), with their biases, or the matrices
            ``"query"``, ``"key"``, ``"value"``, ``"output"``; always head by head. Where a layer has no such product,
            because it normalises queries and keys or has no output projection, its matrices take the product's place,
            under their own names.
        detail: log values of the ``"model"``, of each ``"layer"`` as well, or of each ``"head"`` as well.
        collapse: warn when the effective rank of a head falls under this bound; once, until it recovers.
        names: how your own attention names its projections, as in :func:`rankdecay.find_attention`.
        num_heads: number of query heads, where the model does not say it.
        only: look for ``names`` alone.

    Raises:
        TypeError: If ``model`` is not an ``nn.Module``, or ``log`` cannot be called.
        ValueError: If the model has no attention, or an argument has no meaning.

    Example:
        >>> monitor = Monitor(nn.MultiheadAttention(8, 2), every=2, measures="numerical_rank", detail="model")
        >>> for _ in range(4):
        ...     _ = monitor.step()  # doctest: +ELLIPSIS
        {'step': 2, 'rank/query_key/numerical_rank': 4.0, 'rank/query_key/numerical_rank_min': 4.0, ...}
        {'step': 4, 'rank/query_key/numerical_rank': 4.0, 'rank/query_key/numerical_rank_min': 4.0, ...}
    """

    def __init__(
        self,
        model: nn.Module,
        every: int = 100,
        log: Callable[..., object] = print,
        *,
        measures: Measure | Iterable[Measure] = ("effective_rank", "stable_rank"),
        of: Part | Iterable[Part] = ("query_key", "value_output"),
        detail: Detail = "layer",
        collapse: float | None = None,
        names: Names = None,
        num_heads: int | None = None,
        only: bool = False,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"model must be the torch.nn.Module in training, got {type(model).__name__}; the attention of a "
                "checkpoint is read by rankdecay.find_attention(path)."
            )
        check_number("every", every, at_least=1, whole=True, remedy="the steps between two measurements, such as 100")
        if not callable(log):
            raise TypeError(
                f"log must be callable with a dictionary, got {type(log).__name__}; for example print, "
                "wandb.log, or the append of a list."
            )
        if collapse is not None:
            check_number("collapse", collapse, above=0, remedy="leave it out for no warning")
        check_name("detail", detail, get_args(Detail))
        self.model = model
        self.every = every
        self.log = log
        self._takes_spectra = bool(getattr(log, "takes_spectra", False))
        self.measures: tuple[str, ...] = _chosen("measures", measures, get_args(Measure))
        self.of: tuple[str, ...] = _chosen("of", of, get_args(Part))
        self.detail: Detail = detail
        self.collapse = collapse
        self.steps = 0  #: optimizer steps counted so far
        self._skipped: list[Tensor] = []  # 1 on the device for each of them that a GradScaler skipped
        layers = find_attention(model, names, num_heads, only=only)
        self._layers = {_plain(layer.name, model): layer for layer in layers}
        if not any(_parts(layer, self.of) for layer in self._layers.values()):
            raise ValueError(f"of={self.of!r}: no attention of {type(model).__name__} has an output projection.")
        self._collapsed: set[tuple[str, str, int]] = set()
        self._settle_before_steps()

    @_uncompiled
    def step(self, at: int | None = None) -> dict[str, float] | None:
        """Count an optimizer step; when one is due, measure, log and return what was logged.

        Of several processes only the first logs; in the others it returns None.

        Args:
            at: the number of steps made so far, if you count them yourself; else one more than before. It may stay the
                same, and may jump: a measurement is due when a multiple of ``every`` has been passed.
        """
        before, self.steps = self.steps, self.steps + 1 if at is None else at
        if self.steps // self.every <= before // self.every:
            return None
        first = is_first_process()
        if not first and not any(is_sharded(parameter) for parameter in self.model.parameters()):
            return None
        heads = self._heads()
        if not first:  # it only took part in gathering them
            return None
        values = self._values(heads)
        if self._takes_spectra:
            self.log(dict(values), {f"{layer}/{part}": found[_SPECTRA] for (layer, part), found in heads.items()})
        else:
            self.log(dict(values))
        self._warn(heads)
        return values

    def measure(self) -> dict[str, float]:
        """Return the values of the model as it is now, the same in every process, without logging.

        With sharded parameters all processes have to call it.
        """
        return self._values(self._heads())

    def attach(self, optimizer: Optimizer) -> RemovableHandle:
        """Make the optimizer call :meth:`step` after each of its steps; ``remove()`` of what is returned ends it.

        As with every hook, a copy of the optimizer does not have it. Attach a decay first, to measure what it left.
        """
        return unwrapped(optimizer).register_step_post_hook(self._after_step)

    def state_dict(self) -> dict[str, int]:
        """Return the count of steps, to be saved with the model and the optimizer."""
        self._take_back_skipped()
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue the count of a :meth:`state_dict`."""
        self.steps, self._skipped = int(state["steps"]), []

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Make a copy, or a monitor that was pickled: of the copy of the model, and by its gradients."""
        vars(self).update(state)
        self._settle_before_steps()

    # ---- in a measurement ---------------------------------------------------------------------------------

    @_uncompiled
    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        """Count a step, unless it was skipped: a fused optimizer runs its hooks also when gradients overflowed.

        Whether it was is on the device, and is asked for only where a measurement would be due.
        """
        skipped: Tensor | None = getattr(optimizer, "found_inf", None)
        self._skipped += [] if skipped is None else [skipped.detach()]
        if (self.steps + 1) % self.every:
            self.steps += 1
            return
        before = self.steps
        self._take_back_skipped()
        at, self.steps = self.steps + 1, before  # less than before, where steps were skipped: then nothing is due
        self.step(at)

    def _take_back_skipped(self) -> None:
        self.steps -= sum(int(skipped) for skipped in self._skipped)
        self._skipped = []

    def _settle_before_steps(self) -> None:
        """Look at gradients before each optimizer's step, while the weights are those they are gradients at."""
        if any("qk_norm" in layer.unknown for layer in self._layers.values()):
            monitor = weakref.ref(self)
            settle = _uncompiled(lambda *_: (alive := monitor()) and alive._settle())
            weakref.finalize(self, register_optimizer_step_pre_hook(settle).remove)

    def _settle(self) -> None:
        """Find out from the first gradients whether queries and keys are normalised, where nothing had said it."""
        unknown = {name: layer for name, layer in self._layers.items() if "qk_norm" in layer.unknown}
        if not unknown:
            return
        wanted = set(score_parameters(list(unknown.values())))
        parameters = {n: p for n, p in self.model.named_parameters(remove_duplicate=False) if n in wanted}
        gradients = {name: whole(p.grad) for name, p in parameters.items() if p.grad is not None}
        self._layers |= dict(zip(unknown, settled(list(unknown.values()), gradients), strict=True))

    @torch.no_grad()
    def _heads(self) -> dict[tuple[str, str], dict[str, Tensor]]:
        """Measure every head: (layer, part) -> measure -> one value per head, on the CPU."""
        wanted = {*self.measures, *(("effective_rank",) if self.collapse is not None else ())}
        found: dict[tuple[str, str], dict[str, Tensor]] = {}
        check_values(self.model, list(self._layers.values()))
        for name, layer in self._layers.items():
            for part in _parts(layer, self.of):
                product = getattr(layer, part)() if part in _PRODUCTS else None
                spectra = product.spectrum() if product is not None else spectrum(getattr(layer, part).heads())
                sources = {m: product if m in BALANCE else spectra for m in wanted}
                found[name, part] = {m: figure(source, m).cpu() for m, source in sources.items() if source is not None}
                if self._takes_spectra:
                    found[name, part][_SPECTRA] = spectra.singular_values.cpu()
        return found

    def _values(self, heads: dict[tuple[str, str], dict[str, Tensor]]) -> dict[str, float]:
        values: dict[str, float] = {"step": self.steps}
        for part in dict.fromkeys(part for _, part in heads):
            for measure in self._measures(part):
                everywhere = torch.cat(
                    [by_measure[measure] for (_, other), by_measure in heads.items() if other == part]
                )
                _summarise(values, f"rank/{part}/{measure}", everywhere)
        for (layer, part), by_measure in heads.items() if self.detail != "model" else ():
            for measure in self._measures(part):
                _summarise(values, f"rank/{layer}/{part}/{measure}", by_measure[measure])
                if self.detail == "head":
                    each = by_measure[measure].tolist()
                    values |= {f"rank/{layer}/{part}/{measure}_{head}": value for head, value in enumerate(each)}
        return values

    def _measures(self, part: str) -> list[str]:
        """Return the measures of a part: only products have a balance."""
        return [measure for measure in self.measures if measure not in BALANCE or part in _PRODUCTS]

    def _warn(self, heads: dict[tuple[str, str], dict[str, Tensor]]) -> None:
        """Warn once of all heads that have fallen below the bound since they were last above it."""
        if self.collapse is None:
            return
        fallen: list[str] = []
        for (layer, part), values in heads.items():
            for head, rank in enumerate(values["effective_rank"].tolist()):
                if rank >= self.collapse:
                    self._collapsed.discard((layer, part, head))
                elif rank < self.collapse and (layer, part, head) not in self._collapsed:  # neither if NaN
                    self._collapsed.add((layer, part, head))
                    fallen.append(f"{layer} {part} head {head} ({rank:.3g})")
        if fallen:
            more = f" and {len(fallen) - 8} more" if len(fallen) > 8 else ""
            warnings.warn(
                f"step {self.steps}: the effective rank has fallen below {self.collapse:g} in "
                f"{', '.join(fallen[:8])}{more}. If this is not wanted, lower their decay or the learning rate.",
                RankCollapseWarning,
                stacklevel=2,
            )


def _parts(layer: AttentionLayer, of: Iterable[str]) -> list[str]:
    """Return the parts that a layer has; the matrices of a product in its place if it has no such product."""
    none = set() if layer.has_score_product else {"query_key"}
    none |= set() if layer.has_value_product else {"value_output"}
    none |= {"output"} if layer.output is None else set()
    parts = (name for part in of for name in (part.split("_") if part in none else [part]))
    return [part for part in dict.fromkeys(parts) if part not in none]


def _summarise(values: dict[str, float], name: str, heads: Tensor) -> None:
    values[name] = heads.mean().item()
    values[f"{name}_min"] = heads.min().item()


def _chosen(argument: str, given: str | Iterable[str], legal: tuple[str, ...]) -> tuple[str, ...]:
    chosen = (given,) if isinstance(given, str) else tuple(given)
    if not chosen:
        raise ValueError(f"{argument} is empty; expected one or more of {', '.join(map(repr, legal))}.")
    for name in chosen:
        check_name(argument, name, legal)
    return tuple(dict.fromkeys(chosen))


def _plain(name: str, model: nn.Module) -> str:
    """Return the layer's name in the unwrapped model, so that wrapping does not start new curves."""
    parallel = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    return bare_name(name, in_parallel=isinstance(getattr(model, "_orig_mod", model), parallel)) or "attention"
