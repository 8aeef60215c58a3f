"""The self-contained HTML page of a run, made from an `Experiment` and what its directory holds.

One file with everything in it: the words and tables are plain HTML, the charts are drawn by scripts with plotly, from
data embedded as JSON.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from itertools import groupby
from typing import TYPE_CHECKING, Any

from plotly.offline import get_plotlyjs

from rankdecay.lab.errors import option
from rankdecay.lab.precision import described
from rankdecay.lab.report import page as pieces
from rankdecay.lab.report.chart import Chart, Choice, embedded_charts
from rankdecay.lab.report.section import Html, Section
from rankdecay.lab.report.style import arm_styles
from rankdecay.lab.report.table import html_table, scrolling
from rankdecay.lab.report.words import MARKS, Facts, Verdict, is_number, verdict
from rankdecay.text import duration

if TYPE_CHECKING:
    from rankdecay.lab.experiment import Experiment
    from rankdecay.lab.stored import StoredRun

SCRIPTS = ("core.js", "plotly.js", "controls.js", "legend.js", "chart.js")
FILES = {
    "config.json": "what was asked, the versions and the machine",
    "metrics.jsonl": "everything that was measured, one JSON object per line",
    "summary.json": "the result of every arm; absent while the run goes on",
}


def render(experiment: Experiment[Any], stored: StoredRun) -> str:
    """The page of a run as one HTML string."""
    styles_of_run = experiment.styles_of(stored.settings)
    styles = arm_styles(stored.arms, styles_of_run)
    labels = {name: style.label for name, style in styles.items()}
    sections = experiment.sections(stored)
    parts = [part for section in sections for part in section.parts]
    charts = [part for part in parts if isinstance(part, Chart) and part.lines]
    html = [part for part in parts if isinstance(part, Html)]
    data, thinned = embedded_charts(charts, styles)
    for part in html:
        data |= part.data
    summary = stored.summary
    table, note = "", ""
    if summary is not None:
        found = Facts.of(summary, styles_of_run)
        table = html_table("Result of every arm", experiment.columns_of(found), summary["arms"], labels)
        note = experiment.note(found)
    shown = [section for section in sections if section.parts]
    directory = stored.directory.resolve().name
    several = len(stored.directories)
    last = stored.last_step
    so_far = "Nothing is measured yet." if last is None else f"It has been measured up to step {last:,}."
    outcome = verdict(summary, experiment.headline, experiment.checks, styles_of_run, so_far)
    notices = [*stored.notices, *thinned]
    if summary is not None and not stored.complete:
        notices.insert(0, "This run is not complete: these are the results so far; they may still change.")
    files = FILES | dict(experiment.files)
    filled = {
        "title": escape(f"rankdecay {experiment.name}: {experiment.question}"),
        "command": escape(experiment.name),
        "directory": escape(directory if several == 1 else f"{several} directories, merged"),
        "question": escape(experiment.question),
        "nav": _navigation([*shown, Section("Figures", "")] if table else shown),
        "headline": escape(outcome.headline),
        "points": _points(outcome),
        "notices": pieces.notices(notices),
        "sections": "\n".join(_section(section, labels) for section in shown),
        "figures": table and f'<section id="figures">\n<h2>Figures</h2>\n<p>{escape(note)}</p>\n{table}\n</section>\n',
        "arms": arms_list(stored.config, labels),
        "settings": settings_table(stored.config),
        "again": escape(experiment.again),
        "commands": commands(stored.configs),
        "facts": facts(stored.configs, (summary or {}).get("wall_seconds")),
        "files": _sources(stored, files),
        "data": pieces.embedded(data),
        "plotly": f"<script>{get_plotlyjs()}</script>\n",
    }
    scripts = [*SCRIPTS, *dict.fromkeys(name for part in html for name in part.scripts), "begin.js"]
    looks = ["page.css", *dict.fromkeys(name for part in html for name in part.styles)]
    package = type(next(iter(experiment.presets.values()))).__module__.rpartition(".")[0]
    return pieces.fill("run.html", filled, looks, scripts, package)


def _sources(stored: StoredRun, files: Mapping[str, str]) -> str:
    """Sources of the page: the files of its directory, or several directories."""
    if len(stored.directories) > 1:
        return "".join(f"<li><code>{escape(str(path))}</code></li>" for path in stored.directories)
    return file_list({name: text for name, text in files.items() if os.path.exists(stored.directory / name)})


def _navigation(sections: Sequence[Section]) -> str:
    places = [("result", "Result"), *((section.anchor, section.title) for section in sections)]
    places += [("configuration", "Configuration"), ("reproduce", "Reproduce")]
    return " ".join(f'<a href="#{anchor}">{escape(title)}</a>' for anchor, title in places)


def _points(outcome: Verdict) -> str:
    return "\n".join(
        f"<dt>{escape(point.claim)}</dt><dd><b>{MARKS[point.holds]}</b> {escape(point.text)}</dd>"
        for point in outcome.points
    )


def _section(section: Section, labels: dict[str, str]) -> str:
    made = []
    for are_charts, group in groupby(section.parts, lambda part: isinstance(part, Chart)):
        parts = list(group)
        if not are_charts:
            made += [part.text for part in parts if isinstance(part, Html)]
            continue
        charts = [part for part in parts if isinstance(part, Chart)]
        drawn = [{line.arm for line in chart.at_first()[0] if line.shade is None} & set(labels) for chart in charts]
        if any(len(arms) > 1 for arms in drawn):
            made.append('<div class="legend" role="group" aria-label="Arms shown"></div>')
        shared = [choice for choice in charts[0].offered if all(choice in chart.offered for chart in charts[1:])]
        if len(charts) > 1:  # what all of them follow is asked once
            made.append(_controls(shared))
            figures = "".join(_figure(chart, without=shared) for chart in charts)
            made.append(f'<div class="pair">{figures}</div>')
        else:
            made.append(_figure(charts[0]))
    text = f"<p>{escape(section.text)}</p>" if section.text else ""
    return f'<section id="{section.anchor}">\n<h2>{escape(section.title)}</h2>\n{text}\n{"".join(made)}\n</section>\n'


def _controls(choices: Sequence[Choice]) -> str:
    selects = "".join(pieces.choice(c.name, c.label, c.options, c.first) for c in choices)
    return f'<div class="controls">{selects}</div>' if selects else ""


def _figure(chart: Chart, without: Sequence[Choice] = ()) -> str:
    if not chart.lines:
        return f"<figure><figcaption>{escape(chart.title)}</figcaption>{pieces.absent(chart.empty)}</figure>"
    controls = _controls([choice for choice in chart.offered if choice not in without])
    return (
        f"<figure><figcaption>{escape(chart.title)}</figcaption>{controls}"
        f'<div class="chart" id="{chart.name}-chart"></div></figure>'
    )


# --- what was asked, and how to ask again ---


def reproduce(config: Mapping[str, Any]) -> str:
    """The command line that repeats a run: the recorded one, or the command with its settings as options."""
    if config.get("reproduce"):
        return str(config["reproduce"])
    words = ["rankdecay", str(config.get("command", ""))]
    for name, value in flat(config.get("settings", {})):
        if isinstance(value, bool):
            words.append(option(name if value else f"no_{name}"))
        elif isinstance(value, list | tuple):
            words += [option(name), *map(str, value)] if value else []
        elif value is not None:
            words += [option(name), str(value)]
    return " ".join(shlex.quote(word) for word in words if word) + " --out DIR"


def flat(settings: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested settings as pairs of a dotted name and a value."""
    rows = []
    for name, value in settings.items():
        rows += flat(value, f"{prefix}{name}.") if isinstance(value, dict) else [(f"{prefix}{name}", value)]
    return rows


def settings_table(config: Mapping[str, Any]) -> str:
    """The settings of a run, one per line."""
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(setting_text(value))}</td></tr>'
        for name, value in flat(config.get("settings", {}))
    )
    return scrolling("Settings", rows) if rows else pieces.absent("No settings recorded.")


def setting_text(value: Any) -> str:
    """A setting as text: a list without its brackets, a string without its quotes."""
    if isinstance(value, list | tuple):
        return ", ".join(map(setting_text, value))
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def arms_list(config: Mapping[str, Any], labels: Mapping[str, str]) -> str:
    """List of every arm of a configuration, in words and numbers.

    Args:
        config: the content of `config.json`.
        labels: of all arms of the run, by name.
    """
    items = []
    for arm in config.get("arms", []):
        name = str(arm["name"])
        rest = ", ".join(
            f"{key.replace('_', ' ').replace('.', ' ')} {setting_text(value)}"
            for key, value in flat(arm)
            if key not in ("name", "description", "control") and value is not None and value is not False
        )
        items.append(
            f"<dt>{escape(labels[name])} <code>{escape(name)}</code></dt>"
            f"<dd>{escape(str(arm.get('description', '')))}"
            + (f"<small>{escape(rest)}</small>" if rest else "")
            + "</dd>"
        )
    return f'<dl class="arms">{"".join(items)}</dl>' if items else ""


def folded(command: str, width: int = 72) -> str:
    """A long command with one option per line; one with quotes is left alone, for a break could change it."""
    return command if len(command) <= width or "'" in command else command.replace(" --", " \\\n  --")


def commands(configs: Iterable[Mapping[str, Any]]) -> str:
    """The command lines that repeat some runs, each once."""
    return "\n".join(
        f'<pre class="command" tabindex="0"><code>{escape(command)}</code></pre>'
        for command in dict.fromkeys(folded(reproduce(config)) for config in configs)
    )


def file_list(files: Mapping[str, str]) -> str:
    """The files beside a page and what is in them (HTML)."""
    return "".join(f'<li><a href="{name}">{name}</a> {text}</li>' for name, text in files.items())


def facts(configs: Sequence[Mapping[str, Any]], wall_seconds: Any) -> str:
    """Versions, machines and wall time; of several directories, each different machine and set of versions once."""

    def versions(config: Mapping[str, Any]) -> str:
        return ", ".join(f"{name} {version}" for name, version in config.get("versions", {}).items())

    rows = {
        "Versions": "; ".join(dict.fromkeys(filter(None, map(versions, configs)))),
        "Machine": "; ".join(dict.fromkeys(str(config["machine"]) for config in configs if config.get("machine"))),
        "Precision": "; ".join(dict.fromkeys(filter(None, map(described, configs)))),
        "Wall time": duration(wall_seconds) if is_number(wall_seconds) else "",
    }
    items = "".join(f"<dt>{name}</dt><dd>{escape(value)}</dd>" for name, value in rows.items() if value)
    return f'<dl class="facts">{items}</dl>' if items else ""
