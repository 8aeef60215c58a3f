"""Settings of one attention module: numbers of heads, positions, norms, and keys that layers share.

The settings are attributes of the module and of the configurations above it, or the configuration of a checkpoint
(:mod:`rankdecay.attention.source`). What they leave to a model's class is in the tables of
:mod:`rankdecay.attention.names`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping

from rankdecay.attention.known import KNOWN_TYPES
from rankdecay.attention.model_types import (
    CROSS,
    DEFAULT_SHARES,
    EVERY_FOURTH,
    GATED,
    HEAD_DIM,
    INTERLEAVED,
    KEY_HEADS,
    NORMS_BEFORE_IN_CROSS,
    NORMS_WITHOUT_WEIGHTS,
    NUM_HEADS,
    PARTIAL_ROTARY,
    PERHAPS_CROSS,
    ROTARY,
    ROTARY_IN_CROSS,
    ROTARY_UNREAD,
    ROTARY_UNSAID,
    VALUES_ARE_KEYS,
    WITHOUT_POSITIONS,
    WITHOUT_ROTARY,
)
from rankdecay.attention.names import (
    NO_SCORES,
    NO_SCORES_CLASSES,
    NO_SCORES_SETTINGS,
    RETENTION,
    are_of_one,
    is_fused_like,
    is_query_key_norm,
    is_query_like,
    own_words,
)
from rankdecay.attention.numbering import LISTS, number_in
from rankdecay.attention.partial_rotary import PARTIAL_ROTARY_TYPES
from rankdecay.attention.products import Rotary
from rankdecay.attention.source import Source

#: Settings that say whether rotary planes are neighbouring coordinates.
ROTARY_PLANES = ("rope_interleaved", "rope_interleave", "rotary_interleaved", "rotary_emb_interleaved")
#: Settings that say which frequencies rotary positions have.
FREQUENCIES = ("rope_theta", "rope_scaling", "rope_local_base_freq", "rotary_emb_base", "rotary_value")
_LONG = 160
#: Settings that say whether queries and keys are normalised.
QK_NORM_FLAGS = ("use_qk_norm", "qk_layernorm", "qk_norm", "use_qk_layernorm")


#: Numbers without which nothing can be read, so that one which is none is said; some libraries leave it out as -1.
_SIZES = {NUM_HEADS: "the number of heads", HEAD_DIM: "the size of a head", KEY_HEADS: "the number of key heads"}


#: Those that a user may give where no setting states them.
_GIVEN = {NUM_HEADS: "num_heads", HEAD_DIM: "head_dim"}


class NotHandled(Exception):
    """Raised for a module that looks like attention and cannot be read, with the reason."""


class ModuleSettings:
    """Settings of one module.

    Attributes:
        path: of the module.
        source: the parameters and settings.
        sizes: ``num_heads`` and ``head_dim`` as the user gives them, where the settings state none.
    """

    def __init__(self, path: str, source: Source, sizes: Mapping[str, int] | None = None) -> None:
        self.path, self.source, self.sizes = path, source, sizes or {}
        self._asked: dict[tuple[str, ...], object] = {}

    def setting(self, attributes: tuple[str, ...]) -> object:
        """Return the nearest value of the first of the attributes that is set, or None."""
        if attributes not in self._asked:
            self._asked[attributes] = self.source.setting(self.path, attributes)
        return self._asked[attributes]

    def number(self, attributes: tuple[str, ...]) -> int | None:
        """Return a setting that is a positive whole number, as the user gives it or for this layer, or None."""
        given = self.sizes.get(_GIVEN.get(attributes, ""))
        return self.stated(attributes) if given is None else given

    def check_given(self) -> None:
        """Refuse sizes that a user gives where the settings state others: heads would be cut where none begin."""
        for attributes, name in _GIVEN.items():
            given = self.sizes.get(name)
            stated = None if given is None else self.stated(attributes)
            if stated not in (None, given):
                raise NotHandled(
                    f"{name}={given} contradicts the config ({stated}): omit {name}; if the config is wrong, pass "
                    f"names=AttentionNames(..., {name}={given})"
                )

    def stated(self, attributes: tuple[str, ...]) -> int | None:
        """Return the positive whole number that the settings state for this layer, or None.

        Raises:
            NotHandled: If it is out of range.
        """
        value = self._of_layer(self.setting(attributes))
        if attributes in _SIZES and isinstance(value, (int, float)) and value != -1 and not 1 <= value < 2**31:
            raise NotHandled(f"its config has {str(value)[:40]} as {_SIZES[attributes]}")
        return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None

    @property
    def layer_number(self) -> int | None:
        """The model's own number of the layer: the first that counts a list of layers, else the first in the path."""
        parts = self.path.split(".")
        digits = [i for i, part in enumerate(parts) if number_in(part) is not None]
        layers = [i for i in digits if i and parts[i - 1] in LISTS] or digits
        return int(parts[layers[0]]) if layers else None

    def _of_layer(self, value: object) -> object:
        """Return a setting that is a list, one value per layer, for this layer."""
        if not isinstance(value, list):
            return value
        number = self.layer_number
        return value[number] if number is not None and number < len(value) else None

    # ---- queries, keys and values -------------------------------------------------------------------------

    def reason_without_scores(self) -> str | None:
        """Return why projections called queries and keys form no softmax scores here; None if they may."""
        for setting, reason in NO_SCORES_SETTINGS.items():
            if self.setting((setting,)) not in (None, False):
                return reason
        children = self.source.children(self.path)
        if mark := next((mark for mark in NO_SCORES if mark in children), None):
            return NO_SCORES[mark]
        if set(children) >= RETENTION:
            return "retention: a decay by distance takes the place of a softmax over scores"
        of_sana = str(self.setting(("_class_name",))).startswith("Sana") and self.path.endswith(".attn1")
        if of_sana or "LinearAttn" in str(self.source.own(self.path, ("processor",))):
            return "linear attention: a ReLU of queries and keys, without a softmax"
        kind = self.source.kind(self.path)
        if kind.startswith(("torch.", "transformers.", "timm.")):  # of which the names tell
            return None
        called = kind.rpartition(".")[2]
        return next((reason for name, reason in NO_SCORES_CLASSES.items() if re.search(f"(?:{name})$", called)), None)

    def has_gates(self) -> bool:
        """Whether the query projection holds a gate beside each head."""
        return self.setting(("model_type",)) in GATED or self.setting(("attn_output_gate",)) is True

    def values_are_keys(self) -> bool:
        """Whether the keys serve as values: Gemma 4 in layers of one kind, which then have no projection to values."""
        if self.setting(("attention_k_eq_v", "use_alternative_attention")) is True:
            return True
        return self.setting(("model_type",)) in VALUES_ARE_KEYS

    def shared_kv_path(self) -> str | None:
        """Return the path from here to the attention module whose keys and values this layer takes (Gemma 3n and 4).

        The last layers have none of their own: each takes those of the last layer before them that is of its kind.
        """
        number, kinds, modes = self.layer_number, self.setting(("layer_types",)), self.setting(("kv_sharing_modes",))
        if number is None:
            return None
        if isinstance(modes, list):
            if number >= len(modes) or not str(modes[number]).startswith("reuse"):
                return None
            with_own_keys = [i for i in range(number) if not str(modes[i]).startswith("reuse")]
            with_own_keys = [i for i in with_own_keys if modes[i] == "store"] or with_own_keys
        else:
            shared, depth = self.number(("num_kv_shared_layers",)), self.number(("num_hidden_layers",))
            if not shared or not depth or number < depth - shared:
                return None
            with_own_keys = list(range(depth - shared))
        if isinstance(kinds, list) and len(kinds) > number:
            with_own_keys = [i for i in with_own_keys if kinds[i] == kinds[number]] or with_own_keys
        _, found, after = f"{self.path}.".partition(f".{number}.")
        if not with_own_keys or not found:
            return None
        return "../" * (1 + after.count(".")) + f"{with_own_keys[-1]}.{after}"

    # ---- positions and norms ------------------------------------------------------------------------------

    def has_qk_norm(self, query: str | None = None) -> bool | None:
        """Whether the module normalises queries or keys: it has a norm for them, perhaps without weights, or a flag.

        Args:
            query: name of the projection to the queries, of a module with several attentions.

        Returns:
            None if it has a norm, and nothing says whether it is of this attention or of another in the module.
        """
        kind = self.setting(("model_type",))
        if kind in NORMS_BEFORE_IN_CROSS and self.is_cross():
            return False
        if norms := list(filter(is_query_key_norm, self.source.children(self.path))) or self.norms_inside():
            belongs = self._are_norms_of(query, norms) if query else True
            if belongs is not False:
                return belongs
        if self.setting(QK_NORM_FLAGS) is True:
            return not (kind == "llama4_text" and self._is_without_rotary())
        return kind in NORMS_WITHOUT_WEIGHTS

    def norms_inside(self) -> list[str]:
        """Return the norms of queries and keys that one child, called ``norm``, holds: Flux's own code."""
        path = f"{self.path}.norm" if self.path else "norm"
        return list(filter(is_query_key_norm, self.source.children(path)))

    def _are_norms_of(self, query: str, norms: list[str]) -> bool | None:
        """Whether one of the norms is of the attention with these queries, by the words that the names have more."""
        children = self.source.children(self.path)
        query_words = own_words(query)
        sets = {own_words(child) for child in children if is_query_like(child) or is_fused_like(child)} - {query_words}
        undecided = False
        for words in map(own_words, norms):
            if are_of_one(words, query_words):
                return True
            if words and any(are_of_one(words, other) for other in sets):
                continue
            if words or frozenset() not in sets or self.source.is_known(self.path):
                return True
            undecided = True
        return None if undecided else False

    def rotary(self, head_dim: int) -> Rotary | None:
        """Return how RoPE rotates heads of this size, by the settings; None if it does not."""
        if isinstance(half := self.setting(("rotate_half",)), bool):  # timm
            turned = self.setting(("rope",)) is not None
            return Rotary(head_dim // 2 * 2, not half) if turned else None
        if self.setting(("_diffusers_version", "_use_default_values")) is not None:
            return None  # diffusers' models turn queries and keys in ways of their own, which no setting says
        stated = self.setting(ROTARY) is not None or self.setting(("model_type",)) in ROTARY_UNSAID
        if not stated or self.setting(("alibi",)) is True or self._is_without_rotary():
            return None
        dims = self.number(("rotary_dim", "rotary_ndims"))
        if dims is None:
            share = self._rotary_share()
            dims = int(head_dim * share)
        dims = min(dims + dims % 2, head_dim // 2 * 2)  # frequencies are of every second coordinate, the last too
        return Rotary(dims, self.is_interleaved()) if dims else None

    def is_interleaved(self) -> bool:
        """Whether a rotary plane is of neighbouring coordinates."""
        stated = self.setting(ROTARY_PLANES)
        if isinstance(stated, bool):
            return stated
        # Meta's and llama2.c's code multiplies neighbours, as complex numbers, with a table of this name. Others have
        # such a table and turn halves (Gemma's own code, MiniMind), so that their names have to say it as well.
        of_meta = {"wq", "wk"} <= set(self.source.children(self.path))
        has_table = of_meta and self.setting(("freqs_cis", "freqs_cos")) is True
        return has_table or self.setting(("model_type",)) in INTERLEAVED

    def states_planes(self) -> bool:
        """Whether anything says which coordinates a rotary plane is of: settings, or a class that the tables cover."""
        told = (self.setting(("rotate_half",)), self.setting(ROTARY_PLANES))
        if any(isinstance(value, bool) for value in told) or self.is_interleaved():
            return True
        # files of such names are of other code than the class: transformers permutes the rows of some in loading them
        children = set(self.source.children(self.path))
        of_other_code = not self.source.kind(self.path) and ({"wq", "wk"} <= children or "in_proj_weight" in children)
        return self.source.is_known(self.path) and not of_other_code

    def frequencies(self) -> str:
        """Return what the settings say of the rotary frequencies, as text that layers with one configuration share."""
        statements: dict[str, object] = {}
        parameters = self.setting(("rope_parameters",))
        if isinstance(parameters, dict):  # which holds all of it, for each kind of layer where they differ
            if any(isinstance(part, dict) for part in parameters.values()):
                statements["layer_type"] = kind = str(self._of_layer(self.setting(("layer_types",))))
                parameters = parameters.get(kind)
            statements["rope_parameters"] = parameters
        else:
            statements |= {name: value for name in FREQUENCIES if (value := self.setting((name,))) is not None}
            if "rope_local_base_freq" in statements:  # of the layers with a window
                statements["layer_type"] = str(self._of_layer(self.setting(("layer_types",))))
        text = json.dumps(statements, sort_keys=True, default=str) if statements else ""
        if len(text) > _LONG:  # a factor for each frequency
            text = f"{text[:_LONG]}… {hashlib.sha256(text.encode()).hexdigest()[:12]}"
        kind = self.setting(("model_type",))  # of the part of a model, which has a configuration of its own
        return ", ".join(filter(None, [str(kind or ""), text]))

    def _rotary_share(self) -> float:
        """Return the share of a head's coordinates that positions turn; it may be stated for each kind of layer."""
        parameters = self.setting(("rope_parameters",))
        if isinstance(parameters, dict) and any(isinstance(part, dict) for part in parameters.values()):
            parameters = parameters.get(str(self._of_layer(self.setting(("layer_types",)))))
        if isinstance(parameters, dict) and parameters.get("rope_type") == "proportional":
            return 1.0  # planes span the head; those beyond the share are turned by an angle of 0
        kind = str(self.setting(("model_type",)))
        default = not isinstance(parameters, dict) or parameters.get("rope_type", "default") == "default"
        if default and self.source.is_known(self.path) and kind in KNOWN_TYPES - PARTIAL_ROTARY_TYPES:
            return 1.0  # such a class, as Llama's, ignores what its configuration says
        share = parameters.get("partial_rotary_factor") if isinstance(parameters, dict) else None
        share = share or self.setting(PARTIAL_ROTARY)
        share = share or DEFAULT_SHARES.get(kind)
        return float(share) if isinstance(share, (int, float)) and 0 < share <= 1 else 1.0

    def is_cross(self) -> bool:
        """Whether the module is called as cross-attention is."""
        return bool(CROSS.search(self.path.lower()))

    def may_be_cross(self) -> bool:
        """Whether the module is called as cross-attention may be, in a class that no table covers."""
        of_library = self.source.kind(self.path).startswith(("transformers.", "timm."))
        return not of_library and bool(PERHAPS_CROSS.search(self.path.lower()))

    def _is_without_rotary(self) -> bool:
        """Whether this layer is without rotary positions though the model has them."""
        if self.setting(("use_rope", "use_mem_rope")) is False:
            return True
        kind, number = str(self.setting(("model_type",))), self.layer_number
        if kind in ROTARY_UNREAD:
            return True
        if WITHOUT_POSITIONS.search(self.path) or (self.is_cross() and kind not in ROTARY_IN_CROSS):
            return True
        if self.may_be_cross():  # and shown as if it were
            return True
        positions = self.setting(("position_embedding_type",))
        if (kind == "esm" and positions == "absolute") or (kind == "granitemoehybrid" and positions != "rope"):
            return True
        with_rotary = self.setting(("no_rope_layers",))  # 1 where a layer has them, whatever the name says
        if isinstance(with_rotary, list) and with_rotary:
            return not self._of_layer(with_rotary)
        if kind in EVERY_FOURTH and number is not None:  # as the class fills in what the configuration leaves out
            return (number + 1) % (self.number(("no_rope_layer_interval",)) or 4) == 0
        layer = self._of_layer(self.setting(("layer_types",)))
        period = self.number(("sliding_window_pattern",))
        if layer is None and period and number is not None:
            layer = "full_attention" if (number + 1) % period == 0 else "sliding_attention"
        return (kind, layer if isinstance(layer, str) else None) in WITHOUT_ROTARY
