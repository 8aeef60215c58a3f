"""Weights that modules compute from others, against what the layer itself does with the unit vectors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrizations as P
from torch.nn.utils import prune, spectral_norm, weight_norm
from torch.nn.utils.parametrize import register_parametrization

import rankdecay as rd

Wrap = Callable[[nn.Module], object]


class Attention(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.num_heads = 2
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width, bias=False) for _ in range(4))


class Net(nn.Module):
    """One attention and one more matrix in a block; the query and the matrix are computed."""

    def __init__(self, wrap: Wrap) -> None:
        super().__init__()
        torch.manual_seed(0)
        block = nn.Module()
        block.attn, block.fc = Attention(), nn.Linear(8, 16)
        self.layers = nn.ModuleList([block])
        for layer in (block.attn.q_proj, block.fc):
            wrap(layer)

    @property
    def query(self) -> nn.Module:
        return self.get_submodule("layers.0.attn.q_proj")


class Symmetric(nn.Module):
    def forward(self, matrix: Tensor) -> Tensor:
        return matrix.triu() + matrix.triu(1).mT if matrix.shape[0] == matrix.shape[1] else matrix


class Noisy(nn.Module):
    def forward(self, matrix: Tensor) -> Tensor:
        return matrix * torch.rand_like(matrix)


class LowRank(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a @ b

    def right_inverse(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        return matrix[:, :3].clone(), matrix[:3].clone()


def _own(step: type[nn.Module]) -> Wrap:
    return lambda layer: register_parametrization(layer, "weight", step())


def _of_columns(layer: nn.Module) -> None:
    P.weight_norm(layer, dim=1)


def _of_all(layer: nn.Module) -> None:
    P.weight_norm(layer, dim=None)  # pyright: ignore[reportArgumentType]


def _pruned_twice(layer: nn.Module) -> None:
    prune.l1_unstructured(layer, "weight", 0.4)
    prune.random_unstructured(layer, "weight", 0.2)


#: What computes the weight, the stored matrix, and what describe() says of it.
STORED: dict[str, tuple[Wrap, str, str]] = {
    "weight norm": (P.weight_norm, "parametrizations.weight.original1", "under weight_norm: the stored direction"),
    "weight norm of columns": (_of_columns, "parametrizations.weight.original1", "direction"),
    "weight norm of all": (_of_all, "parametrizations.weight.original1", "direction"),
    "spectral norm": (P.spectral_norm, "parametrizations.weight.original", "under spectral_norm: the stored matrix"),
    "both": (lambda layer: P.spectral_norm(P.weight_norm(layer)), "parametrizations.weight.original1", "direction"),
    "one's own": (_own(Symmetric), "parametrizations.weight.original", "under Symmetric: the stored matrix"),
    "random": (_own(Noisy), "parametrizations.weight.original", "under Noisy: the stored matrix"),
    "older weight norm": (weight_norm, "weight_v", "under weight_norm: the stored direction"),
    "older spectral norm": (spectral_norm, "weight_orig", "under spectral_norm: the stored matrix"),
    "pruning": (_pruned_twice, "weight_orig", "under pruning: the stored matrix before its mask"),
}  # fmt: skip
NOT_STORED: dict[str, tuple[Wrap, str]] = {
    "orthogonal": (P.orthogonal, "under orthogonal, which fixes its singular values"),
    "cayley": (lambda layer: P.orthogonal(layer, orthogonal_map="cayley"), "under orthogonal, which fixes"),
    "low rank": (_own(LowRank), r"under LowRank, of which no one matrix is stored but original0 \(8, 3\), original1"),
}
pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", [*STORED, *NOT_STORED])
def test_a_view_is_what_the_next_forward_pass_uses_and_reading_it_moves_nothing(kind: str, training: bool) -> None:
    wrap = (STORED | NOT_STORED)[kind][0]
    model = Net(wrap).train(training)
    model.query(torch.ones(8)).sum().backward()  # in the middle of training
    [layer] = rd.find_attention(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ours, again = layer.query.tensor(), layer.query.tensor()
    assert torch.equal(ours, again)
    assert not ours.requires_grad
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(ours, model.query(torch.eye(8)).T.detach())


@pytest.mark.parametrize("kind", STORED)
def test_the_stored_matrix_is_decayed_and_the_reason_says_so(kind: str) -> None:
    wrap, stored, note = STORED[kind]
    model = Net(wrap)
    groups = rd.param_groups(model, rd.Frobenius(0.1), query_key=rd.LowRank(0.5), mlp=rd.LowRank(0.2))
    optimizer = torch.optim.SGD(groups, lr=1.0)
    attachment = rd.attach(optimizer)
    name = f"layers.0.attn.q_proj.{stored}"
    before = model.get_parameter(name).detach().clone()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    U, sigma, Vh = torch.linalg.svd(before.double())
    shrunk = (U * (sigma - 0.5 * sigma.norm() / 8**0.5).clamp_min(0)) @ Vh
    torch.testing.assert_close(model.get_parameter(name).detach().double(), shrunk, rtol=0, atol=1e-6)
    [line] = [line for line in attachment.describe().splitlines() if line.startswith(f"{name} ")]
    assert "query_key" in line
    assert "query, under" in line
    assert note in line
    roles = {name: group["role"] for group in groups for name in group["param_names"]}
    assert roles[f"layers.0.fc.{stored}"] == "mlp"
    gains = {name: role for name, role in roles.items() if name.endswith(("original0", "weight_g"))}
    assert set(gains.values()) == ({"norm"} if gains else set())


@pytest.mark.parametrize("kind", NOT_STORED)
def test_what_has_no_stored_matrix_is_named_and_not_decayed(kind: str) -> None:
    wrap, note = NOT_STORED[kind]
    model = Net(wrap)
    with pytest.warns(UserWarning, match=rf"layers.0.attn is not decayed: its query is {note}"):
        groups = rd.param_groups(model, rd.Frobenius(0.1), query_key=rd.LowRank(0.5))
    [group] = [group for group in groups if any("q_proj" in name for name in group["param_names"])]
    assert (group["role"], group["weight_decay"]) == ("other", 0.0)
    assert "stored of weight under" in group["why"][0]


def test_a_fused_weight_is_computed_too() -> None:
    for wrap, stored in (
        (P.weight_norm, "parametrizations.in_proj_weight.original1"),
        (spectral_norm, "in_proj_weight_orig"),
    ):
        attention = nn.MultiheadAttention(8, 2).eval()
        wrap(attention, "in_proj_weight")
        x = torch.ones(3, 1, 8)
        attention(x, x, x)
        [layer] = rd.find_attention(attention)
        assert layer.key.parameter_name == stored
        assert torch.equal(layer.key.tensor(), attention.in_proj_weight.detach()[8:16])


def test_somebody_elses_hooks_stay_where_they_are() -> None:
    model = Net(weight_norm)
    calls: list[int] = []
    model.query.register_forward_pre_hook(lambda *_: calls.append(1))
    rd.find_attention(model)[0].query.tensor()
    assert not calls


# ---- in files --------------------------------------------------------------------------------------------

IN_FILES = ["weight norm", "weight norm of columns", "weight norm of all", "spectral norm", "older weight norm",
            "older spectral norm", "pruning"]  # fmt: skip


def saved(model: nn.Module, folder: Path) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"num_attention_heads": 2}))
    return folder


@pytest.mark.parametrize("kind", IN_FILES)
def test_a_file_is_read_as_the_model_that_was_saved(kind: str, tmp_path: Path) -> None:
    model = Net(STORED[kind][0]).eval()
    model.query(torch.ones(8))
    [stored] = rd.find_attention(saved(model, tmp_path))
    [live] = rd.find_attention(model)
    assert stored.query.parameter_name == "layers.0.attn.q_proj.weight"
    torch.testing.assert_close(stored.query.tensor(), live.query.tensor(), rtol=1e-6, atol=1e-7)
    assert torch.equal(stored.key.tensor(), live.key.tensor())


@pytest.mark.parametrize("kind", ["one's own", "both", "orthogonal"])
def test_a_file_that_does_not_say_how_a_weight_is_computed_is_refused(kind: str, tmp_path: Path) -> None:
    [layer] = rd.find_attention(saved(Net((STORED | NOT_STORED)[kind][0]), tmp_path))
    assert layer.key.tensor().shape == (8, 8)
    with pytest.raises(
        ValueError, match=r"q_proj.weight is computed from .*original.*does not say how; save the model"
    ):
        layer.query.tensor()


def test_a_file_with_factors_alone_names_the_layer(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Not handled: layers.0.attn: layers.0.attn.q_proj.weight has shape"):
        rd.find_attention(saved(Net(_own(LowRank)), tmp_path))


def test_names_that_only_look_like_those_of_torch_are_left_alone(tmp_path: Path) -> None:
    tensors = {f"attn.{name}_proj.weight": torch.ones(8, 8) for name in "qkvo"}
    tensors |= {"attn.q_proj.weight_mask": torch.zeros(8, 8), "attn.q_proj.weight_u": torch.ones(3)}
    save_file(tensors, tmp_path / "model.safetensors")
    [layer] = rd.find_attention(tmp_path, num_heads=2)
    assert torch.equal(layer.query.tensor(), tensors["attn.q_proj.weight"])
