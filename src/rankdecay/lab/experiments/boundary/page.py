"""The self-contained HTML page of a sweep: its words and tables; :mod:`charts` says what its maps are drawn from."""

from html import escape
from pathlib import Path
from typing import Any

from rankdecay.lab.experiments.boundary.charts import MEASURES, page_data
from rankdecay.lab.experiments.boundary.maps import DataAxis, PhaseMap, by_boundary, data_axis, phase_maps, rest_decays
from rankdecay.lab.experiments.boundary.read import Sweep
from rankdecay.lab.experiments.boundary.verdict import amount_words, interval, ratio_words, settled, verdict
from rankdecay.lab.experiments.grok.read import is_number
from rankdecay.lab.report import page as pieces
from rankdecay.lab.report.style import arm_styles

EVENTS = {
    "rank_first": "Rank first",
    "together": "Together",
    "accuracy_first": "Accuracy first",
    "rank_only": "Rank only",
    "accuracy_only": "Accuracy only",
    "neither": "Neither",
}
FILES = {
    "config.json": "what was asked, the versions and the machine",
    "metrics.jsonl": "every finished run with its curves, one JSON object per line",
    "summary.json": "cells, boundaries and differences; absent while the sweep runs",
}
INNER = {"stable_rank": "stable rank of W_Q, W_K", "query_norm": "‖W_Q‖"}
STYLES = ["page.css", "boundary.css"]
SCRIPTS = ["core.js", "plotly.js", "controls.js", "legend.js", "maps.js", "cell.js", "boundary.js"]


def render(sweep: Sweep) -> str:
    """The page of a sweep as one HTML string."""
    axis = data_axis(sweep.summary) if sweep.summary else DataAxis([])
    maps = phase_maps(sweep.summary, axis) if sweep.summary else []
    data = page_data(sweep, axis, maps)
    count = len(sweep.directories)
    parts = {
        **pieces.shared(
            sweep.configs,
            sweep.arms,
            verdict(sweep.summary, sweep.complete),
            [*sweep.notices, *data["notices"]],
            directory=sweep.directories[0].resolve().name if count == 1 else f"{count} directories, merged",
            drawn="maps",
            again="This asks for the same runs; another machine or version may give other digits.",
            wall_seconds=(sweep.summary or {}).get("wall_seconds"),
            files=_files(sweep),
        ),
        "boundaries": _boundaries(sweep, axis),
        "differences": _differences(sweep),
        "without_maps": "" if maps else pieces.absent("There is no map before the first run is finished."),
        "hidden": "" if maps else " hidden",
        "map_controls": _map_controls(maps),
        "inner": pieces.choice("inner", "Second chart", INNER),
        "criterion": _criterion(sweep),
        "events": _events(sweep),
        "controls": _controls(sweep),
        "data": pieces.embedded(data),
    }
    return pieces.fill("boundary.html", parts, STYLES, SCRIPTS, "boundary")


# --- words and tables ---


def _boundaries(sweep: Sweep, axis: DataAxis) -> str:
    arms = by_boundary(sweep.summary)
    if not arms:
        return pieces.absent("No run is finished yet.")
    styles = arm_styles(sweep.arms)
    several = len({cell["rest_decay"] for arm in arms for cell in arm["cells"]}) > 1
    heads = [
        "Arm",
        "Data at the boundary",
        "95 % interval",
        "Best strength",
        *(["Decay of the rest"] if several else []),
    ]
    rows = []
    for arm in arms:
        best = arm["boundary"]
        strength = "—" if best["strength"] == 0 else f"{best['strength']:g}{_edge(best.get('edge'))}"
        cells = [escape(amount_words(best, axis)), escape(interval(axis, best.get("low"), best.get("high"))), strength]
        if several:
            cells.append(f"{best['rest_decay']:g}{_edge(best.get('rest_edge'))}")
        cells += [
            f"{arm['generalised']:,} of {arm['runs']:,}",
            f"{arm.get('diverged', 0):,}",
            _number(arm, "stable_rank"),
        ]
        rows.append((styles[arm["name"]].label, cells))
    heads += ["Runs that generalised", "Diverged", "Stable rank there"]
    return pieces.table("Boundaries at best strength", heads, rows)


def _edge(edge: Any) -> str:
    return f" <small>the {escape(str(edge))} tried</small>" if edge else ""


def _number(row: dict[str, Any], key: str) -> str:
    value: Any = row.get(key)
    return f"{value:.3g}" if is_number(value) else "—"


def _differences(sweep: Sweep) -> str:
    differences = (sweep.summary or {}).get("differences", [])
    if not differences:
        return pieces.absent("There are no two arms to compare yet.")
    styles = arm_styles(sweep.arms)
    reference = styles[differences[0]["reference"]].label
    readings = {
        "less": f"{reference} needs less",
        "more": f"{reference} needs more",
        None: "not settled",
    }
    rows = []
    for difference in differences:
        unknown = difference.get("censored") == "unknown"
        reading = "both beyond the same end of the grid" if unknown else readings[settled(difference)]
        rows.append((styles[difference["arm"]].label, [escape(ratio_words(difference)), escape(reading)]))
    return pieces.table("Differences", ["Compared with", f"Data of {reference} / its data", "Reading"], rows)


def _events(sweep: Sweep) -> str:
    styles = arm_styles(sweep.arms)
    rows = [
        (styles[arm["name"]].label, [f"{arm['events'].get(key, 0):,}" for key in EVENTS])
        for arm in (sweep.summary or {}).get("arms", [])
        if arm.get("events")
    ]
    return pieces.table("Order of events", ["Arm", *EVENTS.values()], rows) if rows else pieces.absent("Nothing yet.")


def _controls(sweep: Sweep) -> str:
    """What each arm is there to rule out, as the experiment says it."""
    styles = arm_styles(sweep.arms)
    controls = [
        (styles[arm["name"]].label, str(arm["control"])) for arm in sweep.config.get("arms", []) if arm.get("control")
    ]
    if not controls:
        return pieces.absent("No arm of this sweep is recorded as a control.")
    return f'<dl class="points">{pieces.points(controls)}</dl>'


def _criterion(sweep: Sweep) -> str:
    threshold: Any = (sweep.summary or {}).get("threshold")
    if not is_number(threshold):
        return ""
    return (
        f"A run has generalised when its test accuracy reaches {threshold * 100:g} % and the next evaluation holds it."
    )


def _map_controls(maps: list[PhaseMap]) -> str:
    controls = pieces.choice("measure", "Colour", {name: label for name, (label, _) in MEASURES.items()})
    rests = {f"{rest:g}": f"{rest:g}" for rest in rest_decays(maps)}
    return controls + (pieces.choice("rest", "Decay of the rest", {"all": "all", **rests}) if len(rests) > 1 else "")


def _files(sweep: Sweep) -> str:
    if len(sweep.directories) > 1:
        return "".join(f"<li><code>{escape(str(path))}</code></li>" for path in sweep.directories)
    return pieces.file_list(FILES)


def write_page(sweep: Sweep, path: Path) -> Path:
    """Render the page of a sweep and put it at `path`, by atomic rename."""
    return pieces.write(render(sweep), path)
