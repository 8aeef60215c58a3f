"""Attention whose matrices are products of factors, or of experts.

* **Latent** (DeepSeek V2 and V3): two factors each for queries, keys and values, and a part of their own for the
  positions.
* **Latent with one key head** (DeepSeek V4), which is the value too.
* **Experts** (JetMoE): W_Q and W_O of each, with keys and values that all share.
"""

from __future__ import annotations

from collections.abc import Sequence

from rankdecay.attention.layer import Role, Window
from rankdecay.attention.model_types import (
    HEAD_DIM,
    LATENT_WITHOUT_ROTARY,
    NUM_HEADS,
)
from rankdecay.attention.module.between import (
    why_no_value_product,
)
from rankdecay.attention.module.found import Found, Place
from rankdecay.attention.module.heads import (
    heads_error,
)
from rankdecay.attention.module.projections import ModuleParameters, divide
from rankdecay.attention.module.settings import NotHandled
from rankdecay.attention.names import EXPERTS, LatentNames, may_be_output
from rankdecay.attention.products import Rotary


def read_latent(module: ModuleParameters, names: LatentNames) -> Found:
    """Locate the factors of multi-head latent attention.

    Raises:
        NotHandled: If names, shapes and settings do not agree.
    """
    name = {field: module.parameter(child) for field, child in names._asdict().items()}
    kv_path = module.shared_kv_path()
    shared = name["shared"] or (kv_path and module.parameter(kv_path + names.shared))
    query, split, output = name["second"] or name["query"], name["split"], name["output"] or _only_output(module)
    if not (query and split and output):
        expected = {f"{names.query} or {names.second}": query, names.split: split, names.output: output}
        missing = [child for child, present in expected.items() if not present]
        raise NotHandled(f"multi-head latent attention whose {', '.join(missing)} has another name: give it this one")
    parameters = [query, split, output, *(part for part in (shared, name["first"]) if part)]
    module.check_shapes(parameters)
    heads = module.number(NUM_HEADS)
    if heads is None:
        raise heads_error(module, names.split, module.shape(split)[0], None, None)
    (rows, latent), across = module.shape(split), module.shape(output)[1]
    value_dim = divide(across, heads, f"the width of {names.output}", "the heads")
    plain_dim = divide(rows, heads, f"the height of {names.split}", "the heads") - value_dim
    head_dim = divide(module.shape(query)[0], heads, "the height of the query's projection", "the heads")
    turned_dim = head_dim - plain_dim
    if plain_dim <= 0 or turned_dim < 0 or (shared and module.shape(shared)[0] != latent + turned_dim):
        raise NotHandled(
            f"multi-head latent attention whose factors disagree: {heads} heads of {head_dim} queries, and of "
            f"{plain_dim} keys and {value_dim} values from a latent of {latent}"
        )
    both = plain_dim + value_dim
    places: dict[Role, Place] = {
        "query": module.place(query, Window("rows", 0, plain_dim, head_dim, plain_dim, heads)),
        "key": module.place(split, Window("rows", 0, plain_dim, both, plain_dim, heads)),
        "value": module.place(split, Window("rows", plain_dim, both, both, value_dim, heads)),
        "output": module.place(output, Window("columns", 0, across, across, value_dim)),
    }
    if shared:
        places["latent"] = module.place(shared, Window("rows", 0, latent, latent + turned_dim, latent))
    if shared and turned_dim:
        window = Window("rows", latent, latent + turned_dim, latent + turned_dim, turned_dim)
        places["query_rotary"] = module.place(query, Window("rows", plain_dim, head_dim, head_dim, turned_dim, heads))
        places["key_rotary"] = module.place(shared, window)
    if name["second"] and name["first"]:
        lines = module.shape(name["first"])[0]
        places["query_factor"] = module.place(name["first"], Window("rows", 0, lines, lines, lines))
    neighbours = names.first == "wq_a" or module.is_interleaved()  # DeepSeek's own code multiplies complex numbers
    turned = turned_dim and module.setting(("model_type",)) not in LATENT_WITHOUT_ROTARY
    rotary = Rotary(turned_dim // 2 * 2, neighbours) if turned else None
    # in DeepSeek's own code q_norm is what q_a_layernorm is elsewhere, between the factors
    qk_norm = bool(module.has_qk_norm()) and names.first != "wq_a"
    no_value_product = why_no_value_product(module, places)
    return Found(module.path, places, plain_dim, rotary, qk_norm, no_value_product=no_value_product)


def _only_output(module: ModuleParameters) -> str | None:
    """Return the one matrix of a module that is called as outputs are; None if there are several, or none."""
    outputs = [
        name
        for child in module.source.children(module.path)
        if may_be_output(child) and (name := module.parameter(child))
    ]
    return outputs[0] if len(outputs) == 1 else None


def read_shared_latent(module: ModuleParameters, names: Sequence[str]) -> Found:
    """Locate DeepSeek V4's matrices: one key head that is the value too, and two factors of queries and outputs.

    Raises:
        NotHandled: If names, shapes and settings do not agree.
    """
    first, second, shared, mix, expand = (module.parameter(child) for child in names)
    heads = module.number(NUM_HEADS)
    if not (first and second and shared and mix and expand and heads):
        raise NotHandled("latent attention with one key head whose factors have other names")
    module.check_shapes([first, second, shared, mix, expand])
    head_dim, lines = module.shape(shared)[0], module.shape(second)[0]
    if lines != heads * head_dim:
        raise NotHandled(f"{second} has {lines} rows, where {heads} heads of {head_dim} have {heads * head_dim}")
    key = module.place(shared, Window("rows", 0, head_dim, head_dim, head_dim))
    places: dict[Role, Place] = {
        "query": module.place(second, Window("rows", 0, lines, lines, head_dim)),
        "key": key,
        "value": key,
    }
    factors: dict[Role, str] = {"query_factor": first, "output_factor": mix, "output_mix": expand}
    for role, name in factors.items():
        rows = module.shape(name)[0]
        groups = (module.number(("o_groups",)) or 1) if role == "output_factor" else 1
        places[role] = module.place(name, Window("rows", 0, rows, rows, divide(rows, groups, name, "its groups")))
    turned = module.number(("qk_rope_head_dim",))
    rotary = Rotary(turned // 2 * 2, module.is_interleaved()) if turned else module.rotary(head_dim)
    return Found(module.path, places, head_dim, rotary, qk_norm=True)


def read_experts(module: ModuleParameters) -> Found:
    """Locate JetMoE's matrices: W_Q and W_O of each expert, and keys and values that all experts share.

    Raises:
        NotHandled: If names, shapes and settings do not agree.
    """
    query, shared, output = (module.parameter(child) for child in EXPERTS)
    head_dim = module.number(HEAD_DIM)
    assert query is not None and shared is not None and output is not None  # noqa: PT018
    if not head_dim or len(module.shape(query)) != 3 or len(module.shape(output)) != 3:
        raise NotHandled(f"the heads of the experts in {query} are of unknown size; pass head_dim=...")
    experts, lines, _ = module.shape(query)
    if lines % head_dim or module.shape(shared)[0] != 2 * lines or module.shape(output)[2] != lines:
        raise NotHandled(f"{lines} rows of each expert's queries do not split into the heads of {shared}")
    places: dict[Role, Place] = {
        "query": module.place(query, Window("rows", 0, lines, lines, head_dim, experts, stacked=True)),
        "key": module.place(shared, Window("rows", 0, lines, 2 * lines, head_dim)),
        "value": module.place(shared, Window("rows", lines, 2 * lines, 2 * lines, head_dim)),
        "output": module.place(output, Window("columns", 0, lines, lines, head_dim, experts, stacked=True)),
    }
    return Found(
        module.path,
        places,
        head_dim,
        module.rotary(head_dim),
        bool(module.has_qk_norm()),
        "strided",
        frequencies=module.frequencies(),
        planes_assumed=not module.states_planes(),
    )
