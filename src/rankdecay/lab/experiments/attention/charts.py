"""The charts of the page and the figure: ranks and quality against decay and against each other, and over training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import product
from operator import itemgetter
from pathlib import Path
from typing import Any

from rankdecay.lab.errors import SettingError
from rankdecay.lab.experiment import Axis, Chart, Choice, Html, Line, Section
from rankdecay.lab.experiments.attention.claims import STYLES, loss_words
from rankdecay.lab.experiments.attention.summary import (
    Cell,
    Record,
    by_cell,
    by_norm,
    main_mlp_decay,
    newest,
    of,
    series,
)
from rankdecay.lab.report import page as pieces
from rankdecay.lab.report.style import arm_styles
from rankdecay.lab.report.words import is_number, known, mean
from rankdecay.lab.stored import StoredRun

PARTS = {"query_key": "W_KᵀW_Q", "value_output": "W_O\u00a0W_V", "query": "W_Q", "key": "W_K"}
MEASURES = {
    "pseudo_rank": "pseudo rank",
    "effective_rank": "effective rank",
    "stable_rank": "stable rank",
    "imbalance": "imbalance",
    "nuclear_gap": "gap to the nuclear norm",
}
LOGARITHMIC = ("nuclear_gap",)
QUALITIES = {"loss": Axis("loss"), "accuracy": Axis("accuracy", percent=True)}
CURVES = {"loss": Axis("loss"), "train_loss": Axis("training loss"), "accuracy": Axis("accuracy", percent=True)}
DECAY = Axis("decay of attention", "symlog")
NO_VALUE = "There is no value of this measure here (under QK-norm W_KᵀW_Q is no product: choose W_Q or W_K)."
ON = {False: "off", True: "on"}  # QK-norm


def _axis(measure: str, values: Sequence[float] = ()) -> Axis:
    """The axis of a measure; of charts that share it the ends are those of all their values."""
    positive = [value for value in values if value > 0]
    if measure in LOGARITHMIC:
        return Axis(MEASURES[measure], "log", (0.8 * min(positive), 1.25 * max(positive)) if positive else None)
    return Axis(MEASURES[measure], limits=(0.0, 1.04 * max(positive)) if positive else None, from_zero=True)


def _mlp(decay: float | None) -> str:
    return "" if decay is None else f"{decay:g}"


@dataclass(frozen=True)
class Grid:
    """The cells of a stored experiment, with their curves, and the choices between them.

    Attributes:
        stored: the experiment.
    """

    stored: StoredRun

    @cached_property
    def cells(self) -> list[Cell]:
        """The results of the runs that have ended."""
        return (self.stored.summary or {}).get("arms", [])

    @cached_property
    def curves(self) -> dict[tuple[Any, ...], list[list[Record]]]:
        """The rows of each cell by step, one per seed.

        Of the runs that ended if there are any, so that no seed leaves a mean on the way; else of all.
        """
        return {key: _by_step(runs) for key, runs in by_cell(newest(self.stored.rows)).items()}

    @cached_property
    def keys(self) -> list[tuple[Any, ...]]:
        """Arm, strength, decay of the MLPs and QK-norm of all cells, those without a result among them."""
        keys = [(str(c["name"]), c["strength"], c["mlp_decay"], bool(c["qk_norm"])) for c in self.cells]
        order = self.stored.arms
        return sorted({*keys, *self.curves}, key=lambda key: (order.index(key[0]), key[3], key[2] or 0, key[1]))

    @cached_property
    def layers(self) -> int:
        """Number of layers."""
        return max((len(row["layers"]) for steps in self.curves.values() for rows in steps for row in rows), default=0)

    @cached_property
    def parts(self) -> list[str]:
        """The parts that any layer has measures of."""
        rows = [row for steps in self.curves.values() for at_step in steps[:1] for row in at_step]
        return [part for part in PARTS if any(part in layer for row in rows for layer in row["layers"])]

    # --- what a reader may choose ---

    @cached_property
    def choices(self) -> dict[str, Choice]:
        """All choices by name; one between a single option is no choice."""
        main = main_mlp_decay(self.cells)
        mlps = sorted({key[2] for key in self.keys if key[2] is not None})
        accurate = bool(known(self.cells, "accuracy"))
        layers = {"0": "mean of all"} | {str(number): str(number) for number in range(1, self.layers + 1)}
        every = [
            Choice("part", "Matrix", {part: PARTS[part] for part in self.parts}),
            Choice("measure", "Measure", MEASURES),
            Choice("layer", "Layer", layers if self.layers > 1 else {"0": layers["0"]}),
            Choice("norm", "QK-norm", {ON[norm]: ON[norm] for norm in sorted({key[3] for key in self.keys})}),
            Choice("mlp", "MLP decay", {_mlp(mlp): _mlp(mlp) for mlp in mlps or [None]}, _mlp(main)),
            Choice("quality", "Quality", {name: name for name in QUALITIES if name == "loss" or accurate}),
            Choice("trained", "Arm", {key[0]: _label(key[0]) for key in self.keys if self.curves.get(key)}),
            Choice("curve", "Show", {n: a.title for n, a in CURVES.items() if n != "accuracy" or accurate}),
        ]
        return {choice.name: choice for choice in every}

    def chosen(self, *names: str) -> list[Choice]:
        """The choices of a chart."""
        return [self.choices[name] for name in names]

    def where(self, **at: Any) -> dict[str, str]:
        """The choices that show a line; those with one option are left out, to keep the page small."""
        at = {name: str(value) for name, value in at.items()}
        return {name: value for name, value in at.items() if len(self.choices[name].options) > 1}

    def slices(self) -> Iterator[tuple[bool, float | None, dict[str, str]]]:
        """QK-norm and the decay of the MLPs, and the choices that show them."""
        for norm, mlp in dict.fromkeys((key[3], key[2]) for key in self.keys):
            yield norm, mlp, self.where(norm=ON[norm], mlp=_mlp(mlp))


def _by_step(runs: Sequence[Sequence[Record]]) -> list[list[Record]]:
    ended = [rows for rows in runs if rows[-1].get("ended") and not rows[-1].get("diverged")]
    by_step: dict[int, list[Record]] = {}
    for rows in ended or runs:
        for row in rows:
            if "layers" in row:
                by_step.setdefault(row["step"], []).append(row)
    return [by_step[step] for step in sorted(by_step)]


# --- against decay ---


def _measured(cell: Cell, part: str, measure: str, layer: int, *, untrained: bool = False) -> float | None:
    """A measure of a layer, counted from 1, or the mean of all as layer 0."""
    means, layers = ("untrained_mean", "untrained") if untrained else ("mean", "layers")
    return _at([cell.get(means) or {}, *(cell.get(layers) or [])], layer, part, measure)


def _at(layers: Sequence[Record], layer: int, part: str, measure: str) -> Any:
    return layers[layer].get(part, {}).get(measure) if layer < len(layers) else None


Of = Callable[[Cell], Any]  # a value of a cell
_strength = itemgetter("strength")


def _lines(arms: Mapping[str, Sequence[Cell]], x: Of, y: Of, where: Mapping[str, str], **more: Of) -> list[Line]:
    """A line per arm through two values of its cells, from the weakest decay to the strongest.

    Args:
        arms: the cells of each.
        x: the place of a cell.
        y: its value.
        where: the choices under which the lines are shown.
        more: what else a `Line` has for each cell: ``words``, ``tags``, ``low`` and ``high``.
    """
    lines = []
    for name, every in arms.items():
        if cells := [cell for cell in every if is_number(x(cell)) and is_number(y(cell))]:
            each: dict[str, Any] = {kind: list(map(value, cells)) for kind, value in more.items()}
            places, values = list(map(x, cells)), list(map(y, cells))
            lines.append(Line(_label(name), places, values, name, mark="line+points", where=where, **each))
    return lines


def _off(cell: Cell, errors: int) -> float:
    """The loss so many standard errors away."""
    return cell["loss"] + errors * (cell["loss_error"] if is_number(cell.get("loss_error")) else 0.0)


BARS = {"loss": {"low": partial(_off, errors=-1), "high": partial(_off, errors=1)}, "accuracy": {}}


def _label(name: str) -> str:
    return STYLES[name].label if name in STYLES else name


def _quality_words(cell: Cell) -> str:
    accuracy = f", accuracy {cell['accuracy']:.1%}" if is_number(cell.get("accuracy")) else ""
    lost = f", {cell['diverged']} of {cell['seeds']} diverged" if cell.get("diverged") else ""
    return f"loss {loss_words(cell)}{accuracy}{lost}"


def _untrained(start: float, ends: Sequence[float], where: Mapping[str, str], *, upright: bool = False) -> Line:
    """A dashed line at a value before training: across places, or upright over them."""
    along, level = [min(ends), max(ends)], [start, start]
    x, y = (level, along) if upright else (along, level)
    return Line("untrained", x, y, mark="dashed", where=where, words=[f"{start:.3g}"] * 2)


def _against_decay(grid: Grid) -> tuple[Chart, Chart, Chart]:
    """Measures and quality against decay, and quality against measures."""
    ranks: list[Line] = []
    qualities: list[Line] = []
    costs: list[Line] = []
    shown = grid.choices["quality"].options
    for norm, mlp, at in grid.slices():
        arms = series(grid.cells, qk_norm=norm, mlp_decay=mlp)
        cells = [cell for own in arms.values() for cell in own]
        for quality in shown:
            where = at | grid.where(quality=quality)
            qualities += _lines(arms, _strength, itemgetter(quality), where, words=_quality_words, **BARS[quality])
        for part, measure, layer in product(grid.parts, MEASURES, map(int, grid.choices["layer"].options)):
            where = at | grid.where(part=part, measure=measure, layer=layer)
            value = partial(_measured, part=part, measure=measure, layer=layer)
            start = mean(value(cell, untrained=True) for cell in cells)
            if start is not None:
                ranks.append(_untrained(start, list(map(_strength, cells)), where))
            ranks += _lines(arms, _strength, value, where)
            for quality in shown:
                beside = where | grid.where(quality=quality)
                if start is not None and known(cells, quality):
                    costs.append(_untrained(start, known(cells, quality), beside, upright=True))
                costs += _lines(
                    arms, value, itemgetter(quality), beside, tags="{strength:g}".format_map, **BARS[quality]
                )
    measures = {measure: _axis(measure) for measure in MEASURES}
    of_measure = ("part", "measure", "layer", "norm", "mlp")
    return (
        Chart("rank", "At the end of training", DECAY, measures, ranks, grid.chosen(*of_measure), "measure",
              empty=NO_VALUE),
        Chart("quality", "On the validation set", DECAY, QUALITIES, qualities,
              grid.chosen("quality", "norm", "mlp"), "quality"),
        Chart("cost", "Quality against the measure", measures, QUALITIES, costs,
              grid.chosen(*of_measure, "quality"), "quality", "measure", NO_VALUE),
    )  # fmt: skip


# --- over training ---


def _over_training(grid: Grid) -> tuple[list[Chart], list[Chart]]:
    """Curves over steps, a line per decay of attention: losses, measures as the mean of all layers and in each."""
    losses: list[Line] = []
    by_layer: list[list[Line]] = [[] for _ in range(grid.layers + 1)]
    extent: dict[str, list[float]] = {measure: [] for measure in MEASURES}
    for key in grid.keys:
        name, strength, mlp, norm = key
        if not (steps := grid.curves.get(key)):
            continue
        at = grid.where(trained=name, norm=ON[norm], mlp=_mlp(mlp))
        label, shade = f"decay {strength:g}", _shade(strength, [k[1] for k in grid.keys if k[0] == name])
        x = [rows[0]["step"] for rows in steps]
        for curve in grid.choices["curve"].options:
            y = [mean(row.get(curve) for row in rows) for rows in steps]
            if any(map(is_number, y)):
                losses.append(Line(label, x, y, where=at | grid.where(curve=curve), shade=shade))
        for part, measure in product(grid.parts, MEASURES):
            where = at | grid.where(part=part, measure=measure)
            each = [
                [mean(_at(row["layers"], layer, part, measure) for row in rows) for rows in steps]
                for layer in range(grid.layers)
            ]
            found = [value for y in each for value in y if value is not None]
            extent[measure] += found  # the ends of a mean are within those of the layers
            for lines, y in zip(by_layer, [list(map(mean, zip(*each, strict=True))), *each], strict=True):
                if found:
                    lines.append(Line(label, x, y, where=where, shade=shade))
    axes = {measure: _axis(measure, values) for measure, values in extent.items()}
    choices, step = grid.chosen("trained", "norm", "mlp"), Axis("step")
    of_measure = [*choices, *grid.chosen("part", "measure")]
    titles = ["Mean of all layers", *(f"Layer {number}" for number in range(1, grid.layers + 1))]
    over = [
        Chart(f"layer-{index}", title, step, axes, lines, of_measure, "measure", empty=NO_VALUE)
        for index, (title, lines) in enumerate(zip(titles, by_layer, strict=True))
    ]
    title = "Loss and accuracy" if "accuracy" in grid.choices["curve"].options else "Loss"
    curves = Chart("curve", title, step, CURVES, losses, [*choices, grid.choices["curve"]], "curve")
    return [curves, over[0]], over[1:] if grid.layers > 1 else []


def _shade(strength: float, strengths: Iterable[float]) -> float:
    """Grey without decay, then from cold to warm the stronger it is."""
    positive = sorted({other for other in strengths if other > 0})
    return 0.0 if not strength else (1 + 2 * positive.index(strength) / max(1, len(positive) - 1)) / 3


# --- the map of both decays ---


def _map(grid: Grid) -> list[Html]:
    """The loss of every pair of decays, which `map.js` draws; none where the MLPs had one decay."""
    if len(grid.choices["mlp"].options) < 2:
        return []
    names = list(dict.fromkeys(key[0] for key in grid.keys))
    controls = pieces.choice("mapped", "Arm", dict(enumerate(map(_label, names))))
    if len(norm := grid.choices["norm"].options) > 1:
        controls += pieces.choice("norm", "QK-norm", norm)
    cells = [
        {
            "arm": names.index(cell["name"]),
            "strength": cell["strength"],
            "mlp": _mlp(cell["mlp_decay"]),
            "norm": ON[cell["qk_norm"]],
            "loss": cell.get("loss"),
            "words": f"{_label(cell['name'])}, decay {cell['strength']:g}, MLP decay {_mlp(cell['mlp_decay'])}",
            "quality": _quality_words(cell) if is_number(cell.get("loss")) else "diverged",
        }
        for cell in sorted(grid.cells, key=lambda cell: (cell["mlp_decay"] or 0, cell["strength"]))
    ]
    figure = f'<figure><div class="controls">{controls}</div><div class="chart" id="mlp-chart"></div></figure>'
    return [Html(figure, {"map": cells}, ("map.js",))]


# --- the page and the figure ---

TEXTS = {
    "rank": "The decay is on a logarithmic axis; 0 has a place of its own on the left. Dashed: untrained.",
    "quality": "Bars are one standard error.",
    "cost": "A point per cell, with its decay of attention beside it; the line joins an arm's from its weakest decay "
    "to its strongest. Dashed: untrained. What is further left has a lower rank.",
    "mlp": "The loss of every pair of decays: the stronger the colour, the less.",
    "training": "A line per decay of attention: grey without, from cold to warm the stronger it is. Means over seeds.",
    "layers": "The same measure in each layer, on one scale.",
}


def make_sections(stored: StoredRun) -> list[Section]:
    """The sections of the page."""
    grid = Grid(stored)
    if not grid.keys:
        return []
    rank, quality, cost = _against_decay(grid)
    training, layers = _over_training(grid)
    return [
        Section("Rank against decay", TEXTS["rank"], [rank, Html("", styles=("attention.css",))], "rank"),
        Section("Quality against decay", TEXTS["quality"], [quality], "quality"),
        Section("What rank costs", TEXTS["cost"], [cost], "cost"),
        Section("Decay of attention and of the MLPs", TEXTS["mlp"], _map(grid), "mlp"),
        Section("Over training", TEXTS["training"], training, "training"),
        Section("Layer by layer", TEXTS["layers"], layers, "layers"),
    ]


def figure(stored: StoredRun, path: Path) -> Path:
    """Draw the static figure: pseudo ranks of both products and loss against decay, in a row for each QK-norm.

    Where the MLPs had several decays it shows the one of `main_mlp_decay`.
    """
    from rankdecay.lab.report.figure import draw

    grid = Grid(stored)
    found, charts = by_norm(grid.cells), []
    if not found:
        raise SettingError(f"{stored.directory} has nothing to draw: no run has ended with a finite loss yet")
    for norm, arms in found.items():
        suffix = "" if len(found) == 1 else ", QK-norm" if norm else ", no QK-norm"
        cells = [cell for own in arms.values() for cell in own]
        for part in ("query_key", "value_output"):
            name = PARTS[part] if any(part in cell["mean"] for cell in cells) else "W_Q, W_K"
            lines = _lines(arms, _strength, partial(of, part=part), {})
            start = mean(of(cell, part, when="untrained_mean") for cell in cells)
            if start is not None:  # below the others, and in the legend
                lines.insert(0, replace(_untrained(start, list(map(_strength, cells)), {}), mark="line"))
            title = f"Pseudo rank of {name}{suffix}"
            charts.append(Chart(f"{part}-{norm}", title, DECAY, Axis(title, limits=(0, 1.02)), lines))
        title, losses = f"Loss{suffix}", _lines(arms, _strength, itemgetter("loss"), {}, **BARS["loss"])
        charts.append(Chart(f"loss-{norm}", title, DECAY, Axis(title), losses))
    return draw(charts, arm_styles(stored.arms, STYLES), path)
