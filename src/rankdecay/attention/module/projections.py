"""Parameters of one module: which weight a child stands for, its shape and bias, and what makes it several matrices."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import cached_property

from rankdecay.attention.layer import Window
from rankdecay.attention.model_types import NUM_HEADS
from rankdecay.attention.module.beside import factors_beside, is_matrix, other_matrices
from rankdecay.attention.module.found import Place
from rankdecay.attention.module.settings import ModuleSettings, NotHandled
from rankdecay.attention.names import (
    CONVOLUTIONS,
    LEARNED,
    AttentionNames,
    factor_of,
    is_fused_like,
    is_gate,
    is_input_like,
    is_key_like,
    is_of_stream,
    is_query_like,
    is_value_like,
    may_be_output,
    projects_to,
    spellings,
)
from rankdecay.attention.source import Source
from rankdecay.attention.tensors import Shape

#: Where a projection's weight may be, under its name: itself, a wrapped or compiled layer, the first of a sequence.
WEIGHTS = (
    ".weight", "", *(f".{own}.weight" for own in ("linear", "layer", "lin", "fc", "dense", "proj", "conv", "c")),
    "._orig_mod.weight", ".convolution.weight", ".0.weight", ".1.weight", ".ln.linear.weight", ".proj.conv.weight",
)  # fmt: skip


class ModuleParameters(ModuleSettings):
    """Parameters of one module by the names of its children, beside its settings."""

    def __init__(
        self,
        path: str,
        plain: Mapping[str, str],
        source: Source,
        sizes: Mapping[str, int] | None = None,
        given_children: Collection[str] = (),
    ) -> None:
        """Prepare to read a module.

        Args:
            path: of the module.
            plain: every parameter's name in the source, by its name without adapters.
            source: the parameters and settings.
            sizes: ``num_heads`` and ``head_dim`` as the user gives them, where the settings state none.
            given_children: children that the user says are projections.
        """
        super().__init__(path, source, sizes)
        self.given_children = given_children
        self.plain, self.shapes = plain, source.shapes

    def parameter(self, child: str) -> str | None:
        """Return the plain name of the weight called ``child``: of a submodule, or the parameter itself."""
        name = self.path_of(child)
        found = [name + weight for weight in WEIGHTS if name + weight in self.plain]
        if found and self.source.kind(found[0].removesuffix(".weight")).endswith(".Embedding"):
            return None  # a table of learned queries, not a projection to them
        if found == [name] and child not in self.given_children and LEARNED.fullmatch(child):
            return None
        if found[:2] == [f"{name}.0.weight", f"{name}.1.weight"] and len(self.shape(found[0])) == 1:
            return found[1]  # behind a norm
        if found and "encoder" in child and any(self._matrix(f"{name}.{i}.weight") for i in range(1, 6)):
            return None  # a network, such as MoCo's encoder_q
        return found[0] if found else None

    def _matrix(self, name: str) -> Shape | None:
        """Return the shape of a parameter of two dimensions or more, if there is one of that name."""
        shape = self.shape(name) if name in self.plain else ()
        return shape if len(shape) > 1 else None

    def bias(self, weight: str) -> str | None:
        """Return the plain name of the bias beside a weight."""
        name = weight.removesuffix("weight").removesuffix("kernel") + "bias"
        return name if name in self.plain and name != weight else None

    def matches(self, row: AttentionNames) -> bool:
        """Whether the module has every projection of the row, and the setting or the child that it asks for."""
        if not all(self.parameter(child) for child in row.projections):
            return False
        if row.when is None:
            return True
        attribute, wanted = row.when
        value = self.setting((attribute,))
        if wanted is None and value is None:  # of what a class states, files have the parameters alone
            return attribute in self.source.children(self.path)
        return value is not None if wanted is None else value in (wanted if isinstance(wanted, tuple) else (wanted,))

    def shape(self, name: str) -> Shape:
        """Return the shape of a parameter, by its plain name."""
        return self.shapes[self.plain[name]]

    def three_in_one(self, children: Sequence[str]) -> str:
        """Return what to say of a module that may hold queries, keys and values in a matrix whose name does not say it.

        That is one that heads are stated for, with an output projection and one other matrix, beside a gate or not,
        three times as high as the output is wide; or as high as other numbers of key heads make it, if the module
        itself states the heads. "" if it is none.
        """
        shapes = {child: self.shape(name) for child in children if (name := self.parameter(child))}
        matrices = {child: shape for child, shape in shapes.items() if len(shape) > 1 and not is_gate(child)}
        if len(matrices) != 2 or not all(map(is_matrix, matrices.values())):
            return ""
        own_heads = self.source.own(self.path, NUM_HEADS)
        heads = own_heads or self.sizes.get("num_heads") or self.setting(NUM_HEADS)
        for inner, output in (tuple(matrices), tuple(matrices)[::-1]):
            (lines, *_), (_, across, *_) = matrices[inner], matrices[output]
            if not may_be_output(output) or not isinstance(heads, int) or heads < 1 or across % heads:
                continue
            left, odd = divmod(lines - across, 2 * across // heads) if isinstance(own_heads, int) else (0, 1)
            grouped = not odd and left > 0 and heads % left == 0 and inner == "in_proj"
            if lines == 3 * across or grouped:
                return (
                    f"{inner} {matrices[inner]} beside {output} {matrices[output]} may hold queries, keys and values, "
                    f"in an unknown order: pass names=AttentionNames(fused={inner!r}, order=..., "
                    f"layout='contiguous', 'interleaved' or 'alternating', output={output!r}, num_heads=...)"
                )
        return ""

    def check_alone(self, child: str) -> None:
        """Check that a projection is one matrix: no wrapper with an adapter of its own, no MLP, no list of heads.

        Raises:
            NotHandled: If it is several.
        """
        if reason := self.several(child):
            raise NotHandled(reason)

    def several(self, child: str) -> str:
        """Return of which matrices a projection is, if it is of more than one."""
        if child in self.pairs or child in self.pairs.values():
            return self.latent_unknown()
        path, weight = self.path_of(child.removesuffix(".0")), self.parameter(child)
        others = other_matrices(self.source, self.plain, path, weight) if weight else []
        says = {"q": is_query_like, "k": is_key_like, "v": is_value_like, "": is_input_like}
        others += [
            f"{factor} beside it"
            for factor, letter in sorted(self._factors_beside.items())
            if factor != child and (says[letter](child) or is_fused_like(child))
        ]
        if not weight or not others:
            return ""
        shown = ", ".join([weight.removeprefix(f"{path}."), *others[:4], *(["…"] if others[4:] else [])])
        return (
            f"{child.removesuffix('.0')} holds several matrices ({shown}), not one: merge them into one weight if it "
            "is their sum or product, as with an adapter; or leave the module to the optimizer with exclude="
        )

    @cached_property
    def _factors_beside(self) -> dict[str, str]:
        return factors_beside(self.source, self.plain, self.path)

    @cached_property
    def pairs(self) -> dict[str, str]:
        """Children that take what another gives, with the other: the two factors of one projection, by their names.

        The second may be called as a projection alone is: ``to_q`` behind ``to_latent_q``.
        """
        sides: dict[str, tuple[int, int]] = {}  # (out, in)
        among = self.source.children(self.path)
        known = {*self._factors_beside, *self.given_children}
        firsts = {child: factor_of(child) for child in among if factor_of(child) and child not in known}
        plain = {child: projects_to(child) for child in among if firsts and child not in {*known, *firsts}}
        letters = firsts | {child: of for child, of in plain.items() if of}
        for child in sorted(letters):
            name = self.parameter(child)
            if name and is_matrix(shape := self.shape(name)):
                transposed = self.source.is_transposed(name.removesuffix(".weight"))
                sides[child] = (shape[1], shape[0]) if transposed else (shape[0], shape[1])
        return {
            second: first
            for second, (rows, columns) in sides.items()
            for first, (lines, across) in sides.items()
            if first in firsts
            and letters[second] & letters[first]
            and columns == lines < min(rows, across)
            and not (is_of_stream(second, among) and is_of_stream(first, among))
        }

    def latent_unknown(self) -> str:
        """Return what to say of such factors; "" if there are none."""
        if not self.pairs:
            return ""
        second, first = next(iter(self.pairs.items()))
        return (
            f"{second} takes what {first} gives, as the factors of latent attention do, and these names of factors are "
            "not known: merge each two into one weight, or call them as DeepSeek does (q_a_proj, q_b_proj, "
            "kv_a_proj_with_mqa, kv_b_proj with the keys and values of one head after the other, o_proj); or leave the "
            "module to the optimizer with exclude="
        )

    def is_beside(self, child: str) -> bool:
        """Whether a child stands beside projections and is none: a factor of low rank, or a convolution behind one."""
        return child in self._factors_beside or self.is_convolution_after(child)

    def is_convolution_after(self, child: str) -> bool:
        """Whether a child is a convolution over tokens, channel by channel, behind one of the projections."""
        name = self.parameter(child) if CONVOLUTIONS.fullmatch(child) else None
        shape = self.shape(name) if name else ()
        return len(shape) > 2 and shape[1] == 1 and not is_matrix(shape)

    def local_convolution(self, heads: int, width: int) -> str:
        """Return a convolution over tokens, channel by channel of the values, that is called after no projection.

        LePE, and the like of YOLO and Agent Attention. One of a kernel for each head leaves a product what it is, and
        of classes that the tables cover it is known where it stands.
        """
        if self.source.is_known(self.path):
            return ""
        children = self.source.children(self.path)
        own = {child: (width,) for child in sorted(children) if child != "sr" and not is_input_like(child)}
        branches = self.source.children(self.path_of("attns"))  # CSWin's, which share the channels out
        own |= {f"attns.{branch}.get_v": (width, width // 2) for branch in sorted(branches)}
        for child, channels in own.items():
            path = self.path_of(child)
            name = next((name for name in (f"{path}.weight", f"{path}.conv.weight") if name in self.plain), None)
            if name is None:
                continue
            shape = self.shape(name)
            if 2 < len(shape) < 5 and shape[1] == 1 and not is_matrix(shape) and heads < shape[0] in channels:
                return child
        return ""

    def has_rows(self, child: str, rows: int) -> bool:
        """Whether a child is, or holds, a matrix of so many rows: of a sequence or of two factors it may be any."""
        path = self.path_of(child)
        inside = [name for name in self.plain if name == path or name.startswith(f"{path}.")]
        sides = ((self.shape(name), self.source.is_transposed(name.rpartition(".")[0])) for name in inside)
        return any(shape and shape[-1 if transposed else 0] == rows for shape, transposed in sides)

    @cached_property
    def queries(self) -> list[str]:
        """Names of the projections to queries in the module that have keys called alike."""
        among = self.source.children(self.path)
        return [
            child
            for child in among
            if any(one.key in among or one.key_value in among for one in spellings(child)) and self.parameter(child)
        ]

    def matrices(self, without: set[str] | frozenset[str] = frozenset()) -> list[str]:
        """Return the matrices directly in the module, as text, without some."""
        inside = self.path + "." if self.path else ""
        return [
            f"{name.removeprefix(inside)} {self.shape(name)}"
            for name, stored in self.plain.items()
            if name.startswith(inside) and stored not in without and len(self.shape(name)) in (2, 3)
            and name.removeprefix(inside).count(".") <= 1
        ][:8]  # fmt: skip

    def path_of(self, child: str) -> str:
        """Return the path of a child; "" if it is above the model."""
        path = self.path
        while child.startswith("../"):
            if not path:
                return ""
            path, child = path.rpartition(".")[0], child[3:]
        return f"{path}.{child}" if path else child

    def lines(self, name: str, lines: str, transposed: bool, stacked: bool) -> int:
        """Return how many rows, or columns, the matrix has that a parameter holds."""
        shape = self.shape(name)
        if stacked:  # (heads, in, head_dim), or (heads, head_dim, out)
            return shape[0] * shape[2 if lines == "rows" else 1]
        if len(shape) == 3 and shape[2] > 1:  # (in, heads, head_dim), or (out, heads, head_dim)
            shape = (shape[0], shape[1] * shape[2])
        return shape[1 if (lines == "rows") == transposed else 0]

    def place(self, name: str, window: Window) -> Place:
        """Return where a matrix lies, and its bias in the same lines."""
        bias = self.bias(name)
        return Place(self.plain[name], window, self.plain[bias] if bias else None, window if bias else None)

    def check_shapes(self, names: list[str], dimensions: int = 2) -> None:
        """Refuse parameters that are flattened or have another number of dimensions."""
        for name in names:
            shape = self.shape(name)
            if len(shape) == 1:
                raise flattened_error(name, shape)
            if len(shape) != dimensions:
                raise not_a_matrix_error(name, shape)


def flattened_error(name: str, shape: Shape) -> NotHandled:
    """Return the error of a weight of one dimension."""
    return NotHandled(f"{name} has shape {shape}: flattened by DeepSpeed ZeRO or FSDP1; shard with FSDP2")


def not_a_matrix_error(name: str, shape: Shape) -> NotHandled:
    """Return the error of a weight that is not a matrix."""
    return NotHandled(
        f"{name} has shape {shape}: not a matrix; store it as (out, in), or leave the module to the optimizer with "
        "exclude="
    )


def own_keys_reason(fused: str, value: str) -> str:
    """Return why a projection to queries and keys that is no higher than that to values is not read."""
    return (
        f"{fused} is no higher than {value}: its queries may be their own keys, so that there are no two matrices to "
        "decay or to show; leave the module to the optimizer with exclude=, or, if it holds queries and keys half as "
        f"wide as the values, pass names=AttentionNames(fused={fused!r}, value={value!r}, output=..., head_dim=...)"
    )


def divide(lines: int, by: int, what: str, what_by: str) -> int:
    """Return ``lines / by``, or refuse what is not whole."""
    if lines % by:
        raise NotHandled(f"{what}, {lines}, is not a multiple of {what_by}, {by}")
    return lines // by
