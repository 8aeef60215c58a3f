"""Whether queries and keys are normalised, from one backward pass, where neither names nor settings say it."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import rankdecay as rd

NORMS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "none": (lambda x: x, False),
    "scaled": (lambda x: x / 3, False),
    "rms": (lambda x: functional.rms_norm(x, x.shape[-1:]), True),
    "layer": (lambda x: functional.layer_norm(x, x.shape[-1:]), True),
    "unit length": (lambda x: functional.normalize(x, dim=-1), True),
    "by hand": (lambda x: x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt(), True),
    "cap": (lambda x: 5 * torch.tanh(x / 5), False),
    "times a constant": (lambda x: 4 * functional.normalize(x, dim=-1), True),
}


class Own(nn.Module):
    """Somebody's own attention, with a norm that has no name and no weight."""

    def __init__(self, norm: str = "none", bias: bool = True, keys_only: bool = False) -> None:
        super().__init__()
        self.num_heads, self.norm, self.keys_only = 2, norm, keys_only
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, nn.Linear(8, 8, bias=bias))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (2, 4)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        normalise, _ = NORMS[self.norm]
        q, k = q if self.keys_only else normalise(q), normalise(k)
        return self.o_proj(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def _x(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0)).to(dtype)


def _shown(report: rd.Inspection) -> set[str]:
    return {row.get("product") or row.get("matrix") for row in report.rows} - {"value_output"}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("norm", NORMS)
def test_a_norm_without_a_name_is_seen(norm: str, bias: bool) -> None:
    report = rd.inspect(Own(norm, bias), example=_x())
    assert _shown(report) == ({"query", "key"} if NORMS[norm][1] else {"query_key"})
    assert not any("does not say whether queries" in note for note in report.notes)


class OverTheWidth(Own):
    """A norm over all heads together: no head of W_Q is without a scale, and W_Q is."""

    def forward(self, x: Tensor) -> Tensor:
        q, k = (functional.normalize(projection(x), dim=-1) for projection in (self.q_proj, self.k_proj))
        q, k, v = (y.unflatten(-1, (2, 4)).transpose(1, 2) for y in (8 * q, k, self.v_proj(x)))
        return self.o_proj(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("bias", [True, False])
def test_a_norm_over_all_heads_is_seen(bias: bool) -> None:
    assert _shown(rd.inspect(OverTheWidth(bias=bias), example=_x())) == {"query", "key"}


def test_without_an_example_it_is_said_to_be_unknown() -> None:
    report = rd.inspect(Own("rms"))
    assert any("queries and keys are normalised" in note and "the model does not say" in note for note in report.notes)
    [layer] = rd.find_attention(Own())
    assert layer.unknown == {"qk_norm", "rotary"}


def test_a_norm_of_keys_alone_counts() -> None:
    assert _shown(rd.inspect(Own("rms", keys_only=True), example=_x())) == {"query", "key"}


@pytest.mark.parametrize("norm", ["none", "rms", "unit length"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_in_other_precisions(norm: str, dtype: torch.dtype) -> None:
    report = rd.inspect(Own(norm).to(dtype), example=_x(dtype))
    assert _shown(report) == ({"query", "key"} if NORMS[norm][1] else {"query_key"})


@pytest.mark.parametrize("norm", ["none", "layer"])
def test_frozen_parameters_stay_frozen_and_nothing_is_left_behind(norm: str) -> None:
    model = Own(norm).requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    with torch.no_grad():
        report = rd.inspect(model, example=_x())
    assert _shown(report) == ({"query", "key"} if NORMS[norm][1] else {"query_key"})
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)


class _Returning(Own):
    def __init__(self, how: Callable[[Tensor], object], norm: str = "rms") -> None:
        super().__init__(norm)
        self.how = how

    def forward(self, x: Tensor) -> object:
        return self.how(super().forward(x))


@pytest.mark.parametrize(
    "how",
    [
        lambda y: (y, None),
        lambda y: {"ids": torch.arange(3), "out": y},
        lambda y: [{"hidden": (y,)}],
        lambda y: SimpleNamespace(loss=y.square().mean()),
        lambda y: y.square().mean(),
        lambda y: (torch.zeros(3), y),
    ],
    ids=["tuple", "dictionary", "nested", "loss", "number", "a constant first"],
)
@pytest.mark.parametrize("norm", ["none", "rms"])
def test_whatever_a_model_returns(how: Callable[[Tensor], object], norm: str) -> None:
    assert _shown(rd.inspect(_Returning(how, norm), example=_x())) == (
        {"query", "key"} if NORMS[norm][1] else {"query_key"}
    )


@pytest.mark.parametrize(
    "example", [lambda: {"x": _x()}, lambda: (_x(),), lambda: [_x()]], ids=["by name", "tuple", "list"]
)
def test_however_a_model_is_called(example: Callable[[], object]) -> None:
    assert _shown(rd.inspect(Own("rms"), example=example())) == {"query", "key"}


def test_a_function_may_return_the_loss() -> None:
    model = Own("rms")
    assert _shown(rd.inspect(model, example=lambda: model(_x()).square().mean())) == {"query", "key"}


def test_layers_are_settled_one_by_one() -> None:
    model = nn.Sequential(Own("none"), Own("rms"))
    report = rd.inspect(model, example=_x())
    assert {row["label"] for row in report.rows if row.get("product") == "query_key"} == {"0"}
    assert {row["label"] for row in report.rows if row.get("matrix") == "query"} == {"1"}


def test_what_was_said_is_not_measured() -> None:
    names = rd.AttentionNames(
        query="q_proj", key="k_proj", value="v_proj", output="o_proj", qk_norm=False, rotary="none"
    )
    report = rd.inspect(Own("rms"), names, example=_x())
    assert _shown(report) == {"query_key"}
    assert report.notes == []


@pytest.mark.parametrize(
    "example",
    [lambda: torch.zeros(2, 6, 5), lambda: {"y": _x()}, lambda: (_x(), _x())],
    ids=["width", "name", "number"],
)
def test_an_example_that_does_not_run_is_one_clear_line(example: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=r"^the model cannot be run and differentiated on example=\w+: "):
        rd.inspect(Own(), example=example())


def test_an_example_without_a_result_is_one_clear_line(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"the model returned NoneType without a tensor of numbers on example="):
        rd.inspect(_Returning(lambda y: None), example=_x())
    with pytest.raises(ValueError, match=r"cannot be run and differentiated"):
        rd.inspect(_Returning(lambda y: y.detach()), example=_x())
    torch.save(Own().state_dict(), tmp_path / "weights.pt")
    with pytest.raises(
        TypeError, match=r"example= runs a live model, and .*weights\.pt is a checkpoint: load the model"
    ):
        rd.inspect(tmp_path / "weights.pt", num_heads=2, example=_x())


def test_a_layer_without_a_gradient_stays_unknown() -> None:
    model = nn.ModuleDict({"used": Own("rms"), "unused": Own("rms")})
    report = rd.inspect(model, example=lambda: model["used"](_x()))
    assert any("the model does not say" in note for note in report.notes)
    assert {row["name"] for row in report.rows if row.get("product") == "query_key"} == {"unused"}


def test_a_monitor_is_let_go() -> None:
    monitor = rd.Monitor(Own(), log=lambda values: None)
    gone = weakref.ref(monitor)
    del monitor
    gc.collect()
    assert gone() is None
    parameter = nn.Parameter(torch.ones(1))
    torch.optim.SGD([parameter], lr=0.1).step()


def test_running_statistics_and_random_numbers_stay() -> None:
    model = nn.Sequential(nn.BatchNorm1d(6), nn.Dropout(0.5), Own("rms")).train()
    before, random = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    assert _shown(rd.inspect(model, example=_x() + 3)) == {"query", "key"}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("attached", [True, False])
@pytest.mark.parametrize("norm", ["none", "rms"])
def test_a_monitor_is_settled_by_the_first_step(norm: str, attached: bool) -> None:
    model = Own(norm)
    monitor = rd.Monitor(model, every=1, log=lambda values: None)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)  # its first step moves the weights far
    if attached:
        monitor.attach(optimizer)
    assert any(name.startswith("rank/query_key/") for name in monitor.measure())
    model(_x()).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    if not attached:
        monitor.step()
    values = monitor.measure()
    assert any(name.startswith("rank/query_key/") for name in values) != NORMS[norm][1]
    assert any(name.startswith("rank/query/") for name in values) == NORMS[norm][1]


def test_a_copied_monitor_is_settled_by_the_copy() -> None:
    copied = copy.deepcopy(rd.Monitor(Own("rms"), every=1, log=lambda values: None))
    optimizer = torch.optim.Adam(copied.model.parameters(), lr=0.1)
    copied.model(_x()).square().mean().backward()
    optimizer.step()
    assert any(name.startswith("rank/query/") for name in copied.measure())
