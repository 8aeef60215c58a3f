"""Which way round a module stores its weight: found by its class or by multiplying, and refused where two differ."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import rankdecay as rd
from rankdecay.attention.orientation import is_transposed


class _AsStored(nn.Module):
    """A layer that stores its weight as (in, out)."""

    def __init__(self, inside: int, outside: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inside, outside))
        self.bias = nn.Parameter(torch.randn(outside)) if bias else None
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        product = self.product(x)
        return product if self.bias is None else product + self.bias

    def product(self, x: Tensor) -> Tensor:
        return x @ self.weight


class _Transposed(_AsStored):
    """A layer of one's own that stores it as nn.Linear does, and scales what comes out."""

    def __init__(self, inside: int, outside: int, bias: bool = False) -> None:
        super().__init__(outside, inside, bias=False)

    def product(self, x: Tensor) -> Tensor:
        return 0.5 * nn.functional.linear(x, self.weight)


class _Waiting(_AsStored):
    """A layer that sums over processes, of which the others may be elsewhere."""

    def product(self, x: Tensor) -> Tensor:
        out = x @ self.weight
        dist.all_reduce(out)
        return out


class _Stateful(_AsStored):
    def product(self, x: Tensor) -> Tensor:
        raise RuntimeError("it needs more than vectors")


def _attention(layer: Callable[[str, int, int], nn.Module], width: int = 8) -> nn.Module:
    attention = nn.Module()
    attention.num_heads = 2
    for name in ("q_proj", "k_proj", "v_proj"):
        attention.add_module(name, layer(name, 8, width))
    attention.add_module("o_proj", layer("o_proj", width, 8))
    return attention


class _LinearAsStored(nn.Linear):
    """A layer whose class says one thing of its weight and whose forward pass another."""

    def __init__(self, inside: int, outside: int, bias: bool = False) -> None:
        super().__init__(outside, inside, bias)
        self.bias = nn.Parameter(torch.randn(outside)) if bias else None
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        product = x @ self.weight
        return product if self.bias is None else product + self.bias


@pytest.mark.parametrize("width", [8, 16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", [_AsStored, _LinearAsStored, _Transposed])
def test_layers_of_ones_own_are_read_as_they_multiply(kind: type[_AsStored], bias: bool, width: int) -> None:
    attention = _attention(lambda _, inside, outside: kind(inside, outside, bias), width)
    nn.init.zeros_(attention.o_proj.weight)  # as many begin, which must not hide it
    [layer] = rd.find_attention(attention)
    nn.init.normal_(attention.o_proj.weight)
    assert attention.q_proj.calls == 0
    x = torch.randn(3, 8)
    made = attention.q_proj(x) - attention.q_proj(torch.zeros_like(x))
    read = x @ layer.query.tensor().mT
    torch.testing.assert_close(made, 0.5 * read if kind is _Transposed else read)
    mixed = torch.randn(3, width)
    made = attention.o_proj(mixed) - attention.o_proj(torch.zeros_like(mixed))
    read = mixed @ layer.output.tensor().mT
    torch.testing.assert_close(made, 0.5 * read if kind is _Transposed else read)


def test_scripted_modules_are_read_as_before_they_were(tmp_path) -> None:
    attention = nn.ModuleDict({name: nn.Linear(8, 8) for name in ("q_proj", "k_proj", "v_proj", "o_proj")})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated in torch, and in use
        scripted = torch.jit.script(attention)
    [layer] = rd.find_attention(scripted, num_heads=2)
    assert torch.equal(layer.query.tensor(), attention["q_proj"].weight)


def test_a_transposed_convolution() -> None:
    attention = _attention(lambda _, inside, outside: nn.ConvTranspose2d(inside, outside, 1))
    [layer] = rd.find_attention(attention)
    assert torch.equal(layer.query.tensor(), attention.q_proj.weight[:, :, 0, 0].mT)


def test_projections_that_are_stored_in_both_ways() -> None:
    kinds = {"o_proj": _AsStored}
    attention = _attention(lambda name, inside, outside: kinds.get(name, nn.Linear)(inside, outside))
    with pytest.raises(ValueError, match=r"o_proj is stored as \(in, out\), but q_proj.*: store all the same way"):
        rd.find_attention(attention)


def test_torchs_random_numbers_stay_as_they_are() -> None:
    module = _AsStored(8, 8)
    state = torch.get_rng_state()
    assert is_transposed(module) is True
    assert torch.equal(torch.get_rng_state(), state)


def test_a_hook_does_not_see_the_vectors() -> None:
    module = _AsStored(8, 8)
    seen = []
    module.register_forward_hook(lambda *given: seen.append(given))
    assert is_transposed(module) is True
    assert not seen


def test_nothing_is_said_of_a_layer_that_cannot_be_run_alone() -> None:
    assert is_transposed(_Stateful(8, 8)) is None
    assert is_transposed(nn.Linear(8, 8)) is None
    assert is_transposed(nn.Sequential(nn.Linear(8, 8))) is None
    with torch.device("meta"):
        assert is_transposed(_AsStored(8, 8)) is None


def test_no_other_process_is_waited_for(tmp_path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        assert is_transposed(_Waiting(8, 8)) is None
    finally:
        dist.destroy_process_group()


class _Masked(nn.Linear):
    def __init__(self, inside: int, outside: int) -> None:
        super().__init__(inside, outside)
        self.register_buffer("mask", torch.ones(outside, inside))
        self.mask[::2] = 0

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight * self.mask, self.bias)


class _Normalised(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        sizes = torch.linspace(1, 2, len(self.weight))[:, None]
        return nn.functional.linear(x, nn.functional.normalize(self.weight, dim=1) * sizes, self.bias)


class _Gated(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        return out * torch.sigmoid(out)


class _InHeads(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).unflatten(-1, (2, -1)).transpose(0, 1)


class _Negative(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return -0.5 * super().forward(x)


@pytest.mark.parametrize(
    ("kind", "more"), [(_Masked, True), (_Normalised, True), (_Gated, True), (_InHeads, False), (_Negative, False)]
)
def test_layers_that_do_more_than_multiply_are_named(kind: type[nn.Linear], more: bool) -> None:
    attention = _attention(lambda name, i, o: kind(i, o) if name == "k_proj" else nn.Linear(i, o))
    [layer] = rd.find_attention(attention)
    assert torch.equal(layer.key.tensor(), attention.k_proj.weight)
    assert ("k_proj is not a plain linear map" in layer.remark) == more
    assert "q_proj" not in layer.remark


def test_a_mask_of_ones_and_a_weight_of_zeros_do_no_more() -> None:
    attention = _attention(lambda _, i, o: _Masked(i, o))
    for name in ("q_proj", "v_proj", "o_proj"):
        getattr(attention, name).mask.fill_(1)
    nn.init.zeros_(attention.k_proj.weight)
    [layer] = rd.find_attention(attention)
    assert layer.remark == ""


class _Own(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


@pytest.mark.parametrize(("dtype", "bias"), [(torch.bfloat16, 100.0), (torch.float16, 100.0), (torch.float32, 1e6)])
def test_a_large_bias_does_no_more(dtype: torch.dtype, bias: float) -> None:
    attention = _attention(lambda _, i, o: _Own(i, o))
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        nn.init.normal_(getattr(attention, name).weight, std=0.02)
        nn.init.constant_(getattr(attention, name).bias, bias)
    [layer] = rd.find_attention(attention.to(dtype))
    assert layer.remark == ""
