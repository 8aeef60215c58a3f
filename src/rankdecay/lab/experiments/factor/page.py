"""The self-contained HTML page of the matrix experiment."""

from html import escape
from pathlib import Path
from typing import Any

import torch

from rankdecay.lab.experiments.factor.factorised import shrunk
from rankdecay.lab.experiments.factor.verdict import small, verdict
from rankdecay.lab.experiments.grok.read import is_number
from rankdecay.lab.report import page as pieces
from rankdecay.lab.report.style import arm_styles
from rankdecay.lab.store import read_json, read_metrics

Row = dict[str, Any]
POINTS = 60  # of a curve of the theory
FEWEST = 1e-16  # below it a logarithmic axis shows rounding alone
FILES = {
    "config.json": "what was asked, the versions and the machine",
    "metrics.jsonl": "balance, gap and singular values of every arm and strength over steps, one JSON object per line",
    "summary.json": "where every arm and strength ended, beside the theory",
    "snapshots": "every problem at the end: singular values, imbalance and gap, as numpy arrays",
}
STYLES = ["page.css"]
SCRIPTS = ["core.js", "plotly.js", "controls.js", "factor.js"]


def write_page(directory: Path, path: Path) -> Path:
    """Writes the page of a run directory to ``path``, by atomic rename, and returns the path."""
    return pieces.write(render(directory), path)


def render(directory: Path) -> str:
    """The page as one HTML string."""
    notices: list[str] = []
    config = read_json(directory / "config.json") or {}
    summary = read_json(directory / "summary.json")
    metrics = read_metrics(directory, notices.append)
    rows: list[Row] = summary["arms"] if summary else []
    names = list(dict.fromkeys(str(row["name"]) for row in rows))
    styles = arm_styles(names)
    labels = {name: styles[name].label for name in names}
    balanced = {row["name"]: labels[row["name"]] for row in rows if "imbalance" in row}
    strengths = {f"{row['strength']:g}": f"{row['strength']:g}" for row in rows}
    parts = {
        **pieces.shared(
            [config],
            names,
            verdict(summary),
            notices,
            directory=directory.resolve().name,
            drawn="charts",
            again="The same version gives the same digits up to rounding, on any machine.",
            wall_seconds=(summary or {}).get("wall_seconds"),
            files=pieces.file_list(FILES),
        ),
        "arm": pieces.choice("arm", "Arm", labels),
        "balanced": pieces.choice("balanced", "Arm", balanced),
        "strength": pieces.choice("strength", "λ", strengths, chosen=_middle(list(strengths))),
        "hidden": "" if names else " hidden",
        "hidden_balance": "" if balanced else " hidden",
        "without": "" if names else pieces.absent("There is nothing to show before the run is complete."),
        "line": escape(_line_words(config)),
        "table": _table(rows, labels),
        "data": pieces.embedded(page_data(config, rows, metrics)),
    }
    return pieces.fill("factor.html", parts, STYLES, SCRIPTS, "factor")


def page_data(config: Row, rows: list[Row], metrics: list[Row]) -> dict[str, Any]:
    """What the charts are drawn from: spectra by arm and strength, with their theory, and curves over steps."""
    names = list(dict.fromkeys(str(row["name"]) for row in rows))
    styles = arm_styles(names)
    lr = config.get("settings", {}).get("lr")
    arms = []
    for name in names:
        own = [row for row in rows if row["name"] == name]
        arms.append({
            "name": name,
            **vars(styles[name]),
            "spectra": [
                {"strength": row["strength"], "values": row["singular_values"], "low": row["singular_values_low"],
                 "high": row["singular_values_high"]} for row in own
            ],
            "theory": _theory(config, name, rows),
            "curves": [_curves(metrics, name, row["strength"]) for row in own if "imbalance" in row],
            "rate": [row["strength"] * 2 * lr if row.get("predicted_rate") is not None else None for row in own],
        })  # fmt: skip
    return {"arms": arms}


def _curves(metrics: list[Row], name: str, strength: float) -> dict[str, Any]:
    lines = [line for line in metrics if line["arm"] == name and line["strength"] == strength]

    def over(key: str) -> list[float | None]:
        values: list[Any] = [line.get(key) for line in lines]
        return [value if is_number(value) and value > FEWEST else None for value in values]

    keys = ("imbalance", "imbalance_low", "imbalance_high", "gap", "gap_low", "gap_high", "gap_bound")
    return {"strength": strength, "step": [line["step"] for line in lines]} | {key: over(key) for key in keys}


def _theory(config: Row, name: str, rows: list[Row]) -> dict[str, Any]:
    """Where the singular values should be, over strengths: one curve per value of the target.

    For a given target that is exact and drawn finely. For a random one, another for each seed, it is the median over
    seeds at the strengths of the run; where entries are missing, what the arm low_rank found, which is certified.
    """
    settings = config.get("settings", {})
    own = [row for row in rows if row["name"] == name]
    arm = next((arm for arm in config.get("arms", []) if arm["name"] == name), {})
    penalty = arm.get("penalty") or 2
    if settings.get("observed", 1) == 1 and settings.get("target") != ["random"]:
        target = torch.tensor(own[0]["target"], dtype=torch.float64)
        top = max(row["strength"] for row in own) or 0.1
        x = torch.linspace(0, 1.05 * top, POINTS, dtype=torch.float64)
        y = shrunk(target, x[:, None], penalty).T  # (values, POINTS)
        # a jump is a gap in the line, not a slope
        return {"x": x.tolist(), "y": [[v if v > 0 or penalty <= 2 else None for v in line] for line in y.tolist()]}
    source = own if any(row.get("expected") for row in own) else [r for r in rows if r["name"] == "low_rank"]
    expected = [row["expected"] or row["singular_values"] for row in source]
    return {"x": [row["strength"] for row in source], "y": [list(line) for line in zip(*expected, strict=True)]}


def _line_words(config: Row) -> str:
    settings = config.get("settings", {})
    if settings.get("observed", 1) < 1:
        return "The line is where the proximal arm ended, which duality certifies as the nuclear-norm optimum."
    depth = settings.get("depth", 3)
    return (
        "The line is the theory: max(s − λ, 0) for two factors, s/(1 + λ) for one matrix, the larger root of "
        f"w + λ w^(2/{depth} − 1) = s for {depth} factors. For AdamW, which has none, it is that of two factors."
    )


def _middle(strengths: list[str]) -> str | None:
    return strengths[len(strengths) // 3] if strengths else None


def _table(rows: list[Row], labels: dict[str, str]) -> str:
    if not rows:
        return ""
    heads = ["Arm", "λ", "Singular values (median)", "Rank", "Off the theory", "Settled", "Imbalance", "Gap"]
    heads += ["Rate per step", "2ηλ", "Above the optimum"]
    body = []
    for row in rows:
        values = " ".join(_digits(value) for value in row["singular_values"][:8])
        settled = f"{row['settled']:,} of {row['seeds']:,}" if is_number(row.get("settled")) else "—"
        cells = [f"{row['strength']:g}", values, f"{row['rank']:g}", _small(row, "deviation"), settled]
        cells += [_small(row, name) for name in ("imbalance", "gap")]
        cells += [_rate(row, name) for name in ("imbalance_rate", "predicted_rate")]
        cells.append(_small(row, "optimality_gap"))
        body.append((labels[row["name"]], [escape(cell) for cell in cells]))
    return pieces.table("Where every arm ended", heads, body)


def _digits(value: float) -> str:
    return "0" if abs(value) < 1e-6 else f"{value:.3g}" if value >= 1e-3 else f"{value:.0e}".replace("e-0", "e-")


def _small(row: Row, key: str) -> str:
    value: Any = row.get(key)
    if not is_number(value):
        return "—"
    return "0" if abs(value) < 2e-14 else small(value) if value < 0.1 else f"{value:.2g}"


def _rate(row: Row, key: str) -> str:
    value: Any = row.get(key)
    return f"{value:.4f}" if is_number(value) else "—"
