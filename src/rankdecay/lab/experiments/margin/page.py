"""The self-contained HTML page of the experiment on attention and its max-margin problems."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rankdecay.lab.experiments.grok.read import is_number
from rankdecay.lab.experiments.margin.curves import (
    CHOICES,
    NORMS,
    PICTURED,
    arm_curves,
    fitting,
    pictures,
    read_snapshot,
)
from rankdecay.lab.experiments.margin.verdict import never_trained, verdict
from rankdecay.lab.report import page as pieces
from rankdecay.lab.report.style import arm_styles
from rankdecay.lab.store import read_json, read_metrics

Row = dict[str, Any]
FILES = {
    "config.json": "what was asked, the versions and the machine",
    "metrics.jsonl": "every evaluation of every arm, with lists over the data sets, one JSON object per line",
    "summary.json": "where every arm ended, data set by data set, and means at margins of 1, 10, 100, …",
    "snapshots": "the data, the weights through time, the tokens selected and both SVM solutions, as numpy arrays",
}
STYLES = ["page.css", "margin.css"]
SCRIPTS = ["core.js", "plotly.js", "controls.js", "legend.js", "margin.js"]
HEADS = ("Arm", "Data sets", "Cosine to nuclear SVM", "Cosine to Frobenius SVM", "Nearer nuclear", "Margin reached")
HEADS += ("Nuclear norm above least", "Frobenius norm above least", "Rank", "Effective rank", "Alignment")
HEADS += ("Excess loss", "Optimal tokens")


def write_page(directory: Path, path: Path) -> Path:
    """Writes the page of a run directory to ``path``, by atomic rename, and returns the path."""
    return pieces.write(render(directory), path)


def render(directory: Path) -> str:
    """The page as one HTML string."""
    notices: list[str] = []
    config = read_json(directory / "config.json") or {}
    summary = read_json(directory / "summary.json")
    rows: list[Row] = summary["arms"] if summary else []
    data = page_data(directory, summary, notices) if summary else {"arms": [], "pictures": None}
    labels = {index: arm["label"] for index, arm in enumerate(data["arms"])}
    sets = sorted({which for row in rows for which in row["datasets"]})[:CHOICES]
    drawn = data["pictures"]
    pictured = {} if drawn is None else {index: labels[index] for index, arm in enumerate(drawn["arms"]) if arm}
    planar = {} if drawn is None else {which: which for which in drawn["sets"]}
    parts = {
        **pieces.shared(
            [config],
            [str(arm["name"]) for arm in config.get("arms", [])],
            verdict(summary),
            notices,
            directory=directory.resolve().name,
            drawn="charts",
            again="The same version gives the same digits up to rounding, on any machine.",
            wall_seconds=(summary or {}).get("wall_seconds"),
            files=pieces.file_list(FILES),
        ),
        "without": "" if rows else pieces.absent("There is nothing to show before the run is complete."),
        "hidden": "" if rows else " hidden",
        "set": pieces.choice("set", "Data set", {"mean": "all: mean and range"} | {which: which for which in sets}),
        "spectrum": pieces.choice("spectrum", "Arm", labels, chosen=_index(rows, "separate")),
        "svm": pieces.choice("svm", "Dashed", {"nuclear": "nuclear SVM", "frobenius": "Frobenius SVM"}),
        "axis": pieces.choice("axis", "Axis", {"log": "logarithmic", "linear": "linear"}),
        "to_picture": ' <a href="#picture">Picture</a>' if pictured else "",
        "hidden_picture": "" if pictured else " hidden",
        "pictured": pieces.choice("pictured", "Arm", pictured, chosen=_index(rows, "separate")),
        "planar": pieces.choice("planar", "Data set", planar),
        "table": _table(rows, summary),
        "data": pieces.embedded(data),
    }
    return pieces.fill("margin.html", parts, STYLES, SCRIPTS, "margin")


def page_data(directory: Path, summary: Row, notices: list[str]) -> Row:
    """What the charts are drawn from; what had to be left out is added to the notices."""
    rows: list[Row] = summary["arms"]
    metrics = read_metrics(directory, notices.append)
    snapshot = read_snapshot(directory, notices.append)
    styles = arm_styles(str(row["name"]) for row in rows)
    most = fitting(rows, summary["shape"]["dimension"])
    arms, longest = [], 0
    for row in rows:
        lines = [line for line in metrics if line["arm"] == row["name"]]
        longest = max(longest, len(lines))
        name = str(row["name"])
        # of diagonal weights the two norms are ℓ1 and ℓ2
        norms = ("ℓ1", "ℓ2") if name == "diagonal" else NORMS
        curves = arm_curves(lines, row, snapshot, most)
        arms.append({"name": name, **vars(styles[name]), "norms": norms, **curves})
    if longest > most:
        notices.append(f"A single data set is drawn at {most} of up to {longest} evaluations, evenly spaced.")
    found = pictures(snapshot, rows, metrics)
    if summary["datasets"] > CHOICES:
        notices.append(f"The first {CHOICES} of {summary['datasets']} data sets can be chosen; means are over all.")
    if found and summary["shape"]["examples"] > PICTURED:
        notices.append(f"Pictures show the first {PICTURED} of {summary['shape']['examples']} examples.")
    return {"arms": arms, "pictures": found}


def _index(rows: Sequence[Row], name: str) -> int | None:
    return next((index for index, row in enumerate(rows) if row["name"] == name), None)


# --- the table ---


def _table(rows: Sequence[Row], summary: Row | None) -> str:
    if summary is None or not rows:
        return ""
    absent = never_trained(summary)
    styles = arm_styles([*(str(row["name"]) for row in rows), *absent])
    body = [(styles[str(row["name"])].label, _cells(row, summary)) for row in rows]
    for name in absent:
        left_out = _with(f"0 of {summary['datasets']}", f"{summary['datasets']} inseparable", "{}")
        body.append((styles[name].label, [left_out, *["—"] * (len(HEADS) - 2)]))
    return pieces.table("Where every arm ended", HEADS, body)


def _cells(row: Row, summary: Row) -> list[str]:
    sets = row["seeds"]
    known = sets - row["infeasible"] - row["undecided"]
    return [
        _with(f"{known} of {summary['datasets']}", "<br>".join(_left_out(row, summary)), "{}"),
        *(
            _with(_number(row[f"cosine_{norm}"], ".4f"), _number(row[f"cosine_{norm}_least"], ".4f"), "least {}")
            for norm in NORMS
        ),
        f"{row['nearer_nuclear']} of {known}",
        _number(row["margin"], ".2g"),
        *(_number(row[f"{norm}_excess"], ".2%") for norm in NORMS),
        _with(_number(row["rank"], ".3g"), _number(row["rank_nuclear"], ".3g"), "SVM {}"),
        _number(row["effective_rank"], ".2f"),
        _number(row["alignment"], ".3f"),
        _power(row["log10_loss_excess"]),
        f"{row['all_optimal']} of {sets}",
    ]


def _left_out(row: Row, summary: Row) -> list[str]:
    found = {
        "inseparable": summary["datasets"] - row["seeds"],
        "select the inseparable": row["infeasible"],
        "select none": row["undecided"],
    }
    return [f"{count} {why}" for why, count in found.items() if count]


def _with(value: str, more: str, form: str) -> str:
    """A number and, smaller, what belongs to it; neither is from outside."""
    return value if more in ("", "—") else f"{value} <small>{form.format(more)}</small>"


def _number(value: Any, form: str) -> str:
    return format(value, form).replace("e+0", "e").replace("e+", "e") if is_number(value) else "—"


def _power(exponent: Any) -> str:
    """A number given by its decimal logarithm, which may be far below what a float64 holds."""
    return (
        f"10<sup>{f'{exponent:,.1f}' if abs(exponent) < 100 else f'{exponent:,.0f}'}</sup>".replace("-", "−")
        if is_number(exponent)
        else "—"
    )
