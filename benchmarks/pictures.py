"""The pictures of `docs/findings` and the README, drawn from the rows in `docs/data`, for `benchmarks/findings.py`.

`docs/images/drawn.json` says of each picture from which rows it was drawn (a checksum of what it shows) and the
checksum of the file. A check compares both, so it needs no drawing, and does not depend on the version of matplotlib;
a picture is drawn again when its rows have changed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import statistics
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import accelerators_findings
import boundary_findings
import compress_findings
import numpy as np
import pretrained_findings
import rotary_findings
import schedule
import schedule_findings
import stored

from rankdecay.lab import experiment
from rankdecay.lab.report.chart import Axis, Chart, Line
from rankdecay.lab.report.style import arm_styles
from rankdecay.lab.store import read_json

DATA, IMAGES = Path("docs/data"), Path("docs/images")
RECORD = IMAGES / "drawn.json"
ARMS_OF_MECHANISM = {"none": "no decay of W_Q, W_K", "l2_all": "L2", "paper_a1": "the paper's step A1"}
RUNS = {  # a picture that `rankdecay report DIR --figure` draws, and the run
    "grok": "grok_default",
    "boundary": "boundary/selection",  # at one decay of the rest
    "paper": "boundary/paper_add",
    "language": "language/standard",
    "recall": "recall/standard",
}
DIGITS = 6  # of the numbers of a chart that count as the same
REST = 2.0  # decay of the rest of the maps of `boundary`: the best, and the one that every arm was tried at
Charts = list[Chart]


# --- charts of what has no page of its own ---


def margin() -> Charts:
    """How the direction settles as the margin grows."""
    arms = stored.arms(DATA / "margin" / "generic")
    charts = []
    for key, title in (("cosine_nuclear", "cosine to the nuclear SVM"), ("cosine_frobenius", "to the Frobenius SVM")):
        lines = [_line(name, [(at["margin"], at[key]) for at in arms[name]["at"]]) for name in ("merged", "separate")]
        charts.append(Chart(key, title, Axis("margin", "log"), Axis(title), lines))
    return charts


def factor() -> Charts:
    """The singular values that are left under L2, and the imbalance."""
    arms = (read_json(DATA / "factor" / "standard" / "summary.json") or {"arms": []})["arms"]
    values, balance = [], []
    for name in ("factors", "decoupled", "merged"):
        own = [row for row in arms if row["name"] == name and row["strength"] > 0]
        values.append(_line(name, [(row["strength"], row["rank"]) for row in own]))
        shares = [(row["strength"], row["imbalance"] / row["imbalance_initial"]) for row in own if row.get("imbalance")]
        balance.append(_line(name, [(x, y) for x, y in shares if y > 0]))
    return [
        Chart("rank", "rank at the end, of 5", Axis("λ"), Axis("rank at the end, of 5", from_zero=True), values),
        Chart("balance", "imbalance left", Axis("λ"), Axis("imbalance left", "log"), balance),
    ]


ENDS = ("AdamW, ε = 10", "Adam with L2, ε = 10", "AdamW, ε = 1e-08")


def plane() -> Charts:
    """Where the toy in two dimensions ends, by its parametrisation."""
    document = json.loads((DATA / "factor" / "more.json").read_text())
    charts = []
    for name, title in (("direct", "on w itself"), ("product", "on w = a·b")):
        lines = [
            Line("solutions", [-0.1, 0.5], [0.55, 0.25], mark="thin"),
            Line("least ‖w‖₁, ‖w‖₂, ‖w‖_∞", [0, 0.2, 1 / 3], [0.5, 0.4, 1 / 3], mark="points"),
        ]
        for row in document["two_dimensions"]:
            if row["parametrisation"] == name:
                x, y = zip(*row["ends"], strict=True)
                label = f"{row['optimizer']}, ε = {row['epsilon']:g}"
                lines.append(Line(label, x, y, mark="points", arm=label, shade=ENDS.index(label) / 2))
        charts.append(Chart(f"{name}-plane", title, Axis("w₁"), Axis("w₂"), lines))
    return charts


def rotary() -> Charts:
    """Planes and the rank of W_Q that L2 leaves, with positions and without."""
    charts = []
    for key, title in (("active", "planes left, of 8"), ("query_rank", "rank of W_Q")):
        lines = []
        for run, arm, label in (
            ("fourier", "rotary", "Fourier frequencies"),
            ("geometric", "rotary", "θ = 100"),
            ("shared", "rotary", "a target of rank two"),
            ("geometric", "unturned", "no positions"),
        ):
            own = rotary_findings.rows(rotary_findings.DATA / run, arm)
            lines.append(_line(label, [(row["strength"], statistics.fmean(row["each"][key])) for row in own]))
        charts.append(Chart(key.replace("_", "-"), title, Axis("λ"), Axis(title, from_zero=True), lines))
    return charts


def cost() -> Charts:
    """Milliseconds of a decay of one stack, by the side of its matrices."""
    rows = json.loads((DATA / "step.json").read_text())["rows"]
    names = ("prox, exact", "smooth, exact", "newton_schulz, matmul", "torch.linalg.svd", "AdamW.step")
    lines = []
    for name in names:
        points = [(row["case"], row["ms"]) for row in rows if row["what"] == name and row["case"] != "gpt2"]
        lines.append(_line(name, sorted((_side(case), ms / _count(case)) for case, ms in points)))
    return [Chart("cost", "ms a matrix", Axis("side of the matrix", "log"), Axis("ms a matrix", "log"), lines)]


def _side(case: str) -> int:
    return int(case.partition("x")[2])


def _count(case: str) -> int:
    return int(case.partition("x")[0])


def inspection() -> Charts:
    """Milliseconds a layer: inspecting, an SVD of every product, reading."""
    rows = json.loads((DATA / "inspection.json").read_text())["rows"]
    widths = {"gpt2": 768, "7b": 4096}
    named = {"inspect_ms": "rankdecay inspect", "direct_ms": "SVD of the products", "read_ms": "reading"}
    lines = [_line(label, [(widths[row["model"]], row[key]) for row in rows]) for key, label in named.items()]
    return [Chart("inspection", "ms a layer", Axis("width of the model", "log"), Axis("ms a layer", "log"), lines)]


SHADES = (0.0, 0.25, 1.0)  # of the seeds


def subtraction() -> Charts:
    """Right answers, and answers right but for the sign, of the runs that stay near .4."""
    document = json.loads((DATA / "plateau.json").read_text())
    charts = []
    for fraction in (0.6, 0.8):
        lines = []
        for row in document["rows"]:
            if (row["arm"], row["fraction"]) == ("l2", fraction):
                steps = [point[0] for point in row["curve"]]
                shade = SHADES[row["seed"]]
                lines.append(Line(f"seed {row['seed']}", steps, [p[3] for p in row["curve"]], shade=shade))
                either = [round(p[3] + p[4], 4) for p in row["curve"]]
                lines.append(Line(f"seed {row['seed']}, either sign", steps, either, shade=shade, mark="dotted"))
        title = f"L2 10, {fraction:.0%} of the pairs"
        charts.append(
            Chart(f"at-{fraction}".replace(".", ""), title, Axis("step"), Axis("test, right", percent=True), lines)
        )
    return charts


def contrasts() -> Charts:
    """The four contrasts of E1; nothing before its rows are all there."""
    if not schedule_findings.complete(schedule_findings.DATA):
        return []
    found = schedule_findings.result(schedule_findings.DATA)["contrasts"]
    horizons = list(found)
    lines = []
    for number, one in enumerate(found[horizons[0]]):
        each = [found[horizon][number] for horizon in horizons]
        lines.append(
            Line(
                f"{one['arm']} / {one['against']}", [int(h) * 1.03**number for h in horizons],
                [e["ratio"] for e in each], low=[e["low"] for e in each], high=[e["high"] for e in each],
                mark="line+points", shade=number / 3,
            )
        )  # fmt: skip
    return [Chart("contrasts", "ratio of times", Axis("read at step", "log"), Axis("ratio of times", "log"), lines)]


LEAST = 1e-5  # of a rise of the loss that is drawn


def compress() -> Charts:
    """The energy of a plane or a rank in the weights, beside the loss of leaving it out."""
    rows = stored.read_lines(compress_findings.DATA / "predicted.jsonl")
    if not rows:
        return []
    planes, ranks = [], []
    for family in compress_findings.families(rows):
        for what, data, lines in (("plane", False, planes), ("rank", False, ranks), ("rank", True, ranks)):
            some = [r for r in rows if (r["family"], r["what"], r["data"]) == (family, what, data) and r["share"] > 0]
            if some:
                rises = [max(row["rise"], LEAST) for row in some]
                label = family if what == "plane" else f"{family}, {'with' if data else 'without'} data"
                lines.append(Line(label, [row["share"] for row in some], rises, mark="points", arm=label))
    rise = Axis("rise of the loss, nats", "log")
    return [
        Chart(
            "planes",
            "a rotary plane left out",
            Axis("share of the energy of the scores", "log", (0.005, 0.6)),
            rise,
            planes,
        ),
        Chart("ranks", "values of a lower rank", Axis("share of the energy of W_O W_V", "log"), rise, ranks),
    ]


def pretrained() -> Charts:
    """The pseudo rank of every layer of two trained models, and what rounding does to a known one."""
    ranks, rounded = [], []
    for model, name in (("minilm", "MiniLM"), ("smollm2", "SmolLM2")):
        for product, symbol in pretrained_findings.SYMBOLS.items():
            rows = pretrained_findings.of(model, product)
            label = f"{name}, {symbol}"
            ranks.append(_line(label, [(row["layer"], row["rank"]) for row in rows]))
            same = [row["untrained"] for row in rows]
            ranks.append(Line(f"{label}, untrained", [row["layer"] for row in rows], same, arm=label, mark="dotted"))
    for what, label in pretrained_findings.CUTS.items():
        some = [row for row in pretrained_findings.read()["rounding"] if row["of"] == what]
        points = [(row["before"][p], row["after"][p]) for row in some for p in pretrained_findings.SYMBOLS]
        rounded.append(Line(label, [x for x, _ in points], [y for _, y in points], mark="points", arm=label))
    rounded.append(Line("no change", [0, 1], [0, 1], mark="thin"))
    rank = Axis("pseudo rank", from_zero=True, limits=(0, 1))
    return [
        Chart("ranks", "in every layer", Axis("layer"), rank, ranks),
        Chart("rounding", "rounded to four bits", Axis("pseudo rank before"), rank, rounded),
    ]


def mechanism() -> Charts:
    """Accuracy and rank in time, and the singular values at the end, with 0.4 and 0.5 of the pairs."""
    if not boundary_findings.MECHANISM.exists():
        return []
    charts = []
    rows = json.loads(boundary_findings.MECHANISM.read_text())["rows"]
    for fraction in sorted({row["fraction"] for row in rows}):
        accuracy, rank, spectrum = [], [], []
        for row in rows:
            if row["fraction"] == fraction:
                name = ARMS_OF_MECHANISM[row["arm"]]
                steps, train, test, stable, *_ = zip(*row["curve"], strict=True)
                accuracy += [Line(name, steps, test, arm=name), Line(name, steps, train, arm=name, mark="thin")]
                rank.append(Line(name, steps, stable, arm=name))
                values = row["best"]["singular_values"]["query"][0]
                spectrum.append(Line(name, range(1, len(values) + 1), values, arm=name))
        at, step = f", {fraction:g} of the pairs", Axis("step")
        right = Axis("right, test (thin: training)", percent=True)
        index = Axis("singular value of W_Q, first layer")
        charts += [
            Chart(f"accuracy-{fraction}", "accuracy" + at, step, right, accuracy),
            Chart(f"rank-{fraction}", "rank" + at, step, Axis("stable rank of W_Q, W_K", from_zero=True), rank),
            Chart(f"values-{fraction}", "spectrum" + at, index, Axis("size", "log", (1e-7, 10)), spectrum),
        ]
    return charts


def _line(label: str, points: Sequence[tuple[float, float]]) -> Line:
    return Line(label, [x for x, _ in points], [y for _, y in points], arm=label, mark="line+points")


def accelerators() -> Charts:
    """Times of every arm's held-out runs with the interval of their mean, and the share that has 95 % at the end."""
    charts, order = [], []
    for task, title in (("selection", "selection mod 13"), ("add", "addition mod 97")):
        found = accelerators_findings.result(accelerators_findings.DATA / task)
        if found is None:
            return []
        arms, budget = {own["arm"]: own for own in found["arms"]}, found["protocol"].horizons[-1]
        order = order or sorted(arms, key=lambda arm: statistics.fmean(map(math.log, arms[arm]["times"])), reverse=True)
        times, shares = [Line("budget", [budget, budget], [-0.5, len(order) - 0.5], mark="dotted")], []
        for place, arm in enumerate(order):
            if arm in arms:
                own = arms[arm]
                mean = schedule.contrast(np.log(own["times"]))
                times.append(Line("runs", own["times"], [place] * own["runs"], mark="points"))
                times.append(Line(arm, [mean["ratio"]], [place], low=[mean["low"]], high=[mean["high"]], arm=arm))
                shares.append(Line(arm, [own["still"] / own["runs"]], [place], arm=arm))
        arm = Axis("arm")
        charts += [
            Chart(f"{task}-times", title, Axis("step at which 95 % is held", "log"), arm, times),
            Chart(f"{task}-still", "95 % at the end", Axis("share of runs", percent=True), arm, shares),
        ]
    return charts


BLUE = "#1d63b8"


def _draw_arms(charts: Charts, path: Path) -> None:
    """Draw pairs of charts with a row for each arm: intervals lie, which a chart's own error bars do not."""
    from matplotlib.ticker import LogLocator, NullLocator, PercentFormatter

    from rankdecay.lab.report.figure import GREY, drawing

    order = [line.label for line in charts[1].lines]
    with drawing(path, (9.2, 4.2), layout="constrained") as picture:
        panels = picture.subplots(1, len(charts), sharey=True, width_ratios=[3, 1] * (len(charts) // 2))
        for axes, chart in zip(panels, charts, strict=True):
            axes.set(title=chart.title, xlabel=chart.first_x.title, axisbelow=True)
            for line in chart.lines:
                if line.low is not None and line.high is not None:
                    ends = [[line.x[0] - line.low[0]], [line.high[0] - line.x[0]]]
                    axes.errorbar(line.x, line.y, xerr=ends, fmt="o", color=BLUE, ms=4.5, elinewidth=1.5, capsize=2.5)
                elif line.arm:
                    axes.barh(line.y, line.x, height=0.6, color=BLUE)
                else:
                    look = {"marker": "|", "linestyle": "", "markersize": 7} if line.mark == "points" else {"ls": ":"}
                    axes.plot(line.x, line.y, color=GREY, linewidth=1, **look)
            if chart.first_x.percent:
                axes.set_xlim(0, 1)
                axes.set_xticks([0, 0.5, 1])
                axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
            else:
                axes.set_xscale("log")
                axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axes.xaxis.set_minor_locator(NullLocator())
                axes.xaxis.set_major_formatter("{x:,g}")
            axes.set_yticks(range(len(order)), order)
            axes.tick_params(axis="y", length=0)


CHARTS: dict[str, Callable[[], Charts]] = {
    "margin": margin,
    "factor": factor,
    "plane": plane,
    "rotary": rotary,
    "cost": cost,
    "inspection": inspection,
    "subtraction": subtraction,
    "schedule": contrasts,
    "compress": compress,
    "pretrained": pretrained,
    "mechanism": mechanism,
    "accelerators": accelerators,
}
DRAWN = {"accelerators": _draw_arms}  # those that have a form of their own


# --- maps ---

Map = tuple[str, list[list[float]]]


def frequencies() -> list[Map]:
    """The energy of the first layer's scores by the frequencies of both tokens, a map a run."""
    if not boundary_findings.MECHANISM.exists():
        return []
    rows = sorted(json.loads(boundary_findings.MECHANISM.read_text())["rows"], key=lambda row: row["fraction"])
    return [
        (f"{ARMS_OF_MECHANISM[row['arm']]}, {row['fraction']:g}, step {row['best']['step']:,}", row["best"]["energies"])
        for row in rows
    ]


def _draw_maps(maps: Sequence[Map], path: Path) -> None:
    """Draw maps side by side, three in a row, each on one logarithmic scale of shares."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm

    from rankdecay.lab.report.figure import drawing, literal

    scale = ScalarMappable(LogNorm(1e-5, 1, clip=True), "magma")
    with drawing(path, (9.2, 3.2 * -(-len(maps) // 3)), layout="constrained") as picture:
        panels = picture.subplots(-(-len(maps) // 3), min(3, len(maps)), squeeze=False)
        for axes in panels.ravel()[len(maps) :]:
            axes.set_axis_off()
        for axes, (title, values) in zip(panels.ravel(), maps, strict=False):
            n = len(values)
            axes.imshow(values, norm=scale.norm, cmap=scale.cmap, origin="lower", extent=(0.5, n + 0.5) * 2)
            axes.grid(visible=False)
            axes.set(title=literal(title), xlabel="frequency of the key's token", ylabel="of the query's token")
        picture.colorbar(scale, ax=panels, label="share of the energy of the scores", shrink=0.8)


MAPS: dict[str, Callable[[], list[Map]]] = {"frequencies": frequencies}


def names() -> list[str]:
    """The pictures, by the names of their files."""
    return [*RUNS, *CHARTS, *MAPS]


# --- drawing and checking ---


def _rounded(value: Any) -> Any:
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def _shown(name: str) -> str | None:
    """A checksum of what a picture shows; None if there is nothing to draw yet."""
    if name in RUNS:
        files = sorted(path for path in (DATA / RUNS[name]).rglob("*") if path.suffix in (".jsonl", ".json", ".npz"))
        seen = hashlib.sha256()
        for path in files:
            seen.update(path.read_bytes())
        return seen.hexdigest()[:16]
    if name in MAPS:
        maps = MAPS[name]()
        return hashlib.sha256(json.dumps(maps).encode()).hexdigest()[:16] if maps else None
    charts = CHARTS[name]()
    if not charts:
        return None
    told = [
        [
            chart.title,
            [[line.label, *([_rounded(v) for v in some or ()] for some in _numbers(line))] for line in chart.lines],
        ]
        for chart in charts
    ]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]


def _numbers(line: Line) -> list[Any]:
    return [line.x, line.y, line.low, line.high]


def _bytes(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.exists() else None


def _recorded() -> dict[str, dict[str, str]]:
    return json.loads(RECORD.read_text()) if RECORD.exists() else {}


def check() -> list[str]:
    """The pictures that do not show what the rows say."""
    recorded, stale = _recorded(), []
    for name in names():
        path, shown = IMAGES / f"{name}.png", _shown(name)
        there = {"shows": shown, "file": _bytes(path)} if shown or path.exists() else None
        if recorded.get(name) != there:
            stale.append(str(path))
    return stale


def _draw_run(directory: Path, path: Path) -> None:
    """Draw the figure of a run; of the phase diagram that of one decay of the rest, which fits a page."""
    kind = experiment.of_directory(directory)
    if kind.merged is None or kind.figure is None:
        experiment.draw_figure([directory], path)
        return
    stored = experiment.read(kind, [directory])
    several = len({row["rest_decay"] for row in stored.rows if row["arm"] != "l2_all"}) > 1
    rows = [row for row in stored.rows if not several or row["rest_decay"] == REST or row["arm"] == "l2_all"]
    some = dataclasses.replace(stored, rows=rows, summary=None)
    kind.figure(dataclasses.replace(some, summary=kind.so_far(some)), path)


def draw_all(redraw: Collection[str] = ()) -> list[str]:
    """Draw the pictures whose rows, or whose file, are not what was recorded, and those named; return those drawn."""
    from rankdecay.lab.report.figure import draw

    recorded, drawn = _recorded(), []
    if unknown := sorted(set(redraw) - set(names())):
        raise ValueError(f"no picture is called {', '.join(unknown)}: choose of {', '.join(names())}")
    for name in names():
        path, shown = IMAGES / f"{name}.png", _shown(name)
        if shown is None:
            recorded.pop(name, None)
            continue
        if name not in redraw and recorded.get(name) == {"shows": shown, "file": _bytes(path)}:
            continue
        if name in RUNS:
            _draw_run(DATA / RUNS[name], path)
        elif name in MAPS:
            _draw_maps(MAPS[name](), path)
        elif name in DRAWN:
            DRAWN[name](CHARTS[name](), path)
        else:
            charts = CHARTS[name]()
            draw(
                charts,
                arm_styles(list(dict.fromkeys(line.arm or line.label for c in charts for line in c.lines)), {}),
                path,
            )
        recorded[name] = {"shows": shown, "file": _bytes(path) or ""}
        drawn.append(str(path))
    RECORD.write_text(json.dumps(recorded, indent=1, sort_keys=True) + "\n")
    return drawn
