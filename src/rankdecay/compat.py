"""NewtonSchulzLowRankDecay and StableRankMonitor with the arguments under which copies of a prototype circulate.

The copies decay every matrix whose name contains a keyword, also W_Q, W_K and W_V in one parameter as one matrix, and
their monitor then finds nothing under the keywords it is given. Here the same calls do this:

* A step is W ← W − decay_rate · NS(W), not multiplied by the learning rate, as in the copies. They divide W by
  ‖W‖_F + 1e-8 and this by ‖W‖_F, which differs where ‖W‖_F is below 1e-5. 16-bit weights are rounded stochastically;
  a copy's step is lost in them.
* W_Q, W_K and W_V in one parameter are three matrices where names and shapes, which are all that ``named_parameters()``
  tells, prove how it is cut. Elsewhere it is refused.
* What is selected and what is not is printed once. Keywords that select nothing are an error.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rankdecay.attention import Window
from rankdecay.attention.fused import is_fused, proven_thirds
from rankdecay.attention.layer import WHOLE
from rankdecay.attention.locate import locate
from rankdecay.attention.module.found import Found
from rankdecay.attention.names import is_input_like
from rankdecay.attention.source import ModuleSource
from rankdecay.checks import check_number
from rankdecay.decay.apply import Step, apply
from rankdecay.decay.policy import LowRank
from rankdecay.dtensor import is_first_process
from rankdecay.linalg.rounding import step_seed
from rankdecay.linalg.rules.newton_schulz import with_steps
from rankdecay.spectrum import spectrum
from rankdecay.text import aligned

Shapes = Mapping[str, tuple[int, ...]]
Windows = dict[str, tuple[Window, ...]]  # of the matrices in each parameter, by name

_NORM_OR_BIAS = re.compile(r"norm|bias|(?<![a-z])ln(?![a-z])", re.IGNORECASE)
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


class NewtonSchulzLowRankDecay:
    """Low-rank decay by five cubic Newton-Schulz steps, called after the optimizer's step.

    In new code use :func:`rankdecay.attach`: it finds attention in the model, and its state is the optimizer's.

    Args:
        named_parameters: ``model.named_parameters()``. What is frozen, a norm, a bias or not 2-D is left out.
        decay_rate: what a step takes from the large singular values, ≥ 0; as an attribute, read at each step.
        num_iterations: Newton-Schulz steps, ≥ 1; as an attribute, read at each step.
        target_keywords: parts of names; by default ``["qk_norm", "attention"]``, as in most copies.

    Attributes:
        params_to_decay: the parameters that are decayed, with their names.

    Raises:
        TypeError: If ``named_parameters`` does not yield names and parameters, or the keywords are no list of strings.
        ValueError: If a number is out of range, no matrix is selected, or a parameter holds several of W_Q, W_K and W_V
            and name and shape do not prove where.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Tensor]],
        decay_rate: float = 1e-3,
        num_iterations: int = 5,
        target_keywords: Sequence[str] | None = None,
    ) -> None:
        self.decay_rate, self.num_iterations = decay_rate, num_iterations
        self.target_keywords = _keywords(target_keywords, ["qk_norm", "attention"])
        self._decay()
        parameters = _parameters(named_parameters)
        shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
        frozen = {name for name, parameter in parameters.items() if not parameter.requires_grad}
        low_rank = f"rd.LowRank({decay_rate:g}, rule='newton_schulz', scale='absolute', lr_coupled=False, every=1)"
        modern = f"rd.attach(optimizer, model, query_key={low_rank})"
        selection = _select(shapes, self.target_keywords, proven_thirds(shapes), modern, frozen)
        if not selection.windows:
            raise ValueError(selection.nothing(self.target_keywords, modern))
        self.params_to_decay = [(name, parameters[name]) for name in selection.windows]
        self._by_windows: dict[tuple[Window, ...], list[Tensor]] = {}
        for name, windows in selection.windows.items():
            self._by_windows.setdefault(windows, []).append(parameters[name])
        self._steps = 0
        title = f"NewtonSchulzLowRankDecay, {decay_rate:g} per step, {num_iterations} iterations"
        _print(title, *selection.table("decayed"), f"in new code: {modern}")

    @torch.no_grad()
    def step(self) -> None:
        """Decay the parameters in place; sharded ones in every process that holds parts."""
        decay = self._decay()
        self._steps += 1
        for number, (windows, parameters) in enumerate(self._by_windows.items()):
            seed = step_seed(self._steps, number)
            apply([Step(parameters, list(windows), decay, decay.strength, seed)], "auto")

    def _decay(self) -> LowRank:
        check_number("decay_rate", self.decay_rate, at_least=0, remedy="0 switches it off")
        check_number("num_iterations", self.num_iterations, at_least=1, whole=True, remedy="the copies use 5")
        return LowRank(self.decay_rate, with_steps(self.num_iterations).name, "absolute", lr_coupled=False)


class StableRankMonitor:
    """Mean stable rank ‖W‖_F² / ‖W‖₂² of the matrices whose names contain a keyword, of a fused one its parts'.

    Where the keywords select nothing, W_Q and W_K of all attention in the model are measured, and the print says so.
    In new code use :class:`rankdecay.Monitor`, which logs more.

    Args:
        model: the model.
        target_keywords: parts of names; by default ``["q_proj", "k_proj", "attention"]``.

    Attributes:
        history: what :meth:`compute` has returned so far.

    Raises:
        TypeError: If ``model`` is no ``nn.Module``, or the keywords are no list of strings.
        ValueError: If nothing is found, or a parameter holds several of W_Q, W_K and W_V and nothing says where.
    """

    def __init__(self, model: nn.Module, target_keywords: Sequence[str] | None = None) -> None:
        self.model = model
        self.history: list[float] = []
        self.target_keywords = _keywords(target_keywords, ["q_proj", "k_proj", "attention"])
        source = ModuleSource(model)
        layers, _ = locate(source)
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        modern = "rd.Monitor(model, every=100, log=print)"
        selection = _select(shapes, self.target_keywords, _windows(layers), modern)
        title = "StableRankMonitor"
        if not selection.windows:
            selection = selection._replace(shapes=source.shapes, windows=_windows(layers, "query", "key"))
            title += f", of W_Q and W_K, as no matrix's name contains {' or '.join(self.target_keywords)}"
        if not selection.windows:
            raise ValueError(selection.nothing(self.target_keywords, modern))
        self._matrices = [(source.reader(name), w) for name, windows in selection.windows.items() for w in windows]
        _print(title, *selection.table("measured"), f"in new code: {modern}")

    @torch.no_grad()
    def compute(self) -> float:
        """Return the present mean, and add it to the history; with sharded parameters all processes have to call it."""
        ranks = [float(spectrum(window.matrix(read())).stable_rank) for read, window in self._matrices]
        self.history.append(sum(ranks) / len(ranks))
        return self.history[-1]


class _Selection(NamedTuple):
    """Parameters that keywords select, by the windows of their matrices, and the reasons why others are left out."""

    shapes: Shapes
    windows: Windows
    left_out: dict[str, str]

    def table(self, verb: str) -> list[str]:
        """Return the lines of a table, names that differ in a number counted together."""
        verdicts = {name: f"not {verb}: {reason}" for name, reason in self.left_out.items()}
        for name, windows in self.windows.items():
            verdicts[name] = verb + (f" as {len(windows)} matrices" if len(windows) > 1 else "")
        ordered = sorted(verdicts, key=lambda name: name not in self.windows)
        kinds = Counter((_NUMBER.sub("*", name), _text(self.shapes[name]), verdicts[name]) for name in ordered)
        rows = [[name, f"{count} × {shape}", verdict] for (name, shape, verdict), count in kinds.items()]
        return [*aligned(rows), f"{len(self.shapes) - len(verdicts)} other parameters: not {verb}"]

    def nothing(self, keywords: list[str], modern: str) -> str:
        """Return the message for keywords that select nothing."""
        found = "; ".join(" ".join(line.split()) for line in self.table("selected"))
        return f"target_keywords={keywords} select no matrix: {found}. Pass parts of these names, or use {modern}"


def _select(
    shapes: Shapes, keywords: list[str], known: Windows, modern: str, frozen: Collection[str] = ()
) -> _Selection:
    """Select parameters by keywords; ``known`` are the windows of those that hold matrices of attention.

    Raises:
        ValueError: If one of them holds several matrices and is not known.
    """
    selection = _Selection(shapes, {}, {})
    for name, shape in shapes.items():
        if not any(word in name for word in keywords):
            if len(shape) > 1 and ("attn" in name or "attention" in name or any(map(is_input_like, name.split(".")))):
                selection.left_out[name] = "no keyword in its name"
        elif name in frozen:
            selection.left_out[name] = "frozen"
        elif any(map(_NORM_OR_BIAS.search, name.split(".")[-2:])):
            selection.left_out[name] = "norm or bias"
        elif len(shape) != 2:
            selection.left_out[name] = "not 2-D"
        elif name not in known and is_fused(name, shape):
            raise ValueError(
                f"{name} ({_text(shape)}) holds several of W_Q, W_K and W_V, and names and shapes do not prove where "
                f"each lies, so it cannot be decayed or measured by keywords; use {modern}"
            )
        else:
            selection.windows[name] = known.get(name, (WHOLE,))
    return selection


def _windows(layers: Iterable[Found], *roles: str) -> Windows:
    """Return the windows of attention's matrices, of some roles or of all."""
    windows: Windows = {}
    for layer in layers:
        for role, (name, window, *_) in layer.places.items():
            if (not roles or role in roles) and window not in windows.get(name, ()):  # keys may be values too
                windows[name] = (*windows.get(name, ()), window)
    return windows


def _keywords(given: Sequence[str] | None, default: list[str]) -> list[str]:
    if isinstance(given, str) or not all(isinstance(word, str) and word for word in given or ()):
        raise TypeError(f"target_keywords must be a list such as ['q_proj', 'k_proj'], got {given!r}.")
    return list(given or default)


def _parameters(named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    pairs = list(named) if isinstance(named, Iterable) else [named]
    if not all(isinstance(pair, tuple) and isinstance(pair[0], str) for pair in pairs):
        raise TypeError(f"named_parameters must be model.named_parameters(), got {type(named).__name__}.")
    if not pairs:
        raise ValueError("named_parameters is empty; if it was read before, call model.named_parameters() again.")
    return dict(pairs)


def _text(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) or "scalar"


def _print(title: str, *lines: str) -> None:
    """Print in the first process alone."""
    if is_first_process():
        print("\n  ".join([f"rankdecay: {title}", *lines]))
