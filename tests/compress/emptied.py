"""Small models of every causal type, with zeros outside some planes, and their logits beside those of a smaller head.

Weights are large enough that attention decides the logits, gains and biases are random, and every expert is chosen, so
that rounding cannot turn one choice of experts into another.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from rankdecay.attention.module.found import Found
from rankdecay.compress.choice import planes_left
from rankdecay.compress.original import Original, Smaller
from rankdecay.compress.reduction import plane_rows_of
from rankdecay.compress.types import CHECKED
from tests.attention.every_type import SETTINGS

VOCABULARY = 50
HEAD, NEW = 16, 8
LENGTH = 24

#: Switches that have nothing to do with attention.
OTHER_SWITCHES = frozenset(
    """
    use_cache tie_word_embeddings output_hidden_states output_attentions return_dict is_encoder_decoder
    output_router_logits add_cross_attention is_decoder
    """.split()  # noqa: SIM905 - a table of words
)
_MOST = 20_000_000  # parameters of a model that is run


class NotBuilt(Exception):
    """Raised for a type whose small model is not built, with the reason."""


#: Sizes of a small model; those that its configuration has are set.
_SIZES: dict[str, Any] = {
    "hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": HEAD, "num_hidden_layers": 4,
    "intermediate_size": 32, "vocab_size": VOCABULARY, "max_position_embeddings": 64, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "moe_intermediate_size": 16, "num_experts": 4, "num_local_experts": 4,
    "n_routed_experts": 4, "num_experts_per_tok": 4, "num_experts_per_token": 4, "top_k_experts": 4, "n_group": 1,
    "topk_group": 1, "sliding_window": 8, "shared_expert_intermediate_size": 16, "n_shared_experts": 1,
    "first_k_dense_replace": 1, "moe_num_experts": 4, "moe_k": 4, "query_pre_attn_scalar": HEAD,
    "shared_intermediate_size": 16, "ffn_hidden_size": 32, "expert_ffn_hidden_size": 16, "attention_bias": True,
    "use_bias": True, "qkv_bias": True, "use_qkv_bias": True, "num_kv_shared_layers": 0,
    "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY, "moe_intermediate_dim": 16,
    "attention_dropout": 0.0, "num_shared_experts": 1, "moe_topk": 4, "use_cla": False, "d_model": 48, "n_heads": 4,
    "n_layers": 4, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32, "encoder_layers": 2, "decoder_layers": 2, "mamba_n_heads": 12, "mamba_d_head": 8,
    "mamba_d_ssm": 96, "mamba_expand": 2, "mamba_d_state": 8, "mamba_num_heads": 12, "mamba_head_dim": 8,
    "ssm_state_size": 8, "n_embd": 48, "n_head": 4, "n_layer": 4, "max_window_layers": 0, "use_sliding_window": True,
}  # fmt: skip


def settings(kind: str, extra: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return what the configuration of a type is made from."""
    from transformers import CONFIG_MAPPING

    base = {key: value for key, value in SETTINGS.get(kind, {}).items() if key not in _SIZES}
    known = CONFIG_MAPPING[kind](**SETTINGS.get(kind, {}))
    fixed = {name for name, value in vars(type(known)).items() if isinstance(value, property) and not value.fset}
    names = ({name for name in _SIZES if hasattr(known, name)} | {"head_dim"}) - fixed
    return base | {name: _SIZES[name] for name in names} | TYPES.get(kind, {}) | (extra or {})


#: Settings of single types.
TYPES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3], "mamba_n_heads": 12, "mamba_d_head": 8, "mamba_n_groups": 1},
    "falcon_h1": {"mamba_d_ssm": 96, "mamba_n_heads": 12, "mamba_d_head": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "num_layers": 4},
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention"] * 2, "mamba_n_heads": 12, "mamba_d_head": 8, "mamba_n_groups": 1,
        "position_embedding_type": "rope",
    },
    "internlm3": {"bias": True, "qkv_bias": True},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "jetmoe": {"num_experts_per_tok": 2},
    "zamba2": {"layer_types": ["mamba", "hybrid"] * 2, "mamba_n_groups": 1, "n_mamba_heads": 12, "mamba_ngroups": 1},
    "zaya": {"num_experts_per_tok": 1},
    "nemotron_h": {"n_groups": 1, "layer_types": ["mamba", "attention", "mlp", "attention"]},
}  # fmt: skip


def build(kind: str, extra: dict[str, Any] | None = None, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Return a model of a type with random weights."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    try:
        config = CONFIG_MAPPING[kind](**settings(kind, extra))
        with torch.device("meta"):
            shapes: Any = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # of whatever a configuration or a class checks
        raise NotBuilt(f"{kind}: {error}") from None
    if sum(parameter.numel() for parameter in shapes.parameters()) > _MOST:
        Original(type(shapes), config)  # which refuses it, as a rule
        raise NotBuilt(f"{kind} is too large to be run")
    _plainly(config)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return randomised(AutoModelForCausalLM.from_config(config, dtype=dtype)).to(dtype)


def original(model: Any) -> Original:
    """Return what is known of a live model."""
    return Original(type(model), model.config)


def cache_bytes(model: Any) -> int:
    """Return the bytes of the keys and values in the cache after a text, counted from its tensors."""
    ids = torch.randint(3, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values
    held = [getattr(layer, part, None) for layer in cache.layers for part in ("keys", "values")]
    return sum(tensor.numel() * tensor.element_size() for tensor in held if isinstance(tensor, Tensor))


def randomised(model: nn.Module) -> nn.Module:
    """Fill all parameters, matrices with entries of about 1/√width and the rest with random numbers."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=1.0 / parameter.shape[-1] ** 0.5)
            else:
                parameter.normal_(mean=1.0 if name.endswith("weight") else 0.0, std=0.3)
    return model.eval()


def emptied(original: Original, model: nn.Module, head_dim: int = NEW) -> dict[str | None, Tensor]:
    """Zero all planes but a random set, and give values and what has no positions a low rank; return the set."""
    generator = torch.Generator().manual_seed(1)
    kept = {}
    for key, planes in original.turned().items():
        left = planes_left(planes, original.head_dim, head_dim)
        kept[key] = torch.randperm(planes, generator=generator)[:left].sort().values
    state = dict(model.named_parameters(remove_duplicate=False))
    for number, found in enumerate(original.skeleton.found):
        turned = 0
        if found.rotary is not None:
            planes = kept[original.skeleton.rope_key(number)]
            turned = found.rotary.dims
            rows = torch.ones(turned, dtype=torch.bool)
            rows[plane_rows_of(found.rotary, planes)] = False
            for role in ("query", "key"):
                _change(found, role, state, lambda heads, gone=rows: _zeroed(heads, gone.nonzero()[:, 0]))
            rank = head_dim - 2 * len(planes)
        else:
            rank = head_dim
        if turned < found.head_dim:
            if found.qk_norm:
                gone = torch.randperm(found.head_dim - turned, generator=generator)[rank:] + turned
                for role in ("query", "key"):
                    _change(found, role, state, lambda heads, gone=gone: _zeroed(heads, gone))
            else:
                _change(found, "key", state, lambda heads, r=rank, t=turned: _low(heads, t, r))
        _change(found, "value", state, lambda heads: _low(heads, 0, head_dim))
    return kept


def _zeroed(heads: Tensor, rows: Tensor) -> Tensor:
    heads = heads.clone()
    heads[:, rows] = 0
    return heads


def _low(heads: Tensor, first: int, rank: int) -> Tensor:
    """Make the rows from the first on combinations of some of them, of the same size."""
    heads = heads.clone()
    basis = heads[:, first : first + rank]
    mix = torch.randn(heads.shape[1] - first, rank, generator=torch.Generator().manual_seed(2))
    heads[:, first:] = torch.linalg.qr(mix).Q.to(heads.dtype) @ basis * (heads.shape[1] / rank) ** 0.5
    return heads


def _change(found: Found, role: Any, state: dict[str, Any], change: Any) -> None:
    """Apply a function to the heads of a matrix with its bias as last column."""
    place = found.places[role]
    parameter = state[place.parameter].data
    heads = place.window.heads(parameter)
    if place.bias is None:
        place.window.write(parameter, change(heads))
        return
    assert place.bias_window is not None
    window = replace(place.bias_window, transposed=False, stacked=False)
    bias = state[place.bias].data
    column = window.vector(bias).reshape(*heads.shape[:2], 1)
    new = change(torch.cat([heads, column], dim=-1))
    place.window.write(parameter, new[..., :-1])
    window.write(bias[:, None], new[..., -1:])


def smaller(original: Original, model: nn.Module, kept: dict[str | None, Tensor], head_dim: int = NEW) -> Smaller:
    """Return the smaller model of a live one."""
    return original.smaller(head_dim, kept, original.config.to_dict())


def with_weights(small: Smaller, model: nn.Module) -> Any:
    """Return the smaller model with its weights, which runs the same way."""
    state = model.state_dict()
    made: Any = small.model(lambda name: state[name], None, lambda done: None).to(next(model.parameters()).dtype).eval()
    _plainly(made.config)
    return made


def _plainly(config: Any) -> None:
    """Let a model run without kernels, which have no float64."""
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"


def copy_frequencies(model: nn.Module, small: nn.Module, kept: dict[str | None, Tensor]) -> None:
    """Give the smaller model the very frequencies of the original."""
    for old, new in zip(_ropes(model), _ropes(small), strict=True):
        for name, _ in list(new.named_buffers(recurse=False)):
            key = name.removesuffix("inv_freq").removesuffix("original_").rstrip("_") or None
            setattr(new, name, getattr(old, name)[kept[key]].clone())


def _ropes(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if any(n.endswith("inv_freq") for n, _ in m.named_buffers(recurse=False))]


def error(one: Tensor, other: Tensor) -> float:
    """Return the largest difference beside the largest logit."""
    return float((one.double() - other.double()).abs().max() / one.double().abs().max())


class InFloat64(TorchFunctionMode):
    """Lets a class compute in float64 what it casts to float32: norms, softmax, sines."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if getattr(func, "__name__", "") == "float":
            return args[0].double()
        args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
        kwargs = {name: torch.float64 if value is torch.float32 else value for name, value in kwargs.items()}
        return func(*args, **kwargs)


def logits(model: Any, length: int = LENGTH) -> Tensor:
    """Return the logits of a batch of two random texts."""
    ids = torch.randint(3, VOCABULARY, (2, length), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def check_same(model: Any, small: Any, length: int = LENGTH) -> None:
    """Check that logits are equal to 1e-5 of the largest; where float32 rounds more than that, those of float64.

    torch without vector instructions sums one number after another, which rounds more.
    """
    found = error(logits(model, length), logits(small, length))
    if 1e-5 <= found < 5e-5:
        with in_float64():
            found = error(*(logits(copy.deepcopy(one).double(), length) for one in (model, small)))
    assert found < 1e-5


@contextmanager
def in_float64() -> Iterator[None]:
    """Compute everything in float64."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with InFloat64():
            yield
    finally:
        torch.set_default_dtype(default)


@dataclass(frozen=True)
class Comparison:
    """Logits of a small model beside those with a smaller head, of which nothing but zeros went.

    Attributes:
        float32: the largest difference beside the largest logit, in float32.
        float64: the same in float64, with the frequencies of the original; norms, sines and the softmax of most classes
            are of float32 even then. NaN where the class does not run in float64.
        algebra: the same with those in float64, too.
        sensitivity: what a change of the keys by a hundredth does: whether attention matters at all.
        cache: bytes of the smaller model's cache beside the original's.
    """

    float32: float
    float64: float
    algebra: float
    sensitivity: float
    cache: float


def compared(kind: str, extra: dict[str, Any] | None = None) -> Comparison:
    """Compare a small model of a type with itself with a smaller head.

    Raises:
        NotReducible: If it is refused.
    """
    model: Any = build(kind, extra)
    original = Original(type(model), model.config)
    kept = emptied(original, model)
    made = smaller(original, model, kept)
    small = with_weights(made, model)
    singles = [copy.deepcopy(one).float() for one in (model, small)]
    in_float32 = error(*map(logits, singles))
    cache = cache_bytes(singles[1]) / cache_bytes(singles[0])
    copy_frequencies(model, small, kept)
    try:
        plain = error(logits(model), logits(small))
    except RuntimeError:  # a class whose router is of float32, whatever the model is
        plain = float("nan")
    with in_float64():
        wanted = logits(model)
        algebra = error(wanted, logits(small))
        state = dict(model.named_parameters(remove_duplicate=False))
        for found in original.skeleton.found:
            _change(found, "key", state, lambda heads: heads * (1 + 0.01 * torch.randn(heads.shape).to(heads.dtype)))
        sensitivity = error(wanted, logits(model))
    return Comparison(in_float32, plain, algebra, sensitivity, cache)


def main(kinds: list[str]) -> None:
    """Print a table of how near the smaller model comes, by type."""
    print("| type | float32 | float64 | float64, norms and softmax too | cache |\n|---|---|---|---|---|")
    for kind in kinds:
        result = compared(kind)
        errors = (f"{value:.0e}" for value in (result.float32, result.float64, result.algebra))
        print(f"| {kind} | {' | '.join(errors)} | {result.cache:.3f} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or sorted(CHECKED))
