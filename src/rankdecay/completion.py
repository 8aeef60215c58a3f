"""Completion scripts for bash, zsh and fish, made from the options of the commands. Imports no package but our own.

A script holds every command and option as text, so that a key press starts no Python.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import shlex
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal, get_args, get_origin, get_type_hints

SHELLS = ("bash", "zsh", "fish")


@dataclasses.dataclass(frozen=True)
class Option:
    """One option of a command.

    Attributes:
        name: as it is typed, ``--first-seed``.
        text: what it does, in a line.
        values: those it may have, where they are a short list.
        takes_value: whether a value follows.
    """

    name: str
    text: str
    values: tuple[str, ...] = ()
    takes_value: bool = True


@dataclasses.dataclass(frozen=True)
class Command:
    """One command: what it does, in a line, and its options."""

    text: str
    options: Sequence[Option]


HELP = Option("--help", "show what the command does and its options", takes_value=False)


def of_parser(parser: argparse.ArgumentParser) -> list[Option]:
    """Return the options of a parser."""
    return [
        Option(name, _line(action.help or ""), tuple(map(str, action.choices or ())), action.nargs != 0)
        for action in parser._actions
        for name in action.option_strings
        if name.startswith("--")
    ]


def of_settings(settings: type) -> list[Option]:
    """Return the options that the fields of a dataclass are, with their docstrings, as tyro reads them."""
    hints = get_type_hints(settings, include_extras=False)
    texts = _docstrings(settings)
    options = []
    for field in dataclasses.fields(settings):
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            continue  # a positional argument
        kind = hints[field.name]
        values = get_args(kind) if get_origin(kind) is Literal else ()
        name = f"--{field.name.replace('_', '-')}"
        options.append(Option(name, _line(texts.get(field.name, "")), tuple(map(str, values)), kind is not bool))
    return [*options, HELP]


def _docstrings(settings: type) -> dict[str, str]:
    """Return the string under each field, of the class itself before those of its bases."""
    texts: dict[str, str] = {}
    for cls in reversed(settings.__mro__):
        if not dataclasses.is_dataclass(cls):
            continue
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
        body: list[Any] = getattr(tree, "body", [])
        for field, below in pairwise(body):
            if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
                continue
            if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
                texts[field.target.id] = str(below.value.value)
    return texts


def _line(text: str) -> str:
    """Return the first sentence or clause of a help text, short enough to stand beside an option."""
    text = " ".join(text.split()).replace("%%", "%")
    return textwrap.shorten(text, 78, placeholder=" …")


def script(shell: str, commands: Mapping[str, Command], options: Sequence[Option]) -> str:
    """Return the completion script of a shell.

    Args:
        shell: one of `SHELLS`.
        commands: by name.
        options: of ``rankdecay`` itself, before any command.
    """
    return {"bash": _bash, "zsh": _zsh, "fish": _fish}[shell](commands, options)


def _names(options: Iterable[Option]) -> str:
    return " ".join(option.name for option in options)


# --- bash ---

_BASH = """\
# Completion of rankdecay for bash: eval "$(rankdecay --completion bash)", in ~/.bashrc to have it always.
_rankdecay() {{
    local current=${{COMP_WORDS[COMP_CWORD]}} previous=${{COMP_WORDS[COMP_CWORD-1]}} command=${{COMP_WORDS[1]}}
    local words= values=
    COMPREPLY=()
    if [[ $current == = ]]; then current=; elif [[ $previous == = ]]; then previous=${{COMP_WORDS[COMP_CWORD-2]}}; fi
    if [[ $command == -* ]]; then command=; fi
    if ((COMP_CWORD == 1)); then command=; words="{commands}"; fi
    case "$command $previous" in
{values}
    esac
    if [[ -n $values ]]; then COMPREPLY=($(compgen -W "$values" -- "$current")); return; fi
    if [[ $current == -* ]]; then
        case $command in
{options}
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "$current"))
}}
complete -o default -F _rankdecay rankdecay
"""


def _bash(commands: Mapping[str, Command], options: Sequence[Option]) -> str:
    values = [
        f'    "{name} {option.name}") values="{" ".join(option.values)}" ;;'
        for name, command in [("", Command("", options)), *commands.items()]
        for option in command.options
        if option.values
    ]
    known = [f'        "") words="{_names(options)}" ;;']
    known += [f'        {name}) words="{_names(command.options)}" ;;' for name, command in commands.items()]
    return _BASH.format(commands=" ".join(commands), values="\n".join(values), options="\n".join(known))


# --- zsh ---

_ZSH = """\
#compdef rankdecay
# Completion of rankdecay for zsh: eval "$(rankdecay --completion zsh)" after compinit, in ~/.zshrc to have it always;
# or as a file _rankdecay in a directory of $fpath.
_rankdecay() {{
    local -a commands
    local state line
    commands=(
{commands}
    )
    _arguments -C {options} '1:command:->command' '*::argument:->arguments'
    case $state in
    command) _describe command commands ;;
    arguments)
        case $words[1] in
{cases}
        esac ;;
    esac
}}
if [[ $funcstack[1] == _rankdecay ]]; then _rankdecay "$@"; else compdef _rankdecay rankdecay; fi
"""


def _zsh(commands: Mapping[str, Command], options: Sequence[Option]) -> str:
    listed = [f"        {shlex.quote(f'{name}:{command.text}')}" for name, command in commands.items()]
    cases = [
        f"        {name}) _arguments {' '.join(map(_zsh_option, command.options))} '*:path:_files' ;;"
        for name, command in commands.items()
    ]
    return _ZSH.format(commands="\n".join(listed), options=" ".join(map(_zsh_option, options)), cases="\n".join(cases))


def _zsh_option(option: Option) -> str:
    text = option.text.translate(str.maketrans({"[": "(", "]": ")", ":": " -", "\\": "/"}))
    value = f":value:({' '.join(option.values)})" if option.values else ":value:_files"
    return shlex.quote(f"*{option.name}[{text}]{value if option.takes_value else ''}")


# --- fish ---


def _fish(commands: Mapping[str, Command], options: Sequence[Option]) -> str:
    lines = [
        "# Completion of rankdecay for fish: rankdecay --completion fish | source",
        "# in ~/.config/fish/config.fish to have it always.",
        "complete -c rankdecay -n __fish_use_subcommand -f",
        *(
            f"complete -c rankdecay -n __fish_use_subcommand -f -a {name} -d {_fish_text(command.text)}"
            for name, command in commands.items()
        ),
    ]
    for condition, shown_options in [
        ("__fish_use_subcommand", options),
        *((f"'__fish_seen_subcommand_from {name}'", command.options) for name, command in commands.items()),
    ]:
        lines += [f"complete -c rankdecay -n {condition} {_fish_option(option)}" for option in shown_options]
    return "\n".join(lines) + "\n"


def _fish_option(option: Option) -> str:
    value = f" -x -a {_fish_text(' '.join(option.values))}" if option.values else " -r" if option.takes_value else ""
    return f"-l {option.name.removeprefix('--')} -d {_fish_text(option.text)}{value}"


def _fish_text(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"
