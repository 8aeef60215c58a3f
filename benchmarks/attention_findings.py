"""The tables of `docs/findings` on the decay of attention, from the stored rows of recall, language and vision.

    python benchmarks/attention_findings.py store runs/language docs/data/language/default   # a compact copy
    python benchmarks/attention_findings.py table docs/data/language/default                 # one line per cell
    python benchmarks/attention_findings.py layers docs/data/recall/default                  # and of each layer
    python benchmarks/attention_findings.py scatter docs/data/language                         # chance
    python benchmarks/attention_findings.py stands docs/data/language/standard docs/data/language/qk_norm
    python benchmarks/attention_findings.py balance runs/language/models/*                   # of the models it kept
    python benchmarks/attention_findings.py planes runs/language/models/*                    # and their rotary planes
    python benchmarks/attention_findings.py controls docs/data/language/controls      # what scores are worth
    python benchmarks/attention_findings.py needle docs/data/language/needle.json     # of `benchmarks/needle.py`
    python benchmarks/attention_findings.py extension docs/data/language/planes_*     # planes and ranks over seeds
    python benchmarks/attention_findings.py paired docs/data/vision/mnist_vit         # loss and accuracy seed by seed

A compact copy is a run directory: its rows with the measures that the tables show, so `rankdecay report` draws it too.
Of a run that is not complete it has the runs that have ended. `extension` reads the planes of the models from the file
``planes.json`` beside the rows, which ``planes RUN/models/* --json`` writes.
"""

import argparse
import itertools
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import stored
from scipy import optimize, stats

from rankdecay import find_attention, inspect, spectrum
from rankdecay.lab.experiments.attention.summary import difference, of, summarise
from rankdecay.lab.machine import describe_machine, versions
from rankdecay.lab.session.run_key import key_of
from rankdecay.lab.store import read_json, read_metrics

MEASURES = ("pseudo_rank", "imbalance", "nuclear_gap")
PARTS = ("query_key", "value_output")
DATA = Path("docs/data/language")
NONE = ("l2", 0.0)  # no decay
FEWEST = 3  # seeds that say anything of a scatter
POWER = 0.8  # of the test that a difference is said to show in
Row = dict[str, Any]


def store(options: argparse.Namespace) -> None:
    """Copy a run directory with the measures that the tables show."""
    rows = read_metrics(options.run)
    ended = {key_of(row) for row in rows if row.get("ended")}
    stored.copy(options.run, options.to, (_kept(row) for row in rows if key_of(row) in ended))
    summary = read_json(options.run / "summary.json")
    if summary is None:
        return
    summary["arms"] = summarise(read_metrics(options.to), summary["unit"])
    stored.write_summary(options.to, summary)


def _kept(row: Row) -> Row:
    kept = {key: value for key, value in row.items() if key != "pieces" or row.get("ended")}
    if "layers" in row:
        kept["layers"] = [
            {part: {m: v[m] for m in MEASURES if m in v} for part, v in layer.items()} for layer in row["layers"]
        ]
    return kept


def table(options: argparse.Namespace) -> None:
    """A Markdown line per cell, its loss against that of no decay with the same MLP decay and norm.

    The rotary planes in use are in the last column where ``planes`` has measured the models.
    """
    for directory in options.directories:
        _table_of(directory)


def cells_of(directory: Path) -> list[Row]:
    """The cells of a stored run."""
    return summarise(read_metrics(directory), unit_of(directory))


def unit_of(directory: Path) -> str:
    """The unit that a stored run counts in; tokens where it has no summary."""
    return (read_json(directory / "summary.json") or {"unit": "tokens"})["unit"]


def measure(cell: Row, part: str, name: str = "pseudo_rank") -> float | None:
    """A measure of a product, or of W_Q or W_K alone, over heads and layers."""
    return (cell["mean"].get(part) or {}).get(name) if part in ("query", "key") else of(cell, part, name)


def over_seeds(directory: Path, arm: str, strength: str, part: str, name: str = "pseudo_rank") -> list[float]:
    """A measure of a product at the end, a mean over the layers, of every seed of a cell; ``accuracy`` of the cell."""
    found = []
    for row in read_metrics(directory):
        if (row["arm"], row["strength"], row.get("ended")) == (arm, float(strength), True):
            layers = [layer[part][name] for layer in row["layers"]] if name != "accuracy" else [row["accuracy"]]
            found.append(statistics.fmean(layers))
    return found


def seeds_of(directory: str, arm: str, strength: str, part: str, name: str = "pseudo_rank") -> str:
    """The mean of `over_seeds` and its 95 % interval, of a run below `docs/data`."""
    return stored.interval(over_seeds(Path("docs/data") / directory, arm, strength, part, name), ".2f")


def learnt(directory: str, arm: str, strength: str) -> str:
    """How many seeds of a cell end at an accuracy of 95 % or more, of a run below `docs/data`."""
    ends = over_seeds(Path("docs/data") / directory, arm, strength, "query_key", "accuracy")
    return f"{sum(end >= 0.95 for end in ends)} of {len(ends)}"


def _table_of(directory: Path) -> None:
    cells = cells_of(directory)
    heads = ["arm", "decay", "MLP", "QK-norm", "loss", "above no decay", "accuracy", "rank QK", "rank VO"]
    heads += ["rank W_Q", "rank W_K", "imbalance QK", "imbalance VO", "gap QK", "gap VO"]
    heads += [f"{unit_of(directory)}/s", "at equal time", "planes in use"]
    shown = []
    for cell in cells:
        planes = planes_of(directory, cell["name"], cell["strength"])["planes"]
        shown.append([*_named(cell), *_figures(cell, _no_decay(cells, cell)), stored.mean(planes, ".2f")])
    keep = [i for i in range(len(heads)) if any(row[i] != "—" for row in shown)]
    print("\n| " + " | ".join(heads[i] for i in keep) + " |\n|" + "---|" * len(keep))
    for row in shown:
        print("| " + " | ".join(row[i] for i in keep) + " |")
    for cell in cells[:1]:
        ranks = ", ".join(f"{part} {stored.figure(of(cell, part, when='untrained_mean'), '.2f')}" for part in PARTS)
        print(f"\nuntrained pseudo rank: {ranks}")


def _named(cell: Row) -> list[str]:
    norm = "yes" if cell["qk_norm"] else "no"
    return [cell["name"], f"{cell['strength']:g}", stored.figure(cell["mlp_decay"], "g"), norm]


def _figures(cell: Row, none: Row | None) -> list[str]:
    if cell["loss"] is None:
        return ["diverged", *["—"] * 12]
    above = "—"
    if none is not None and none is not cell:
        distance, error = difference(cell, none)
        above = f"{distance:+.4f}" + (f" ± {error:.4f}" if error is not None else "")
    figures = [f"{cell['loss']:.4f}", above, stored.figure(cell["accuracy"], ".3f")]
    for measure in MEASURES:
        figures += [stored.figure(of(cell, part, measure), ".3g") for part in PARTS]
        if measure == "pseudo_rank":
            figures += [stored.figure((cell["mean"].get(side) or {}).get(measure), ".3g") for side in ("query", "key")]
    return [*figures, stored.figure(cell["per_second"], ",.0f"), stored.figure(cell["loss_at_equal_time"], ".4f")]


def _no_decay(cells: list[Row], cell: Row) -> Row | None:
    same = [
        c
        for c in cells
        if c["strength"] == 0 and (c["mlp_decay"], c["qk_norm"]) == (cell["mlp_decay"], cell["qk_norm"])
    ]
    return same[0] if same and same[0]["loss"] is not None else None


def layers(options: argparse.Namespace) -> None:
    """A Markdown line per cell and layer: pseudo rank and imbalance of both products, untrained in brackets."""
    for directory in options.directories:
        print("\n| arm | decay | QK-norm | layer | rank QK | rank VO | imbalance QK | imbalance VO |\n|" + "---|" * 8)
        for cell in cells_of(directory):
            for index, (layer, before) in enumerate(zip(cell["layers"], cell["untrained"], strict=True)):
                now, then = {"mean": layer}, {"mean": before}
                shown = [
                    f"{stored.figure(of(now, part, measure), '.2f')} ({stored.figure(of(then, part, measure), '.2f')})"
                    for measure in MEASURES[:2]
                    for part in PARTS
                ]
                print(f"| {cell['name']} | {cell['strength']:g} | {_named(cell)[3]} | {index} | {' | '.join(shown)} |")


def balance(options: argparse.Namespace) -> None:
    """A Markdown line per checkpoint: nuclear ratio and imbalance of both products, means over heads and layers."""
    print("| model | ratio QK | imbalance QK | ratio VO | imbalance VO |\n|---|---|---|---|---|")
    for directory in options.directories:
        rows = inspect(directory).rows
        figures = []
        for part in PARTS:
            for measure in ("nuclear_ratio", "imbalance"):
                values = [row[measure] for row in rows if row.get("product") == part]
                figures.append(stored.mean(values, ".3f"))
        print(f"| {directory.name} | {' | '.join(figures)} |")


# --- what differs by chance ---

BLOCK = (0.0, 0.1, 1.0)  # decays of attention and of the MLPs whose cells hardly differ but by chance
PLANE = 0.01  # of the largest of the model: a plane above it is in use, and so is its head
SHARE = 0.95  # of the sum of the planes' sizes, as of a pseudo rank
PLANE_FIGURES = {
    "heads": "heads in use",
    "planes": "planes in use",
    "carrying": "planes that make 95 % of a head",
    "query": "rank W_Q",
    "key": "rank W_K",
    "product": "rank W_KᵀW_Q at equal positions",
}


def chances(data: Path = DATA) -> list[Row]:
    """The difference of two runs that chance alone exceeds once in twenty times, as far as it was measured.

    From neighbouring cells of one seed, whose scatter holds what the decays do as well; and from seeds of no decay,
    where they are stored, whose scatter holds what two runs of one seed have in common. A difference of two cells of
    one seed is between the two, so it stands where it is beyond both.
    """
    cells = [cell for name in ("mlp", "standard") for cell in summarise(read_metrics(data / name), "tokens")]
    near = [cell for cell in cells if cell["strength"] in BLOCK and cell["mlp_decay"] in BLOCK]
    found = {"neighbouring cells of one seed": [cell["loss"] for cell in near if cell["name"] == "l2"]}
    seeds = data / "seeds"
    if (seeds / "config.json").exists():
        found["seeds of no decay"] = [row["loss"] for row in read_metrics(seeds) if row.get("ended")]
    rows = []
    for what, losses in found.items():
        if len(losses) >= FEWEST:
            pair = math.sqrt(2) * statistics.stdev(losses)
            bound = float(stats.t.ppf(0.975, len(losses) - 1)) * pair
            rows.append({"of": what, "runs": len(losses), "pair": pair, "bound": bound})
    return rows


def scatter(options: argparse.Namespace) -> None:
    """A Markdown line per way to say how far two runs differ by chance."""
    print("| from | runs | standard deviation of a difference | exceeded once in twenty times |\n|---|--:|--:|--:|")
    for found in chances(options.directories[0]):
        print(f"| {found['of']} | {found['runs']} | {found['pair']:.3f} | {found['bound']:.3f} |")


def standing(directories: Iterable[Path], data: Path = DATA) -> tuple[list[tuple[str, float, int]], int, int]:
    """The cells whose loss differs from that of no decay by more than chance, as it was measured in some way.

    Returns:
        The name of each, its difference, and beyond how many of the bounds it is; how many bounds there are; and how
        many cells were compared.
    """
    bounds = [found["bound"] for found in chances(data)]
    found, compared = [], 0
    for directory in directories:
        cells = summarise(read_metrics(directory), "tokens")
        for cell in cells:
            none = _no_decay(cells, cell)
            if none is None or none is cell or cell["loss"] is None:
                continue
            compared += 1
            distance = difference(cell, none)[0]
            if beyond := sum(abs(distance) > bound for bound in bounds):
                norm = " with QK-norm" if cell["qk_norm"] else ""
                found.append((f"{cell['name']} {cell['strength']:g}{norm}", distance, beyond))
    return found, len(bounds), compared


def stands(options: argparse.Namespace) -> None:
    """The differences from no decay that chance does not explain."""
    found, bounds, compared = standing(options.directories, options.directories[0].parent)

    def listed(wanted: bool) -> str:
        some = [f"{name} ({distance:+.3f})" for name, distance, beyond in found if (beyond == bounds) == wanted]
        return ", ".join(some) or "none"

    print(f"Of {compared} differences from no decay these stand: {listed(True)}. Beyond one measure of chance and not "
          f"the other: {listed(False)}.")  # fmt: skip


def plane_figures(directory: Path) -> Row:
    """Shares of the heads and rotary planes in use, and of the heads in use the planes that matter and the ranks.

    A plane is as large as ‖q_j‖·‖k_j‖; without rotary positions a coordinate takes its place. A head without a plane in
    use has no rank but that of its rounding errors, and is left out.
    """
    planes: list[list[float]] = []
    ranks: list[dict[str, float]] = []
    products = [row for row in inspect(directory).rows if row.get("product") == "query_key"]
    for layer in find_attention(directory):
        query, key = (spectrum(view.heads().double()).pseudo_rank(SHARE).tolist() for view in (layer.query, layer.key))
        for row in (row for row in products if row["name"] == layer.name):
            planes.append([math.sqrt(a * b) for a, b in zip(*row["squared_norms"].values(), strict=True)])
            own = {"query": query[row["head"]], "key": key[layer.key_head(row["head"])]}
            ranks.append(own | {"product": row["pseudo_rank"]})
    least = PLANE * max(map(max, planes))
    used = [
        (sorted(sizes, reverse=True), rank) for sizes, rank in zip(planes, ranks, strict=True) if max(sizes) > least
    ]
    carrying = [
        next(n for n, total in enumerate(itertools.accumulate(sizes), 1) if total >= SHARE * sum(sizes)) / len(sizes)
        for sizes, _ in used
    ]
    found = {
        "heads": len(used) / len(planes),
        "planes": statistics.fmean(size > least for sizes in planes for size in sizes),
        "carrying": statistics.fmean(carrying),
        **{name: statistics.fmean(rank[name] for _, rank in used) for name in ranks[0]},
    }
    name, _, rest = directory.name.partition("_mlp_")  # of a model that `rankdecay language` keeps: arm and strength
    seed = {"seed": int(rest.rpartition("_seed_")[2])} if "_seed_" in rest else {}
    return {"model": name} | seed | {key: round(value, 4) for key, value in found.items()}


def planes(options: argparse.Namespace) -> None:
    """A Markdown line per checkpoint, or per row of a stored file: ranks, and the rotary planes in use."""
    rows: list[Row] = []
    for path in options.directories:
        rows += json.loads(path.read_text())["rows"] if path.suffix == ".json" else [plane_figures(path)]
    if options.json:
        document = {"machine": describe_machine("cpu"), "versions": versions(), "rows": rows}
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    print(f"| model | {' | '.join(PLANE_FIGURES.values())} |\n|---|" + "--:|" * len(PLANE_FIGURES))
    for row in rows:
        print(f"| {row['model']} | {' | '.join(f'{row[key]:.2f}' for key in PLANE_FIGURES)} |")


# --- over seeds ---


def by_seed(directory: Path, arm: str, strength: float, key: str = "loss") -> dict[int, float]:
    """A figure at the end of the runs of a cell, by seed."""
    rows = [row for row in read_metrics(directory) if row.get("ended")]
    return {row["seed"]: row[key] for row in rows if (row["arm"], row["strength"]) == (arm, strength)}


def above(directory: Path, arm: str, strength: float, against: tuple[str, float], key: str = "loss") -> Row | None:
    """A figure of a cell above another's, seed by seed: mean, 95 % interval by Student's t, seeds, what would show."""
    own, other = by_seed(directory, arm, strength, key), by_seed(directory, *against, key)
    found = [own[seed] - other[seed] for seed in own if seed in other]
    if not found:
        return None
    mean, wide = statistics.fmean(found), stored.half_interval(found)
    shows = least_shown(found) if len(found) > 1 else math.inf
    return {"mean": mean, "low": mean - wide, "high": mean + wide, "seeds": len(found), "shows": shows}


def least_shown(differences: Sequence[float]) -> float:
    """The true mean difference that a two-sided t-test at 5 % finds in `POWER` of experiments that scatter as this one.

    Args:
        differences: of two seeds or more, with each seed's difference once.
    """
    degrees = len(differences) - 1
    bound = stats.t.ppf(0.975, degrees)
    # The test's denominator over the true standard error. scipy's noncentral t is NaN where the shift is large.
    scatter = np.sqrt(stats.chi2.ppf((np.arange(4000) + 0.5) / 4000, degrees) / degrees)

    def beyond(shift: float) -> float:  # in standard errors of the mean
        found = stats.norm.sf(bound * scatter - shift) + stats.norm.cdf(-bound * scatter - shift)
        return float(found.mean()) - POWER

    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return optimize.root_scalar(beyond, bracket=(0.0, 8 * bound)).root * error


def above_words(found: Row | None) -> str:
    """A difference with its interval, if it has one."""
    if found is None:
        return "—"
    interval = f" ({found['low']:+.3f} to {found['high']:+.3f})" if found["seeds"] > 1 else " (one seed)"
    return f"{found['mean']:+.3f}{interval}"


USUAL = ("l2", 0.1)  # what the controls are compared with: attention trained, with the usual decay
CONTROLS = ("uniform", "frozen", "frozen_large", "positions")


def directory_of(run: str) -> Path:
    """The rows of a run of language by its name, or of another command, such as ``vision/mnist_vit``."""
    return DATA.parent / run if "/" in run else DATA / run


def control(arm: str, strength: str = "0.1", run: str = "controls", key: str = "loss") -> str:
    """A figure of a control above that of attention with the usual decay, by seed: its loss, in nats, or another."""
    return above_words(above(directory_of(run), arm, float(strength), USUAL, key))


def controls(options: argparse.Namespace) -> None:
    """A Markdown line per arm: loss, what it is above attention with the usual decay, and the rank of W_KᵀW_Q."""
    print("| scores | arm | decay | seeds | loss | above l2 0.1, by seed | rank QK |\n|---|---|--:|--:|--:|---|--:|")
    for directory in options.directories:
        for cell in cells_of(directory):
            kind = "controlled" if cell["name"] in CONTROLS else "learned"
            seeds = len(by_seed(directory, cell["name"], cell["strength"]))
            own = (cell["name"], cell["strength"])
            words = "—" if own == USUAL else above_words(above(directory, *own, USUAL))
            print(f"| {kind} | {cell['name']} | {cell['strength']:g} | {seeds} | {cell['loss']:.4f} | {words} | "
                  f"{stored.figure(of(cell, 'query_key'), '.2f')} |")  # fmt: skip


def planes_of(directory: Path, arm: str, strength: float) -> dict[str, list[float]]:
    """The figures of the planes of a cell's models, seed by seed."""
    path = directory / "planes.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    own = [row for row in rows if row["model"] == f"{arm}_{strength:g}"]
    return {key: [row[key] for row in own] for key in PLANE_FIGURES}


def extension(options: argparse.Namespace) -> None:
    """A Markdown line per cell: loss above no decay, ranks, and planes, or coordinates without rotary positions."""
    heads = ("positions", "arm", "decay", "seeds", "loss", "above no decay", *PLANE_FIGURES.values())
    print(f"| {' | '.join(heads)} |\n|---|---" + "|--:" * (len(heads) - 2) + "|")
    for directory in options.directories:
        positions = (read_json(directory / "config.json") or {"settings": {}})["settings"].get("positions", "")
        for cell in cells_of(directory):
            own = (cell["name"], cell["strength"])
            words = "—" if own == NONE else above_words(above(directory, *own, NONE))
            found = planes_of(directory, *own)
            ranks = [stored.mean(values, ".2f") for values in found.values()]
            seeds = len(by_seed(directory, *own))
            shown = [positions, own[0], f"{own[1]:g}", str(seeds), f"{cell['loss']:.4f}", words, *ranks]
            print(f"| {' | '.join(shown)} |")


def plane(run: str, arm: str, strength: str, key: str, form: str = ".2f") -> str:
    """The mean over seeds of a figure of a cell's planes; a dash where no model has been measured."""
    values = planes_of(DATA / run, arm, float(strength))[key]
    return stored.mean(values, form)


def above_none(run: str, arm: str, strength: str, key: str = "loss") -> str:
    """The loss of a cell above no decay, by seed, or another figure."""
    return above_words(above(directory_of(run), arm, float(strength), NONE, key))


def paired(options: argparse.Namespace) -> None:
    """A Markdown line per cell: loss, and accuracy where there is one, beside no decay seed by seed, and ranks.

    *Would show* is the difference of losses that four in five such experiments find (`least_shown`).
    """
    for directory in options.directories:
        cells = cells_of(directory)
        figures = [("loss", ".4f"), *([("accuracy", ".3f")] if cells[0]["accuracy"] is not None else [])]
        heads = ["arm", "decay", "seeds"]
        for key, _ in figures:
            heads += [key, "above no decay", *(["would show"] if key == "loss" else [])]
        heads += ["rank QK", "rank VO"]
        print(f"\n| {' | '.join(heads)} |\n|---|" + "--:|" * (len(heads) - 1))
        for cell in cells:
            own = (cell["name"], cell["strength"])
            shown = [own[0], f"{own[1]:g}", str(len(by_seed(directory, *own)))]
            for key, form in figures:
                found = None if own == NONE else above(directory, *own, NONE, key)
                shown += [format(cell[key], form), above_words(found)]
                shown += [would_show(found)] if key == "loss" else []
            shown += [f"{of(cell, part, 'pseudo_rank'):.2f}" for part in PARTS]
            print(f"| {' | '.join(shown)} |")


def would_show(found: Row | None) -> str:
    """The difference that four in five such experiments find, in words; a dash where one seed says nothing of it."""
    return "—" if found is None or math.isinf(found["shows"]) else f"{found['shows']:.3f}"


def power(run: str, arm: str, strength: str) -> str:
    """`would_show` of a cell's loss above no decay, of a run of language."""
    return would_show(above(DATA / run, arm, float(strength), NONE))


NEEDLE = {
    "loss": ("loss", ".4f"),
    "in_use": ("directions in use of a head", ".1f"),
    "pseudo_rank": ("pseudo rank", ".3f"),
    "share": ("of ‖W‖² between the empty", ".1g"),
    "gradient_share": ("of the gradient's square", ".0%"),
    "isotropic": ("of any matrix's", ".0%"),
    "gradient_sharpest": ("σ₁ there / σ₁ of the gradient", ".2f"),
    "grown": ("grown in 3 steps / threshold of 4", ".1f"),
}


def needle(options: argparse.Namespace) -> None:
    """A Markdown line per arm and step of `benchmarks/needle.py`: its figures, means over seeds."""
    print(f"| arm | step | seeds | {' | '.join(title for title, _ in NEEDLE.values())} |")
    print("|---" + "|--:" * (2 + len(NEEDLE)) + "|")
    for path in options.directories:
        rows = json.loads(path.read_text())["rows"]
        some = [row for row in rows if row["step"] == 20 or row["step"] % 100 == 0]
        for arm, step in dict.fromkeys((row["arm"], row["step"]) for row in some):
            own = [row for row in rows if (row["arm"], row["step"]) == (arm, step)]
            shown = [
                format(statistics.fmean(row[key] for row in own), form) if key in own[0] else "—"
                for key, (_, form) in NEEDLE.items()
            ]
            print(f"| {arm} | {step} | {len(own)} | {' | '.join(shown)} |")


def _needle(arm: str, step: str, key: str) -> dict[int, float]:
    """A figure of `benchmarks/needle.py` under an arm, ``on`` or ``off``, by seed."""
    rows = json.loads((DATA / "needle.json").read_text())["rows"]
    return {row["seed"]: row[key] for row in rows if (row["arm"], row["step"]) == (f"decay {arm}", int(step))}


def emptied(arm: str, step: str, key: str) -> str:
    """A figure of `benchmarks/needle.py`, a mean over seeds."""
    return format(statistics.fmean(_needle(arm, step, key).values()), NEEDLE[key][1])


def refilled(step: str) -> str:
    """The loss without the decay less that with it, of `benchmarks/needle.py`, seed by seed."""
    on, off = (_needle(arm, step, "loss") for arm in ("on", "off"))
    return stored.interval([off[seed] - on[seed] for seed in off], "+.4f")


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, help="of planes: write the rows here as well")


TABLES = {
    "table": table, "layers": layers, "scatter": scatter, "stands": stands, "balance": balance, "planes": planes,
    "controls": controls, "extension": extension, "needle": needle, "paired": paired,
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one of the commands above."""
    stored.command_line(__doc__, store, TABLES, _options, arguments)


if __name__ == "__main__":
    main()
