"""The skeleton of every experiment: what one is made of, how it is found, and how it is run.

An experiment is a folder of `lab/experiments`: ``settings.py`` has its options and imports no torch, ``experiment.py``
says in an `Experiment` what is trained and how it is shown. `run` trains what the run directory does not hold yet,
writes the summary and the page. Another package adds one by an entry point of the group ``rankdecay.experiments``.

Importing this module imports neither torch nor numpy: the command line reads it for ``--help``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import tempfile
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from rankdecay.decay.policy import Frobenius
from rankdecay.lab.errors import SettingError, check_name
from rankdecay.lab.report.chart import Axis, Chart, Choice, Line
from rankdecay.lab.report.section import Html, Section
from rankdecay.lab.report.style import ArmStyle, arm_styles
from rankdecay.lab.report.table import Column
from rankdecay.lab.report.words import Check, Facts
from rankdecay.lab.settings import Record, Settings, check_lists, identity, question, renamed

if TYPE_CHECKING:
    from rankdecay.lab.precision import Products
    from rankdecay.lab.progress import Screen
    from rankdecay.lab.store import RunDirectory
    from rankdecay.lab.stored import StoredRun

__all__ = [
    "Arm",
    "Axis",
    "Chart",
    "Check",
    "Choice",
    "Column",
    "Experiment",
    "Facts",
    "Html",
    "Job",
    "Line",
    "Section",
    "Work",
    "draw_figure",
    "examples",
    "load",
    "names",
    "presets",
    "questions",
    "renamed_presets",
    "run",
    "write_merged_report",
    "write_report",
]
EXPERIMENTS = "rankdecay.lab.experiments"  # the package whose folders are experiments
ENTRY_POINTS = "rankdecay.experiments"  # the group by which another package registers the folder of an experiment
FIGURE_PANELS = 3  # of a figure that an experiment does not arrange itself
S = TypeVar("S", bound=Settings)
T = TypeVar("T")


# --- what an experiment is made of ---


@dataclass(frozen=True)
class Arm:
    """One of the alternatives that an experiment compares: how to decay, to parametrise, to train.

    Attributes:
        name: in ``--arms``, in every row and in the summary.
        description: what it is, in a sentence.
        how: what the experiment does under it: a dataclass of its own, whose fields are stored with the arm.
        strengths: of its decay, where they are an axis of the grid.
        control: what it rules out, in a sentence, if it is there as a control.
    """

    name: str
    description: str
    how: Any = None
    strengths: tuple[float, ...] = ()
    control: str = ""

    def record(self) -> Record:
        """The arm as ``config.json`` holds it."""
        how = _as_stored(self.how) if dataclasses.is_dataclass(self.how) else {}
        more = {"strengths": self.strengths} if self.strengths else {}
        return {"name": self.name, "description": self.description, **more, **how} | (
            {"control": self.control} if self.control else {}
        )


def _as_stored(how: Any) -> Any:
    """A dataclass as a dictionary, without what older directories do not hold, where it is at its default."""
    if not dataclasses.is_dataclass(how):
        return how
    fields = {field.name: (getattr(how, field.name), field.default) for field in dataclasses.fields(how)}
    later = fields if isinstance(how, Frobenius) else _LATER_FIELDS
    return {n: _as_stored(value) for n, (value, default) in fields.items() if n not in later or value != default}


#: Of a decay or a control, and of what an arm of `margin` trains.
_LATER_FIELDS = ("keep", "preserve_norm", "warmup", "in_loss", "planes", "scores", "finite", "head")


@dataclass(frozen=True)
class Job:
    """One run of an experiment.

    Attributes:
        key: names and values that no other job shares; they stand in every row of it.
        how: what is trained: whatever the experiment's ``train`` takes.
    """

    key: Record
    how: Any = None


@dataclass
class Work(Generic[S]):
    """Arguments of `Experiment.train`.

    Attributes:
        settings: checked, filled in, with the precision resolved.
        device: where to compute.
        arms: those asked for.
        data: what `Experiment.data` made.
        screen: what a person sees meanwhile; ``screen.notice`` tells something.
        writes: whether this process writes; of ``torchrun`` the first alone does.
        directory: of the run; None in a process that does not write.
        rows: those the directory holds.
        jobs: those it does not hold yet.
        seconds: spent before an interruption and now; None for the time of this call.
        found: anything `Experiment.summarise` needs beside the rows.
    """

    settings: S
    device: str
    arms: Sequence[Arm]
    data: Any
    screen: Screen
    writes: bool = True
    directory: RunDirectory | None = None
    rows: list[Record] = field(default_factory=list)
    jobs: list[Job] = field(default_factory=list)
    seconds: float | None = None
    found: Record = field(default_factory=dict)

    @property
    def run_directory(self) -> RunDirectory:
        """The directory, in the process that writes."""
        assert self.directory is not None
        return self.directory


def _alone() -> Any:
    """The one process of an experiment that shares nothing; `lab.session.distributed` has the same two functions."""

    @contextlib.contextmanager
    def process_group(device: str) -> Iterator[tuple[str, bool]]:
        yield device, True

    return SimpleNamespace(process_group=process_group, broadcast=lambda value: value)


def _plain_screen(work: Work[Any], title: str, options: Mapping[str, Any]) -> Screen:
    from rankdecay.lab.progress import Screen

    return Screen(**options)


@dataclass(frozen=True)
class Experiment(Generic[S]):
    """An experiment as data: `run` and the pages know nothing else of it.

    Attributes:
        name: the command.
        question: what it answers, in a sentence.
        presets: settings by the name of the preset; the first are the defaults.
        check: returns the settings filled in; raises a `SettingError` for those that cannot work.
        arms: those that the settings ask for.
        train: trains the jobs of a `Work` and yields rows, which `run` stores as they come. One that stores rows by
            itself, in step with a checkpoint, yields none.
        summarise: the figures of the summary, ``arms`` among them, from the work and all rows.
        columns: of the table of ``arms``, in the terminal and on the page; a function where the summary decides them.
        headline: the main result, in a sentence.
        checks: what else the run shows.
        jobs: every run of the grid; `run` leaves out those that the directory holds.
        data: made once before anything is written: data sets, a corpus.
        title: what is running, for the screen; after it come the steps and the device.
        screen: what a person sees meanwhile.
        minutes: that the default may take on the slowest machine that counts.
        shorter: the options that shorten it, as a user types them.
        resumable: whether an interrupted run continues; one of seconds starts over.
        grid: the settings that are axes which may grow: a directory takes in what a larger grid adds.
        not_identity: settings that do not change what a row says, beside those of every experiment.
        fingerprint: of the data, where the settings do not say what is learnt.
        narrow: the choice of ``--precision`` that multiplies in bfloat16; none where there is no such option.
        products: the largest products, to be timed where the machine decides the precision.
        needs_float64: whether it computes in float64 on the device.
        processes: joins and shares, see `lab.session.distributed`.
        aliases: older names of arms, in ``--arms`` and in stored rows.
        setting_names: how the experiment calls settings that functions it shares with others name in their errors.
        brief: the rows of the terminal's table, from those of the summary, where the page's are too many.
        note: what the figures of the table are, in words.
        check_row: of a line of ``metrics.jsonl``, see `lab.stored.read_run`.
        so_far: the summary of a run that is not complete, from its rows.
        merged: reads several directories as one; None where that has no meaning.
        sections: of the page, with their charts.
        figure: draws the figure for a paper; by default the first charts of the page, side by side.
        styles: how its arms are drawn and called, where `lab.report.style` does not know them; a function of the
            settings where they decide it.
        picture: what the terminal draws below the table, from the run directory; empty for nothing.
        files: what is in the run directory, by name.
        again: what repeating the command gives.
    """

    name: str
    question: str
    presets: Mapping[str, S]
    check: Callable[[S], S]
    arms: Callable[[S], Sequence[Arm]]
    train: Callable[[Work[S]], Iterable[Record]]
    summarise: Callable[[Work[S], list[Record]], Record]
    columns: Sequence[Column] | Callable[[Facts], Sequence[Column]]
    headline: Callable[[Facts], str]
    checks: Sequence[Check] = ()
    jobs: Callable[[Work[S]], Sequence[Job]] = lambda work: [Job({"arm": arm.name}, arm) for arm in work.arms]
    data: Callable[[S], Any] = lambda settings: None
    title: Callable[[Work[S]], str] = lambda work: f"{len(work.arms)} arms"
    screen: Callable[[Work[S], str, Mapping[str, Any]], Screen] = _plain_screen
    minutes: float = 15
    shorter: str = "fewer --seeds or --arms"
    resumable: bool = True
    grid: tuple[str, ...] = ()
    not_identity: tuple[str, ...] = ()
    fingerprint: Callable[[Any], Record] = lambda data: {}
    narrow: str = ""
    products: Callable[[Work[S]], Products | None] = lambda work: None
    needs_float64: bool = True
    processes: Callable[[], Any] = _alone
    aliases: Mapping[str, str] = field(default_factory=dict)
    setting_names: Mapping[str, str] = field(default_factory=dict)
    brief: Callable[[Sequence[Record]], Sequence[Record]] = lambda rows: rows
    note: Callable[[Facts], str] = lambda facts: ""
    check_row: Callable[[Record], Record] = lambda row: row
    so_far: Callable[[StoredRun], Record | None] = lambda stored: None
    merged: Callable[[Sequence[Path]], StoredRun] | None = None
    sections: Callable[[StoredRun], Sequence[Section]] = lambda stored: ()
    figure: Callable[[StoredRun, Path], Path] | None = None
    styles: Mapping[str, ArmStyle] | Callable[[Mapping[str, Any]], Mapping[str, ArmStyle]] = field(default_factory=dict)
    picture: Callable[[Path], str] = lambda path: ""
    files: Mapping[str, str] = field(default_factory=dict)
    again: str = "The same version gives the same digits up to rounding, on any machine."

    def columns_of(self, facts: Facts) -> Sequence[Column]:
        """The columns of a summary."""
        return self.columns(facts) if callable(self.columns) else self.columns

    def styles_of(self, settings: Mapping[str, Any]) -> Mapping[str, ArmStyle]:
        """How the arms of a run with these settings are drawn and called."""
        return self.styles(settings) if callable(self.styles) else self.styles


# --- how one is found ---


@cache
def _folders() -> dict[str, str]:
    """The package of every experiment by its name: folders of `lab/experiments`, and those of other packages.

    A folder with settings but no ``experiment.py`` holds what the experiments below it share.
    """
    root = Path(import_module(EXPERIMENTS).__path__[0])  # by name: nothing here depends on any of them
    folders = [path.parent for path in root.rglob("experiment.py") if path.with_name("settings.py").exists()]
    found = {folder.name: ".".join([EXPERIMENTS, *folder.relative_to(root).parts]) for folder in folders}
    return found | {point.name: point.value for point in entry_points(group=ENTRY_POINTS)}


def names() -> list[str]:
    """The commands of all experiments, in the order of `lab.experiments.ORDER`, then those of other packages."""
    order = import_module(EXPERIMENTS).ORDER
    return sorted(_folders(), key=lambda name: (order.index(name) if name in order else len(order), name))


def presets(name: str) -> Mapping[str, Settings]:
    """The presets of an experiment, without importing torch."""
    return import_module(f"{_folders()[name]}.settings").PRESETS


def questions() -> dict[str, str]:
    """Question of every experiment, by its name."""
    return {name: question(type(next(iter(presets(name).values())))) for name in names()}


def examples(name: str) -> Mapping[str, str]:
    """Command lines to show in the help of an experiment, with what each does."""
    return getattr(import_module(f"{_folders()[name]}.settings"), "EXAMPLES", {})


def renamed_presets(name: str) -> Mapping[str, str]:
    """Present names of presets that had another name in an earlier version."""
    return getattr(import_module(f"{_folders()[name]}.settings"), "RENAMED_PRESETS", {})


def load(name: str) -> Experiment[Any]:
    """An experiment by its name.

    Raises:
        SettingError: For a name that nothing is registered by.
    """
    check_name("command", name, _folders())
    return import_module(f"{_folders()[name]}.experiment").EXPERIMENT


# --- how one is run ---


def run(experiment: Experiment[S], settings: S, command: str) -> Record:
    """Run an experiment, or what is missing of it, and return its summary.

    Args:
        experiment: to run.
        settings: of this run.
        command: how to repeat it, for the report.

    Returns:
        The summary; an empty one in a process of ``torchrun`` that does not write.

    Raises:
        SettingError: If the settings, the data or the output directory cannot work, or training cannot go on.
    """
    try:
        return _run(experiment, settings, command)
    except SettingError as error:
        error.names = experiment.setting_names
        raise


def _run(experiment: Experiment[S], settings: S, command: str) -> Record:
    """`run`, with the errors of what experiments share."""
    from rankdecay.lab import precision
    from rankdecay.lab.machine import resolve_device
    from rankdecay.lab.progress import Promise, Screen

    check_lists(settings)
    older = [name for name in getattr(settings, "arms", ()) if name in experiment.aliases]
    settings = experiment.check(settings)
    processes = experiment.processes()
    device = resolve_device(settings.device, needs_float64=experiment.needs_float64)
    with processes.process_group(device) as (device, writes):
        promise = Promise(experiment.minutes, experiment.shorter)
        quiet = settings.quiet or not writes
        options = {"quiet": quiet, "to_stderr": settings.json, "promise": promise}
        work = Work(settings, device, experiment.arms(settings), experiment.data(settings), Screen(**options), writes)
        work.screen = experiment.screen(work, f"{experiment.title(work)} · {device}", options)
        for name in older if writes else ():
            work.screen.notice(
                f"--arms {name} is an older name of {experiment.aliases[name]}, which rankdecay 0.3 will not know: "
                f"give {experiment.aliases[name]}"
            )
        choice = None
        if experiment.narrow:
            products, notice = experiment.products(work), work.screen.notice
            resolved = (
                precision.resolve(
                    settings, experiment.name, device, notice, narrow=experiment.narrow, products=products
                )
                if writes
                else None
            )
            work.settings, choice = processes.broadcast(resolved)
        if writes:
            return _run_and_write(experiment, work, command, choice, processes.broadcast)
        if processes.broadcast(None):
            for _ in experiment.train(work):
                pass
        return {}


def _run_and_write(
    experiment: Experiment[S],
    work: Work[S],
    command: str,
    choice: Any,
    broadcast: Callable[[Any], Any],
) -> Record:
    """`_run` in the process that writes."""
    from rankdecay.lab import precision, unfit
    from rankdecay.lab.store import EXTENSIBLE_IDENTITY, IDENTITY, RunDirectory, read_metrics
    from rankdecay.lab.stored import check_rows

    settings, notice = work.settings, work.screen.notice
    asked = identity(settings, experiment.not_identity) | experiment.fingerprint(work.data)
    config = configuration(experiment.name, asked, work.arms, work.device, command, choice)
    if experiment.grid:
        fixed, *arms = (_without(record, experiment.grid) for record in (asked, *config["arms"]))
        config |= {"fixed": fixed, "arms": arms}
    defaults = json.loads(json.dumps(identity(type(settings)())))
    keys = EXTENSIBLE_IDENTITY if experiment.grid else IDENTITY
    with RunDirectory.open(settings.out, config, notice, keys, defaults) as directory:
        work.directory = directory
        complete = directory.summary
        lost_lines = complete is not None and len(read_metrics(directory.path)) < complete.get("lines", 0)
        if complete is not None and (lost_lines or not experiment.grid):
            broadcast(False)
            return _shown(experiment, work)  # which refuses a run that lost lines
        broadcast(True)
        work.rows = [renamed(row, experiment.aliases) for row in directory.drop_damaged_line()]
        check_rows(directory.path, work.rows, experiment.check_row)
        known = bool(work.rows) or bool(directory.checkpoints())
        jobs = experiment.jobs(work)
        with unfit.explain_inconsistency(lambda error: unfit.in_line(settings.out, 0)):
            done = {tuple(row.get(name) for name in jobs[0].key) for row in work.rows} if jobs else set()
        work.jobs = [job for job in jobs if tuple(job.key.values()) not in done]
        if experiment.grid and work.jobs:
            if directory.summary is not None and choice is not None:  # complete until now, when nothing was computed
                precision.warn_if_slow(choice, settings.out, work.device, notice, experiment.products(work))
            directory.grow(_grown(renamed(directory.config, experiment.aliases), config))
        started = time.monotonic()
        checkpoints = directory.checkpoints()

        def going_on() -> contextlib.AbstractContextManager[None]:
            if not known:
                return contextlib.nullcontext()
            return unfit.explain_inconsistency(lambda error: unfit.in_checkpoint(settings.out, checkpoints))

        with going_on():
            _train(experiment, work)
        if directory.summary is not None:  # nothing was added
            return _shown(experiment, work)
        seconds = time.monotonic() - started if work.seconds is None else work.seconds
        rows = [renamed(row, experiment.aliases) for row in directory.metrics()]
        with going_on():
            figures = experiment.summarise(work, rows)
        summary = {
            "command": experiment.name,
            "settings": asked,
            **figures,
            "wall_seconds": seconds,
            "lines": len(rows),
        }
        if "precision" in directory.config:  # one that began before precisions were chosen has none
            summary["precision"] = directory.config["precision"]
        directory.finish(summary)
        write_report(directory.path)
        return summary


def _train(experiment: Experiment[S], work: Work[S]) -> None:
    """Train and store the rows: as they come, or in one piece where an interrupted run starts over."""
    directory = work.run_directory
    if experiment.resumable:
        rows = experiment.train(work)
        try:
            for number, row in enumerate(rows):
                if number == 0:
                    directory.reopen()
                directory.append([row])
        finally:
            if isinstance(rows, Generator):  # it may have threads and a display to end before anything is said
                rows.close()
        return
    directory.resume()  # an interrupted run may have left lines
    try:
        directory.append(list(experiment.train(work)))
    except SettingError:
        (directory.path / "config.json").unlink()  # nothing was found: leave the directory to other settings
        raise


def _shown(experiment: Experiment[S], work: Work[S]) -> Record:
    """The summary of a run that is complete, after saying so."""
    directory = work.run_directory
    more = "a larger grid would be added to it" if experiment.grid else "for a new run give another --out"
    read(experiment, [directory.path])  # refuse what was changed since
    work.screen.notice(f"{directory.path} is complete: showing its result; {more}")
    if not os.path.lexists(directory.path / "report.html"):  # a kill came between the summary and the page
        write_report(directory.path)
    return renamed(directory.summary or {}, experiment.aliases)


def _without(record: Record, names: Sequence[str]) -> Record:
    return {name: value for name, value in record.items() if name not in names}


def _grown(stored: Record, config: Record) -> Record:
    """The configuration now asked for, with the arms and the commands that made what the directory has already."""
    new = [arm["name"] for arm in config["arms"]]
    arms = [*config["arms"], *(arm for arm in stored.get("arms", []) if arm["name"] not in new)]
    last, this = (
        {name: each[name] for name in ("reproduce", "settings", "versions", "machine", "precision") if name in each}
        for each in (stored, json.loads(json.dumps(config)))
    )
    earlier = [command for command in (*stored.get("earlier", []), last) if command != this]
    return config | {"arms": arms} | ({"earlier": earlier} if earlier else {})


def configuration(
    command: str, settings: Record, arms: Sequence[Arm], device: str, reproduce: str, precision: Any = None
) -> Record:
    """The content of ``config.json``.

    Args:
        command: name of the experiment.
        settings: of `identity`.
        arms: those compared.
        device: on which it runs.
        reproduce: the command line that repeats it.
        precision: of its products, where there is a choice.
    """
    from rankdecay.lab.machine import describe_machine, versions

    config = {
        "command": command,
        "settings": settings,
        "arms": [arm.record() for arm in arms],
        "versions": versions(),
        "machine": describe_machine(device),
        "reproduce": reproduce,
    }
    return config if precision is None else config | {"precision": dataclasses.asdict(precision)}


# --- what is shown of one ---


def of_directory(directory: str | Path) -> Experiment[Any]:
    """The experiment that a directory holds a run of.

    Raises:
        SettingError: When it holds none, or one that is not installed.
    """
    from rankdecay.lab.stored import read_config

    command = str(read_config(Path(directory)).get("command"))
    try:
        return load(command)
    except SettingError as error:
        raise SettingError(f"{Path(directory) / 'config.json'}: {error}") from None


def read(experiment: Experiment[Any], directories: Sequence[str | Path]) -> StoredRun:
    """A run directory, or several as one, after removing what a kill left in them.

    Raises:
        SettingError: When a directory is not a run of the experiment, is damaged, or cannot be merged with the others.
    """
    from rankdecay.lab.store import tidy
    from rankdecay.lab.stored import read_run

    paths = list(dict.fromkeys(map(Path, directories)))
    for path in paths:
        tidy(path)
    if experiment.merged is not None:
        return experiment.merged(paths)
    if len(paths) > 1:
        raise SettingError(f"runs of {experiment.name} cannot be merged: report {len(paths)} directories one by one")
    return read_run(paths[0], experiment.check_row, experiment.so_far, experiment.aliases)


def write_report(directory: str | Path, notice: Callable[[str], None] | None = None) -> Path:
    """Write ``report.html`` into a run directory, complete or not, and return its path.

    Args:
        directory: of the run.
        notice: receives what the page says of files that were left out.

    Raises:
        SettingError: When the directory is not a run or a file in it is damaged.
    """
    return write_merged_report([directory], Path(directory) / "report.html", notice)


def write_merged_report(
    directories: Sequence[str | Path], path: str | Path, notice: Callable[[str], None] | None = None
) -> Path:
    """Write one page of a run directory, or of several that can be merged, and return its path.

    Args:
        directories: of the runs.
        path: of the page.
        notice: receives what the page says of files that were left out.

    Raises:
        SettingError: When a directory is not a run, is damaged, or cannot be merged with the first.
    """
    from rankdecay.lab.report.page import write
    from rankdecay.lab.report.run_page import render

    experiment = of_directory(directories[0])
    # rendering adds to the notices
    page, notices = _made(experiment, directories, lambda stored: (render(experiment, stored), stored.notices))
    written = write(page, Path(path))
    if notice is not None:
        for text in notices:
            notice(text)
    return written


def draw_figure(directories: Sequence[str | Path], path: str | Path) -> Path:
    """Draw the static figure of a run, or of several that can be merged, and return its path.

    Raises:
        SettingError: When a directory is not a run, is damaged, cannot be merged, or has nothing to draw.
        ValueError: When the suffix is not a format matplotlib writes.
    """
    from rankdecay.lab.report.figure import draw

    experiment = of_directory(directories[0])

    def drawn(stored: StoredRun, path: Path) -> Path:
        if experiment.figure is not None:
            return experiment.figure(stored, path)
        charts = _charts_of_figure(experiment, stored)
        if not charts:
            raise SettingError(f"{directories[0]} has nothing to draw yet: let the run continue, or complete it")
        return draw(charts, arm_styles(stored.arms, experiment.styles_of(stored.settings)), path)

    with tempfile.TemporaryDirectory() as elsewhere:  # for the attempts that find out which file is to blame
        attempt = Path(elsewhere, "figure").with_suffix(Path(path).suffix)
        return _made(experiment, directories, lambda stored: drawn(stored, Path(path)), lambda run: drawn(run, attempt))


def _made(
    experiment: Experiment[Any],
    directories: Sequence[str | Path],
    make: Callable[[StoredRun], T],
    attempt: Callable[[StoredRun], object] | None = None,
) -> T:
    """Make something from run directories; where that fails, find the file to blame by further attempts."""
    from rankdecay.lab import unfit
    from rankdecay.lab.stored import read_run

    def again(run: StoredRun) -> object:
        return (attempt or make)(run if run.summary else dataclasses.replace(run, summary=experiment.so_far(run)))

    def find(error: Exception) -> tuple[str, str]:
        for directory in dict.fromkeys(map(Path, directories)):
            run = read_run(directory, experiment.check_row, aliases=experiment.aliases)
            if named := unfit.find_inconsistent_file(run, again, error):
                return named
        return ", ".join(map(str, directories)), "restore what was changed in them, or report them one by one"

    with unfit.explain_inconsistency(find):
        return make(read(experiment, directories))


def _charts_of_figure(experiment: Experiment[Any], stored: StoredRun) -> list[Chart]:
    charts = [part for section in experiment.sections(stored) for part in section.parts if isinstance(part, Chart)]
    return [chart for chart in charts if chart.lines][:FIGURE_PANELS]
