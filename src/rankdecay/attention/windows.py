"""Read where W_Q, W_K, W_V and W_O of one attention module lie, from the names and shapes of its parameters.

* **Head size** is the query's height over the number of heads; how many key and value heads there are follows from the
  height of W_K. No model class is asked for.
* **Fused, contiguous**: lines [q, k, v], the heads inside each.
* **Fused, interleaved**: one group per key head, [its queries, k, v]. With as many key heads as query heads that is
  per head [q, k, v] (GPT-NeoX, BLOOM); with one it is [all queries, k, v] (multi-query Falcon).
* **Fused, alternating**: a row of q, one of k and one of v in turn (EDM).
* **Transposed** (Conv1D): a fused matrix whose bias is as long as its second side.
* **Stacked**: a parameter (heads, in, head_dim), one matrix per head (TransformerLens).
* **With a gate**: per head [q, gate] in one projection (Qwen3-Next).
* **Shared**: the last layers of Gemma 3n and 4 take keys and values of an earlier one, and in some layers the keys
  serve as values.
* **Latent** (DeepSeek): two factors each for queries, keys and values, and a part of their own for the positions.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Literal, NamedTuple

from rankdecay.attention.beside import factors_beside, is_batch_norm, is_matrix, is_norm, other_matrices, steps
from rankdecay.attention.layer import Role, Window
from rankdecay.attention.names import (
    BETWEEN,
    CHANNELS,
    CONVOLUTIONS,
    EXPERTS,
    HEAD_DIM,
    HEADS_NORMS,
    KEY_DIM,
    KEY_HEADS,
    LATENT_WITHOUT_ROTARY,
    MIXED_OUTPUT,
    NORM_OF_HEADS,
    NUM_HEADS,
    PLAIN_NORM,
    POOLING,
    POSITIONS,
    QUERY_BIASES,
    ROTARY,
    SCALES,
    TURNED,
    VALUE_NORMS_WITHOUT_WEIGHTS,
    WIDTH,
    AttentionNames,
    LatentNames,
    is_another_output,
    is_fused_like,
    is_gate,
    is_input_like,
    is_key_like,
    is_output_like,
    is_query_like,
    is_table,
    is_value_like,
    is_value_norm,
    may_be_output,
    spellings,
)
from rankdecay.attention.products import Grouping, Rotary
from rankdecay.attention.settings import QK_NORM_FLAGS, ModuleSettings, NotHandled
from rankdecay.attention.source import Shape, Source


class Place(NamedTuple):
    """Location of one matrix and of its bias."""

    parameter: str
    window: Window
    bias: str | None = None
    bias_window: Window | None = None
    added: str | None = None  # (heads, head_dim), or flat: what is added to queries before they meet keys

    def parts(self) -> list[tuple[str, Window]]:
        """Return where the lines are of the matrix and, in a parameter of one column, of its bias."""
        matrix = [(self.parameter, self.window)]
        if self.bias is None or self.bias_window is None:
            return matrix
        return [*matrix, (self.bias, self.bias_window.of_vector())]


class Found(NamedTuple):
    """Attention module, with the locations of its matrices by role.

    Attributes:
        name: path of the module, and after ``:`` a projection if it is not the module's first attention.
        places: of each matrix, by role.
        head_dim: size of a query's head.
        rotary: how positions turn the heads.
        qk_norm: whether queries and keys are normalised.
        grouping: which key head a query head meets.
        unknown: which of these nothing says.
        no_product: why scores are no product W_Kᵀ W_Q, though queries and keys are not normalised.
        no_value_product: what stands between values and output projection.
        no_output: what was looked for, if the module has matrices and none is its output projection.
        frequencies: what the settings say of the rotary frequencies, as text: layers of one text share them.
        planes_assumed: whether nothing says which coordinates positions turn together; then those half a head apart.
        remark: which numbers of heads the settings state that the weights contradict, and what else is assumed.
    """

    name: str
    places: dict[Role, Place]
    head_dim: int
    rotary: Rotary | None = None
    qk_norm: bool = False
    grouping: Grouping = "consecutive"
    unknown: frozenset[str] = frozenset()
    no_product: str = ""
    no_value_product: str = ""
    no_output: str = ""
    frequencies: str = ""
    planes_assumed: bool = False
    remark: str = ""

    @property
    def module(self) -> str:
        """Path of the module."""
        return self.name.partition(":")[0]


#: Where a projection's weight may be, under its name: itself, a wrapped linear layer, the first of a sequence.
WEIGHTS = (
    ".weight", "", *(f".{own}.weight" for own in ("linear", "layer", "lin", "fc", "dense", "proj", "conv", "c")),
    ".convolution.weight", ".0.weight", ".1.weight", ".ln.linear.weight", ".proj.conv.weight",
)  # fmt: skip


#: What a norm is called that stands behind a projection in a module of their own.
BATCH_NORMS = ("bn", "norm", "batch_norm", "batchnorm", "normalization")


_UNPLACED = (
    "its norm is taken to stand before its projections, and nothing says so: if it stands between the heads and the "
    "output projection, W_O W_V is not what a head writes, and value_output= should be left out"
)


class ModuleReader(ModuleSettings):
    """Reader of one module as attention."""

    def __init__(
        self, module: str, plain: Mapping[str, str], source: Source, sizes: Mapping[str, int] | None = None
    ) -> None:
        """Prepare to read a module.

        Args:
            module: its path.
            plain: every parameter's name in the source, by its name without adapters.
            source: the parameters and settings.
            sizes: ``num_heads`` and ``head_dim`` as the user gives them, where the settings state none.
        """
        super().__init__(module, source, sizes)
        self.plain, self.shapes = plain, source.shapes
        self._outputs: dict[str, str | None] = {}  # the queries that each output read so far belongs to

    def parameter(self, child: str) -> str | None:
        """Return the plain name of the weight called ``child``: of a submodule, or the parameter itself."""
        name = self._path(child)
        found = [name + weight for weight in WEIGHTS if name + weight in self.plain]
        if found and self.source.kind(found[0].removesuffix(".weight")).endswith(".Embedding"):
            return None  # a table of learned queries, not a projection to them
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
        name = weight.removesuffix("weight").removesuffix("kernel") + "bias"
        return name if name in self.plain and name != weight else None

    def matches(self, row: AttentionNames) -> bool:
        """Whether the module has every projection of the row, and the configuration it asks for."""
        if not all(self.parameter(child) for child in row.projections):
            return False
        if row.when is None:
            return True
        attribute, wanted = row.when
        value = self.setting((attribute,))
        return value is not None if wanted is None else value in (wanted if isinstance(wanted, tuple) else (wanted,))

    def shape(self, name: str) -> Shape:
        return self.shapes[self.plain[name]]

    def read(self, row: AttentionNames, named: bool = False) -> Found:
        """Locate the matrices of the module.

        Args:
            row: the names.
            named: whether the user gave them, who then has to be told of an output that is not there.

        Raises:
            NotHandled: If names, shapes and settings do not agree.
        """
        assumed = not named and bool(row.fused) and row.when is None
        given = named and (row.num_heads or row.head_dim)
        row = replace(row, **self.sizes)
        parameters = {child: name for child in row.projections if (name := self.parameter(child))}
        self._check_own_keys(row, parameters)
        candidates = row.outputs
        if candidates and not named:  # the known names first, then what is called an output
            candidates = (*candidates, *sorted(filter(is_output_like, self.source.children(self.module))))
        outputs = {child: name for child in candidates if (name := self.parameter(child))}
        others = {} if named else {c: name for c, name in outputs.items() if self._is_of_another(c, name, row)}
        outputs = {child: name for child, name in outputs.items() if child not in others}
        if named and row.outputs and not outputs:
            raise NotHandled(
                f"it has no output projection {' or '.join(map(repr, row.outputs))}; its matrices are "
                f"{', '.join(self._matrices()) or 'none'}; leave output= out if there is none"
            )
        if not named:
            self._check_alike(parameters)
        layout = self._layout(row, parameters)
        stacked = layout == "stacked"
        transposed = layout != "plain" or self._transposed(row, parameters, outputs)
        height = {child: self._lines(name, "rows", transposed, stacked) for child, name in parameters.items()}
        turned = transposed and layout != "middle"  # the output of (in, heads, head_dim) is (out, heads, head_dim)
        fits = {
            child: self._lines(name, "columns", turned, stacked)
            for child, name in outputs.items()
            if is_matrix(self.shape(name)) or (layout != "plain" and len(self.shape(name)) == 3)
        }
        heads, head_dim = self._heads(row, height, list(fits.values()), parameters, stacked)
        gated = self._is_gated(row, height, heads, head_dim, list(fits.values()))
        if gated:
            head_dim //= 2
        places: dict[Role, Place] = {}
        for role, (child, window) in self._windows(row, height, heads, head_dim, gated).items():
            window = replace(window, transposed=transposed, stacked=stacked)
            if stacked:
                size = window.head_dim
                window = replace(window, start=0, stop=size, size=size, groups=window.num_heads)
            places[role] = self._place(parameters[child], window)
        if row.query == "q_proj_weight":
            self._share_bias(places)
        elif row.fused and not self.bias(parameters[row.fused]):
            self._separate_biases(places)
        self._check_heads(heads, places["key"].window.num_heads)
        if not given and layout == "plain":
            self._check_whole(
                heads, head_dim, self._lines(parameters[row.query or row.fused or ""], "columns", transposed, stacked)
            )
        value_dim = places["value"].window.head_dim
        unfit = self._place_output(places, outputs, fits, heads, value_dim, turned, stacked, others)
        self._place_positions(places, row, heads)
        rotary, qk_norm, unknown = self._positions_and_norms(row, head_dim)
        if assumed and not self.source.is_known(self.module):
            unknown |= {"order"}
        if not named and places["key"].window.num_heads not in (1, heads) and not self.source.is_known(self.module):
            unknown |= {"grouping"}
        output = places["output"].parameter if "output" in places else None
        if output:
            self._outputs.setdefault(output, row.query)
        projected = next((name for name in outputs.values() if self.plain[name] == output), "")
        no_product = self._no_product(row, places)
        no_value_product = self._no_value_product(places, parameters[row.value or row.fused or ""], projected)
        self._add_query_bias(places)
        remarks = ["" if given else self._contradicted(heads, head_dim, places["key"].window.num_heads)]
        if not no_value_product and self._norm_stands(places) == "unknown":
            remarks.append(_UNPLACED)
        return Found(
            self.module,
            places,
            head_dim,
            rotary,
            qk_norm,
            row.grouping,
            unknown,
            no_product,
            no_value_product,
            unfit,
            self.frequencies() if rotary is not None else "",
            rotary is not None and row.rotary is None and not self.states_planes(),
            "; ".join(filter(None, remarks)),
        )

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
        own = self.source.own(self.module, NUM_HEADS)
        heads = own or self.sizes.get("num_heads") or self.setting(NUM_HEADS)
        for inner, output in (tuple(matrices), tuple(matrices)[::-1]):
            (lines, *_), (_, across, *_) = matrices[inner], matrices[output]
            if not may_be_output(output) or not isinstance(heads, int) or heads < 1 or across % heads:
                continue
            left, odd = divmod(lines - across, 2 * across // heads) if isinstance(own, int) else (0, 1)
            grouped = not odd and left > 0 and heads % left == 0 and inner == "in_proj"
            if lines == 3 * across or grouped:
                return (
                    f"{inner} {matrices[inner]} beside {output} {matrices[output]} may hold queries, keys and values, "
                    f"in an order that is not known: say it with names=AttentionNames(fused={inner!r}, order=..., "
                    f"layout='contiguous', 'interleaved' or 'alternating', output={output!r}, num_heads=...)"
                )
        return ""

    def check_alone(self, child: str) -> None:
        """Check that a projection is one matrix: no wrapper with an adapter of its own, no MLP, no list of heads.

        Raises:
            NotHandled: If it is several.
        """
        if reason := self._several(child):
            raise NotHandled(reason)

    def _several(self, child: str) -> str:
        """Return of which matrices a projection is, if it is of more than one."""
        path, weight = self._path(child.removesuffix(".0")), self.parameter(child)
        others = other_matrices(self.source, self.plain, path, weight) if weight else []
        says = {"q": is_query_like, "k": is_key_like, "v": is_value_like, "": is_input_like}
        others += [
            f"{factor} beside it"
            for factor, of in sorted(self._factors_beside.items())
            if factor != child and (says[of](child) or is_fused_like(child))
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
        return factors_beside(self.source, self.plain, self.module)

    def is_beside(self, child: str) -> bool:
        """Whether a child stands beside projections and is none: a factor of low rank, or a convolution behind one."""
        return child in self._factors_beside or self.is_convolution_behind(child)

    def _no_product(self, row: AttentionNames, places: dict[Role, Place]) -> str:
        if self._is_of_channels():
            return "takes its scores between channels, not tokens"
        weights = (self.parameter(child) for child in (row.query, row.key, row.fused) if child)
        owners = {  # a norm beside the last of a sequence, called proj, is before it
            weight.removesuffix(".weight").rpartition(".")[0]
            for weight in weights
            if weight and not weight.endswith(".proj.weight")
        }
        if any(f"{owner}.{norm}.weight" in self.plain for owner in owners - {self.module} for norm in BATCH_NORMS):
            return "normalises queries and keys over the batch"
        behind = self._behind_scores(row)
        if any(map(is_batch_norm, behind)):
            return "normalises queries and keys over the batch"
        if other := next((step for step in behind if not is_norm(step)), ""):
            return f"puts {other} between its projections and the scores"
        kind = self.setting(("model_type",))
        if kind in TURNED:
            return "turns queries and keys by positions, though not plane by plane"
        if kind in POOLING and row.fused and (shape := self.shape(self.parameter(row.fused) or ""))[0] != 3 * shape[1]:
            return "pools its queries over tokens"
        if "k_sconv" in self.source.children(self.module):
            return "convolves keys over tokens"
        if {"q", "k"} & self._convolved():
            return "convolves queries or keys over tokens"
        if self._scales_coordinates(row, places):
            return "scales queries or keys coordinate by coordinate, by a learned vector"
        return ""

    def is_convolution_behind(self, child: str) -> bool:
        """Whether a child is a convolution over tokens, channel by channel, behind one of the projections."""
        name = self.parameter(child) if CONVOLUTIONS.fullmatch(child) else None
        shape = self.shape(name) if name else ()
        return len(shape) > 2 and shape[1] == 1 and not is_matrix(shape)

    def _convolved(self) -> set[str]:
        """Return which of q, k and v such convolutions stand behind."""
        children = filter(self.is_convolution_behind, self.source.children(self.module))
        matches = (CONVOLUTIONS.fullmatch(child) for child in children)
        names = (match["of"] for match in matches if match)
        return {letter for name in names for letter in (name if name.strip("qkv") == "" else name[0])}

    def _scales_coordinates(self, row: AttentionNames, places: dict[Role, Place]) -> bool:
        """Whether a parameter has a factor for each coordinate of a head, or of all heads, that meets queries or keys.

        One of a factor for each head, or of a single one, leaves a product what it is.
        """
        window = places["query"].window
        for child in self.source.children(self.module):
            if child and SCALES.fullmatch(child) and child not in row.projections:
                path = self._path(child)
                names = (path, f"{path}.{child}", f"{path}.weight", f"{path}.scale")
                shape = next((self.shape(name) for name in names if name in self.plain), ())
                whole = "q" in child or "k" in child  # otherwise it may be one of what the module gives
                sizes = {window.head_dim, *([window.head_dim * window.num_heads] if whole else [])}
                if shape and shape[-1] > 1 and math.prod(shape) in sizes:
                    return True
        return False

    def _check_own_keys(self, row: AttentionNames, parameters: dict[str, str]) -> None:
        """Check that queries and keys in one projection are two, unless the user says how wide they are."""
        if row.fused and row.value and row.head_dim is None:
            (lines, *_), (own, *_) = self.shape(parameters[row.fused]), self.shape(parameters[row.value])
            if lines <= own:
                raise NotHandled(own_keys(row.fused, row.value))

    def _check_alike(self, parameters: dict[str, str]) -> None:
        """Check that no projection is a parameter of the module itself beside layers: it may be learned queries."""
        own = [child for child, name in parameters.items() if name == self._path(child)]
        if own and len(own) < len(parameters):
            raise NotHandled(
                f"{' and '.join(own)} {'is a parameter' if len(own) == 1 else 'are parameters'} of the module itself "
                "beside layers, and may be learned tokens rather than a projection: if it is a projection, say so with "
                "names=AttentionNames(query=..., key=..., value=..., output=..., num_heads=...)"
            )

    def _behind_scores(self, row: AttentionNames) -> list[str]:
        """Return what stands in sequences between the projections to queries and keys and their scores."""
        weights = (self.parameter(child) for child in (row.query, row.key, row.fused) if child)
        return [step for weight in weights if weight for step in steps(self.source, self.plain, weight, "behind")]

    def _has_norm_behind(self, row: AttentionNames) -> bool:
        """Whether a norm, but not over the batch, stands behind a projection to queries or keys in a sequence."""
        return any(is_norm(step) and not is_batch_norm(step) for step in self._behind_scores(row))

    def _no_value_product(self, places: dict[Role, Place], value: str = "", output: str = "") -> str:
        """Return what stands between values and output projection, if it is more than the weights of attention.

        Args:
            places: of the matrices.
            value: plain name of the weight that projects to values, if it may be in a sequence.
            output: that of the output projection.
        """
        if "output" not in places:
            return ""
        if self._is_of_channels():
            return "mixes the channels of each head by its scores"
        children = self.source.children(self.module)
        own = places["query"].window.num_heads * places["value"].window.head_dim
        if reason := next((reason for child, reason in BETWEEN.items() if child in children), ""):
            return reason
        if "v" in self._convolved():
            return BETWEEN["v_sconv"]
        if "gate" in places or any(self._has_rows(child, own) for child in filter(is_gate, children)):
            return "gates what its heads give before the output projection"
        if any(child in children for child in HEADS_NORMS) or self._norm_stands(places) == "behind heads":
            return "normalises what its heads give before the output projection"
        if any(map(is_value_norm, children)) or self.setting(("model_type",)) in VALUE_NORMS_WITHOUT_WEIGHTS:
            return "normalises values"
        behind = steps(self.source, self.plain, value, "behind")
        before = steps(self.source, self.plain, output, "before")
        if step := next((step for step in (*behind, *before) if not is_norm(step)), ""):
            return f"puts {step} between values and the output projection"
        if behind:
            return "normalises values"
        return "normalises what its heads give before the output projection" if before else ""

    def _has_rows(self, child: str, rows: int) -> bool:
        """Whether a child is, or holds, a matrix of so many rows: of a sequence or of two factors it may be any."""
        path = self._path(child)
        inside = [name for name in self.plain if name == path or name.startswith(f"{path}.")]
        sides = ((self.shape(name), self.source.is_turned(name.rpartition(".")[0])) for name in inside)
        return any(shape and shape[-1 if is_turned else 0] == rows for shape, is_turned in sides)

    def _norm_stands(self, places: dict[Role, Place]) -> Literal["", "behind heads", "unknown"]:
        """Return where a child called ``norm`` stands: "" if before the projections, or if there is none."""
        children = self.source.children(self.module)
        if PLAIN_NORM not in children or "sr" in children or "output" not in places or "latent" in places:
            return ""  # sr: a norm of what keys and values are formed from
        if self.source.kind(self.module) in NORM_OF_HEADS:
            return "behind heads"
        of_library = self.source.kind(self.module).startswith(("timm.", "transformers.", "diffusers."))
        if of_library or self.setting(("model_type",)) is not None or self._is_of_vqgan():
            return ""
        weight, query, value = self._path(f"{PLAIN_NORM}.weight"), places["query"], places["value"].window
        width = self.shape(weight)[0] if weight in self.plain and self.shape(weight) else None
        read = math.prod(self.shapes[query.parameter]) // (query.window.groups * query.window.size)
        given = {query.window.num_heads * value.head_dim, value.head_dim}
        if width is None or (width in given) == (width == read):
            return "unknown"
        return "behind heads" if width in given else ""

    def _add_query_bias(self, places: dict[Role, Place]) -> None:
        """Locate what is added to queries that meet keys, beside what is added to those that meet positions."""
        lines = places["query"].window.extent(0)
        for child in QUERY_BIASES:
            name = self.plain.get(self._path(child))
            if name and math.prod(self.shapes[name]) == lines:
                places["query"] = places["query"]._replace(added=name)

    def _is_of_vqgan(self) -> bool:
        """Whether it is the attention of a VQGAN's convolutions: of one head, without positions."""
        query = self.parameter("q")
        return bool(query and self.parameter("proj_out") and len(self.shape(query)) == 4)

    def _is_of_channels(self) -> bool:
        """Whether tokens are summed over in the scores: Florence-2's and DaViT's channel attention, XCiT, Restormer.

        A temperature of another shape than (heads, 1, 1) is a factor of the scores between tokens.
        """
        if CHANNELS.search(self.source.kind(self.module)) or "channel_attn" in self.module.split("."):
            return True
        name = self._path("temperature")
        return name in self.plain and len(shape := self.shape(name)) == 3 and shape[1:] == (1, 1)

    def _place_positions(self, places: dict[Role, Place], row: AttentionNames, heads: int) -> None:
        """Locate the projections of positions that belong to content projections (DETR and its kin)."""
        if not row.query or "content" not in row.query:
            return
        for child in sorted(self.source.children(self.module)):
            role: Role | None = next((r for pattern, r in POSITIONS.items() if re.fullmatch(pattern, child)), None)
            name = self.parameter(child) if role else None
            if role and name and len(self.shape(name)) == 2 and self.shape(name)[0] % heads == 0:
                lines = self.shape(name)[0]
                places[role] = self._place(name, Window("rows", 0, lines, lines, lines // heads))

    def _check_heads(self, heads: int, key_heads: int) -> None:
        if heads % key_heads:
            raise NotHandled(
                f"{heads} query heads are not a multiple of {key_heads} key heads; if there are others, "
                f"{self._say_heads()}"
            )

    def _place_output(
        self, places: dict[Role, Place], outputs: dict[str, str], fits: dict[str, int], heads: int, value_dim: int,
        transposed: bool, stacked: bool = False, others: Mapping[str, str] | None = None,
    ) -> str:  # fmt: skip
        """Locate the output projection: the first of the candidates that takes as many columns as the heads give.

        Those of the module's other attentions are ``others``.

        Returns:
            What to say if there are matrices beside the projections and none is the output; "" if all is well.
        """
        if self.source.kind(self.module) in MIXED_OUTPUT:
            return "since its columns take the heads' channels in turn"
        own = heads * value_dim
        for child, across in fits.items():
            if across == own and stacked:
                window = Window("columns", 0, value_dim, value_dim, value_dim, heads, True, stacked=True)
            elif across == own + self._columns_behind(child, own) or across == own:
                window = Window("columns", 0, own, across, value_dim, 1, transposed)
            else:
                window = self._share_of_output(child, across, own, transposed)
            if window is not None:
                if reason := self._several(child):
                    return f"since {reason}"
                places["output"] = self._place(outputs[child], window)
                return ""
        inside = [child for child in outputs if not child.startswith("../") and child in fits]
        if inside:
            raise NotHandled(
                f"the output projection takes {fits[inside[0]]} columns, where {heads} heads of {value_dim} give {own}"
            )
        others = others or {}
        left = self._matrices({place.parameter for place in places.values()} | {self.plain[o] for o in others.values()})
        read = {place.parameter.removesuffix(".weight") for place in places.values()}
        left = [  # without an adapter's factors, and the projections of another attention
            matrix
            for matrix in left
            if self._path(matrix.split(".")[0]) not in read
            and not is_input_like(re.split(r"[. ]", matrix)[0])
            and not is_table(matrix)
        ]
        if left:
            return f"none of its other matrices is known as one: {', '.join(left)}"
        if others and not places["query"].parameter.endswith("add_q_proj.weight"):  # diffusers' last layers have none
            return f"since {' and '.join(others)} is that of another attention in the module"
        return ""

    def _is_of_another(self, child: str, name: str, row: AttentionNames) -> bool:
        """Whether an output projection in the module belongs to another attention there, with queries of its own."""
        if child.startswith("../"):
            return False
        if self._outputs.get(self.plain[name], row.query) != row.query:
            return True
        return is_another_output(child, row, self._queries)

    @cached_property
    def _queries(self) -> list[str]:
        """Names of the projections to queries in the module that have keys called alike."""
        among = self.source.children(self.module)
        return [
            child
            for child in among
            if any(one.key in among or one.key_value in among for one in spellings(child)) and self.parameter(child)
        ]

    def _columns_behind(self, child: str, own: int) -> int:
        """Return how many columns of an output projection take something else, behind what attention gives."""
        if "key_conv_attn_layer" in self.source.children(self.module):
            return own  # ConvBERT's convolution, which has as many channels
        mlp = self.parameter("../proj_mlp") if child == "../proj_out" else None
        return self.shape(mlp)[0] if mlp else 0  # Flux and its kin

    def _share_of_output(self, child: str, across: int, own: int, transposed: bool) -> Window | None:
        """Return the part of an output projection one level up that belongs to this one of several modules.

        A list of modules of one head each, whose results are concatenated: the number is the last in the path.
        """
        number = self.module.rpartition(".")[2]
        if not child.startswith("../") or not number.isdigit() or across % own:
            return None
        siblings = self.source.children(self.module.rpartition(".")[0])
        first = int(number) * own
        if len(siblings) * own != across:
            return None
        return Window("columns", first, first + own, across, own, 1, transposed)

    def _matrices(self, without: set[str] | frozenset[str] = frozenset()) -> list[str]:
        """Return the matrices directly in the module, as text, without some."""
        inside = self.module + "." if self.module else ""
        return [
            f"{name.removeprefix(inside)} {self.shape(name)}"
            for name, stored in self.plain.items()
            if name.startswith(inside) and stored not in without and len(self.shape(name)) in (2, 3)
            and name.removeprefix(inside).count(".") <= 1
        ][:8]  # fmt: skip

    def _path(self, child: str) -> str:
        """Return the path of a child; "" if it is above the model."""
        path = self.module
        while child.startswith("../"):
            if not path:
                return ""
            path, child = path.rpartition(".")[0], child[3:]
        return f"{path}.{child}" if path else child

    def _lines(self, name: str, lines: str, transposed: bool, stacked: bool) -> int:
        """Return how many rows, or columns, the matrix has that a parameter holds."""
        shape = self.shape(name)
        if stacked:  # (heads, in, head_dim), or (heads, head_dim, out)
            return shape[0] * shape[2 if lines == "rows" else 1]
        if len(shape) == 3 and shape[2] > 1:  # (in, heads, head_dim), or (out, heads, head_dim)
            shape = (shape[0], shape[1] * shape[2])
        return shape[1 if (lines == "rows") == transposed else 0]

    def _layout(self, row: AttentionNames, parameters: dict[str, str]) -> Literal["plain", "stacked", "middle"]:
        """Return how the projections are stored: as matrices, as (heads, in, head_dim), or as (in, heads, head_dim).

        Raises:
            NotHandled: If a projection is none of these.
        """
        shapes = {name: self.shape(name) for name in parameters.values()}
        for name, shape in shapes.items():
            if len(shape) == 1:
                raise NotHandled(f"{name} has shape {shape}: flattened by DeepSpeed ZeRO or FSDP1; shard with FSDP2")
        if all(map(is_matrix, shapes.values())):
            for name, shape in shapes.items():
                groups = (
                    self.number(("q_groups", "groups")),
                    self.source.setting(name.removesuffix(".weight"), ("groups",)),
                )
                if len(shape) > 2 and any(isinstance(count, int) and count > 1 for count in groups):
                    raise NotHandled(f"{name} is the weight of a grouped convolution, which is no matrix")
            return "plain"
        itself = all(name.endswith(child) for child, name in parameters.items())
        if not (itself and row.query and row.key and all(len(shape) == 3 for shape in shapes.values())):
            name, shape = next((name, shape) for name, shape in shapes.items() if not is_matrix(shape))
            raise _no_matrix(name, shape)
        heads = row.num_heads or self.number(NUM_HEADS)
        first, middle, last = self.shape(parameters[row.query])
        if heads == first != middle < last != (row.head_dim or self.number(HEAD_DIM)):
            raise NotHandled(
                f"{parameters[row.query]} has shape {(first, middle, last)}, where {heads} matrices of (in, head_dim) "
                f"were expected; transpose it, or say names=AttentionNames(..., head_dim={last}) if heads are that wide"
            )
        if heads == first != middle or (heads is None and first < middle):
            return "stacked"
        if heads == middle != first:
            return "middle"
        remedy = "store it as a matrix, (out, in)" if heads == first == middle else self._say_heads()
        raise NotHandled(
            f"{parameters[row.query]} has shape {self.shape(parameters[row.query])}, and "
            f"{heads or 'an unknown number of'} heads do not say which side is theirs; {remedy}"
        )

    def read_latent(self, names: LatentNames) -> Found:
        """Locate the factors of multi-head latent attention.

        Raises:
            NotHandled: If names, shapes and settings do not agree.
        """
        name = {field: self.parameter(child) for field, child in names._asdict().items()}
        lender = self.lender()
        shared = name["shared"] or (lender and self.parameter(lender + names.shared))
        query, split, output = name["second"] or name["query"], name["split"], name["output"]
        if not (query and split and output):
            expected = {f"{names.query} or {names.second}": query, names.split: split, names.output: output}
            missing = [child for child, there in expected.items() if not there]
            raise NotHandled(f"multi-head latent attention whose {', '.join(missing)} has another name")
        parameters = [query, split, output, *(part for part in (shared, name["first"]) if part)]
        self._check_shapes(parameters)
        heads = self.number(NUM_HEADS)
        if heads is None:
            raise self._no_heads(names.split, self.shape(split)[0], None, None)
        (rows, latent), across = self.shape(split), self.shape(output)[1]
        value_dim = _divide(across, heads, f"the width of {names.output}", "the heads")
        plain_dim = _divide(rows, heads, f"the height of {names.split}", "the heads") - value_dim
        head_dim = _divide(self.shape(query)[0], heads, "the height of the query's projection", "the heads")
        turned_dim = head_dim - plain_dim
        if plain_dim <= 0 or turned_dim < 0 or (shared and self.shape(shared)[0] != latent + turned_dim):
            raise NotHandled(
                f"multi-head latent attention whose factors disagree: {heads} heads of {head_dim} queries, and of "
                f"{plain_dim} keys and {value_dim} values from a latent of {latent}"
            )
        both = plain_dim + value_dim
        places: dict[Role, Place] = {
            "query": self._place(query, Window("rows", 0, plain_dim, head_dim, plain_dim, heads)),
            "key": self._place(split, Window("rows", 0, plain_dim, both, plain_dim, heads)),
            "value": self._place(split, Window("rows", plain_dim, both, both, value_dim, heads)),
            "output": self._place(output, Window("columns", 0, across, across, value_dim)),
        }
        if shared:
            places["latent"] = self._place(shared, Window("rows", 0, latent, latent + turned_dim, latent))
        if shared and turned_dim:
            window = Window("rows", latent, latent + turned_dim, latent + turned_dim, turned_dim)
            places["query_rotary"] = self._place(
                query, Window("rows", plain_dim, head_dim, head_dim, turned_dim, heads)
            )
            places["key_rotary"] = self._place(shared, window)
        if name["second"] and name["first"]:
            lines = self.shape(name["first"])[0]
            places["query_factor"] = self._place(name["first"], Window("rows", 0, lines, lines, lines))
        neighbours = names.first == "wq_a" or self.is_interleaved()  # DeepSeek's own code multiplies complex numbers
        turned = turned_dim and self.setting(("model_type",)) not in LATENT_WITHOUT_ROTARY
        rotary = Rotary(turned_dim // 2 * 2, neighbours) if turned else None
        # in DeepSeek's own code q_norm is what q_a_layernorm is elsewhere, between the factors
        qk_norm = bool(self.has_qk_norm()) and names.first != "wq_a"
        no_value_product = self._no_value_product(places)
        return Found(self.module, places, plain_dim, rotary, qk_norm, no_value_product=no_value_product)

    def read_shared_latent(self, names: Sequence[str]) -> Found:
        """Locate DeepSeek V4's matrices: one key head that is the value too, and two factors of queries and outputs.

        Raises:
            NotHandled: If names, shapes and settings do not agree.
        """
        first, second, shared, mix, expand = (self.parameter(child) for child in names)
        heads = self.number(NUM_HEADS)
        if not (first and second and shared and mix and expand and heads):
            raise NotHandled("latent attention with one key head whose factors have other names")
        self._check_shapes([first, second, shared, mix, expand])
        head_dim, lines = self.shape(shared)[0], self.shape(second)[0]
        if lines != heads * head_dim:
            raise NotHandled(f"{second} has {lines} rows, where {heads} heads of {head_dim} have {heads * head_dim}")
        key = self._place(shared, Window("rows", 0, head_dim, head_dim, head_dim))
        places: dict[Role, Place] = {
            "query": self._place(second, Window("rows", 0, lines, lines, head_dim)),
            "key": key,
            "value": key,
        }
        factors: dict[Role, str] = {"query_factor": first, "output_factor": mix, "output_mix": expand}
        for role, name in factors.items():
            rows = self.shape(name)[0]
            groups = (self.number(("o_groups",)) or 1) if role == "output_factor" else 1
            places[role] = self._place(name, Window("rows", 0, rows, rows, _divide(rows, groups, name, "its groups")))
        turned = self.number(("qk_rope_head_dim",))
        rotary = Rotary(turned // 2 * 2, self.is_interleaved()) if turned else self.rotary(head_dim)
        return Found(self.module, places, head_dim, rotary, qk_norm=True)

    def read_experts(self) -> Found:
        """Locate JetMoE's matrices: W_Q and W_O of each expert, and keys and values that all experts share.

        Raises:
            NotHandled: If names, shapes and settings do not agree.
        """
        query, shared, output = (self.parameter(child) for child in EXPERTS)
        head_dim = self.number(HEAD_DIM)
        assert query is not None and shared is not None and output is not None  # noqa: PT018
        if not head_dim or len(self.shape(query)) != 3 or len(self.shape(output)) != 3:
            raise NotHandled(f"the heads of the experts in {query} are of unknown size; pass head_dim=...")
        experts, lines, _ = self.shape(query)
        if lines % head_dim or self.shape(shared)[0] != 2 * lines or self.shape(output)[2] != lines:
            raise NotHandled(f"{lines} rows of each expert's queries do not fall into the heads of {shared}")
        places: dict[Role, Place] = {
            "query": self._place(query, Window("rows", 0, lines, lines, head_dim, experts, stacked=True)),
            "key": self._place(shared, Window("rows", 0, lines, 2 * lines, head_dim)),
            "value": self._place(shared, Window("rows", lines, 2 * lines, 2 * lines, head_dim)),
            "output": self._place(output, Window("columns", 0, lines, lines, head_dim, experts, stacked=True)),
        }
        return Found(
            self.module,
            places,
            head_dim,
            self.rotary(head_dim),
            bool(self.has_qk_norm()),
            "strided",
            frequencies=self.frequencies(),
            planes_assumed=not self.states_planes(),
        )

    # ---- what is done with queries and keys --------------------------------------------------------------

    def _positions_and_norms(self, row: AttentionNames, head_dim: int) -> tuple[Rotary | None, bool, frozenset[str]]:
        """Return how positions turn the heads, whether they are normalised, and what of it nothing says."""
        if row.rotary is not None:
            rotary = self._rotary_as_named(row, head_dim)
        else:
            rotary = None if self._is_of_vqgan() else self.rotary(head_dim)
        of_names = self.has_qk_norm(row.query or row.fused)
        qk_norm = bool(of_names) or self._has_norm_behind(row) if row.qk_norm is None else row.qk_norm
        unknown = {"qk_norm"} if row.qk_norm is None and of_names is None and not qk_norm else set[str]()
        if row.rotary is None and self.may_be_cross() and self.setting(ROTARY) is not None:
            unknown |= {"rotary"}
        if not self.source.is_known(self.module):
            unknown |= {"rotary"} if row.rotary is None and rotary is None else set()
            stated = qk_norm or row.qk_norm is not None or self.setting(QK_NORM_FLAGS) is False
            unknown |= set() if stated else {"qk_norm"}
        return rotary, qk_norm, frozenset(unknown)

    def _rotary_as_named(self, row: AttentionNames, head_dim: int) -> Rotary | None:
        if row.rotary == "none":
            return None
        return Rotary(min(row.rotary_dims or head_dim, head_dim) // 2 * 2, row.rotary == "interleaved")

    # ---- windows -----------------------------------------------------------------------------------------

    def _windows(
        self, row: AttentionNames, height: dict[str, int], heads: int, head_dim: int, gated: bool
    ) -> dict[Role, tuple[str, Window]]:
        """Return the projection and the window, if it is not transposed, of query, key and value."""

        def whole(child: str, size: int) -> tuple[str, Window]:
            return child, Window("rows", 0, height[child], height[child], size)

        windows: dict[Role, tuple[str, Window]] = {}
        if row.query and gated:  # per head [query, gate]
            windows["query"] = row.query, Window("rows", 0, head_dim, 2 * head_dim, head_dim, heads)
            windows["gate"] = row.query, Window("rows", head_dim, 2 * head_dim, 2 * head_dim, head_dim, heads)
        elif row.query:
            windows["query"] = whole(row.query, head_dim)
        if row.query and row.key and row.value:
            key_heads = _divide(height[row.key], head_dim, f"the height of {row.key}", "the head size")
            value_dim = _divide(height[row.value], key_heads, f"the height of {row.value}", "the key heads")
            windows["key"], windows["value"] = whole(row.key, head_dim), whole(row.value, value_dim)
            return windows
        assert row.fused
        for role, window in self._cut(row, height[row.fused], heads, head_dim).items():
            windows[role] = (row.fused, window)
        if row.value:
            windows["value"] = whole(
                row.value, _divide(height[row.value], heads, f"the height of {row.value}", "the heads")
            )
        return windows

    def _is_gated(
        self, row: AttentionNames, height: dict[str, int], heads: int, head_dim: int, across: list[int]
    ) -> bool:
        """Whether the query projection holds a gate beside each head; every other output fits without."""
        if not row.query or not self.has_gates():
            return False
        return head_dim % 2 == 0 and height[row.query] == heads * head_dim and heads * head_dim // 2 in across

    def _place(self, name: str, window: Window) -> Place:
        bias = self.bias(name)
        return Place(self.plain[name], window, self.plain[bias] if bias else None, window if bias else None)

    def _share_bias(self, places: dict[Role, Place]) -> None:
        """Locate the biases of nn.MultiheadAttention: one vector [q, k, v], even if the weights are separate."""
        name = f"{self.module}.in_proj_bias" if self.module else "in_proj_bias"
        if name not in self.plain:
            return
        lines = self.shape(name)[0] // 3
        for i, role in enumerate(places):
            window = Window("rows", i * lines, (i + 1) * lines, 3 * lines, lines)
            places[role] = places[role]._replace(bias=self.plain[name], bias_window=window)

    def _separate_biases(self, places: dict[Role, Place]) -> None:
        """Locate the q_bias and v_bias that timm's BEiT and EVA add to a fused weight; the key has no bias."""
        for role, place in list(places.items()):
            name = self.plain.get(self._path(f"{role[0]}_bias"))
            if name and len(self.shapes[name]) == 1:
                lines = self.shapes[name][0]
                places[role] = place._replace(bias=name, bias_window=Window("rows", 0, lines, lines, lines))

    def _check_shapes(self, names: list[str], dimensions: int = 2) -> None:
        for name in names:
            shape = self.shape(name)
            if len(shape) == 1:
                raise NotHandled(f"{name} has shape {shape}: flattened by DeepSpeed ZeRO or FSDP1; shard with FSDP2")
            if len(shape) != dimensions:
                raise _no_matrix(name, shape)

    def _transposed(self, row: AttentionNames, parameters: dict[str, str], outputs: dict[str, str]) -> bool:
        """Whether the weights are stored (in, out): as their class says or multiplies, or as shapes and bias tell.

        Raises:
            NotHandled: If they are parameters of the module itself, which may be either, and no shape tells; or are
                stored in both ways.
        """
        if row.transposed is not None:
            return row.transposed
        projections = parameters | outputs
        stored = {child: self.source.is_turned(name.removesuffix(".weight")) for child, name in projections.items()}
        turned = [child for child, is_turned in stored.items() if is_turned]
        if turned and len(turned) < len(stored):
            others = " and ".join(child for child in stored if child not in turned)
            raise NotHandled(
                f"{' and '.join(turned)} is stored as (in, out) and {others} is not: store them alike, or leave the "
                "module to the optimizer with exclude="
            )
        if turned:
            return True
        for name in parameters.values():
            bias = self.bias(name)
            if bias is None or not self.shape(bias):
                continue
            (length, *_), (rows, columns, *_) = self.shape(bias), self.shape(name)
            if rows != columns:
                return length == columns
        own = {child: self.shape(name) for child, name in parameters.items() if name == self._path(child)}
        if not own or len(own) < len(parameters) or any(child.endswith("weight") for child in own):
            return False  # weights of modules, or called as torch calls those that it takes as (out, in)
        rows, columns = ({shape[side] for shape in own.values()} for side in (0, 1))
        if row.fused and not row.query and (shape := own[row.fused])[0] != shape[1]:
            return shape[1] > shape[0]
        if len(rows) == len(columns):
            raise NotHandled(
                f"{' and '.join(own)} are parameters of the module itself, and no shape says whether they are "
                "(out, in), or (in, out) as in x @ W: say it with names=AttentionNames(..., transposed=...)"
            )
        return len(rows) < len(columns)  # all have the input's width in common

    def _heads(
        self, row: AttentionNames, height: dict[str, int], across: list[int], parameters: dict[str, str], stacked: bool
    ) -> tuple[int, int]:
        """Return the number of query heads and the lines of each."""
        if stacked:  # the shape says it
            count, _, size = self.shape(parameters[row.query or row.fused or ""])
            return count, size
        heads = row.num_heads or self.number(NUM_HEADS)
        if self._is_of_vqgan():
            heads = row.num_heads or 1
        if row.query in ("vision_proj", "text_proj") and (sides := self.number(("encoder_attention_heads",))):
            heads = row.num_heads or sides // 2  # Grounding DINO's fusion
        ratio = self.number(("head_ratio",))
        if ratio and heads and row.num_heads is None and self.number(HEAD_DIM) is None:
            heads //= ratio  # a configuration's number; ConvBERT gives the rest to its convolution
        if self._is_of_channels():
            heads = row.num_heads or self.number(("groups", "num_groups")) or heads
        head_dim = row.head_dim or self.number(HEAD_DIM)
        if row.query and self._is_one_of_heads(row, height):
            return 1, height[row.query]
        own_dim = self.source.own(self.module, HEAD_DIM)
        stated = row.num_heads or row.head_dim or self.has_gates() or self.source.own(self.module, NUM_HEADS)
        if row.query and isinstance(own_dim, int) and not stated and own_dim > 0 and height[row.query] % own_dim == 0:
            return height[row.query] // own_dim, own_dim  # the configuration's number may be of another tower
        if row.query and row.head_dim:
            lines, count = height[row.query], row.num_heads or height[row.query] // row.head_dim
            if count * row.head_dim != lines:
                raise NotHandled(
                    f"{row.query} has {lines} rows, and {count} heads of {row.head_dim} have {count * row.head_dim}: "
                    "leave head_dim= out where the settings state the heads, or give the size that they have"
                )
            return count, row.head_dim
        key_dim = self.number(KEY_DIM) if row.layout == "interleaved" else None
        if key_dim and row.query:  # LeViT: values are wider than keys, and a layer that shrinks has heads of its own
            return _divide(height[row.query], key_dim, f"the height of {row.query}", "the key size"), key_dim
        if key_dim and heads:
            return heads, key_dim
        if row.query:
            lines = height[row.query]
            if heads and lines % heads == 0:
                return heads, lines // heads
            if head_dim and lines % head_dim == 0:
                return lines // head_dim, head_dim
            raise self._no_heads(row.query, lines, heads, head_dim)
        assert row.fused
        lines = height[row.fused]
        if heads and (key_dim := self.number(KEY_DIM)):
            return heads, key_dim
        if row.value and not heads and head_dim:
            heads = _divide(lines, 2 * head_dim, f"the height of {row.fused}", "two times the head size")
        if row.value and heads:  # queries and keys in one, as wide as each other
            size = _divide(lines, 2 * heads, f"the height of {row.fused}", "two times the heads")
            if row.head_dim not in (None, size):
                raise NotHandled(
                    f"{row.fused} has {lines} rows, where {heads} heads of {row.head_dim} queries and keys have "
                    f"{2 * heads * row.head_dim}: give the size that they have, {size}"
                )
            return heads, size
        if across and lines == 1 + 2 * across[0]:
            raise NotHandled(
                f"{row.fused} holds one score for each token, keys and values, and no queries: linear attention"
            )
        if self.number(("val_dim", "value_dim")):
            raise NotHandled(f"{row.fused} holds queries and values of different widths")
        if heads is None and head_dim and across:
            heads = across[0] // head_dim
        if heads is None:
            raise self._no_heads(row.fused, lines, heads, head_dim)
        if row.head_dim and not row.num_heads and across and heads * row.head_dim not in across:
            heads = across[0] // row.head_dim  # some of those that the settings state
        key_heads = self.number(KEY_HEADS)
        candidates = [
            head_dim,
            *(columns // heads for columns in across if columns % heads == 0),
            lines // (heads + 2 * key_heads) if key_heads and lines % (heads + 2 * key_heads) == 0 else None,
            lines // (3 * heads) if lines % (3 * heads) == 0 else None,
        ]
        for size in candidates:
            if size and lines % size == 0 and (lines // size - heads) % 2 == 0 and lines // size > heads:
                return heads, size
        raise self._no_heads(row.fused, lines, heads, head_dim)

    def _no_heads(self, child: str, lines: int, heads: int | None, head_dim: int | None) -> NotHandled:
        known = (
            " with their number, or, if it is stored (in, out) as in x @ W, names=AttentionNames(..., transposed=True)"
        )
        return NotHandled(
            f"{child} has {lines} rows, and {heads or 'an unknown number of'} heads of {head_dim or 'unknown'} size do "
            f"not divide it; {self._say_heads()}{known if heads else ''}"
        )

    def _say_heads(self) -> str:
        """Return how to say another number of heads: a plain ``num_heads=`` does not stand against the settings."""
        stated = self._stated(NUM_HEADS) is not None
        return "say names=AttentionNames(..., num_heads=...)" if stated else "pass num_heads=..."

    def _check_whole(self, heads: int, head_dim: int, across: int) -> None:
        """Refuse queries in a file that have room for some of the heads of the stated width, and not for all.

        Args:
            heads: as many as the settings state, if this is such a file.
            head_dim: of each, if all of them are there.
            across: width of the input.
        """
        if self.source.kind(self.module) or self.number(WIDTH) != across or heads != self._stated(NUM_HEADS):
            return
        size, left = divmod(across, heads)
        narrow = ("head_ratio", "attention_downsample_rate")  # ConvBERT, SAM
        stated = self.number(HEAD_DIM) or self.number(KEY_DIM) or self.number(narrow)
        if stated or left or heads * head_dim >= across or heads * head_dim % size:
            return
        raise NotHandled(
            f"its settings state {heads} heads in a width of {across}, which are {size} wide, and its weights have "
            f"room for {heads * head_dim // size} of those: it is one of several tensor-parallel slices, which have to "
            f"be merged, or heads were pruned: then say names=AttentionNames(..., head_dim={size}), or what they are"
        )

    def _contradicted(self, heads: int, head_dim: int, key_heads: int) -> str:
        """Return which numbers of heads the settings state, and what the weights make; "" if they agree.

        Raises:
            NotHandled: If a class that no table covers states them itself, and not a configuration that may be
                another part's.
        """
        made = f"where its weights make {heads} heads of {head_dim} with {key_heads} of keys"
        how = "names=AttentionNames(..., num_heads=..., head_dim=...)"
        read = (
            (NUM_HEADS, "{} heads", heads),
            (HEAD_DIM, "heads of {}", head_dim),
            (KEY_HEADS, "{} key heads", key_heads),
        )

        def differing(setting: Callable[[tuple[str, ...]], object]) -> str:
            stated = [(text, setting(attributes), number) for attributes, text, number in read]
            return " and ".join(
                text.format(n) for text, n, number in stated if type(n) is int and n not in (0, -1, number)
            )

        if not self.source.is_known(self.module) and (own := differing(partial(self.source.own, self.module))):
            raise NotHandled(f"it states {own}, {made}: say which with {how}")
        settings = [text] if (text := differing(self._stated)) else []
        of_file = not self.source.kind(self.module)  # whose configuration states key heads where there are fewer
        if of_file and key_heads not in (1, heads) and self._stated(NUM_HEADS) and self._stated(KEY_HEADS) is None:
            settings.append("no number of key heads")
        if not settings:
            return ""
        return f"its settings state {' and '.join(settings)}, {made}, as is shown; if that is wrong, say {how}"

    def _is_one_of_heads(self, row: AttentionNames, height: Mapping[str, int]) -> bool:
        """Whether the module is one head of a list of them: by the list's name, or by the output beside the list."""
        parts = self.module.split(".")
        if len(parts) < 2 or not parts[-1].isdigit() or any(map(self.parameter, _inside(row.outputs))):
            return False
        lines = height.get(row.value or "", 0)
        return parts[-2] in ("heads", "attn_heads", "attention_heads") or any(
            lines > 0 and len(self.shape(name)) == 2 and self._share_of_output(child, self.shape(name)[1], lines, False)
            for child in row.outputs
            if (name := self.parameter(child))
        )

    def _cut(self, row: AttentionNames, lines: int, heads: int, head_dim: int) -> dict[Role, Window]:
        """Return the windows of a fused parameter, if it is not transposed."""
        height = f"the height of {row.fused}"
        if self.number(KEY_DIM) and (
            row.layout == "interleaved" or not row.query
        ):  # values are wider than keys; LeViT's and HaloNet's are per head
            groups = heads if row.layout == "interleaved" else 1
            size = _divide(lines, heads, height, "the heads") * heads // groups
            head_dim = head_dim * heads // groups
            ends = [head_dim * (i + 1) for i in range(len(row.order) - 1)] + [size]
            starts = [0, *ends[:-1]]
            roles: dict[str, Role] = {"q": "query", "k": "key", "v": "value"}
            return {
                roles[letter]: Window("rows", start, end, size, (end - start) * groups // heads, groups)
                for letter, start, end in zip(row.order, starts, ends, strict=True)
            }
        if row.value:
            key_heads = _divide(lines, head_dim, height, "the head size") - heads
        elif len(row.order) == 2:
            key_heads = _divide(lines, 2 * head_dim, height, "two heads")
        else:
            key_heads = (_divide(lines, head_dim, height, "the head size") - heads) // 2
        amounts: dict[str, tuple[Role, int]] = {
            "q": ("query", heads),
            "k": ("key", key_heads),
            "v": ("value", key_heads),
        }
        sizes = [amounts[letter] for letter in row.order]
        if row.layout == "alternating":
            if key_heads != heads and "q" in row.order:
                raise NotHandled(f"{row.fused} holds {heads} query and {key_heads} key heads, which cannot take turns")
            turns = len(row.order)
            return {
                amounts[letter][0]: Window("rows", i, i + 1, turns, head_dim, lines // turns)
                for i, letter in enumerate(row.order)
            }
        groups = key_heads if row.layout == "interleaved" else row.blocks
        if any(amount % groups for _, amount in sizes):
            raise NotHandled(f"{heads} query and {key_heads} key heads do not fall into {groups} equal groups")
        windows: dict[Role, Window] = {}
        start = 0
        for role, amount in sizes:
            stop = start + amount // groups * head_dim
            windows[role] = Window("rows", start, stop, lines // groups, head_dim, groups)
            start = stop
        return windows


def _inside(outputs: Iterable[str]) -> list[str]:
    return [child for child in outputs if not child.startswith("../")]


def _no_matrix(name: str, shape: Shape) -> NotHandled:
    return NotHandled(
        f"{name} has shape {shape}, not that of a matrix; store it as one, (out, in), or leave the module to the "
        "optimizer with exclude="
    )


def own_keys(fused: str, value: str) -> str:
    """Return why a projection to queries and keys that is no higher than that to values is not read."""
    return (
        f"{fused} is no higher than {value}: its queries may be their own keys, so that there are no two matrices to "
        "decay or to show; leave the module to the optimizer with exclude=, or, if it holds queries and keys half as "
        f"wide as the values, say names=AttentionNames(fused={fused!r}, value={value!r}, output=..., head_dim=...)"
    )


def _divide(lines: int, by: int, what: str, what_by: str) -> int:
    if lines % by:
        raise NotHandled(f"{what}, {lines}, is not a multiple of {what_by}, {by}")
    return lines // by
