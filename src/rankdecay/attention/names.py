"""Names of attention's projections, and of the settings that state its heads and positions.

To teach the library a new family, add a row to :data:`KNOWN` and the model to ``tests/attention/families.py``, whose
tests compare each head with what the model itself computes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from rankdecay.checks import check_number


@dataclass(frozen=True)
class AttentionNames:
    """Names of the projections in one family of attention modules, relative to the module.

    Give separate ``query``, ``key`` and ``value``; or ``fused`` alone for all three in one parameter; or ``query`` and
    ``fused`` for keys and values in one. A name is a submodule with a ``weight`` (``"q_proj"``), or a parameter itself
    (``"q_proj_weight"``).

    Attributes:
        query: name of the query projection.
        key: name of the key projection.
        value: name of the value projection.
        fused: name of the projection that holds several of them.
        output: names the output projection may have, the first that exists counts; ``"../output.dense"`` starts one
            level higher. Empty if there is none.
        order: what the fused projection holds, and in which order: ``"qkv"``, ``"qvk"`` or ``"kv"``.
        layout: of the fused projection: ``"contiguous"``, or ``"interleaved"`` by key head
            (:mod:`rankdecay.attention.windows`).
        blocks: for a contiguous layout that repeats: how many times (CodeGen: 4).
        when: the row counts only if the model's configuration has this attribute with this value (CodeGen), or has it
            at all when the value is None.
        num_heads: number of query heads, if the module does not say it itself.
        head_dim: size of a head, if it is not height / num_heads.

    Example:
        >>> AttentionNames(query="to_queries", key="to_keys", value="to_values", output="unify", num_heads=8)
        ... # doctest: +ELLIPSIS
        AttentionNames(...)
    """

    query: str | None = None
    key: str | None = None
    value: str | None = None
    fused: str | None = None
    output: str | tuple[str, ...] = ()
    order: Literal["qkv", "qvk", "kv"] = "qkv"
    layout: Literal["contiguous", "interleaved"] = "contiguous"
    blocks: int = 1
    when: tuple[str, object] | None = None
    num_heads: int | None = None
    head_dim: int | None = None

    def __post_init__(self) -> None:
        given = {name for name in ("query", "key", "value", "fused") if getattr(self, name)}
        if given not in ({"query", "key", "value"}, {"fused"}, {"query", "fused"}):
            raise ValueError(
                f"AttentionNames got {', '.join(sorted(given)) or 'no projection'}; expected query, key and value, "
                "or fused alone, or query and fused (keys and values in one)."
            )
        if given == {"query", "fused"} and self.order != "kv":
            object.__setattr__(self, "order", "kv")
        for name in ("num_heads", "head_dim", "blocks"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), at_least=1, whole=True)

    @property
    def projections(self) -> tuple[str, ...]:
        """Names that must exist."""
        return tuple(name for name in (self.query, self.key, self.value, self.fused) if name)

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names that the output projection may have."""
        return (self.output,) if isinstance(self.output, str) else self.output


_OUTPUTS = ("o_proj", "out_proj", "c_proj", "dense", "o", "out_lin", "proj", "Wo", "wo", "W_o", "to_out.0", "to_out",
            "linear_out", "out", "proj_out", "attn_output", "attn_out", "attn_o", "../output.dense")  # fmt: skip


def _separate(query: str, key: str, value: str) -> AttentionNames:
    return AttentionNames(query=query, key=key, value=value, output=_OUTPUTS)


def _fused(name: str, query: str | None = None, **how: object) -> AttentionNames:
    return AttentionNames(fused=name, query=query, output=_OUTPUTS, **how)  # pyright: ignore[reportArgumentType]


#: The names in use, most specific first. Read in transformers 5.23, timm 1.0.31 and torch 2.13.
KNOWN: tuple[AttentionNames, ...] = (
    _separate("q_proj", "k_proj", "v_proj"),  # llama, mistral, qwen, gemma, opt, gpt-j, clip, whisper, bart, vit, …
    _separate("query", "key", "value"),  # bert, roberta
    _separate("q_lin", "k_lin", "v_lin"),  # distilbert
    _separate("q", "k", "v"),  # t5
    _separate("q_proj_weight", "k_proj_weight", "v_proj_weight"),  # nn.MultiheadAttention with kdim or vdim
    _separate("to_q", "to_k", "to_v"),  # diffusers, lucidrains
    _separate("query_proj", "key_proj", "value_proj"),
    _separate("wq", "wk", "wv"),
    _separate("Wq", "Wk", "Wv"),
    _separate("W_q", "W_k", "W_v"),
    _separate("linear_q", "linear_k", "linear_v"),
    _separate("attn_q", "attn_k", "attn_v"),  # GGUF
    _fused("attn_qkv"),  # GGUF
    _fused("c_attn", query="q_attn"),  # gpt-2's cross-attention
    _fused("c_attn", layout="interleaved", when=("multi_query", None)),  # gpt_bigcode
    _fused("c_attn"),  # gpt-2, nanoGPT
    _fused("query_key_value", layout="interleaved"),  # gpt_neox, bloom, falcon, persimmon
    _fused("qkv_proj", order="qvk", blocks=4, when=("model_type", "codegen")),
    _fused("qkv_proj"),  # phi-3
    _fused("Wqkv"),  # mpt, modernbert, dbrx
    _fused("in_proj_weight"),  # nn.MultiheadAttention
    _fused("qkv"),  # timm
    _fused("kv", query="q"),  # timm's attention pooling
    _fused("kv", query="to_q"),
)

#: Attributes of a module or its configuration: number of heads, head size, number of key heads.
NUM_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "nhead", "heads")
HEAD_DIM = ("head_dim", "attention_head_size", "head_size", "key_value_proj_dim", "d_head", "d_kv", "dim_head")
KEY_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_kv_head", "kv_heads")

#: Settings, or a submodule, that only models with rotary positions have.
ROTARY = ("rope_parameters", "rope_theta", "rope_scaling", "rotary_emb_base", "rotary_dim", "rotary_pct", "rotary_emb")
#: Model types whose rotary planes are neighbouring coordinates; elsewhere they are half a head apart.
INTERLEAVED = ("gptj", "codegen", "cohere", "cohere2", "glm", "glm4", "llama4_text", "ernie4_5")
QK_NORM = re.compile(r"(attn_)?(q|k|query|key)_?(layer)?_?(norm|ln)|norm_(q|k)|(q|k)_layernorm")

#: DeepSeek's multi-head latent attention, in transformers and in GGUF.
LATENT = ("kv_a_proj_with_mqa", "kv_b_proj", "attn_kv_a_mqa", "attn_kv_b", "attn_k_b", "attn_v_b")

#: Model types with rotary positions that older configurations do not mention.
ROTARY_TYPES = ("llama", "mistral", "mixtral", "qwen", "gemma", "phi", "gpt_neox", "gptj", "codegen", "falcon", "olmo",
                 "persimmon", "stablelm", "cohere", "glm", "granite", "starcoder2", "modernbert", "dbrx")  # fmt: skip

#: Sub-configuration of a model with several parts, by a word in the path of a module.
PARTS = {"vision": "vision_config", "visual": "vision_config", "image": "vision_config", "audio": "audio_config",
          "text": "text_config", "language": "text_config"}  # fmt: skip

#: Model types that initialise the projections into the residual stream by 1/√(2 · layers) smaller.
SCALED_OUTPUT = ("gpt2", "gpt_bigcode")
