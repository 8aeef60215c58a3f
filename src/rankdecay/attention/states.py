"""Choice among several sets of weights in a file or a directory: the obvious one, or the one the caller names.

A set is a file of a directory, a mapping nested in a pickle, or a prefix of the names in one flat dictionary. The
state of an optimizer is no set of weights. Two sets of one file are **copies** of one model if the name of one says so
(student and teacher, EMA, target, actor and critic …) and both hold the same matrices: the caller then says which.
Parts of one model (encoder and decoder, two towers, queries and documents) are read together.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from rankdecay.attention.errors import CheckpointError
from rankdecay.attention.numbering import LISTS, number_in

#: Words in the name of a copy of a model.
_COPY = frozenset((
    "student", "teacher", "ema", "shadow", "online", "target", "actor", "critic", "policy", "ref", "reference",
    "generator", "discriminator", "swa", "averaged", "avg", "polyak", "momentum", "frozen", "old", "prev",
    "previous", "best", "last", "latest", "backup", "stale", "initial", "init", "copy",
))  # fmt: skip
#: Whole names of an optimizer's moments, beside the names of the weights.
_MOMENTS = frozenset(("m", "v", "mu", "nu"))
#: Words in the name of a part of a model: parts are read together.
_PART = frozenset((
    "encoder", "decoder", "backbone", "trunk", "head", "neck", "tower", "vision", "visual", "image", "text",
    "language", "audio", "video", "query", "doc", "document", "passage", "context", "question", "answer",
    "embedder", "embedding", "embeddings", "projector", "adapter", "connector", "lm",
))  # fmt: skip
_LATER = r"(?:_?(?:states?|dicts?|\d))*"  # one way to read each character: a name that does not match fails at once
#: Names of an optimizer's state, whose tensors have the shapes of the weights.
_OPTIMIZER = re.compile(
    r"(?:.*_)?(?:optimi[sz]ers?|optim|opt|grads?|gradients?|(?:max_)?exp_avg(?:_sq)?|momentum_buffer|moments?)"
    + _LATER,
    re.IGNORECASE,
)
#: Names under which trainers store other things than weights.
_TRAINER = re.compile(
    r"(?:.*_)?(?:schedulers?|scaler|amp|rng|callbacks|loops|dataloader|sampler)" + _LATER, re.IGNORECASE
)
#: Key of the tensors that are under none of the other keys.
REST = "."
_DEEP, _MOST_MAPPINGS = 4, 10_000  # a hostile pickle can refer to itself
#: Longest name of a tensor, in characters, and most parts of one: what is done with a name grows with both.
LONGEST_NAME, MOST_PARTS = 1024, 64
#: Most tensors of a checkpoint: the largest that are published, quantised experts, have about half of it.
MOST_TENSORS = 2**19


class SeveralSets(CheckpointError):
    """Raised where the caller has to say which weights are meant.

    Attributes:
        candidates: the keys to choose from.
    """

    def __init__(self, where: object, candidates: Iterable[str], state: str | None = None) -> None:
        """Say which sets there are, and, if one was asked for, that it is none of them."""
        self.candidates = tuple(candidates)
        shown = ", ".join(self.candidates[:12]) + (", …" if len(self.candidates) > 12 else "")
        what = f"{where} has no weights {state!r}: it holds" if state else f"{where} holds several sets of weights:"
        super().__init__(f"{what} {shown}; choose one with --state KEY (state= in Python).")


def take(keys: Collection[str], state: str | None, separator: str) -> tuple[str, str | None] | None:
    """Return the longest key that the state begins with, and what is left of the state; None if none is."""
    for key in sorted(keys, key=len, reverse=True):
        if state == key:
            return key, None
        if state is not None and state.startswith(key + separator):
            return key, state[len(key + separator) :]
    return None


def choose_mapping(content: object, state: str | None, file: Path) -> tuple[dict[str, Tensor], str | None, list[str]]:
    """Choose one state dict of what a pickle holds.

    Args:
        content: what ``torch.load`` returned.
        state: dotted path of the mapping; by default the one that is obvious.
        file: for the messages.

    Returns:
        The tensors by name; what is left of ``state``, to be found among the names; the keys of all sets.

    Raises:
        SeveralSets: If more than one set can be meant.
        CheckpointError: If there is none.
    """
    if isinstance(content, Tensor):
        raise CheckpointError(f"{file} is one tensor of shape {tuple(content.shape)}, not a state dict.")
    mappings = _mappings(content, "", _DEEP, ()) if isinstance(content, Mapping) else ()
    sets: dict[str, Any] = {}
    for count, (key, tensors) in enumerate(mappings):
        if count == _MOST_MAPPINGS:
            raise CheckpointError(
                f"{file} has more than {_MOST_MAPPINGS} mappings inside of each other, and no model has so many parts; "
                "where you trust it, load it and save the state_dict() of the model."
            )
        if tensors:
            sets[key] = tensors
    if not sets:
        raise CheckpointError(f"{file} contains no state dict of tensors.")
    keys = _candidates(sets)
    if state is not None:
        named = take(sets, state, ".")
        if named:
            return _named(sets[named[0]], named[0], file), named[1], keys
        inside = {key: value for key, value in sets.items() if key.startswith(state + ".")}
        if inside:  # a mapping of mappings: a model in parts
            keys, sets = _candidates(inside), inside
        elif len(keys) > 1 and not _together(keys, sets):
            raise SeveralSets(file, keys, state)
        state = None if inside else state
    if len(keys) == 1:
        return _named(sets[keys[0]], keys[0], file), state, keys
    if not _together(keys, sets):
        raise SeveralSets(file, keys)
    joined = {
        name if key == REST else f"{key}.{name}": tensor for key in keys for name, tensor in _items(sets[key]).items()
    }
    return joined, state, keys


def choose_names(
    shapes: Mapping[str, tuple[int, ...]], state: str | None, where: object
) -> tuple[dict[str, str], list[str]]:
    """Choose the tensors of one model among all names of a checkpoint.

    Args:
        shapes: shape of every tensor, by name.
        state: prefix of the names; by default all of them, if they are of one model.
        where: for the messages.

    Returns:
        The name in the checkpoint of every tensor, by its name in the model; and the keys of all copies.

    Raises:
        SeveralSets: If there are copies of one model and nothing says which, or not the one that was asked for.
    """
    copies = _copies(shapes, "")
    if state is None:
        if copies:
            raise SeveralSets(where, copies)
        names = [name for name in shapes if not _OPTIMIZER.fullmatch(name.partition(".")[0])]
        return {name: name for name in names or shapes}, []
    inside = "" if state == REST else state + "."
    others = tuple(f"{copy}." for copy in copies if copy not in (state, REST) and copy.startswith(inside))
    named = [name for name in shapes if name.startswith(inside) and not (state in copies and name.startswith(others))]
    chosen = {name[len(inside) :]: name for name in named if inside or REST in copies}
    if not chosen:
        raise SeveralSets(where, copies or dict.fromkeys(name.partition(".")[0] for name in shapes), state)
    if nested := _copies({name: shapes[whole] for name, whole in chosen.items()}, inside):
        raise SeveralSets(where, nested)
    return _with_dots(chosen, shapes), copies


def _mappings(content: Mapping[Any, Any], path: str, depth: int, above: tuple[int, ...]) -> Iterator[tuple[str, Any]]:
    """Yield every mapping or list of tensors with its dotted path, except the state of an optimizer.

    Args:
        content: the mapping.
        path: where it is.
        depth: how much deeper to look.
        above: the mappings that it is in; one that holds itself is looked at once.
    """
    if "param_groups" in content or id(content) in above:
        return
    above = (*above, id(content))
    yield path or REST, {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    for name, value in content.items():
        inner = f"{path}.{name}" if path else str(name)
        if len(inner) > LONGEST_NAME:  # of a tensor it is refused where names are
            continue
        if _OPTIMIZER.fullmatch(str(name)):
            continue
        if isinstance(value, Mapping) and depth:
            found = _mappings(value, inner, depth - 1, above)
            if _TRAINER.fullmatch(str(name)):  # the average that a callback keeps is the model's
                found = ((key, tensors) for key, tensors in found if _is_copy(key))
            yield from found
        elif isinstance(value, list) and _is_copy(inner) and any(isinstance(item, Tensor) for item in value):
            yield inner, value


def _items(tensors: Mapping[str, Tensor] | list[Any]) -> Mapping[str, Tensor]:
    if isinstance(tensors, list):
        return {str(i): tensor for i, tensor in enumerate(tensors) if isinstance(tensor, Tensor)}
    return tensors


def _candidates(sets: Mapping[str, Any]) -> list[str]:
    """Return the keys of the sets that can be a model: two matrices at least, if any has them."""
    count = {key: sum(tensor.ndim >= 2 for tensor in _items(value).values()) for key, value in sets.items()}
    return [key for key in sets if count[key] >= min(2, max(count.values()))]


def _named(tensors: Mapping[str, Tensor] | list[Any], key: str, file: Path) -> dict[str, Tensor]:
    if isinstance(tensors, list):
        raise CheckpointError(
            f"{key} in {file} is a list of tensors without names; copy it into the model "
            "(as its EMA class does) and save the model's state_dict()."
        )
    return dict(tensors)


def _together(keys: list[str], sets: Mapping[str, Any]) -> bool:
    """Whether sets are parts of one model: no copies, and named as parts, or of one matrix each."""
    if any(map(_is_copy, keys)) or REST in keys:
        return False
    single = all(sum(tensor.ndim >= 2 for tensor in _items(sets[key]).values()) == 1 for key in keys)
    return single or all(_words(key.rpartition(".")[2]) & _PART for key in keys)


def _words(name: str) -> set[str]:
    return {word.lower() for word in re.split(r"[^A-Za-z]+|(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", name)}


def _is_copy(path: str) -> bool:
    return bool(_words(path) & _COPY)


def _copies(shapes: Mapping[str, tuple[int, ...]], inside: str) -> list[str]:
    """Return the prefixes that hold copies of one model, each preceded by ``inside``."""
    groups: dict[tuple[str, ...], set[str]] = {(): set()}
    for name, shape in shapes.items():
        parts = name.split(".")
        if len(shape) < 2 or _OPTIMIZER.fullmatch(parts[0]):
            continue
        for depth in range(min(4, len(parts))):
            if depth and number_in(parts[depth - 1]) is not None:  # inside of a layer there are no copies of models
                break
            # without dots: some EMA classes keep their buffers under such names
            groups.setdefault(tuple(parts[:depth]), set()).add("".join(parts[depth:]))
    found: dict[str, None] = {}
    total = len(groups[()])
    large = [prefix for prefix, names in groups.items() if prefix and len(names) >= _least(total)]  # of a parent a few
    heart = {prefix: _unwrapped(prefix, large, groups) for prefix in large}
    siblings: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    for prefix in large:
        siblings.setdefault(prefix[:-1], []).append(prefix)
    for prefix in large:
        parent, own, names = prefix[:-1], prefix[-1], groups[prefix]
        beside = [other for other in siblings[parent] if other != prefix]
        rivals = [other for other in beside if _rivals(own, other[-1])]
        matches = [o for o in rivals if _same(names, groups[o], total) or _same(heart[prefix], heart[o], total)]
        if not matches and _rivals(own, ""):
            rest = {name for name in groups[parent] if not name.startswith(own)}
            matches = [parent] if _same(names, rest, total) or _same(heart[prefix], rest, total) else []
        for key in (*matches, prefix) if matches else ():
            found[inside + ".".join(key) if key else REST] = None
    return list(found)


def _unwrapped(
    prefix: tuple[str, ...], prefixes: list[tuple[str, ...]], groups: Mapping[tuple[str, ...], set[str]]
) -> set[str]:
    """Return the names under a prefix without the wrappers that all of them are in: DDP's ``module``, a backbone."""
    names = groups[prefix]
    within = (deeper for deeper in prefixes if deeper[:-1] == prefix and deeper[-1] not in LISTS)
    inside = [deeper for deeper in within if len(groups[deeper]) == len(names)]
    return _unwrapped(inside[0], prefixes, groups) if inside else names


def _rivals(name: str, other: str) -> bool:
    """Whether two sibling names are those of copies; encoders of source and target languages are not."""
    if name.endswith("encoder_k") and other == f"{name[:-1]}q":  # MoCo's, whose second follows the first
        return True
    return name == f"{other}_m" or name in _MOMENTS or (_is_copy(name) and not _words(other) & {"source", "src"})


def _same(names: set[str], others: set[str], total: int) -> bool:
    """Whether two sets of names are of one model: they share most of the smaller, and more than a head's names."""
    common = len(names & others)
    return common >= _least(total) and 2 * common >= min(len(names), len(others))


def _least(total: int) -> float:
    """Return how many names of ``total`` two copies of a model share at least."""
    return max(2, total / 20)


def _with_dots(chosen: dict[str, str], shapes: Mapping[str, Any]) -> dict[str, str]:
    """Return the names as they are in the model, where a copy keeps them without dots (``model_ema`` of LDM)."""
    if any("." in name for name in chosen):
        return chosen
    dotted: dict[str, str] = {}
    for name in shapes:
        inner = name.partition(".")[2]
        if "." in inner:
            dotted.setdefault(inner.replace(".", ""), inner)
    return {dotted.get(name, name): whole for name, whole in chosen.items()}
