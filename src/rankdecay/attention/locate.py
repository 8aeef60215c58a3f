"""Find attention by the names and shapes of parameters: the same for a live model and for files.

A module is attention when the parameters under it carry names that belong together
(:mod:`rankdecay.attention.names`). Shapes, and the number of heads, say the rest
(:mod:`rankdecay.attention.module`). What carries such names and is not read is named, with the reason.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from rankdecay.attention.checkpoints import Checkpoint
from rankdecay.attention.complete import missing_layers
from rankdecay.attention.layer import AttentionLayer, MatrixView, Role, Window
from rankdecay.attention.module.found import Found, Place
from rankdecay.attention.module.latent import read_experts, read_latent, read_shared_latent
from rankdecay.attention.module.projections import WEIGHTS, own_keys_reason
from rankdecay.attention.module.reader import ModuleReader
from rankdecay.attention.module.settings import NotHandled
from rankdecay.attention.names import (
    EXPERTS,
    FUSED,
    LATENT,
    NOT_READ,
    SEPARATE,
    SHARED_LATENT,
    AttentionNames,
    factor_of,
    glued,
    is_fused_like,
    is_input_like,
    is_key_like,
    is_query_key_like,
    is_query_like,
    is_value_like,
    query_beside,
    separate,
    spellings,
)
from rankdecay.attention.numbering import LayerNumber, matches_label, number_layers, ranges
from rankdecay.attention.source import Source, open_source
from rankdecay.text import visible


class Unhandled(NamedTuple):
    """Module that looks like attention and cannot be read, with the reason."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name or 'the model'}: {self.reason}"


Names = AttentionNames | Sequence[AttentionNames] | None


@dataclass(frozen=True)
class SearchOptions:
    """Options of a search for attention as a user gives them; :func:`locate` checks them.

    Attributes:
        names: of the user's own attention; they come before those that are known.
        num_heads: number of query heads, where no setting says it.
        head_dim: size of a head, where nothing says it.
        only: look for ``names`` alone.
    """

    names: Names = None
    num_heads: int | None = None
    head_dim: int | None = None
    only: bool = False


DEFAULT_SEARCH = SearchOptions()


def find_attention(
    model: nn.Module | str | Path,
    names: Names = None,
    num_heads: int | None = None,
    *,
    head_dim: int | None = None,
    only: bool = False,
    state: str | None = None,
) -> list[AttentionLayer]:
    """Return the attention layers of a model or a checkpoint, in the order of its parameters.

    Recognised by the names and shapes of parameters and by the numbers of heads that modules and configurations
    state (:mod:`rankdecay.attention.names`), not by class; so a model wrapped by ``torch.compile``, DDP or PEFT is
    seen too, and cross-attention counts as a layer of its own. With a PEFT adapter the view reads the effective
    weight. Of a sharded parameter (a DTensor, by FSDP2 or tensor parallelism) names and shapes are those of the whole,
    and reading a view gathers it for that moment: in every process the same, so every process has to read it.

    Args:
        model: the model, or any part of it; or a path to a checkpoint (:mod:`rankdecay.attention.checkpoints`),
            of which nothing but shapes is read until a view is asked for its tensor.
        names: how your own attention names its projections, for one kind of attention or several. They come first; what
            they do not fit is read by the names that are known.
        num_heads: number of query heads, where neither module nor configuration says it.
        head_dim: size of a head, where nothing says it.
        only: look for ``names`` alone.
        state: which weights, of a checkpoint that holds several sets: a file's name, a dotted key, a prefix of names.

    Returns:
        One :class:`~rankdecay.attention.AttentionLayer` per attention; a module with two kinds of it has two.

    Raises:
        TypeError: If ``model`` is neither an ``nn.Module`` nor a path.
        ValueError: If no attention is found; the message lists what looked like it, and why it was not taken. Or if
            a checkpoint cannot be read.

    Warns:
        UserWarning: If some modules look like attention and could not be read, with the reason.

    Example:
        >>> attention = nn.MultiheadAttention(64, num_heads=4)
        >>> [layer] = find_attention(attention)
        >>> layer.key.parameter_name, str(layer.key.window), layer.key.heads().shape
        ('in_proj_weight', 'rows[64:128]/192 by 16', torch.Size([4, 16, 64]))
    """
    source = open_source(model, state)
    layers, unhandled = find_layers(source, SearchOptions(names, num_heads, head_dim, only))
    warn_unhandled(unhandled, "is not handled", stacklevel=3)
    return layers


def warn_unhandled(unhandled: Sequence[Unhandled], what: str, stacklevel: int) -> None:
    """Give one warning of all attention that could not be read; modules with one reason are listed together."""
    if unhandled:
        text = "; ".join(f"{modules} {what}: {reason}" for modules, reason in grouped(unhandled))
        warnings.warn(visible(text.rstrip(".") + "."), stacklevel=stacklevel)


def grouped(unhandled: Sequence[Unhandled]) -> list[tuple[str, str]]:
    """Return (modules, reason) for each reason, the modules that share it as one text."""
    by_reason: dict[str, list[str]] = {}
    for module in unhandled:
        by_reason.setdefault(module.reason, []).append(module.name or "the model")
    return [
        (", ".join(modules[:3]) + (f" and {len(modules) - 3} more" if len(modules) > 3 else ""), reason)
        for reason, modules in by_reason.items()
    ]


def listed(unhandled: Sequence[Unhandled]) -> list[str]:
    """Return one text for each reason, with the modules that it is said of."""
    return [f"{modules}: {reason}" for modules, reason in grouped(unhandled)]


def find_layers(source: Source, search: SearchOptions = DEFAULT_SEARCH) -> tuple[list[AttentionLayer], list[Unhandled]]:
    """Return the attention layers of a source, and the modules that look like attention and cannot be read.

    Raises:
        ValueError: If no attention is found.
    """
    found, unhandled = locate_or_raise(source, search)
    return layers_of(source, found), unhandled


def locate_or_raise(source: Source, search: SearchOptions = DEFAULT_SEARCH) -> tuple[list[Found], list[Unhandled]]:
    """Locate attention as :func:`locate` does.

    Raises:
        ValueError: If there is none.
    """
    found, unhandled = locate(source, search)
    if not found:
        raise ValueError(_nothing(source, search.names, unhandled))
    return found, unhandled


def layers_of(source: Source, found: Sequence[Found]) -> list[AttentionLayer]:
    """Return the attention layers that were located in a source."""
    places = number_layers([layer.name for layer in found])
    return [_layer(layer, source, place) for layer, place in zip(found, places, strict=True)]


def chosen(wanted: Collection[int | str] | None, layers: Sequence[AttentionLayer]) -> list[AttentionLayer]:
    """Return the layers that are meant by numbers, or in a tower by labels such as ``"decoder.4"``; all by default.

    Raises:
        ValueError: If a layer that is wanted does not exist.
    """
    if wanted is None:
        return list(layers)
    for one in wanted:
        if not any(matches_label(layer.place, one) for layer in layers):
            known = ranges([layer.place.label for layer in layers]).replace("-", "–")
            raise ValueError(f"layers={one} is out of range: the model has {known}.")
    return [layer for layer in layers if any(matches_label(layer.place, one) for one in wanted)]


def locate(source: Source, search: SearchOptions = DEFAULT_SEARCH) -> tuple[list[Found], list[Unhandled]]:
    """Locate the attention modules of a source, and those that look like attention and cannot be read.

    What looks like attention: a module with a projection called as queries are and one called as keys are, or with one
    called as both (:mod:`rankdecay.attention.names`), that no row of names has read.

    Raises:
        TypeError: If ``search.names`` are no names of attention.
        ValueError: If names alone are looked for, and there are none.
    """
    names = search.names
    given = [names] if isinstance(names, AttentionNames) else list(names or ())
    if isinstance(names, (str, dict)) or not all(isinstance(row, AttentionNames) for row in given):
        raise TypeError(f"names must be an AttentionNames or several of them, got {names!r}.")
    if search.only and not given:
        raise ValueError("only=True looks for names= alone, and names= is not given.")
    sizes = {"num_heads": search.num_heads, "head_dim": search.head_dim}
    walk = _Walk(source, given, {name: size for name, size in sizes.items() if size is not None}, search.only)
    for module, children in _modules(source.plain).items():
        walk.look_at(module, children)
    for row in given:
        if row not in walk.matched and walk.found:
            called = ", ".join(map(repr, row.projections))
            walk.unhandled.append(Unhandled("", f"names=AttentionNames of {called} match no module; is one misspelt?"))
    if search.num_heads is not None and search.head_dim is None:
        walk.found = _with_sizes(walk.found, search.num_heads)
    if isinstance(source, Checkpoint):
        modules = {layer.module for layer in walk.found}
        walk.unhandled += [Unhandled(path, reason) for path, reason in missing_layers(source, modules)]
    return walk.found, walk.unhandled


def _with_sizes(found: list[Found], num_heads: int) -> list[Found]:
    """Return layers with a remark where one number of heads makes heads of several sizes: it may be that of some."""
    sizes = sorted({layer.head_dim for layer in found})
    if len(sizes) < 2:
        return found
    remark = (
        f"num_heads={num_heads} makes heads of {', '.join(map(str, sizes))} in layers of several widths; if heads have "
        "one size in all of them (Swin and other pyramids), pass head_dim=... instead"
    )
    return [layer._replace(remark="; ".join(filter(None, [layer.remark, remark]))) for layer in found]


#: Children beside those called as queries, keys or values that make a module worth a look.
_WORTH_A_LOOK = frozenset(
    [name for row in (*FUSED, *SEPARATE) for name in row.projections]
    + [name for names in (*LATENT, *SHARED_LATENT) for name in names]
    + [*NOT_READ]
)


class _Walk:
    """Walk over the modules of a source, with what has been found so far."""

    def __init__(self, source: Source, given: Sequence[AttentionNames], sizes: dict[str, int], only: bool) -> None:
        self.source, self.given, self.sizes, self.only = source, given, sizes, only
        self.found: list[Found] = []
        self.unhandled: list[Unhandled] = []
        self.matched: set[AttentionNames] = set()  # of those given
        self._given_children = frozenset(name for row in given for name in (*row.projections, *row.outputs))
        self._taken: set[str] = set()  # parameters that are read, or spoken of, in the module at hand

    def look_at(self, module: str, children: Sequence[str]) -> None:
        """Read every attention of a module, and note what looks like attention beside it."""
        reader = ModuleReader(module, self.source.plain, self.source, self.sizes, self._given_children)
        children = [child for child in children if reader.parameter(child)]
        self._taken = set()
        for row in filter(reader.matches, self.given):
            self.matched.add(row)
            self._attempt(reader, partial(reader.read, row, by_user=True), row.projections, by_user=True)
        all_children = {*children, *self.source.children(module)}
        three_in_one = "" if self.only else reader.three_in_one(children)
        is_worth_a_look = (
            three_in_one or _WORTH_A_LOOK & all_children or any(is_input_like(c) or factor_of(c) for c in all_children)
        )
        if self.only or not (is_worth_a_look or glued(children)[0]):
            return
        projections = [child for child in children if not reader.is_beside(child)]
        if any(is_query_like(child) or is_fused_like(child) for child in projections):
            children = projections
        reason = reader.reason_without_scores()
        if reason is None:
            for latent in sorted(LATENT, key=lambda names: reader.parameter(names.shared) is None):
                if reader.parameter(latent.split):
                    self._attempt(reader, partial(read_latent, reader, latent), latent)
            for shared in SHARED_LATENT:
                if all(map(reader.parameter, shared)):
                    self._attempt(reader, partial(read_shared_latent, reader, shared), shared)
            if all(map(reader.parameter, EXPERTS)):
                self._attempt(reader, partial(read_experts, reader), EXPERTS)
            for row in _known(reader, children):
                self._attempt(reader, partial(reader.read, row), row.projections)
        left = [
            child
            for child in children
            if (name := reader.parameter(child)) and name not in self._taken and len(reader.shape(name)) > 1
        ]
        settled = reason or self._taken
        three_in_one = "" if settled else three_in_one
        factors = "" if settled or not any(second in left for second in reader.pairs) else reader.latent_unknown()
        if reason := _of_flax(reader, self._taken) or factors or _not_recognised(reader, left, reason) or three_in_one:
            self._say(module, reason)

    def _attempt(
        self, reader: ModuleReader, read: Callable[[], Found], projections: Sequence[str], by_user: bool = False
    ) -> None:
        """Read projections, unless they are taken: of two rows that share queries each has its own values, the last."""
        names = [name for name in map(reader.parameter, projections) if name]
        if names[-1] in self._taken:
            return
        self._taken.update(names)
        try:
            if empty := next((name for name in names if 0 in reader.shape(name)), None):
                raise NotHandled(f"{empty} has shape {reader.shape(empty)}: it is empty")
            if not by_user:
                reader.check_given()
            for child in projections:
                reader.check_alone(child)
            layer = read()
        except NotHandled as reason:
            self._say(reader.path, str(reason))
            return
        called = {earlier.name for earlier in takewhile(lambda one: one.module == layer.module, reversed(self.found))}
        firsts = (name.removeprefix(f"{reader.path}.").partition(".")[0] for name in names)
        name = next(name for name in (layer.name, *(f"{layer.name}:{first}" for first in firsts)) if name not in called)
        self.found.append(layer._replace(name=name))
        if layer.no_output:
            self._say(reader.path, f"its output projection was not found: {layer.no_output}")

    def _say(self, module: str, reason: str) -> None:
        if (entry := Unhandled(module, reason)) not in self.unhandled:
            self.unhandled.append(entry)


def _known(reader: ModuleReader, children: Sequence[str]) -> Iterator[AttentionNames]:
    """Yield the rows of known names that a module has the projections of, the surest first."""
    yield from filter(reader.matches, (*FUSED, *SEPARATE))
    among = set(children)  # asked for each name of each spelling
    for child in sorted(children, key=lambda child: (len(child), child)):  # the order in files differs
        for spelling in spellings(child):
            query, key, value = spelling.query, spelling.key, spelling.value
            if key in among and value in among:
                yield separate(query, key, value, spelling.output)
            elif spelling.key_value in among:
                yield query_beside(query, spelling.key_value)
            elif spelling.key_value.replace("key_value", "kv") in among:
                yield query_beside(query, spelling.key_value.replace("key_value", "kv"))
            elif key in among and reader.values_are_keys():
                yield separate(query, key, key, spelling.output)
            elif key not in among and (kv_path := reader.shared_kv_path()) and reader.parameter(kv_path + key):
                value = kv_path + (value if reader.parameter(kv_path + value) else key)
                yield separate(query, kv_path + key, value, spelling.output)
    if "add_k_proj" in children and "add_q_proj" not in children:  # diffusers: queries that meet keys of two inputs
        yield separate("to_q", "add_k_proj", "add_v_proj", "to_out.0")


def _not_recognised(reader: ModuleReader, left: Sequence[str], reason: str | None) -> str | None:
    """Return why a module is not read whose remaining projections look like queries and keys; None if none do."""
    queries, keys = list(filter(is_query_like, left)), list(filter(is_key_like, left))
    if not (queries and keys) and any(unsaid := glued(left)):
        queries, keys = unsaid
    fused = list(filter(is_fused_like, left))

    def shown(children: Sequence[str]) -> str:
        first = children[:6]
        shapes = (reader.shape(name) for child in first if (name := reader.parameter(child)))
        more = f" and {len(children) - 6} more" if len(children) > 6 else ""
        return " and ".join(f"{child} {shape}" for child, shape in zip(first, shapes, strict=True)) + more

    if not (fused or (queries and keys)):
        all_children = reader.source.children(reader.path)
        if mark := next((mark for mark in NOT_READ if mark in all_children), None):
            return NOT_READ[mark]
        among = set(left)
        alike = any(spelling.value in among for key in keys for spelling in spellings(key, of="key"))
        if alike and "receptance" not in left:
            return f"{shown(keys)}: keys and values without a projection to queries"
        spelled = (spelling for child in queries for spelling in spellings(child))
        if not reason and any(one.value in among or reader.parameter(one.output) for one in spelled):
            return f"{shown(queries)}: queries without a projection to keys, which may be those of another layer"
        return None

    if reason:
        return f"{reason} ({shown([*queries, *keys, *fused])})"
    if fused:
        shared, value = next(filter(is_query_key_like, fused), None), next(filter(is_value_like, left), None)
        if shared and value:
            (lines, *_), (value_rows, *_) = (reader.shape(reader.parameter(child) or "") for child in (shared, value))
            if lines <= value_rows:
                return f"{shown([shared, value])}: {own_keys_reason(shared, value)}"
            return (
                f"{shown([shared])} holds queries and keys in an unknown order: pass "
                f"names=AttentionNames(fused={shared!r}, value={value!r}, order='qk' or 'kq', "
                "layout='contiguous', 'interleaved' or 'alternating', output=..., num_heads=...)"
            )
        hold = "hold" if len(fused) > 1 else "holds"
        return (
            f"{shown(fused)} {hold} queries, keys or values in an unknown order: pass "
            f"names=AttentionNames(fused={fused[0]!r}, order=..., layout='contiguous', "
            "'interleaved' or 'alternating', output=..., num_heads=...)"
        )
    return (
        f"{shown([*queries, *keys])} are named like projections to queries and keys, but not recognised: map them with "
        f"names=AttentionNames(query={queries[0]!r}, key={keys[0]!r}, value=..., output=..., num_heads=...)"
    )


def _of_flax(reader: ModuleReader, taken: Collection[str]) -> str | None:
    """Return what to do about projections that are kernels of Flax; None if there are none."""
    children = sorted(reader.source.children(reader.path))
    names = {child: reader.parameter(f"{child}.kernel") for child in children if is_input_like(child)}
    kernels = {child: reader.shape(name) for child, name in names.items() if name and name not in taken}
    if not kernels:
        return None
    child, shape = next(iter(kernels.items()))
    problem = f"{child}.kernel {shape} is a kernel as Flax stores it, (in, out)"
    if odd := next((child for child, shape in kernels.items() if len(shape) != 2), None):
        return (
            f"{problem}, with heads or layers in a dimension of their own: store it as {odd}.weight, a matrix (out, in)"
        )
    says = {"query": is_query_like, "key": is_key_like, "value": is_value_like, "fused": is_fused_like}
    roles = {role: next(filter(like, kernels), None) for role, like in says.items()}
    how = ", ".join(f"{role}='{child}.kernel'" for role, child in roles.items() if child)
    return f"{problem}: map it with names=AttentionNames({how}, output=..., num_heads=..., transposed=True)"


def _modules(plain: Mapping[str, str]) -> dict[str, list[str]]:
    """Return the paths of all modules with parameters, outer ones first, with their children that have a weight.

    In the order of the parameters. A child may be a parameter itself.
    """
    modules: dict[str, dict[str, None]] = {}
    for name in plain:
        parts = name.split(".")
        for i in range(len(parts)):
            modules.setdefault(".".join(parts[:i]), {})
        for weight in WEIGHTS:
            if name.endswith(weight):
                module, _, child = name.removesuffix(weight).rpartition(".")
                if child:
                    modules.setdefault(module, {})[child] = None
    return {module: list(children) for module, children in modules.items()}


def _layer(found: Found, source: Source, place: LayerNumber) -> AttentionLayer:
    views: dict[Role, MatrixView] = {
        role: MatrixView(
            role,
            place.parameter,
            place.window,
            source.reader(place.parameter),
            _bias(place, source),
            place.bias,
            place.bias_window,
        )
        for role, place in found.places.items()
    }
    return AttentionLayer(
        name=found.name,
        query=views["query"],
        key=views["key"],
        value=views["value"],
        output=views.get("output"),
        head_dim=found.head_dim,
        rotary=found.rotary,
        qk_norm=found.qk_norm,
        grouping=found.grouping,
        no_product=found.no_product,
        no_value_product=found.no_value_product,
        factors={role: view for role, view in views.items() if role not in ("query", "key", "value", "output")},
        unknown=found.unknown | ({"planes"} if found.planes_assumed else set()),
        place=place,
        remark=found.remark,
    )


def _bias(place: Place, source: Source) -> Callable[[], Tensor] | None:
    added = source.reader(place.added) if place.added else None
    if place.bias is None or place.bias_window is None:
        return None if added is None else partial(_sum_of_biases, None, None, added)
    return partial(_sum_of_biases, place.bias_window, source.reader(place.bias), added)


def _sum_of_biases(
    window: Window | None, read: Callable[[], Tensor] | None, added: Callable[[], Tensor] | None
) -> Tensor:
    parts = [window.vector(read())] if window is not None and read is not None else []
    parts += [added().flatten()] if added is not None else []
    return sum(parts[1:], parts[0])


def _nothing(source: Source, names: Names, unhandled: list[Unhandled]) -> str:
    shapes = source.shapes
    text = f"no attention was found in {source}"
    if names is not None:
        rows = [names] if isinstance(names, AttentionNames) else names
        text += f" under the names {', '.join(repr(name) for row in rows for name in row.projections)}"
    if unhandled:
        return f"{text}. Not handled: {'; '.join(listed(unhandled)[:4]).rstrip('.')}."
    flat = [n for n, shape in shapes.items() if len(shape) == 1 and n.rpartition(".")[2].startswith("_flat_param")]
    if flat:
        return text + f": {flat[0]} is a flattened FSDP1 parameter; shard with FSDP2 (fully_shard) instead."
    matrices = [f"{name} {shape}" for name, shape in shapes.items() if len(shape) == 2]
    return (
        text + f". Its matrices are: {', '.join(matrices[:12]) or 'none'}{', …' if len(matrices) > 12 else ''}. "
        "Map the attention's with names=AttentionNames(query=..., key=..., value=..., output=..., "
        "num_heads=...)."
    )
