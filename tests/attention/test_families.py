"""Every family, head by head, against what the model itself computes.

The score product and the mixing of values are caught below the model's own code, as the `bmm` that any attention ends
in. Nothing here knows how a family stores its matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import rankdecay as rd
from rankdecay.attention import AttentionLayer
from tests import needs

from .families import TOKENS, TRANSFORMERS, build, randomised, run

_NORMS = ("q_norm", "k_norm", "q_layernorm", "k_layernorm")


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


class _Products(TorchDispatchMode):
    """Batched products (left, right, result) in the order of execution, while ``open``."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[list[tuple[Tensor, Tensor, Tensor]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if self.open and func in (torch.ops.aten.bmm.default, torch.ops.aten.baddbmm.default):
            left, right = args[-2:]
            self.open[-1].append((left, right, out))
        return out


@contextmanager
def _watched(model: nn.Module, layers: list[AttentionLayer]) -> Iterator[dict[str, list]]:
    """Collects, per attention layer, the products inside it; per module, its first input and its output."""
    seen: dict[str, list] = {}
    products = _Products()
    handles = []

    def note_module(name: str) -> Callable[..., None]:
        def hook(module, args, kwargs, output):
            given = args[0] if args else kwargs.get("hidden_states", kwargs.get("query"))
            seen[name] = [given, output[0] if isinstance(output, tuple) else output]

        return hook

    for layer in layers:
        attention = model.get_submodule(layer.name)
        record: list[tuple[Tensor, Tensor, Tensor]] = seen.setdefault(f"products of {layer.name}", [])
        handles.append(attention.register_forward_pre_hook(lambda *_, record=record: products.open.append(record)))
        handles.append(attention.register_forward_hook(lambda *_: products.open.pop() and None))
        handles.append(attention.register_forward_hook(note_module(layer.name), with_kwargs=True))
        for view in layer.views:
            owner = _owner(view.parameter_name)
            handles.append(model.get_submodule(owner).register_forward_hook(note_module(owner), with_kwargs=True))
    try:
        with products, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            yield seen
    finally:
        for handle in handles:
            handle.remove()


def _owner(parameter: str) -> str:
    """The module that applies the parameter; with an adapter, the wrapper."""
    return parameter.rpartition(".")[0].removesuffix(".base_layer")


def _check(model: nn.Module, layers: list[AttentionLayer], forward: Callable[[], object]) -> None:
    for module in list(model.modules()):
        for name in _NORMS:
            if isinstance(getattr(module, name, None), nn.Module):
                setattr(module, name, nn.Identity())
    with _watched(model, layers) as seen:
        forward()
    for layer in layers:
        _check_layer(layer, seen)


def _check_layer(layer: AttentionLayer, seen: dict[str, list]) -> None:
    heads, shared = layer.num_heads, layer.num_heads // layer.num_key_value_heads
    scores, mixing = [p for p in seen[f"products of {layer.name}"] if p[0].shape[0] % heads == 0][-2:]
    query, key, value, context = scores[0], scores[1].mT, mixing[1], mixing[2]
    for view, formed, repeats in ((layer.query, query, 1), (layer.key, key, shared), (layer.value, value, shared)):
        x = (seen.get(_owner(view.parameter_name)) or seen[layer.name])[0]  # (batch, tokens, in)
        mine = torch.einsum("bti,hdi->bhtd", x, view.heads())
        bias = view.bias()
        if bias is not None:
            mine += bias.reshape(view.num_heads, 1, -1)
        mine = mine.repeat_interleave(repeats, 1)
        theirs = formed.reshape(mine.shape)
        scale = float(theirs.norm() / mine.norm())  # some fold the softmax's 1/√d, or half of it, into the query
        steps = [layer.head_dim**-power for power in (0, 0.25, 0.5)]
        assert min(abs(scale / step - 1) for step in steps) < 1e-4, (layer.name, view.role, scale)
        torch.testing.assert_close(theirs, scale * mine, atol=1e-5, rtol=1e-4)
    if layer.output is None:
        return
    context = context.reshape(-1, heads, *context.shape[1:])  # (batch, heads, tokens, d)
    mine = torch.einsum("bhtd,hod->bto", context, layer.output.heads())
    bias = layer.output.bias()
    mine = mine if bias is None else mine + bias
    theirs = (seen.get(_owner(layer.output.parameter_name)) or seen[layer.name])[1]
    torch.testing.assert_close(theirs.reshape(mine.shape), mine, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_each_head_is_what_the_model_computes(name: str) -> None:
    model = build(name)
    layers = rd.find_attention(model)
    assert len(layers) == TRANSFORMERS[name][-1]
    _check(model, layers, lambda: run(name, model))


# ---- torch's own attention -------------------------------------------------------------------------------


def _attention(**how) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    return randomised(nn.MultiheadAttention(32, 4, **how))


@pytest.mark.parametrize("batch_first", [True, False])
def test_packed_multihead_attention(batch_first: bool) -> None:
    attention = _attention(batch_first=batch_first).train()  # in eval mode it may be one fused kernel
    model = nn.ModuleDict({"attention": attention})
    x = torch.randn(2, TOKENS, 32)
    given = x if batch_first else x.transpose(0, 1)
    [layer] = rd.find_attention(model)
    assert layer.query.parameter_name == "attention.in_proj_weight"
    with _watched(model, [layer]) as seen:
        out, _ = attention(given, given, given, need_weights=True, average_attn_weights=False)
    seen["attention"] = [x, out if batch_first else out.transpose(0, 1)]
    _check_layer(layer, seen)


def test_multihead_attention_with_separate_widths() -> None:
    attention = _attention(kdim=24, vdim=16, batch_first=True)
    [layer] = rd.find_attention(attention)
    query, key, value = torch.randn(2, TOKENS, 32), torch.randn(2, 9, 24), torch.randn(2, 9, 16)
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    products = _Products()
    products.open.append(seen)
    with products:
        attention(query, key, value, need_weights=True)
    scores, mixing = [product for product in seen if product[0].shape[0] == 8]
    for view, x, formed in (
        (layer.query, query, scores[0]),
        (layer.key, key, scores[1].mT),
        (layer.value, value, mixing[1]),
    ):
        mine = torch.einsum("bti,hdi->bhtd", x, view.heads()) + view.bias().reshape(4, 1, -1)
        theirs = formed.reshape(mine.shape)
        torch.testing.assert_close(theirs / theirs.norm(), mine / mine.norm())


def test_transformer_encoder() -> None:
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    model = randomised(nn.TransformerEncoder(block, 2, enable_nested_tensor=False))
    model.train()  # the inference path is one fused kernel, with nothing to watch inside
    layers = rd.find_attention(model)
    assert [layer.name for layer in layers] == ["layers.0.self_attn", "layers.1.self_attn"]
    _check(model, layers, lambda: model(torch.randn(2, TOKENS, 32)))


# ---- timm ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "count"),
    [
        ("vit_tiny_patch16_224", {"img_size": 32, "depth": 2}, 2),
        ("vit_tiny_patch16_224", {"img_size": 32, "depth": 2, "qk_norm": True}, 2),
        ("vit_base_patch16_siglip_224", {"img_size": 32, "depth": 1, "embed_dim": 48, "num_heads": 4}, 2),
        ("eva02_tiny_patch14_224", {"img_size": 28, "depth": 1}, 1),
    ],
)
def test_timm(timm, name: str, options: dict, count: int) -> None:
    torch.manual_seed(0)
    model = randomised(timm.create_model(name, num_classes=0, **options))
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
        if hasattr(module, "rope") and name.startswith("eva"):
            module.rope = None
    layers = rd.find_attention(model)
    assert len(layers) == count
    size = options["img_size"]
    _check(model, layers, lambda: model(torch.randn(2, 3, size, size)))


# ---- wrapped, shared, unknown ----------------------------------------------------------------------------


def test_an_adapter_is_part_of_the_matrix() -> None:
    peft = needs.package("peft")
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj", "o_proj"], init_lora_weights=False)
    model = randomised(peft.get_peft_model(build("llama"), config))
    layers = rd.find_attention(model)
    assert layers[0].query.parameter_name.endswith("q_proj.base_layer.weight")
    _check(model, layers, lambda: run("llama", model))
    adapted = layers[0].query.tensor()
    with model.disable_adapter():
        assert not torch.equal(layers[0].query.tensor(), adapted)


def test_an_adapter_in_a_transposed_layer() -> None:
    peft = needs.package("peft")
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)
    model = randomised(peft.get_peft_model(build("gpt2"), config))
    _check(model, rd.find_attention(model), lambda: run("gpt2", model))


def test_compiled_models_are_seen_through() -> None:
    [layer, _] = rd.find_attention(torch.compile(build("llama")))
    assert layer.query.parameter_name == "_orig_mod.model.layers.0.self_attn.q_proj.weight"


def test_tied_attention_is_listed_under_each_name() -> None:
    model = build("llama")
    first, second = (model.model.layers[i].self_attn.q_proj for i in range(2))
    second.weight = first.weight
    layers = rd.find_attention(model)
    assert layers[0].query.tensor().data_ptr() == layers[1].query.tensor().data_ptr()
    assert layers[0].query.parameter_name != layers[1].query.parameter_name


def test_latent_attention_is_named_with_the_reason() -> None:
    import transformers

    config = transformers.DeepseekV3Config(
        hidden_size=32, num_attention_heads=4, num_hidden_layers=1, intermediate_size=64, vocab_size=50, q_lora_rank=16,
        kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8, n_routed_experts=4, num_experts_per_tok=2,
        n_group=1, topk_group=1, moe_intermediate_size=16, first_k_dense_replace=1, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = transformers.DeepseekV3ForCausalLM(config)
    with pytest.raises(ValueError, match=r"model.layers.0.self_attn: multi-head latent attention .*two factors"):
        rd.find_attention(model)
    both = nn.ModuleDict({"latent": model, "plain": build("llama")})
    with pytest.warns(UserWarning, match=r"latent.model.layers.0.self_attn is not handled: multi-head latent"):
        assert len(rd.find_attention(both)) == 2


class _Own(nn.Module):
    """Somebody's own attention: odd names, keys and values in one."""

    def __init__(self, heads: int | None = None) -> None:
        super().__init__()
        self.asks = nn.Linear(24, 24, bias=False)
        self.answers = nn.Linear(24, 24)
        self.mix = nn.Linear(24, 24)
        if heads:
            self.num_heads = heads


def test_ones_own_attention_is_named_in_one_call() -> None:
    model = nn.Sequential(_Own(), _Own())
    names = rd.AttentionNames(query="asks", fused="answers", output="mix", num_heads=4)
    layers = rd.find_attention(model, names)
    assert [layer.name for layer in layers] == ["0", "1"]
    layer = layers[0]
    assert (layer.num_heads, layer.num_key_value_heads, layer.head_dim) == (4, 2, 6)
    assert torch.equal(layer.key.tensor(), model[0].answers.weight[:12])
    assert torch.equal(layer.value.bias(), model[0].answers.bias[12:])
    assert layer.output.heads().shape == (4, 24, 6)


def test_what_is_not_attention_is_refused_with_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"no attention was found in Linear.*weight \(3, 4\).*names=AttentionNames"):
        rd.find_attention(nn.Linear(4, 3))
    with pytest.raises(TypeError, match=r"got int"):
        rd.find_attention(7)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"under the names 'asks', 'answer'"):
        rd.find_attention(_Own(), rd.AttentionNames(query="asks", fused="answer", output="mix", num_heads=4))
    with pytest.raises(ValueError, match=r"asks has 24 rows, and an unknown number.*num_heads"):
        rd.find_attention(_Own(), rd.AttentionNames(query="asks", fused="answers"))
    with pytest.raises(ValueError, match=r"got query; expected query, key and value"):
        rd.AttentionNames(query="asks")
    with pytest.raises(ValueError, match=r"num_heads=0"):
        rd.AttentionNames(fused="qkv", num_heads=0)


def test_heads_that_do_not_divide_are_refused() -> None:
    attention = nn.ModuleDict({name: nn.Linear(24, 24) for name in ("q_proj", "k_proj", "v_proj", "o_proj")})
    attention.num_heads = 5
    with pytest.raises(ValueError, match=r"q_proj has 24 rows, and 5 heads"):
        rd.find_attention(attention)


def test_weights_that_are_no_matrices_are_refused() -> None:
    convolution = nn.ModuleDict({"qkv": nn.Conv2d(8, 24, 1), "proj": nn.Conv2d(8, 8, 1)})
    with pytest.raises(ValueError, match=r"qkv.weight has shape \(24, 8, 1, 1\), not that of a matrix"):
        rd.find_attention(convolution)
    flat = nn.ParameterDict({"q_proj": torch.zeros(64), "k_proj": torch.zeros(64), "v_proj": torch.zeros(64)})
    with pytest.raises(ValueError, match=r"flattened by DeepSpeed ZeRO or FSDP1; shard with FSDP2"):
        rd.find_attention(flat)
    sharded = nn.Module()
    sharded.register_parameter("_flat_param", nn.Parameter(torch.zeros(64)))
    with pytest.raises(ValueError, match=r"_flat_param is a flattened FSDP1 parameter"):
        rd.find_attention(sharded)
