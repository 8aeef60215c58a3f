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
from functools import cached_property
from typing import Literal, NamedTuple

from rankdecay.attention.layer import Role, Window
from rankdecay.attention.model_types import ROTARY
from rankdecay.attention.module.beside import is_matrix
from rankdecay.attention.module.between import (
    has_norm_after,
    is_vqgan_attention,
    mixes_heads,
    norm_stands,
    plain_norm,
    why_no_product,
    why_no_value_product,
)
from rankdecay.attention.module.found import Found, Place
from rankdecay.attention.module.heads import (
    check_heads,
    check_key_heads_are_said,
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
    AttentionNames,
    is_another_output,
    is_input_like,
    is_output_like,
    is_table,
    may_be_output_above,
)
from rankdecay.attention.products import Rotary

_UNPLACED = (
    "its {} is assumed to come before its projections, or behind all of it; if it comes between the heads and the "
    "output projection, a head's output is not W_O W_V: omit value_output="
)
_MIXED = (
    "its heads' scores are mixed before the softmax, so that W_Kᵀ W_Q of a head is a term of the scores of every head"
)


class _Outputs(NamedTuple):
    """Candidates for the output projection.

    Attributes:
        names: their weights, by child.
        columns: number of columns, of those that are matrices.
        others: weights that are the output projections of the module's other attentions, by child.
        transposed: whether they are stored as (in, out).
        stacked: whether they are stored as one matrix per head.
    """

    names: dict[str, str]
    columns: dict[str, int]
    others: dict[str, str]
    transposed: bool
    stacked: bool


class ModuleReader(ModuleParameters):
    """Reader of one module as attention."""

    @cached_property
    def _outputs(self) -> dict[str, str | None]:
        """Queries that each output belongs to, of those read so far."""
        return {}

    def read(self, row: AttentionNames, by_user: bool = False) -> Found:
        """Locate the matrices of the module.

        Args:
            row: the names.
            by_user: whether the user gave them, who then has to be told of an output that is not there.

        Raises:
            NotHandled: If names, shapes and settings do not agree.
        """
        sizes_given = by_user and (row.num_heads or row.head_dim)
        row = replace(row, **self.sizes)
        parameters = {child: name for child in row.projections if (name := self.parameter(child))}
        self._check_own_keys(row, parameters)
        names, others = self._output_candidates(row, by_user)
        if not by_user:
            self._check_no_learned_tokens(parameters)
        layout = layout_of(self, row, parameters)
        stacked = layout == "stacked"
        transposed = layout != "plain" or is_transposed(self, row, parameters, names)
        outputs = self._outputs_of(names, others, layout, transposed)
        places, heads, head_dim = self._place_inputs(row, parameters, outputs, transposed, stacked)
        if not by_user:
            check_key_heads_are_said(self, row, heads, places["key"].window)
        if not sizes_given and layout == "plain":
            width = self.lines(parameters[row.query or row.fused or ""], "columns", transposed, stacked)
            check_whole(self, heads, head_dim, width)
        no_output = self._place_output(places, outputs, heads)
        self._place_positions(places, row, heads)
        rotary, qk_norm, unknown = self._positions_and_norms(row, head_dim)
        unknown |= self._assumed(row, by_user, heads, places["key"].window.num_heads)
        output = places["output"].parameter if "output" in places else None
        if output:
            self._outputs.setdefault(output, row.query)
        projected = next((name for name in names.values() if self.plain[name] == output), "")
        no_product = why_no_product(self, row, places)
        no_value_product = why_no_value_product(self, places, parameters[row.value or row.fused or ""], projected)
        self._add_query_bias(places)
        remarks = ["" if sizes_given else contradicted(self, heads, head_dim, places["key"].window.num_heads)]
        if not no_value_product and norm_stands(self, places) == "unknown":
            remarks.append(_UNPLACED.format(plain_norm(self)))
        if mixes_heads(self, heads):
            remarks.append(_MIXED)
        used = {**parameters, **{child: name for child, name in names.items() if name == projected}}
        remarks.append(self._not_plain_linear(used, transposed and not stacked))
        return Found(
            name=self.path,
            places=places,
            head_dim=head_dim,
            rotary=rotary,
            qk_norm=qk_norm,
            grouping=row.grouping,
            unknown=unknown,
            no_product=no_product,
            no_value_product=no_value_product,
            no_output=no_output,
            frequencies=self.frequencies() if rotary is not None else "",
            planes_assumed=rotary is not None and row.rotary is None and not self.states_planes(),
            remark="; ".join(filter(None, remarks)),
        )

    def _output_candidates(self, row: AttentionNames, by_user: bool) -> tuple[dict[str, str], dict[str, str]]:
        """Return the weights that may be the output projection, by child, and those of the module's other attentions.

        Raises:
            NotHandled: If the user names an output that does not exist.
        """
        candidates = row.outputs
        if candidates and not by_user:  # the known names first, then names like an output's
            candidates = (*candidates, *sorted(filter(is_output_like, self.source.children(self.path))))
        outputs = {child: name for child in candidates if (name := self.parameter(child))}
        others = {} if by_user else {c: name for c, name in outputs.items() if self._is_of_another(c, name, row)}
        outputs = {child: name for child, name in outputs.items() if child not in others}
        if by_user and row.outputs and not outputs:
            raise NotHandled(
                f"it has no output projection {' or '.join(map(repr, row.outputs))}; its matrices are "
                f"{', '.join(self.matrices()) or 'none'}; omit output= if there is none"
            )
        return outputs, others

    def _outputs_of(
        self,
        names: dict[str, str],
        others: dict[str, str],
        layout: Literal["plain", "stacked", "middle"],
        transposed: bool,
    ) -> _Outputs:
        """Return the candidates for the output projection, with their columns."""
        stacked = layout == "stacked"
        transposed = transposed and layout != "middle"  # the output of (in, heads, head_dim) is (out, heads, head_dim)
        columns = {
            child: self.lines(name, "columns", transposed, stacked)
            for child, name in names.items()
            if is_matrix(self.shape(name)) or (layout != "plain" and len(self.shape(name)) == 3)
        }
        return _Outputs(names, columns, others, transposed, stacked)

    def _place_inputs(
        self, row: AttentionNames, parameters: dict[str, str], outputs: _Outputs, transposed: bool, stacked: bool
    ) -> tuple[dict[Role, Place], int, int]:
        """Locate queries, keys and values with their biases; return them, the number of heads and their size."""
        height = {child: self.lines(name, "rows", transposed, stacked) for child, name in parameters.items()}
        across = list(outputs.columns.values())
        heads, head_dim = count_heads(self, row, height, across, parameters, stacked)
        gated = is_gated(self, row, height, heads, head_dim, across)
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
        else:
            self._separate_biases(places)
        check_heads(self, heads, places["key"].window.num_heads)
        return places, heads, head_dim

    def _assumed(self, row: AttentionNames, by_user: bool, heads: int, key_heads: int) -> set[str]:
        """Return which of the order in a fused projection and the grouping of heads is assumed."""
        if by_user or self.source.is_known(self.path):
            return set()
        order = {"order"} if row.fused and row.when is None else set[str]()
        return order | ({"grouping"} if key_heads not in (1, heads) else set())

    def _check_own_keys(self, row: AttentionNames, parameters: dict[str, str]) -> None:
        """Check that queries and keys in one projection are two, unless the user says how wide they are."""
        if row.fused and row.value and row.head_dim is None:
            (lines, *_), (value_rows, *_) = self.shape(parameters[row.fused]), self.shape(parameters[row.value])
            if lines <= value_rows:
                raise NotHandled(own_keys_reason(row.fused, row.value))

    def _check_no_learned_tokens(self, parameters: dict[str, str]) -> None:
        """Check that no projection is a parameter of the module itself beside layers: it may be learned queries."""
        raw = [child for child, name in parameters.items() if name == self.path_of(child)]
        if raw and len(raw) < len(parameters):
            raise NotHandled(
                f"{' and '.join(raw)} {'is a parameter' if len(raw) == 1 else 'are parameters'} of the module itself "
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

    def _not_plain_linear(self, projections: Mapping[str, str], transposed: bool) -> str:
        """Return which projections are not plain linear maps by their weights, as text."""
        owners = {child: n.removesuffix(".weight") for child, n in projections.items() if n.endswith(".weight")}
        more = [child for child, owner in owners.items() if self.source.is_not_plain_linear(owner, transposed)]
        if not more:
            return ""
        return (
            f"{', '.join(more)} {'are not plain linear maps' if len(more) > 1 else 'is not a plain linear map'} "
            "(masked, normalised or gated); the stored weight is shown"
        )

    def _place_positions(self, places: dict[Role, Place], row: AttentionNames, heads: int) -> None:
        """Locate the projections of positions that belong to content projections (DETR and its kin)."""
        own = re.match(r"(.*_)?(q|query)_?content", row.query or "")
        if own is None:
            return
        for child in sorted(self.source.children(self.path)):
            role: Role | None = None
            for pattern, called in POSITIONS.items():
                if (found := re.fullmatch(pattern, child)) and found[1] == own[1]:
                    role = called
            name = self.parameter(child) if role else None
            if role and name and len(self.shape(name)) == 2 and self.shape(name)[0] % heads == 0:
                lines = self.shape(name)[0]
                places[role] = self.place(name, Window("rows", 0, lines, lines, lines // heads))

    def _place_output(self, places: dict[Role, Place], outputs: _Outputs, heads: int) -> str:
        """Locate the output projection: the first of the candidates that takes as many columns as the heads give.

        Returns:
            Reason why none of the module's other matrices is the output; "" if one is, or there are none.
        """
        if self.source.kind(self.path) in MIXED_OUTPUT:
            return "its columns take the heads' channels in turn"
        value_dim = places["value"].window.head_dim
        width = heads * value_dim
        for child, across in outputs.columns.items():
            if window := self._output_window(outputs, child, across, heads, value_dim):
                if reason := self.several(child):
                    return reason
                places["output"] = self.place(outputs.names[child], window)
                return ""
        inside = [across for child, across in outputs.columns.items() if not child.startswith("../")]
        if inside:
            raise NotHandled(
                f"the output projection takes {inside[0]} columns, but {heads} heads of {value_dim} give {width}"
                + self._gate_remedy(width, inside[0])
            )
        return self._reason_without_output(places, outputs.others)

    def _output_window(self, outputs: _Outputs, child: str, across: int, heads: int, value_dim: int) -> Window | None:
        """Return the window of an output projection that takes what the heads give; None if it does not."""
        width = heads * value_dim
        if across == width and outputs.stacked:
            return Window("columns", 0, value_dim, value_dim, value_dim, heads, True, stacked=True)
        if across in (width, width + self._columns_behind(child, width)):
            return Window("columns", 0, width, across, value_dim, 1, outputs.transposed)
        return share_of_output(self, child, across, width, outputs.transposed)

    def _reason_without_output(self, places: dict[Role, Place], others: Mapping[str, str]) -> str:
        """Return why no matrix beside the projections is the output; "" if there are none."""
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
        return "" if others or self.source.is_known(self.path) else self._output_above(places)

    def _output_above(self, places: dict[Role, Place]) -> str:
        """Return which matrix beside the module may be the output, by its name and shape; "" if there is none."""
        above, query = self.path.rpartition(".")[0], places["query"]
        width = query.window.num_heads * places["value"].window.head_dim
        read = math.prod(self.shapes[query.parameter]) // (query.window.groups * query.window.size)
        called = query.parameter.removesuffix(".weight").rpartition(".")[2]
        beside = sorted(self.source.children(above)) if self.path else []
        if any(is_input_like(child) and self.parameter(f"../{child}") for child in beside):
            return ""  # which is attention itself, and has it
        for child in beside:
            name = self.parameter(f"../{child}") if may_be_output_above(child, called) else None
            if name and self.shape(name)[:2] == (read, width) and is_matrix(self.shape(name)):
                return f"../{child} may be it: pass names=AttentionNames(..., output='../{child}') if it is"
        return ""

    @staticmethod
    def _gate_remedy(width: int, across: int) -> str:
        """Return the remedy where heads give twice what the output projection takes; "" elsewhere."""
        if width != 2 * across:
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

    def _columns_behind(self, child: str, width: int) -> int:
        """Return how many columns of an output projection take something else, behind what attention gives."""
        if "key_conv_attn_layer" in self.source.children(self.path):
            return width  # ConvBERT's convolution, which has as many channels
        mlp = self.parameter("../proj_mlp") if child == "../proj_out" else None
        return self.shape(mlp)[0] if mlp else 0  # Flux and its kin

    def _positions_and_norms(self, row: AttentionNames, head_dim: int) -> tuple[Rotary | None, bool, frozenset[str]]:
        """Return how positions turn the heads, whether they are normalised, and what of it nothing says."""
        if row.rotary is not None:
            rotary = self._rotary_of_names(row, head_dim)
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

    def _rotary_of_names(self, row: AttentionNames, head_dim: int) -> Rotary | None:
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
        """Locate the q_bias and v_bias of weights that have no bias of their own: timm's BEiT and EVA, VideoMAE."""
        for role, place in list(places.items()):
            name = None if place.bias else self.plain.get(self.path_of(f"{role[0]}_bias"))
            lines = place.window.extent(0)
            if name and self.shapes[name] == (lines,):
                window = place.window if place.window.is_whole else Window("rows", 0, lines, lines, lines)
                places[role] = place._replace(bias=name, bias_window=window)
