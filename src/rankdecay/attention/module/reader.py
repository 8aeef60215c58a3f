"""Read where W_Q, W_K, W_V and W_O of one attention module lie, from the names and shapes of its parameters.

Head size is the query's height over the number of heads; how many key and value heads there are follows from the height
of W_K. No model class is asked for. The last layers of Gemma 3n and 4 take keys and values of an earlier one, and in
some layers the keys serve as values.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace

from rankdecay.attention.layer import Role, Window
from rankdecay.attention.module.beside import is_matrix
from rankdecay.attention.module.between import (
    has_norm_after,
    is_vqgan_attention,
    norm_stands,
    why_no_product,
    why_no_value_product,
)
from rankdecay.attention.module.found import Found, Place
from rankdecay.attention.module.heads import (
    check_heads,
    check_whole,
    contradicted,
    count_heads,
    share_of_output,
)
from rankdecay.attention.module.projections import ModuleParameters, own_keys_reason
from rankdecay.attention.module.settings import QK_NORM_FLAGS, NotHandled
from rankdecay.attention.module.windows import is_gated, is_transposed, layout_of, windows_of
from rankdecay.attention.names import (
    MIXED_OUTPUT,
    POSITIONS,
    QUERY_BIASES,
    ROTARY,
    AttentionNames,
    is_another_output,
    is_input_like,
    is_output_like,
    is_table,
)
from rankdecay.attention.products import Rotary
from rankdecay.attention.source import Source

_UNPLACED = (
    "its norm is assumed to come before its projections; if it comes between the heads and the output projection, a "
    "head's output is not W_O W_V: omit value_output="
)


class ModuleReader(ModuleParameters):
    """Reader of one module as attention."""

    def __init__(
        self, path: str, plain: Mapping[str, str], source: Source, sizes: Mapping[str, int] | None = None
    ) -> None:
        super().__init__(path, plain, source, sizes)
        self._outputs: dict[str, str | None] = {}  # the queries that each output read so far belongs to

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
            candidates = (*candidates, *sorted(filter(is_output_like, self.source.children(self.path))))
        outputs = {child: name for child in candidates if (name := self.parameter(child))}
        others = {} if named else {c: name for c, name in outputs.items() if self._is_of_another(c, name, row)}
        outputs = {child: name for child, name in outputs.items() if child not in others}
        if named and row.outputs and not outputs:
            raise NotHandled(
                f"it has no output projection {' or '.join(map(repr, row.outputs))}; its matrices are "
                f"{', '.join(self.matrices()) or 'none'}; omit output= if there is none"
            )
        if not named:
            self._check_alike(parameters)
        layout = layout_of(self, row, parameters)
        stacked = layout == "stacked"
        transposed = layout != "plain" or is_transposed(self, row, parameters, outputs)
        height = {child: self.lines(name, "rows", transposed, stacked) for child, name in parameters.items()}
        turned = transposed and layout != "middle"  # the output of (in, heads, head_dim) is (out, heads, head_dim)
        fits = {
            child: self.lines(name, "columns", turned, stacked)
            for child, name in outputs.items()
            if is_matrix(self.shape(name)) or (layout != "plain" and len(self.shape(name)) == 3)
        }
        heads, head_dim = count_heads(self, row, height, list(fits.values()), parameters, stacked)
        gated = is_gated(self, row, height, heads, head_dim, list(fits.values()))
        if gated:
            head_dim //= 2
        places: dict[Role, Place] = {}
        for role, (child, window) in windows_of(self, row, height, heads, head_dim, gated).items():
            window = replace(window, transposed=transposed, stacked=stacked)
            if stacked:
                size = window.head_dim
                window = replace(window, start=0, stop=size, size=size, groups=window.num_heads)
            places[role] = self.place(parameters[child], window)
        if row.query == "q_proj_weight":
            self._share_bias(places)
        elif row.fused and not self.bias(parameters[row.fused]):
            self._separate_biases(places)
        check_heads(self, heads, places["key"].window.num_heads)
        if not given and layout == "plain":
            check_whole(
                self,
                heads,
                head_dim,
                self.lines(parameters[row.query or row.fused or ""], "columns", transposed, stacked),
            )
        value_dim = places["value"].window.head_dim
        unfit = self._place_output(places, outputs, fits, heads, value_dim, turned, stacked, others)
        self._place_positions(places, row, heads)
        rotary, qk_norm, unknown = self._positions_and_norms(row, head_dim)
        if assumed and not self.source.is_known(self.path):
            unknown |= {"order"}
        if not named and places["key"].window.num_heads not in (1, heads) and not self.source.is_known(self.path):
            unknown |= {"grouping"}
        output = places["output"].parameter if "output" in places else None
        if output:
            self._outputs.setdefault(output, row.query)
        projected = next((name for name in outputs.values() if self.plain[name] == output), "")
        no_product = why_no_product(self, row, places)
        no_value_product = why_no_value_product(self, places, parameters[row.value or row.fused or ""], projected)
        self._add_query_bias(places)
        remarks = ["" if given else contradicted(self, heads, head_dim, places["key"].window.num_heads)]
        if not no_value_product and norm_stands(self, places) == "unknown":
            remarks.append(_UNPLACED)
        used = {**parameters, **{child: name for child, name in outputs.items() if name == projected}}
        remarks.append(self._not_plain_linear(used, transposed and not stacked))
        return Found(
            self.path,
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

    def _check_own_keys(self, row: AttentionNames, parameters: dict[str, str]) -> None:
        """Check that queries and keys in one projection are two, unless the user says how wide they are."""
        if row.fused and row.value and row.head_dim is None:
            (lines, *_), (own, *_) = self.shape(parameters[row.fused]), self.shape(parameters[row.value])
            if lines <= own:
                raise NotHandled(own_keys_reason(row.fused, row.value))

    def _check_alike(self, parameters: dict[str, str]) -> None:
        """Check that no projection is a parameter of the module itself beside layers: it may be learned queries."""
        own = [child for child, name in parameters.items() if name == self.path_of(child)]
        if own and len(own) < len(parameters):
            raise NotHandled(
                f"{' and '.join(own)} {'is a parameter' if len(own) == 1 else 'are parameters'} of the module itself "
                "beside layers, and may be learned tokens rather than a projection: if it is a projection, pass "
                "names=AttentionNames(query=..., key=..., value=..., output=..., num_heads=...)"
            )

    def _add_query_bias(self, places: dict[Role, Place]) -> None:
        """Locate what is added to queries that meet keys, beside what is added to those that meet positions."""
        lines = places["query"].window.extent(0)
        for child in QUERY_BIASES:
            name = self.plain.get(self.path_of(child))
            if name and math.prod(self.shapes[name]) == lines:
                places["query"] = places["query"]._replace(added=name)

    def _not_plain_linear(self, projections: Mapping[str, str], turned: bool) -> str:
        """Return which projections do more than to multiply by their weight, as text."""
        owners = {child: n.removesuffix(".weight") for child, n in projections.items() if n.endswith(".weight")}
        more = [child for child, owner in owners.items() if self.source.is_not_plain_linear(owner, turned)]
        if not more:
            return ""
        return (
            f"{', '.join(more)} {'are not plain linear maps' if len(more) > 1 else 'is not a plain linear map'} "
            "(masked, normalised or gated); the stored weight is shown"
        )

    def _place_positions(self, places: dict[Role, Place], row: AttentionNames, heads: int) -> None:
        """Locate the projections of positions that belong to content projections (DETR and its kin)."""
        if not row.query or "content" not in row.query:
            return
        for child in sorted(self.source.children(self.path)):
            role: Role | None = next((r for pattern, r in POSITIONS.items() if re.fullmatch(pattern, child)), None)
            name = self.parameter(child) if role else None
            if role and name and len(self.shape(name)) == 2 and self.shape(name)[0] % heads == 0:
                lines = self.shape(name)[0]
                places[role] = self.place(name, Window("rows", 0, lines, lines, lines // heads))

    def _place_output(
        self, places: dict[Role, Place], outputs: dict[str, str], fits: dict[str, int], heads: int, value_dim: int,
        transposed: bool, stacked: bool = False, others: Mapping[str, str] | None = None,
    ) -> str:  # fmt: skip
        """Locate the output projection: the first of the candidates that takes as many columns as the heads give.

        Those of the module's other attentions are ``others``.

        Returns:
            What to say if there are matrices beside the projections and none is the output; "" if all is well.
        """
        if self.source.kind(self.path) in MIXED_OUTPUT:
            return "its columns take the heads' channels in turn"
        own = heads * value_dim
        for child, across in fits.items():
            if across == own and stacked:
                window = Window("columns", 0, value_dim, value_dim, value_dim, heads, True, stacked=True)
            elif across == own + self._columns_behind(child, own) or across == own:
                window = Window("columns", 0, own, across, value_dim, 1, transposed)
            else:
                window = share_of_output(self, child, across, own, transposed)
            if window is not None:
                if reason := self.several(child):
                    return reason
                places["output"] = self.place(outputs[child], window)
                return ""
        inside = [child for child in outputs if not child.startswith("../") and child in fits]
        if inside:
            raise NotHandled(
                f"the output projection takes {fits[inside[0]]} columns, where {heads} heads of {value_dim} give {own}"
                + self._say_gates(own, fits[inside[0]])
            )
        others = others or {}
        left = self.matrices({place.parameter for place in places.values()} | {self.plain[o] for o in others.values()})
        read = {place.parameter.removesuffix(".weight") for place in places.values()}
        left = [  # without an adapter's factors, and the projections of another attention
            matrix
            for matrix in left
            if self.path_of(matrix.split(".")[0]) not in read
            and not is_input_like(re.split(r"[. ]", matrix)[0])
            and not is_table(matrix)
        ]
        if left:
            return f"none of its other matrices is known as one: {', '.join(left)}"
        if others and not places["query"].parameter.endswith("add_q_proj.weight"):  # diffusers' last layers have none
            return f"{' and '.join(others)} is that of another attention in the module"
        return ""

    @staticmethod
    def _say_gates(own: int, across: int) -> str:
        """Return what to say where heads give twice of what the output projection takes."""
        if own != 2 * across:
            return ""
        return (
            "; if its projection to queries holds a gate behind each head's query, set attn_output_gate = True on the "
            "module, or in its configuration"
        )

    def _is_of_another(self, child: str, name: str, row: AttentionNames) -> bool:
        """Whether an output projection in the module belongs to another attention there, with queries of its own."""
        if child.startswith("../"):
            return False
        if self._outputs.get(self.plain[name], row.query) != row.query:
            return True
        return is_another_output(child, row, self.queries)

    def _columns_behind(self, child: str, own: int) -> int:
        """Return how many columns of an output projection take something else, behind what attention gives."""
        if "key_conv_attn_layer" in self.source.children(self.path):
            return own  # ConvBERT's convolution, which has as many channels
        mlp = self.parameter("../proj_mlp") if child == "../proj_out" else None
        return self.shape(mlp)[0] if mlp else 0  # Flux and its kin

    def _positions_and_norms(self, row: AttentionNames, head_dim: int) -> tuple[Rotary | None, bool, frozenset[str]]:
        """Return how positions turn the heads, whether they are normalised, and what of it nothing says."""
        if row.rotary is not None:
            rotary = self._rotary_as_named(row, head_dim)
        else:
            rotary = None if is_vqgan_attention(self) else self.rotary(head_dim)
        of_names = self.has_qk_norm(row.query or row.fused)
        qk_norm = bool(of_names) or has_norm_after(self, row) if row.qk_norm is None else row.qk_norm
        unknown = {"qk_norm"} if row.qk_norm is None and of_names is None and not qk_norm else set[str]()
        if row.rotary is None and self.may_be_cross() and self.setting(ROTARY) is not None:
            unknown |= {"rotary"}
        if not self.source.is_known(self.path):
            unknown |= {"rotary"} if row.rotary is None and rotary is None else set()
            stated = qk_norm or row.qk_norm is not None or self.setting(QK_NORM_FLAGS) is False
            unknown |= set() if stated else {"qk_norm"}
        return rotary, qk_norm, frozenset(unknown)

    def _rotary_as_named(self, row: AttentionNames, head_dim: int) -> Rotary | None:
        if row.rotary == "none":
            return None
        return Rotary(min(row.rotary_dims or head_dim, head_dim) // 2 * 2, row.rotary == "interleaved")

    def _share_bias(self, places: dict[Role, Place]) -> None:
        """Locate the biases of nn.MultiheadAttention: one vector [q, k, v], even if the weights are separate."""
        name = f"{self.path}.in_proj_bias" if self.path else "in_proj_bias"
        if name not in self.plain:
            return
        lines = self.shape(name)[0] // 3
        for i, role in enumerate(places):
            window = Window("rows", i * lines, (i + 1) * lines, 3 * lines, lines)
            places[role] = places[role]._replace(bias=self.plain[name], bias_window=window)

    def _separate_biases(self, places: dict[Role, Place]) -> None:
        """Locate the q_bias and v_bias that timm's BEiT and EVA add to a fused weight; the key has no bias."""
        for role, place in list(places.items()):
            name = self.plain.get(self.path_of(f"{role[0]}_bias"))
            if name and len(self.shapes[name]) == 1:
                lines = self.shapes[name][0]
                places[role] = place._replace(bias=name, bias_window=Window("rows", 0, lines, lines, lines))
