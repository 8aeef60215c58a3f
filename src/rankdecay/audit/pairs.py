"""Multiplicative pairs: two parts that enter the loss only as their product."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from rankdecay.attention import Window
from rankdecay.attention.module.found import Found
from rankdecay.attention.scale import Terms, cancels
from rankdecay.audit.parts import AuditedPart, Partner
from rankdecay.audit.trial import Trial, alternating
from rankdecay.audit.view import ParameterView, terms_of

EFFECT = {
    "product": "only their product counts. L2 on both balances them, and is then a nuclear norm on the product; "
    "low-rank decay lowers the rank of each, and so of the product{turned}",
    "planes": "only their product counts, at every distance. L2 on both balances each rotary plane, and is then a sum "
    "over the planes, not a nuclear norm; low-rank decay lowers the rank of each{turned}",
    "units": "only the product of both sides of a hidden unit counts. L2 on both balances each unit, and then switches "
    "off whole units; low-rank decay lowers the rank of each{turned}",
    "gains": "only their product counts: the scale of the scores, which the norms took from W_Q and W_K. L2 on both "
    "balances them, and then makes attention more even",
}


@dataclass(eq=False)
class Pair:
    """Candidate pair: two parts that may enter the loss only as their product, in every head or hidden unit."""

    first: AuditedPart
    second: AuditedPart
    effect: str
    # What scales, cut into units; a side may have several heads in one.
    sides: tuple[list[ParameterView], list[ParameterView]]

    def judge(self, trial: Trial | None) -> None:
        """Make the parts a pair if the equation holds, and a rescaling does not contradict it."""
        terms = [terms_of(side) for side in self.sides]
        units = min(len(side.total) for side in terms)
        first, second = (side.grouped(units) for side in terms)
        balance, confirmed = cancels(Terms(first.total - second.total, first.square + second.square)), None
        tolerance = max(self.first.tolerance, self.second.tolerance)
        if balance > tolerance:
            return
        if trial is not None:
            up = alternating(units)
            first, second = (
                [(view, factors.repeat_interleave(view.heads // units)) for view in side]
                for side, factors in zip(self.sides, (up, 1 / up), strict=True)
            )
            confirmed = trial.unchanged(first + second, abs(trial.change(first)), tolerance)
        if confirmed is not False:
            words, scaled = EFFECT[self.effect], [*self.sides[0], *self.sides[1]]
            for part, other in ((self.first, self.second), (self.second, self.first)):
                part.partner = Partner(other, words, scaled, balance, confirmed)


def pairs(found: list[Found], parts: list[AuditedPart]) -> Iterator[Pair]:
    """Return candidate pairs: by the structure of attention, and by the shapes of matrices side by side in a module."""
    known = {(part.matrix.name, part.part): part for part in parts}
    for layer in found:
        query, key, value, output = (
            known.get((layer.places[role].parameter, role)) if role in layer.places else None
            for role in ("query", "key", "value", "output")
        )
        if query and key:
            yield Pair(query, key, "planes" if layer.rotary else "product", (query.scaled, key.scaled))
        if value and output:
            yield Pair(value, output, "product", (value.scaled, output.scaled))
        gains = [part for part in parts if part.role == "norm" and part.matrix.name.startswith(layer.name + ".")]
        for first in gains:
            for second in gains:
                if re.search(r"\.(norm_)?q", first.matrix.name[len(layer.name) :]) and first is not second:
                    yield Pair(first, second, "gains", (first.scaled, second.scaled))

    siblings: dict[str, list[AuditedPart]] = {}
    for part in parts:
        if not part.part and part.matrix.parameter.ndim == 2 and part.role in ("mlp", "other"):
            module = part.matrix.name.rpartition(".")[0]
            adapter = re.sub(r"lora_[AB]\.(.*)", r"lora.\1.", module)  # A and B are in two dictionaries
            siblings.setdefault(adapter.rpartition(".")[0], []).append(part)
    for module, members in siblings.items():
        for first in members:
            for second in members:
                sizes = [side.matrix.parameter.shape[i ^ side.transposed] for i, side in enumerate((first, second))]
                if first is second or sizes[0] != sizes[1]:
                    continue
                rows = Window("rows", 0, sizes[0], sizes[0], 1, transposed=first.transposed)
                columns = Window("columns", 0, sizes[0], sizes[0], 1, transposed=second.transposed)
                sides = ([b._replace(window=rows) for b in first.scaled], [second.matrix._replace(window=columns)])
                yield Pair(first, second, "product" if ".lora." in module else "units", sides)
