"""Self-contained HTML page of one inspection, or of several: a training trajectory in the order given.

As on the page of a run, words and tables are plain HTML made here, nothing is fetched, and a string of a checkpoint is
only ever text. The charts are drawn from embedded JSON by `inspection.js` on `svg.js`, not by plotly, which the base
install does not have.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path, PurePath
from typing import Any

from rankdecay.inspection import KINDS, Inspection, Row, by_layer, strip
from rankdecay.lab.report import page as pieces
from rankdecay.lab.report.page import SNAPSHOT_NUMBERS, asset, choice
from rankdecay.lab.report.table import scrolling
from rankdecay.text import finite_mean, number

#: What the charts and tables show: a name and what it means.
MEASURES = {
    "pseudo_rank": ("Pseudo rank", "the share of a head's dimensions that holds 95 % of the nuclear norm"),
    "effective_share": (
        "Effective rank / dim",
        "the exponential of the entropy of the singular values, as a share of the head's dimensions",
    ),
    "stable_rank": ("Stable rank", "‖M‖_F² / ‖M‖₂²: how many directions are as strong as the strongest"),
    "nuclear_ratio": (
        "Nuclear norm / bound",
        "the nuclear norm of a product over the mean squared norm of its factors, which bounds it: 1 is balanced",
    ),
    "imbalance": ("Imbalance", "the difference of the Gram matrices of the two factors over their mean: 0 is balanced"),
    "nuclear_gap": ("Nuclear gap", "the bound less the nuclear norm, in the units of the product: 0 is balanced"),
}
FACTORS = {"query_key": ("W_Q", "W_K"), "value_output": ("W_V", "W_O")}

#: The squared norms of the rows of one factor and of the other, and a pair of `_bound`.
Pairs = tuple[tuple[float | None, ...], tuple[float | None, ...], tuple[float | None, float | None]]


def inspection_page(reports: Sequence[Inspection], path: Path) -> Path:
    """Write the page of one or several inspections, by atomic rename.

    Args:
        reports: what :func:`rankdecay.inspect` returned; several are checkpoints of one training, in this order.
        path: the file to write.

    Returns:
        ``path``: one HTML file that needs no network.

    Raises:
        ValueError: If there is no report, or no row in any.
    """
    if not any(report.rows for report in reports):
        raise ValueError("There is nothing to show: no report with a row was given.")
    return pieces.write(render(reports), path)


def render(reports: Sequence[Inspection]) -> str:
    """Return the page as one HTML string."""
    labels = short_labels([report.source for report in reports])
    data = page_data(reports, labels)
    title = labels[0] if len(reports) == 1 else f"{len(reports)} checkpoints: {labels[0]} → {labels[-1]}"
    notes = dict.fromkeys(note for report in reports for note in report.notes)
    unhandled = dict.fromkeys(f"Not handled: {reason}" for report in reports for reason in report.unhandled)
    parts = {
        "title": f"rankdecay inspect: {escape(title)}",
        "heading": escape(title),
        "sources": _sources(reports) if len(reports) > 1 else "",
        "reading": "".join(f'<p class="headline">{escape(_reading(kind, labels))}</p>' for kind in data["kinds"]),
        "notes": pieces.notices([*notes, *unhandled, *data["notices"]]),
        "sections": "\n".join(_section(kind, labels) for kind in data["kinds"]),
        "nav": " ".join(f'<a href="#{kind["key"]}">{kind["symbol"]}</a>' for kind in data["kinds"]),
        "measures": "".join(f"<dt>{name}</dt><dd>{escape(text)}</dd>" for name, text in MEASURES.values()),
        "data": pieces.embedded(data),
    }
    return pieces.fill(
        "inspection.html", parts, ["page.css", "inspection.css"], ["core.js", "controls.js", "svg.js", "inspection.js"]
    )


def short_labels(sources: Sequence[str]) -> list[str]:
    """Return one label per source: its path without the folders that all share; numbered if two are the same."""
    paths: list[tuple[str, ...]] = [PurePath(source).parts or (source,) for source in sources]
    while len(paths) > 1 and min(map(len, paths)) > 1 and len({parts[0] for parts in paths}) == 1:
        paths = [parts[1:] for parts in paths]
    while len(paths) > 1 and min(map(len, paths)) > 1 and len({parts[-1] for parts in paths}) == 1:
        paths = [parts[:-1] for parts in paths]
    labels = [str(PurePath(*parts)) for parts in paths]
    repeated = len(set(labels)) < len(labels)
    return [f"{i}: {label}" for i, label in enumerate(labels, 1)] if repeated else labels


def page_data(reports: Sequence[Inspection], labels: Sequence[str]) -> dict[str, Any]:
    """Return the data of the charts.

    Per kind, report and layer: the measures and singular values of its heads. Untrained spectra, which most layers
    share, are in a separate list.
    """
    untrained: dict[tuple[float, ...], int] = {}
    pairs: dict[Pairs, int] = {}
    size = sum(len(row["singular_values"]) for report in reports for row in report.rows)
    thin = len(reports) > 2 and size > SNAPSHOT_NUMBERS
    with_spectra = {0, len(reports) - 1} if thin else set(range(len(reports)))
    kinds = []
    for key, (symbol, meaning) in KINDS.items():
        series = [report.of(key) for report in reports]
        rows = [row for rows in series for row in rows]
        if rows:
            defined = [name for name in MEASURES if _measure(rows[0]["untrained"], name, 1) is not None]
            places = _places(rows)
            layers = [
                _layers(part, defined, i in with_spectra, untrained, pairs, places) for i, part in enumerate(series)
            ]
            kinds.append({
                "key": key, "symbol": symbol, "meaning": meaning,
                "measures": {name: MEASURES[name][0] for name in defined},
                "heads": sorted({row["head"] for row in rows}),
                # a run directory has spectra and no weights
                "factors": FACTORS.get(key) if all(row.get("squared_norms") for row in rows) else None,
                "reports": layers,
            })  # fmt: skip
    notices = ["The page has the singular values of the first and the last checkpoint only."] if thin else []
    return {
        "labels": list(labels), "kinds": kinds, "untrained": list(untrained), "untrained_pairs": list(pairs),
        "notices": notices,
    }  # fmt: skip


def _layers(
    rows: list[Row],
    measures: list[str],
    spectra: bool,
    pool: dict[tuple[float, ...], int],
    pairs: dict[Pairs, int],
    places: dict[str, int],
) -> list[Row]:
    layers = []
    for called, heads in sorted(by_layer(rows).items(), key=lambda layer: places[layer[0]]):
        untrained, dim = heads[0]["untrained"], heads[0]["head_dim"]
        layers.append({
            "layer": places[called], "label": called, "name": heads[0]["name"], "dim": dim,
            "untrained": pool.setdefault(tuple(untrained["singular_values"]), len(pool)),
            "heads": [row["head"] for row in heads],
            "values": {name: [_measure(row, name, dim) for row in heads] for name in measures},
            "spectra": [_spectrum(row) for row in heads] if spectra else None,
            "baseline": {name: _measure(untrained, name, dim) for name in measures},
        })  # fmt: skip
        if heads[0].get("squared_norms"):
            layers[-1] |= {
                "norms": _norms(heads[0]),  # of the first head, as in the paper: of all they would be most of the page
                "bounds": [_bound(row) for row in heads],
                "untrained_pairs": pairs.setdefault((*_norms(untrained), _bound(untrained)), len(pairs)),
            }
    return layers


def _places(rows: Iterable[Row]) -> dict[str, int]:
    """Return the place of each layer on an axis: its number, or where there are towers its order."""
    labels = list(by_layer(rows))
    numbers = all(called.isdigit() for called in labels)
    return {called: int(called) if numbers else i for i, called in enumerate(labels)}


def _norms(row: Row) -> tuple[tuple[float | None, ...], tuple[float | None, ...]]:
    """Return the squared norms of the rows of each factor."""
    first, second = (tuple(values) for values in row["squared_norms"].values())
    return first, second


def _bound(row: Row) -> tuple[float | None, float | None]:
    """Return the mean squared norm of the factors, and its value at balance: the norm of the product or planes."""
    mean, gap = row["mean_frobenius"], row["nuclear_gap"]
    return mean, None if mean is None or gap is None else mean - gap


def _measure(row: Row, name: str, dim: int) -> float | None:
    value = row[name.replace("share", "rank")]
    return value / dim if name == "effective_share" and value is not None else value


def _spectrum(row: Row) -> list[float] | None:
    """Return the singular values, or None if any is not finite."""
    return None if None in row["singular_values"] else row["singular_values"]


# --- words and tables ---


def _clearly_lower(layer: dict[str, Any]) -> bool:
    """Whether the mean over heads is below the untrained one by more than fresh weights scatter."""
    value, baseline = finite_mean(layer["values"]["pseudo_rank"]), layer["baseline"]["pseudo_rank"]
    return value is not None and value < baseline - max(0.05 * baseline, 1 / layer["dim"])


def _reading(kind: dict[str, Any], labels: Sequence[str]) -> str:
    """Summarise the pseudo ranks of the last report in a sentence."""
    first, last = kind["reports"][0], kind["reports"][-1]
    lower = sum(_clearly_lower(layer) for layer in last)
    cells = [
        (value, layer["layer"], layer["label"], head, layer["baseline"]["pseudo_rank"])
        for layer in last
        for head, value in zip(layer["heads"], layer["values"]["pseudo_rank"], strict=True)
    ]
    finite = sorted(cell for cell in cells if cell[0] is not None)
    of = "" if len(labels) == 1 else f" of {labels[-1]}"
    words = (
        f"In {lower} of {len(last)} layers{of}, {kind['symbol']} has a clearly lower pseudo rank than the same shapes "
        "untrained (mean over heads, by more than 5 % and one dimension)"
    )
    if finite:
        value, _, layer, head, baseline = finite[0]
        words += f"; lowest: layer {layer} head {head}, {number(value)} against {number(baseline)}"
    if len(labels) > 1 and first:
        before, after = (
            finite_mean(v for layer in part for v in layer["values"]["pseudo_rank"]) for part in (first, last)
        )
        words += f"; the mean over all heads went from {number(before)} to {number(after)}"
    broken = [f"layer {layer} head {head}" for value, _, layer, head, _ in cells if value is None]
    if broken:
        more = f" and {len(broken) - 3} more" if len(broken) > 3 else ""
        words += f"; not finite: {', '.join(broken[:3])}{more}"
    return words + "."


def _sources(reports: Sequence[Inspection]) -> str:
    items = "".join(f"<li>{escape(report.source)}</li>" for report in reports)
    return f'<ol class="sources">{items}</ol>'


def _section(kind: dict[str, Any], labels: Sequence[str]) -> str:
    key, several, last = kind["key"], len(labels) > 1, len(labels) - 1
    layers = dict(sorted((layer["layer"], layer["label"]) for report in kind["reports"] for layer in report))
    first, final = (escape(called) for called in (min(layers.items())[1], max(layers.items())[1]))
    ramp = f'<span class="ramp">layer {first}<i></i>layer {final}</span>'
    controls = [choice(f"measure:{key}", "Measure", kind["measures"])]
    controls += [choice(f"report:{key}", "Checkpoint", dict(enumerate(labels)), last)] if several else []
    numbers = {"layer": layers, "head": {head: head for head in kind["heads"]}}
    cell = [choice(f"{name}:{key}", name.title(), options) for name, options in numbers.items()]
    cell.append(choice(f"scale:{key}", "Scale", {"log": "log", "linear": "linear"}))
    swatches = [f'<span><i data-ramp="{i / last}"></i>{escape(labels[i])}</span>' for i in range(last + 1) if several]
    parts = {
        "key": key,
        "symbol": kind["symbol"],
        "meaning": kind["meaning"],
        "controls": "".join(controls),
        "cell": "".join(cell),
        "legend": "".join(swatches),
        "trajectory": asset("assets/inspection_trajectory.html", None, {"key": key, "ramp": ramp}) if several else "",
        "balance": _balance(kind, ramp) if kind["factors"] else "",
        "table": _table(kind, several),
    }
    return asset("assets/inspection_kind.html", None, parts)


def _balance(kind: dict[str, Any], ramp: str) -> str:
    """Return the two charts that the paper shows of pretrained models."""
    layers = kind["reports"][-1]
    imbalances = [value for layer in layers for value in layer["values"]["imbalance"]]
    parts = {
        "key": kind["key"],
        "ramp": ramp,
        "first": kind["factors"][0],
        "second": kind["factors"][1],
        "line": "column" if kind["key"] == "value_output" else "row",
        "imbalance": number(finite_mean(imbalances)),
        "untrained": number(finite_mean(layer["baseline"]["imbalance"] for layer in layers)),
    }
    return asset("assets/inspection_balance.html", None, parts)


def _table(kind: dict[str, Any], several: bool) -> str:
    """Return a table with a line per layer: mean over heads, of several reports first → last, and [untrained]."""
    first = {layer["layer"]: layer for layer in kind["reports"][0]}
    body = ""
    for layer in kind["reports"][-1]:
        cells = ""
        for name in kind["measures"]:
            figures = number(finite_mean(layer["values"][name]))
            if several:
                before = first.get(layer["layer"])
                figures = f"{number(finite_mean(before['values'][name])) if before else '–'} → {figures}"
            cells += f"<td>{figures} <small>[{number(layer['baseline'][name])}]</small></td>"
        name = f"{escape(layer['label'])} <small>{escape(layer['name'])}</small>"
        body += (
            f'<tr><th scope="row">{name}</th><td>{layer["dim"]}</td>'
            f'{cells}<td class="strip">{strip(layer["values"]["pseudo_rank"])}</td></tr>'
        )
    heads = "".join(f'<th scope="col">{name}</th>' for name in kind["measures"].values())
    top = f'<th scope="col">Layer</th><th scope="col">Dim</th>{heads}<th scope="col">Pseudo rank of each head</th>'
    return scrolling(f"{kind['symbol']} per layer", f"<thead><tr>{top}</tr></thead><tbody>{body}</tbody>")
