"""Decays as text or as a dictionary, so that a command line or a YAML file can hold them.

=======================================  ==========================================================================
in one line of text                      ``query_key=LowRank:0.1:rule=smooth:every=4,value_output=Frobenius:0.0``
a decay in a dictionary                  ``"LowRank:0.1:rule=smooth:every=4"``
the same, field by field                 ``{"decay": "LowRank", "strength": 0.1, "rule": "smooth", "every": 4}``
=======================================  ==========================================================================

Text separates parameters to exclude by ``;``. In a dictionary ``exclude`` may be a list, with ``{"regex": "..."}`` for
a regular expression, and ``names`` is a dictionary of the arguments of :class:`rankdecay.AttentionNames`, or a list of
them.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, fields
from typing import Any, get_args

from rankdecay.attention.names import AttentionNames
from rankdecay.checks import check_name, check_number, given
from rankdecay.decay.policy import Decay
from rankdecay.decay.roles import ROLES

_KINDS: dict[str, type] = {kind.__name__: kind for kind in get_args(Decay)}
_ROLES = ("default", *ROLES)
_EXAMPLE = "'query_key=LowRank:0.1,value_output=Frobenius:0.0'"


def decays(settings: str | Mapping[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """Read the arguments of :func:`rankdecay.attach` from text or a dictionary.

    Args:
        settings: one line of text, or a dictionary with a decay for each role and, as ``attach`` takes them,
            ``exclude``, ``names``, ``num_heads``, ``only``, ``backend`` and ``counts``.
        **more: further entries of the dictionary. A decay may be an object, too.

    Returns:
        Keyword arguments for ``attach``. What is None is left out.

    Raises:
        TypeError: If ``settings`` is neither text nor a dictionary.
        ValueError: If a name is unknown, a value is not what its name takes, or no role has a decay.

    Example:
        >>> decays("query_key=LowRank:0.1:every=4", exclude="lm_head")
        ... # doctest: +ELLIPSIS
        {'query_key': LowRank(strength=0.1, ..., every=4, ...), 'exclude': ['lm_head']}
    """
    if not isinstance(settings, (str, Mapping, type(None))):
        raise TypeError(f"settings={settings!r} must be a dictionary, or text such as {_EXAMPLE}.")
    entries = _split(settings) if isinstance(settings, str) else dict(settings or {})
    twice = entries.keys() & more.keys()
    if twice:
        raise ValueError(f"{', '.join(sorted(twice))} is in the settings and among the arguments; give it once.")
    keywords: dict[str, Any] = {}
    for name, value in (entries | more).items():
        check_name("setting", name, (*_ROLES, *_READERS))
        if value is not None:
            keywords[name] = _READERS[name](value) if name in _READERS else _decay(name, value)
    if not keywords.keys() & set(_ROLES):
        raise ValueError(f"no role is named, so there is nothing to decay: give settings such as {_EXAMPLE}.")
    return keywords


def as_settings(keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Return the dictionary, of plain values alone, from which :func:`decays` reads the same keyword arguments."""
    settings: dict[str, Any] = {}
    for name, value in keywords.items():
        if name in _ROLES:
            settings[name] = decay_text(value)
        elif name == "exclude":
            settings[name] = [e if isinstance(e, str) else {"regex": e.pattern, "flags": e.flags} for e in value]
        elif name == "names":
            settings[name] = [_differing(each) for each in value]
        else:
            settings[name] = value
    return settings


# ---- text ------------------------------------------------------------------------------------------------


def _split(text: str) -> dict[str, str]:
    entries: dict[str, str] = {}
    for piece in filter(None, map(str.strip, text.split(","))):
        name, separator, value = (part.strip() for part in piece.partition("="))
        if not separator:
            raise ValueError(f"{piece!r} in the settings {text!r} has no '='; write them as in {_EXAMPLE}.")
        if name in entries:
            raise ValueError(f"{name} is in the settings {text!r} twice; give it once.")
        entries[name] = value
    return entries


def _literal(value: Any) -> Any:
    """Return the number, truth value or None that a text is, or the text; YAML reads ``1e-3`` as text."""
    if not isinstance(value, str):
        return value
    words = {"true": True, "false": False, "none": None}
    if value.lower() in words:
        return words[value.lower()]
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(value)
    return value


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


# ---- decays ----------------------------------------------------------------------------------------------


def _decay(role: str, value: Any) -> Decay:
    if isinstance(value, get_args(Decay)):
        return value
    try:
        return _read_decay(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{given(role, value)} is not a decay: {error}") from None


def _read_decay(value: Any) -> Decay:
    kinds = " or ".join(f"'{kind}:0.1'" for kind in _KINDS)
    if isinstance(value, str):
        kind, *pieces = (piece.strip() for piece in value.split(":"))
        entries: dict[str, Any] = {}
        for number, piece in enumerate(pieces):
            name, separator, text = (part.strip() for part in piece.partition("="))
            if not separator and number:
                raise ValueError(f"{piece!r} has no '='; write a field behind the strength as in 'LowRank:0.1:every=4'")
            name, text = (name, text) if separator else ("strength", name)
            if name in entries:
                raise ValueError(f"{name} is given twice")
            entries[name] = text
    elif isinstance(value, Mapping) and "decay" in value:
        entries = dict(value)
        kind = entries.pop("decay")
    else:
        raise ValueError(f"write {kinds}, or a dictionary with 'decay' for its kind and 'strength'")
    check_name("decay", kind, _KINDS)
    known = {field.name: field for field in fields(_KINDS[kind])}
    arguments: dict[str, Any] = {}
    for name, entry in entries.items():
        check_name("field", name, known)
        arguments[name] = _truth(name, entry) if known[name].type == "bool" else _literal(entry)
    for name, field in known.items():
        if field.default is MISSING and name not in arguments:
            raise ValueError(f"it has no {name}; write {kinds}")
    return _KINDS[kind](**arguments)


def decay_text(decay: Decay) -> str:
    """Return a decay as it is written in text, without what is as by default: ``LowRank:0.1:every=4``."""
    differing = _differing(decay)
    strength = differing.pop("strength")
    return ":".join([type(decay).__name__, _text(strength), *(f"{n}={_text(v)}" for n, v in differing.items())])


def _differing(instance: Any) -> dict[str, Any]:
    """Return the fields of a dataclass that are not as their defaults."""
    values = {field.name: (getattr(instance, field.name), field.default) for field in fields(instance)}
    return {name: value for name, (value, default) in values.items() if value != default}


# ---- the other arguments ---------------------------------------------------------------------------------


def _truth(name: str, value: Any) -> bool:
    found = _literal(value)
    if not isinstance(found, bool):
        raise ValueError(f"{given(name, value)} must be true or false")
    return found


def _several(value: Any) -> list[Any]:
    return list(value) if isinstance(value, Iterable) and not isinstance(value, (str, Mapping)) else [value]


def _exclude(value: Any) -> list[Any]:
    patterns: list[Any] = value.split(";") if isinstance(value, str) else _several(value)
    return [
        re.compile(each["regex"], each.get("flags", 0)) if isinstance(each, Mapping) and "regex" in each else each
        for each in patterns
    ]


def _names(value: Any) -> list[AttentionNames]:
    found: list[AttentionNames] = []
    known = [field.name for field in fields(AttentionNames)]
    for each in _several(value):
        if isinstance(each, AttentionNames):
            found.append(each)
            continue
        if not isinstance(each, Mapping):
            raise ValueError(
                f"{given('names', each)} must be a dictionary of the arguments of rankdecay.AttentionNames, such as "
                "{'query': 'to_q', 'key': 'to_k', 'value': 'to_v'}."
            )
        for name in each:
            check_name("field of names", name, known)
        arguments: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in each.items()}
        found.append(AttentionNames(**arguments))
    return found


_READERS: dict[str, Callable[[Any], Any]] = {
    "exclude": _exclude,
    "names": _names,
    "num_heads": lambda value: check_number("num_heads", _literal(value), at_least=1, whole=True),
    "only": lambda value: _truth("only", value),
    "backend": str,
    "counts": str,
}
