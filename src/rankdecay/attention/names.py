"""Names of attention's projections, and of what stands beside them.

Separate projections are recognised by a grammar, not by a list: three names that differ in one word alone, which says
query, key or value (:func:`spellings`). Fused ones are listed in :data:`FUSED`, since a name does not say in which
order they hold queries, keys and values. A module whose names look like queries and keys to this grammar, and which no
row reads, is reported to the user (:mod:`rankdecay.attention.locate`).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

from rankdecay.attention.layer import Role
from rankdecay.attention.products import Grouping
from rankdecay.checks import check_name, check_number

Layout = Literal["contiguous", "interleaved", "alternating"]
_ORDERS = ("qkv", "qvk", "kqv", "kvq", "vqk", "vkq")
Planes = Literal["none", "half", "interleaved"]


@dataclass(frozen=True)
class AttentionNames:
    """Names of the projections in one family of attention modules, relative to the module.

    Give separate ``query``, ``key`` and ``value``; or ``fused`` alone for all three in one parameter; or ``query`` and
    ``fused`` for keys and values in one; or ``fused`` and ``value`` for queries and keys in one. A name is a submodule
    with a ``weight`` (``"q_proj"``), or a parameter itself (``"q_proj_weight"``). A parameter of three dimensions is a
    stack of one matrix per head, (heads, in, head_dim) for queries, keys and values and (heads, head_dim, out) for the
    output.

    Attributes:
        query: name of the query projection.
        key: name of the key projection.
        value: name of the value projection.
        fused: name of the projection that holds several of them.
        output: names the output projection may have, the first that exists and fits counts; ``"../output.dense"``
            starts one level higher. Empty if there is none.
        order: what the fused projection holds, and in which order: ``"qkv"``, ``"qvk"``, ``"kv"``, …
        layout: of the fused projection: ``"contiguous"``; ``"interleaved"`` by key head; or ``"alternating"``, a row of
            each in turn, as ``view(batch * heads, head_dim, 3, -1)`` takes them (``module.windows``).
        blocks: for a contiguous layout that repeats: how many times (CodeGen: 4).
        when: the row counts only if the model's configuration has this attribute with this value, or with one of these
            values if it is a tuple, or has it at all if it is None.
        num_heads: number of query heads, if the module does not say it itself.
        head_dim: size of a head, if it is not height / num_heads.
        rotary: how positions turn queries and keys: ``"none"``, planes ``"half"`` a head apart as in Llama's
            ``rotate_half``, or ``"interleaved"`` neighbours; None to read it from the model's settings.
        rotary_dims: how many coordinates of a head are turned; by default all.
        qk_norm: whether queries and keys are normalised before their product; None to read it from the module.
        transposed: whether the weights are stored (in, out), as ``x @ W`` takes them; None to tell it from the module's
            class, its biases and the shapes.
        grouping: which of g key heads query head i of h meets: ``"consecutive"``, i // (h / g), or ``"strided"``,
            i mod g.

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
    order: Literal["qkv", "qvk", "kqv", "kvq", "vqk", "vkq", "kv", "vk", "qk", "kq"] = "qkv"
    layout: Layout = "contiguous"
    blocks: int = 1
    when: tuple[str, object] | None = None
    num_heads: int | None = None
    head_dim: int | None = None
    rotary: Planes | None = None
    rotary_dims: int | None = None
    qk_norm: bool | None = None
    transposed: bool | None = None
    grouping: Grouping = "consecutive"

    def __post_init__(self) -> None:
        given = {name for name in ("query", "key", "value", "fused") if getattr(self, name)}
        if given not in ({"query", "key", "value"}, {"fused"}, {"query", "fused"}, {"fused", "value"}):
            raise ValueError(
                f"AttentionNames got {', '.join(sorted(given)) or 'no projection'}; expected query, key and value, "
                "or fused alone, or query and fused (keys and values in one), or fused and value (queries and keys in "
                "one)."
            )
        if len({self.query, self.key}) == 1 and self.query:
            raise ValueError(f"AttentionNames got query={self.query!r} and key={self.key!r}; they are two projections.")
        if self.rotary_dims is not None and self.rotary in (None, "none"):
            raise ValueError(f"rotary_dims={self.rotary_dims} needs rotary='half' or 'interleaved'.")
        if len(given) == 2 and len(self.order) != 2:
            object.__setattr__(self, "order", "kv" if self.query else "qk")
        if self.fused:
            orders = ("kv", "vk") if self.query else ("qk", "kq") if self.value else _ORDERS
            check_name("order", self.order, orders)
        check_name("layout", self.layout, ("contiguous", "interleaved", "alternating"))
        check_name("grouping", self.grouping, ("consecutive", "strided"))
        if self.rotary is not None:
            check_name("rotary", self.rotary, ("none", "half", "interleaved"))
        for name in ("num_heads", "head_dim", "blocks", "rotary_dims"):
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


# ---- the grammar of names --------------------------------------------------------------------------------

#: How a name says query, key, value and output.
_WORDS = (
    ("q", "k", "v", "o", "kv"), ("query", "key", "value", "output", "key_value"), ("Q", "K", "V", "O", "KV"),
    ("queries", "keys", "values", "outputs", "keys_values"), ("qs", "ks", "vs", "os", "kvs"),
    ("Query", "Key", "Value", "Output", "KeyValue"),
)  # fmt: skip
#: A word stands for itself: "to_q", "q_proj", "wq", "toQ"; but not "sequence" or "qkv".
_BEFORE = r"(?:(?<![A-Za-z])|(?<=\b[wW])|(?<=_[wW])|(?<=[a-z](?=[A-Z]))|(?<=\bto)(?=quer|key|val|out))"
_AFTER = r"(?![a-z])"
#: Parts of names of what is no projection, though it may have the shape of one.
_NO_PROJECTION = re.compile(
    r"norm|bias|token|embed|pool|mapper|(?<![a-z])emb(?![a-z])|pos(?![a-z])|scale|lora|lambda|(?<![a-z])ln(?![a-z])"
)
#: Keys and values that are learned numbers, not projected: "mem_kv", "null_k".
LEARNED = re.compile(r"(mem(ory)?|null|bias|learned)_?(k|v|kv|keys?|values?|keys?_values?)s?")
#: "lin_out", "toOut", "OutProj"; not "output_gate".
_OUTPUT_WORD = re.compile(
    r"(.*(_|[a-z](?=O)))?[oO]ut(put)?(_?(proj(ection)?|lin(ear)?|layer|fc|dense|conv|map|w|weight))?", re.IGNORECASE
)
#: All of it in one parameter: "qkv_proj", "Wqkv", "query_key_value", "to_kv", with a gate "gqkv_proj"; and names that
#: do not say it.
_FUSED_WORD = re.compile(
    r"(?<![a-z])(?:w|to|g)?(qkv|kqv|qvk|vqk|vkq|kvq|q_k_v|kv|vk|qk|kq|quer(?:y|ies)_keys?(?:_values?)?|keys?_values?)"
    r"(?:[a-z]?(?![a-z]))|^c_attn$|^att_proj$|^in_proj_weight$|^w_pack$",
    re.IGNORECASE,
)

#: A projection with a norm before it in one module, as TransformerEngine's LayerNormLinear.
_NORMED = re.compile(r"(layer_?norm|(rms_?)?norm|ln)_(qkv|query_key_value)")


class Spelling(NamedTuple):
    """Names that differ in one word alone, of the projections of one attention."""

    query: str
    key: str
    value: str
    output: str
    key_value: str


#: Letter of query, key and value where a name spells the word.
LETTERS = {"query": "q", "key": "k", "keys": "k", "value": "v", "values": "v"}


def words_of(name: str, digits: bool = False) -> list[str]:
    """Split a name into its words, in lower case.

    Args:
        name: in snake case or camel case.
        digits: whether digits are part of a word; by default they separate words.

    Example:
        >>> words_of("linear_a_q"), words_of("toQuery2"), words_of("norm2_q", digits=True)
        (['linear', 'a', 'q'], ['to', 'query'], ['norm2', 'q'])
    """
    split = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()
    return re.findall(r"[a-z0-9]+" if digits else r"[a-z]+", split)


#: Longest name of a projection in its module, in characters: what is done with one grows with the square.
_LONGEST = 128


@lru_cache(maxsize=4096)  # the layers of a model use a few names again and again
def spellings(child: str, of: Literal["query", "key", "value"] = "query") -> tuple[Spelling, ...]:
    """Return the names that belong together if ``child`` is the query's, or that of another.

    Example:
        >>> list(spellings("q_proj"))
        [Spelling(query='q_proj', key='k_proj', value='v_proj', output='o_proj', key_value='kv_proj')]
    """
    return tuple(_spelled(child, of)) if len(child) <= _LONGEST else ()


def _spelled(child: str, of: Literal["query", "key", "value"]) -> Iterator[Spelling]:
    if _NO_PROJECTION.search(child):
        return
    for words in _WORDS:
        for found in re.finditer(_BEFORE + words[Spelling._fields.index(of)] + _AFTER, child):
            before, after = child[: found.start()], child[found.end() :]
            yield Spelling(*(before + word + after for word in words))


#: Words of query, key and value that other letters may stand beside without a gap: "qproj", "fcq", "queryproj".
_GLUED = (("q", "k", "v"), ("Q", "K", "V"), ("query", "key", "value"), ("Query", "Key", "Value"))


def glued(children: Collection[str]) -> tuple[list[str], list[str]]:
    """Return names that are one but for q and k, though neither says it as a word, and stand beside values.

    Args:
        children: names of the projections of one module.

    Returns:
        Those of queries, and those of keys in the same order.

    Example:
        >>> glued(["qproj", "kproj", "vproj"]), glued(["quality", "kuality", "volume"])
        ((['qproj'], ['kproj']), ([], []))
    """
    among, queries, keys = set(children), list[str](), list[str]()
    has_values = any(map(is_value_like, among))
    for child in children:
        if len(child) > _LONGEST or _NO_PROJECTION.search(child):
            continue
        for query, key, value in _GLUED:
            for found in re.finditer(query, child):
                before, after = child[: found.start()], child[found.end() :]
                if before + key + after in among and (has_values or before + value + after in among):
                    queries.append(child)
                    keys.append(before + key + after)
    return queries, keys


def is_table(child: str) -> bool:
    """Whether a name is that of positions, biases, norms and the like, which may have the shape of a projection."""
    return bool(_NO_PROJECTION.search(child))


def is_query_like(child: str) -> bool:
    """Whether a name says that it is a projection to queries."""
    return not is_fused_like(child) and any(True for _ in spellings(child))


def is_key_like(child: str) -> bool:
    """Whether a name says that it is a projection to keys."""
    return not is_fused_like(child) and any(True for _ in spellings(child, of="key"))


def is_value_like(child: str) -> bool:
    """Whether a name says that it is a projection to values."""
    return not is_fused_like(child) and any(True for _ in spellings(child, of="value"))


@lru_cache(maxsize=4096)
def is_input_like(child: str) -> bool:
    """Whether a name says that it is a projection to any of queries, keys and values."""
    return any(says(child) for says in (is_query_like, is_key_like, is_value_like, is_fused_like))


def is_output_like(child: str) -> bool:
    """Whether a name says that it is a projection to the attention's output."""
    return len(child) <= _LONGEST and bool(_OUTPUT_WORD.fullmatch(child)) and not _NO_PROJECTION.search(child)


def is_query_key_norm(child: str) -> bool:
    """Whether a name says that it is a norm of queries or keys: "q_norm", "ln_query", "qk_layernorm", "k_rmsnorm".

    Or the scale of cosine attention, "logit_scale" (Swin 2).
    """
    if child == "logit_scale":
        return True
    words = set(words_of(child, digits=True))
    if "a" in words:
        return False  # of the first factor of latent attention, before the queries
    return bool(words & {"q", "k", "qk", "query", "key", "queries", "keys"}) and any(
        re.fullmatch(r"norm|ln|rms|(layer|rms|l2|head)?norm(alize|alise|ed)?s?|layernorm", word) for word in words
    )


#: Words that say what a projection or a norm is, and not of which of several attentions.
_USUAL_WORDS = frozenset(
    """
    q k v qk kv qkv wq wk wv wqkv query key value queries keys values to w proj projection linear lin fc layer dense
    pack norm norms ln rms l layernorm rmsnorm normalize head heads attn att attention weight in c self conv
    """.split()  # noqa: SIM905 - a table of words
)


@lru_cache(maxsize=4096)
def own_words(child: str) -> frozenset[str]:
    """Return the words by which a name tells one of several attentions in a module: "add" of "add_q_proj"."""
    return frozenset(words_of(child)) - _USUAL_WORDS


def are_of_one(some: frozenset[str], others: frozenset[str]) -> bool:
    """Whether two names tell the same of several attentions, as "add_q_proj" and "norm_added_q" do."""
    if not some or not others:
        return not some and not others
    return any(
        one == other or (min(len(one), len(other)) > 2 and (one.startswith(other) or other.startswith(one)))
        for one in some
        for other in others
    )


#: What one of two factors is called, of whatever it is; and of "w_uq", "W_DKV".
_FACTORS = frozenset(["down", "up", "a", "b", "compress", "decompress", "compressed", "latent"])
_UP_OR_DOWN = re.compile(r"[ud](?=q|k|v)")


@lru_cache(maxsize=4096)
def factor_of(child: str) -> frozenset[str]:
    """Return of which of q, k and v a child is one of two factors, by its name; of none if it is one of DeepSeek's.

    Example:
        >>> sorted(factor_of("kv_down_proj")), sorted(factor_of("W_UQ")), sorted(factor_of("q_proj"))
        (['k', 'v'], ['q'], [])
    """
    if child in _KNOWN_FACTORS or len(child) > _LONGEST:
        return frozenset()
    words = words_of(child)
    bare = [_UP_OR_DOWN.sub("", word, count=1) if _UP_OR_DOWN.match(word) else word for word in words]
    if bare == words and not _FACTORS & set(words):
        return frozenset()
    of = (LETTERS.get(word, word.removeprefix("w")) for word in bare)
    return frozenset(letter for word in of if word and not word.strip("qkv") for letter in word)


@lru_cache(maxsize=4096)
def projects_to(child: str) -> frozenset[str]:
    """Return to which of q, k and v a name says that it projects, of those that are no factors.

    Example:
        >>> sorted(projects_to("to_kv")), sorted(projects_to("q_proj")), sorted(projects_to("o_proj"))
        (['k', 'v'], ['q'], [])
    """
    if child in _KNOWN_FACTORS:
        return frozenset()
    says = {"q": is_query_like, "k": is_key_like, "v": is_value_like}
    words = (LETTERS.get(word, word) for word in words_of(child)) if is_fused_like(child) else ()
    fused = "".join(word for word in words if not word.strip("qkv"))
    return frozenset(letter for letter, like in says.items() if like(child) or letter in fused)


def is_of_stream(child: str, among: Collection[str]) -> bool:
    """Whether "a" or "b" in a name is one of two streams and not of two factors: it has queries, keys and values.

    Args:
        child: name of a projection.
        among: names of the children of its module.
    """
    if _FACTORS & set(words_of(child)) - {"a", "b"}:
        return False
    roles: tuple[Literal["query", "key", "value"], ...] = ("query", "key", "value")
    return any(
        spelling.query in among and spelling.key in among and spelling.value in among
        for role in roles
        for spelling in spellings(child, role)
    )


def is_value_norm(child: str) -> bool:
    """Whether a name says that it is a norm of values: "v_norm", "value_layernorm"."""
    return bool(re.fullmatch(r"(v|value|values)_(rms_?|layer_?)?norm", child))


def is_gate(child: str) -> bool:
    """Whether a name says that it gates what heads give: "gate_proj", "to_v_gate", "linear_g", "attn_gate".

    If it has as many rows as they give: one for each head is a factor of the head, and some are of another part.
    """
    words = set(words_of(child, digits=True))
    gates = words & {"g", "wg", "gate", "gates", "gating"}
    of_others = words & {"q", "k", "query", "key", "up", "down", "mlp", "ff", "ffn", "ffw", "moe", "router", "expert"}
    return bool(gates) and not of_others and not _NO_PROJECTION.search(child)


def is_query_key_like(child: str) -> bool:
    """Whether a name says that it is a projection to queries and keys, and not to values."""
    return is_fused_like(child) and bool(re.search(r"qk(?!v)|quer(?:y|ies)_keys?(?!_values?)", child, re.IGNORECASE))


def is_fused_like(child: str) -> bool:
    """Whether a name says that it is a projection to several of queries, keys and values."""
    return bool(_NORMED.fullmatch(child) or (_FUSED_WORD.search(child) and not _NO_PROJECTION.search(child)))


#: Names of output projections, in the order they are looked for: in the module, then one and two levels up.
_OUTPUTS = (
    "o_proj", "out_proj", "c_proj", "dense", "o", "out_lin", "proj", "Wo", "wo", "W_o", "to_out.0", "to_out",
    "linear_out", "out", "proj_out", "output_proj", "out_projection", "projection_output", "linear_proj",
    "attn_output", "attn_out", "attention_out", "out_layer", "proj_attn", "output", "output_projection",
    "projection", "projection_layer", "post_proj", "post", "final_proj", "fc", "unify", "unifyheads", "output_linear",
    "../output.dense", "../output", "../dense", "../post", "../proj",
    "../../proj", "../../out_proj", "../../o_proj", "../../c_proj", "../../dense", "../../fc", "../../unify",
    "../proj_out",
)  # fmt: skip


def may_be_output_above(child: str, query: str) -> bool:
    """Whether the output projection of an attention without one may be called so one level higher."""
    word = "|".join(words[3] for words in _WORDS)
    spelled = re.search(f"{_BEFORE}(?:{word}){_AFTER}", child) and not _NO_PROJECTION.search(child)
    return bool(spelled) or child in own_outputs(query) or child == "c_proj" or is_output_like(child)


#: What stands in an output's name where a query's says so, beside the word of the same kind.
_OUTPUT_WORDS = ("out", "output", "o", "proj", "projection")
#: What a query's name may have behind its word that an output's has not: "q_proj_txt" and "out_txt".
_PROJECTION = re.compile(r"^_?(proj(ection)?|lin(ear)?)(?![a-z])")


@lru_cache(maxsize=4096)
def own_outputs(query: str) -> tuple[str, ...]:
    """Return what the output projection may be called that belongs to a query's name and no other.

    Example:
        >>> own_outputs("to_q_t")[:2], "proj_cross" in own_outputs("q_cross"), "out_txt" in own_outputs("q_proj_txt")
        (('to_o_t', 'to_out_t'), True, True)
    """
    found: dict[str, None] = {}
    for words in _WORDS if len(query) <= _LONGEST else ():
        for match in re.finditer(_BEFORE + words[0] + _AFTER, query):
            before, after = query[: match.start()], query[match.end() :]
            capital = words[3][0].isupper()
            for end in dict.fromkeys((after, _PROJECTION.sub("", after))):
                for word in (words[3], *(word.capitalize() if capital else word for word in _OUTPUT_WORDS)):
                    found[before + word + end] = None
    if query.startswith("add_"):  # diffusers
        found["to_add_out"] = None
    return tuple(found)


def may_be_output(child: str) -> bool:
    """Whether an output projection in a module may be called so."""
    return child in _OUTPUTS or is_output_like(child)


def is_another_output(child: str, row: AttentionNames, queries: Collection[str]) -> bool:
    """Whether a name is that of the output of another attention in the module, by that attention's query.

    Args:
        child: the name.
        row: the names of the attention whose output is sought.
        queries: names of the queries of every attention in the module.
    """
    child = child.removesuffix(".0")
    if child in own_outputs(row.query or "") or (row.query is None and child in _OUTPUTS):
        return False
    return any(child in own_outputs(query) for query in queries if query != row.query)


def _outputs(query: str) -> list[str]:
    """Return names of the output of a query: those that only it has, then those that many have."""
    return [*(name for name in own_outputs(query) if name not in _OUTPUTS), *_OUTPUTS]


def separate(query: str, key: str, value: str, output: str) -> AttentionNames:
    """Return the row of three names; the output may be called as they are, or as many are."""
    outputs = dict.fromkeys([output, output.replace("output", "out"), f"../{output}.dense", *_outputs(query)])
    return AttentionNames(query=query, key=key, value=value, output=tuple(outputs))


def query_beside(query: str, fused: str) -> AttentionNames:
    """Return the row of a query projection and one of keys and values together, keys first."""
    return AttentionNames(query=query, fused=fused, output=tuple(_outputs(query)))


def _fused(name: str, query: str | None = None, **how: object) -> AttentionNames:
    return AttentionNames(fused=name, query=query, output=_OUTPUTS, **how)  # pyright: ignore[reportArgumentType]


#: Fused projections whose order is known, most specific first. Read in transformers 5.23, timm 1.0.31 and torch 2.13.
FUSED: tuple[AttentionNames, ...] = (
    _fused("c_attn", query="q_attn"),  # gpt-2's cross-attention
    _fused("c_attn", layout="interleaved", when=("multi_query", None)),  # gpt_bigcode
    _fused("c_attn"),  # gpt-2, nanoGPT
    _fused("query_key_value", when=("multi_query_attention", None)),  # ChatGLM 2 and later
    _fused("query_key_value", layout="interleaved", when=("model_type", (
           "bloom", "falcon", "gpt_neox", "gpt_neox_japanese", "persimmon", "fuyu", "chatglm", "gptj"))),
    _fused("qkv_proj", order="qvk", blocks=4, when=("model_type", "codegen")),
    _fused("qkv", layout="interleaved", when=("attention", "QKVAttentionLegacy")),  # OpenAI's U-Nets, LDM
    _fused("qkv", layout="interleaved", when=("head_first", True)),  # timm's CoAtNet, MaxViT
    _fused("qkv", layout="interleaved", when=("key_dim", None)),  # timm's LeViT, EfficientFormer
    _fused("qkv", layout="interleaved", when=("attention_biases", None)),  # the same in files, and TinyViT
    _fused("queries_keys_values", layout="interleaved", when=("key_dim", None)),  # LeViT
    _fused("keys_values", query="queries", layout="interleaved"),  # LeViT
    _fused("in_proj", layout="interleaved", when=("model_type", "deberta")),
    _fused("kv", query="q", layout="interleaved", when=("key_dim", None)),  # timm's LeViT where it shrinks the image
    _fused("kv", query="q", layout="interleaved", when=("dim_head_qk", None)),  # timm's HaloNet
    _fused("pwise", layout="interleaved", when=("num_keys", 3)),  # timm's LowFormer, CPUBone
    AttentionNames(fused="qk", value="v", output=_OUTPUTS),  # timm's ConViT, TNT
    _fused("qkv_proj"),  # phi-3
    _fused("Wqkv"),  # mpt, modernbert, dbrx
    _fused("in_proj_weight"),  # nn.MultiheadAttention
    _fused("qkv"),  # timm
    _fused("to_qkv"),  # diffusers, lucidrains
    _fused("qkv_linear"),  # LayoutLMv2
    _fused("W_pack"),  # Baichuan
    _fused("attn_qkv"),  # GGUF
    _fused("att_proj"),  # OLMo's own code, Molmo
    _fused("linear_qkv", layout="interleaved", when=("num_query_groups_per_partition", None)),  # Megatron
    _fused("wqkv", layout="interleaved", when=("model_type", ("internlm2", "internvl", "internvl_chat"))),
)  # fmt: skip


def _row(query: str, key: str, value: str, output: str) -> AttentionNames:
    return AttentionNames(query=query, key=key, value=value, output=output)


#: Separate projections whose names differ in more than the one word.
SEPARATE: tuple[AttentionNames, ...] = (
    _row("q_content_proj", "k_content_proj", "v_proj", "o_proj"),  # Conditional DETR, and its files
    _row("sa_qcontent_proj", "sa_kcontent_proj", "sa_v_proj", "self_attn.out_proj"),
    AttentionNames(query="ca_qcontent_proj", key="ca_kcontent_proj", value="ca_v_proj",
                   output=("encoder_attn.out_proj", "cross_attn.out_proj")),
    *(_row(f"{kind}_query_content_proj", f"{kind}_key_content_proj", f"{kind}_value_proj", f"{kind}.output_proj")
      for kind in ("self_attn", "cross_attn")),  # DAB-DETR
    _row("vision_proj", "text_proj", "values_text_proj", "out_vision_proj"),  # Grounding DINO's fusion, and
    _row("text_proj", "vision_proj", "values_vision_proj", "out_text_proj"),  # its other direction
    *(_row("query", f"key_{kind}", f"value_{kind}", "out_proj") for kind in ("protein", "structure", "msa")),  # Evolla
)  # fmt: skip

#: Projections of positions that are added to queries or keys, or stand beside them in each head: DETR and its kin.
POSITIONS: dict[str, Role] = {
    r"(.*_)?(q|query)_?pos_proj": "query_position",
    r"(.*_)?(k|key)_?pos_proj": "key_position",
    r"(.*_)?(q|query)_?pos_sine_proj": "query_sine",
}

#: Norms between the heads and the output projection.
HEADS_NORMS = ("inner_attn_ln", "attn_sub_norm", "o_norm", "attn_norm_before_out", "subln", "sub_ln", "sub_norm",
               "attn_ln", "out_norm", "output_norm", "inner_norm", "heads_norm", "head_norm", "out_ln",
               "o_ln")  # fmt: skip
#: Norms that stand there in the classes below; in others they may as well stand before the projections, or at the end.
PLAIN_NORMS = ("norm", "ln", "layer_norm", "layernorm", "attn_norm", "post_norm", "norm_out")
#: Classes of timm whose norm of the first name, which ``scale_norm`` asks for, stands before the output projection.
NORM_OF_HEADS = (
    "timm.layers.attention.Attention", "timm.layers.attention.AttentionRope", "timm.models.eva.EvaAttention",
    "timm.models.vision_transformer.Attention",
)  # fmt: skip
#: Classes that add what their heads give to a network of it, of which the output projection is part: Set Transformer's.
OUTPUT_BESIDE = re.compile(r"\.MAB$")
#: Children that say what else stands there.
BETWEEN = {
    "v_sconv": "convolves values over tokens",
    "dt_proj": "takes from its values which tokens are seen",  # Doge
    "queries_keys_values": "puts an activation before the output projection",  # LeViT
    "keys_values": "puts an activation before the output projection",
}
#: Parameters that scale queries or keys, or their scores: coordinate by coordinate if they have as many numbers.
SCALES = re.compile(r"sqk|((q|k|qk|query|key)_?)?(per_dim_)?(scale|scaling|scales|temperature)")
#: Convolutions behind a projection to queries, keys and values: Primer's, Canon's, Restormer's. What they are of.
CONVOLUTIONS = re.compile(
    r"(?P<of>qkv|qk|kv|q|k|v|query|key|value)s?_?(d|dw|s|short|depthwise)?_?conv(olution)?(1d|2d|s)?"
)
#: What is added to queries before they meet keys, and not before they meet positions: Transformer-XL, conformers,
#: Enformer.
QUERY_BIASES = ("bias_u", "pos_bias_u", "u_bias", "r_w_bias", "rel_content_bias")
#: Matrices that mix the scores of heads before their softmax, not behind it: talking heads of CaiT and x-transformers.
HEAD_MIXERS = re.compile(r"mix_heads_pre_attn|(pre_softmax|pre)_talking_heads?|talking_heads?_pre(_softmax)?|proj_l")

_RECURRENT = "a delta or linear attention layer: a recurrent state takes the place of scores of queries and keys"
_FEATURES = "linear attention: features of queries and keys take the place of a softmax over scores"
_LIGHTNING = "lightning attention: linear, without a softmax over scores of queries and keys"
_TEST_TIME = "a layer that is trained by gradient steps on its keys and values, without a softmax over scores"
_DIFFERENCES = "vector attention: a network of differences of queries and keys, not their product, weighs the values"
_DIFFERENTIAL = "differential attention: the difference of two softmaxes, for which queries and keys come in pairs"
#: Marks of modules that have projections called queries and keys, and no scores of theirs in a softmax.
NO_SCORES: dict[str, str] = {
    "A_log": _RECURRENT,
    "dt_bias": _RECURRENT,
    "fast_attention": "Performer: random features take the place of a softmax over scores",
    "inner_attention": "an attention of a library that chooses its kind elsewhere, softmax or linear",
    "q_conv1d": _RECURRENT,
    "ssm_alpha": _RECURRENT,  # GGUF
    "ssm_beta": _RECURRENT,
    "ssm_ba": _RECURRENT,
    "slope_rate": _LIGHTNING,
    "output_gate": _LIGHTNING,
    "forget_gate": _RECURRENT,
    "igate_preact": "an mLSTM: linear attention with a recurrent state",
    "weights_proj": "an indexer: it chooses the tokens that attention looks at",
    "index_qk_proj": "an indexer: it chooses the tokens that attention looks at",
    "w_g": "additive attention: a learned vector, not the keys, weighs the queries",
    "to_q_attn_logits": "additive attention: a learned vector, not the keys, weighs the queries",  # Fastformer
    "wbias": "an attention-free transformer: learned positions, not the queries, weigh the keys",
    "attn_mlp": _DIFFERENCES,  # point transformers
    "fc_gamma": _DIFFERENCES,
    "learnable_ttt_lr_weight": _TEST_TIME,
    "lambda_q1": _DIFFERENTIAL,
    "lambda_a": _DIFFERENTIAL,
    "crpe": "factorised attention: keys go through a softmax without queries",  # timm's CoaT
    "conv_lambda": "a lambda layer: keys go through a softmax without queries",
    "v_gate": "values and a gate are in one projection",  # timm's iFormer
    "aggreg": "linear attention: a ReLU of queries and keys, without a softmax",  # timm's EfficientViT
    "to_qkv_multiscale": "linear attention: a ReLU of queries and keys, without a softmax",  # Sana's autoencoder
    "to_qkv_mlp_proj": "one projection holds queries, keys, values and the hidden layer of an MLP",  # Flux 2
    "query_key": "attention by hashing: queries are their own keys, normalised",
    "gk_proj": "gated linear attention: a recurrent state takes the place of scores of queries and keys",
    "g_norm_swish_gate": "linear attention or retention, without a softmax over scores of queries and keys",
    "conv_qk_depthwise": "convolutions stand between its projections and the scores",
    "feature_map_q": _FEATURES,
    "feature_map_k": _FEATURES,
    "feature_map": _FEATURES,
    "multihead_attn": "its projections lead into those of multihead_attn, which are read",
}
#: The same among classes, whose names end so.
NO_SCORES_CLASSES: dict[str, str] = {
    r"Linear(Self|Cross|Causal)?Att(entio)?n(\dd|Block|Layer)?": "linear attention by its class, without a softmax",
    r"(MultiScale|Gated)?Retention": "retention by its class: a decay by distance takes the place of a softmax",
    r"(Performer|FAVOR)(Self|Cross)?Attention|Performer": "random features take the place of a softmax over scores",
    r"AFT(Full|Simple|Local|Conv)?(Attention)?": "an attention-free transformer: queries are gates, and meet no keys",
    r"(Cosformer|CosFormer|Hydra|LightNet)(Self)?Attention": _FEATURES,
    r"ABCAttention": "linear attention with a bounded memory: its slots stand between queries and keys",
    r"LambdaLayer": "a lambda layer: keys go through a softmax without queries",
    r"TTT(Base|Linear|MLP)|NeuralMemory": _TEST_TIME,
    r"(Gated)?DeltaNet|GatedLinearAttention|Gated(Delta|Slot)\w*|Lightning\w*Attention": _RECURRENT,
}
#: Children that together say so: a retention gates what heads give behind a norm of each.
RETENTION = {"group_norm", "g_proj"}
#: The same among settings, which are not None or False.
NO_SCORES_SETTINGS: dict[str, str] = {
    "autocorrelation_factor": "autocorrelation: its weights are by delay, not by token",
    "use_global": "its queries are tokens of the whole image, for which it has no projection",  # timm's GC ViT
    "dim_qk": "a lambda layer: keys go through a softmax without queries",
}
#: Marks of modules that attend, and have no projections called so.
NOT_READ: dict[str, str] = {
    "sampling_offsets": "deformable attention: its weights come from the queries alone, without keys",
    "lambda_q1": _DIFFERENTIAL,
    "lambda_a": _DIFFERENTIAL,
    # timm's ViT-22B
    "mlp_out_proj": "one projection, in_proj, holds queries, keys, values and the hidden layer of an MLP",
    "qkvs": "a list of fused projections, one for each head, whose input is the result of the head before",
}
#: Classes whose output projection takes the first channel of every head, then the second: heads have no columns of
#: their own.
MIXED_OUTPUT = ("timm.models.nest.Attention",)
#: Classes whose scores are between channels; a learned temperature of (heads, 1, 1) says it, too.
CHANNELS = re.compile(r"ChannelAttention|CrossCovarianceAtt|\.XCA$|\.MDTA$")


class LatentNames(NamedTuple):
    """Names of the factors of multi-head latent attention.

    Attributes:
        query: W_Q, if it has one factor.
        first: the first factor of W_Q, if it has two.
        second: the second.
        shared: to the latent, and to the part of the keys that positions turn.
        split: from the latent to keys and values.
        output: W_O.
    """

    query: str
    first: str
    second: str
    shared: str
    split: str
    output: str


LATENT = (
    LatentNames("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"),  # in transformers
    LatentNames("wq", "wq_a", "wq_b", "wkv_a", "wkv_b", "wo"),  # DeepSeek's own files
    LatentNames("wq", "wq_a", "wq_b", "wkv_a_with_mqa", "wkv_b", "wo"),  # Mistral's
    LatentNames("attn_q", "attn_q_a", "attn_q_b", "attn_kv_a_mqa", "attn_kv_b", "attn_output"),  # GGUF
)


#: DeepSeek V4, in transformers and in its own files: the queries' two factors, keys that are the values, and the
#: outputs' two.
SHARED_LATENT = (
    ("q_a_proj", "q_b_proj", "kv_proj", "o_a_proj", "o_b_proj"),
    ("wq_a", "wq_b", "wkv", "wo_a", "wo_b"),
)
_KNOWN_FACTORS = frozenset(name for row in (*LATENT, *SHARED_LATENT) for name in row)
#: JetMoE: queries of the experts, keys and values of all, outputs of the experts.
EXPERTS = ("experts.input_linear", "kv_proj", "experts.output_linear")
