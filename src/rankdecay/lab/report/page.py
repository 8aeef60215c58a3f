"""What every page is made of: the template filled in, embedded JSON, and the pieces of HTML that pages share.

Words and tables are plain HTML, readable without a script. Text from a run or a checkpoint goes through `html.escape`,
and JSON through `embedded`. Nothing is fetched: a content-security policy in `assets/shell.html` forbids it.
"""

import json
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from rankdecay.lab import precision
from rankdecay.lab.report.style import arm_styles
from rankdecay.lab.report.table import scrolling, table  # noqa: F401 - pages not yet ported
from rankdecay.lab.report.words import duration, is_number

SNAPSHOT_NUMBERS = 1_000_000  # of spectra and attention in one page, about 7 MB; what does not fit is thinned


@dataclass(frozen=True)
class Verdict:
    """A headline and the points under it, of pages not yet ported: each a lead-in and a sentence or two."""

    headline: str
    points: list[tuple[str, str]]

    def __str__(self) -> str:
        """The verdict as lines of text, for a terminal."""
        return "\n".join([self.headline, *(f"{lead}: {text}" for lead, text in self.points)])


def fill(
    template: str, parts: Mapping[str, str], styles: Sequence[str], scripts: Sequence[str], experiment: str = ""
) -> str:
    """A page as one HTML string: a template inside `assets/shell.html`.

    Args:
        template: the name of a file in `assets/`; `{{> name}}` in it is replaced by the file `name.html`, which pages
            share, then `{{name}}` in all of it, and in the shell, by a part.
        parts: HTML by name; `title` and `data` are for the shell.
        styles: names of style sheets, as `{{css}}`.
        scripts: names of scripts, as `{{js}}`; with `plotly.js` among them, plotly's own is `{{plotly}}`.
        experiment: the folder of `lab/experiments` that may hold any of these files, or else the one above it;
            `assets/` has the others.
    """
    folders = [files("rankdecay.lab.report") / "assets"]
    if experiment:
        package = experiment if "." in experiment else f"rankdecay.lab.experiments.{experiment}"
        above = package.rpartition(".")[0]
        folders[:0] = [files(package), *([files(above)] if above else [])]

    def joined(names: Iterable[str]) -> str:
        paths = [next(folder / name for folder in folders if (folder / name).is_file()) for name in names]
        return "\n".join(path.read_text(encoding="utf-8") for path in paths)

    def filled(name: str, every: Mapping[str, str]) -> str:
        text = re.sub(r"\{\{> (\w+)\}\}\n", lambda match: joined([f"{match[1]}.html"]), joined([name]))
        return re.sub(r"\{\{(\w+)\}\}", lambda match: every[match[1]], text)

    plotly = _plotly() if "plotly.js" in scripts else ""
    shell = {"css": joined(styles), "js": joined(scripts), "plotly": plotly, "body": filled(template, parts)}
    return filled("shell.html", {**parts, **shell})


def _plotly() -> str:
    from plotly.offline import get_plotlyjs  # of the extra `lab`; the page of an inspection is made without it

    return f"<script>{get_plotlyjs()}</script>\n"


def write(text: str, path: Path) -> Path:
    """Puts a page at `path`, by atomic rename, and returns the path."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
    return path


def embedded(value: Any) -> str:
    """JSON for a `<script type="application/json">`: nothing in it can end the script or open a comment."""
    text = json.dumps(plain(value), separators=(",", ":"), allow_nan=False, ensure_ascii=True)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def plain(value: Any) -> Any:
    """A value as JSON holds it: numpy arrays as lists, floats to four digits, non-finite numbers as null."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, float):
        return float(f"{value:.4g}") if np.isfinite(value) else None
    return value


def reproduce(config: Mapping[str, Any]) -> str:
    """The command line that repeats a run: the recorded one, or the command with its settings as options."""
    if config.get("reproduce"):
        return str(config["reproduce"])
    words = ["rankdecay", str(config.get("command", ""))]
    for name, value in flat(config.get("settings", {})):
        option = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        elif isinstance(value, list | tuple):
            words += [f"--{option}", *map(str, value)] if value else []
        elif value is not None:
            words += [f"--{option}", str(value)]
    return " ".join(shlex.quote(word) for word in words if word) + " --out DIR"


def flat(settings: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested settings as pairs of a dotted name and a value."""
    rows = []
    for name, value in settings.items():
        rows += flat(value, f"{prefix}{name}.") if isinstance(value, dict) else [(f"{prefix}{name}", value)]
    return rows


# --- pieces ---


def shared(
    configs: Sequence[Mapping[str, Any]],
    arms: Iterable[str],
    outcome: Verdict,
    said: Iterable[str],
    *,
    directory: str,
    drawn: str,
    again: str,
    wall_seconds: Any,
    files: str,
    sources: str = "these files",
) -> dict[str, str]:
    """The parts that every page of results has: its head, and `result.html`, `configuration.html`, `reproduce.html`.

    Args:
        configs: of the directories shown; the first speaks for all.
        arms: names of all arms of the run.
        outcome: what may be said of it.
        said: what a reader must know before believing the page.
        directory: what is shown, in words (text).
        drawn: what the page draws, "charts" or "maps".
        again: what repeating the command gives.
        wall_seconds: of the whole run, if known.
        files: that the page is made of (HTML).
        sources: what they are called.
    """
    config = configs[0]
    command, asked = str(config.get("command", "experiment")), question(config)
    return {
        "title": escape(f"rankdecay {command}: {asked}"),
        "command": escape(command),
        "directory": escape(directory),
        "question": escape(asked),
        "headline": escape(outcome.headline),
        "points": points(outcome.points),
        "notices": notices(said),
        "drawn": drawn,
        "arms": arms_list(config, {name: style.label for name, style in arm_styles(arms).items()}),
        "settings": settings_table(config),
        "again": again,
        "commands": commands(configs),
        "facts": facts(configs, wall_seconds),
        "sources": sources,
        "files": files,
    }


def question(config: Mapping[str, Any]) -> str:
    """The question an experiment asks, in words."""
    command = str(config.get("command", "experiment"))
    return str(config.get("question") or f"rankdecay {command}")


def points(pairs: Iterable[tuple[str, str]]) -> str:
    """The lines of a list of lead-ins and sentences."""
    return "\n".join(f"<dt>{escape(lead)}</dt><dd>{escape(text)}</dd>" for lead, text in pairs)


def notices(texts: Iterable[str]) -> str:
    """What a reader must know before believing a page."""
    return "".join(f'<p class="notice">{escape(text)}</p>' for text in texts)


def absent(text: str) -> str:
    """What stands where a page has nothing to show."""
    return f'<p class="absent">{escape(text)}</p>'


def choice(state: str, label: str, choices: Mapping[Any, Any], chosen: Any = None) -> str:
    """A labelled choice that a script reads as `state[...]`; the first is chosen unless another is named."""
    options = "".join(
        f'<option value="{escape(str(value))}"{" selected" if chosen is not None and value == chosen else ""}>'
        f"{escape(str(text))}</option>"
        for value, text in choices.items()
    )
    return f'<label>{escape(label)} <select data-state="{state}">{options}</select></label>'


def settings_table(config: Mapping[str, Any]) -> str:
    """The settings of a run, one per line."""
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(shown(value))}</td></tr>'
        for name, value in flat(config.get("settings", {}))
    )
    return scrolling("Settings", rows) if rows else absent("No settings recorded.")


def shown(value: Any) -> str:
    """A setting as text: a list without its brackets, a string without its quotes."""
    if isinstance(value, list | tuple):
        return ", ".join(map(shown, value))
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def arms_list(config: Mapping[str, Any], labels: Mapping[str, str]) -> str:
    """What every arm of a configuration is, in words and numbers.

    Args:
        config: the content of `config.json`.
        labels: of all arms of the run, by name.
    """
    items = []
    for arm in config.get("arms", []):
        name = str(arm["name"])
        rest = ", ".join(
            f"{key.replace('_', ' ').replace('.', ' ')} {shown(value)}"
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
        "Precision": "; ".join(dict.fromkeys(filter(None, map(precision.described, configs)))),
        "Wall time": duration(wall_seconds) if is_number(wall_seconds) else "",
    }
    items = "".join(f"<dt>{name}</dt><dd>{escape(value)}</dd>" for name, value in rows.items() if value)
    return f'<dl class="facts">{items}</dl>' if items else ""
