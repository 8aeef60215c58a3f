"""What stands in a projection beside its matrix: read, said, or refused by name; in a live model and in its file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import rankdecay as rd
from rankdecay.cli import main

NAMES = ("to_q", "to_k", "to_v", "to_out")


def _linear() -> nn.Module:
    return nn.Linear(32, 32, bias=False)


def _model(**projections: nn.Module) -> nn.Module:
    attention = nn.ModuleDict({name: projections.get(name) or _linear() for name in NAMES})
    attention.heads = 4
    return nn.ModuleDict({"attn": attention})


def _saved(model: nn.Module, folder: Path) -> str:
    torch.save(model.state_dict(), folder / "weights.pt")
    return str(folder / "weights.pt")


def _shown(report: rd.Inspection) -> set[str]:
    return {row.get("product") or row["matrix"] for row in report.rows}


# ---- other matrices ------------------------------------------------------------------------------------------


class _Factors(nn.Module):
    def __init__(self, first: str, second: str) -> None:
        super().__init__()
        self.register_parameter(first, nn.Parameter(torch.randn(32, 4)))
        self.register_parameter(second, nn.Parameter(torch.randn(4, 32)))


class _Raschka(nn.Module):
    """LinearWithLoRA of "Build a large language model from scratch"."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.lora = _linear(), _Factors("A", "B")


class _LitGPT(_Factors):
    """LoRALinear of litgpt."""

    def __init__(self) -> None:
        super().__init__("lora_A", "lora_B")
        self.linear = _linear()
        self.merged = False


class _Bare(_Factors):
    """Factors beside the weight, whose names say nothing."""

    def __init__(self) -> None:
        super().__init__("A", "B")
        self.weight = nn.Parameter(torch.randn(32, 32))


def _with(*children: str) -> Callable[[], nn.Module]:
    return lambda: nn.ModuleDict({name: _linear() for name in children})


SEVERAL = {
    "Raschka": (_Raschka, "linear.weight, lora"), "litgpt": (_LitGPT, "linear.weight, lora_A, lora_B"),
    "bare": (_Bare, "weight, A, B"), "gated": (_with("linear", "gate"), "linear.weight, gate.weight"),
    "two": (_with("linear", "linear2"), "linear.weight, linear2.weight"),
    "mlp": (lambda: nn.Sequential(_linear(), nn.ReLU(), _linear()), "0.weight, 2.weight"),
}  # fmt: skip


@pytest.mark.parametrize("kind", SEVERAL)
@pytest.mark.parametrize("where", ["live", "file"])
def test_a_projection_of_several_matrices_is_refused(kind: str, where: str, tmp_path: Path) -> None:
    build, said = SEVERAL[kind]
    for child in ("to_q", "to_v"):
        model = _model(**{child: build()})
        given = model if where == "live" else _saved(model, tmp_path)
        reason = rf"attn: {child} holds several matrices \({said}.*merge them into one .*exclude="
        with pytest.raises(ValueError, match=reason):
            rd.find_attention(given, num_heads=4)
        names = rd.AttentionNames(query="to_q", key="to_k", value="to_v", output="to_out", num_heads=4)
        with pytest.raises(ValueError, match=reason):
            rd.find_attention(given, names)


def test_several_matrices_can_be_left_to_the_optimizer() -> None:
    model = nn.ModuleDict({"several": _model(to_q=_Raschka()), "one": _model(), "fc": _linear()})
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.warns(UserWarning, match="several matrices"):
        attachment = rd.attach(optimizer, model, rd.Frobenius(0.1), query_key=rd.LowRank(0.1), exclude="several")
    [said] = attachment.unhandled
    assert said.startswith("several.attn: to_q holds several matrices (linear.weight, lora)")


@pytest.mark.parametrize("kind", SEVERAL)
@pytest.mark.parametrize("where", ["live", "file"])
def test_an_output_of_several_matrices_is_none(kind: str, where: str, tmp_path: Path) -> None:
    model = _model(to_out=SEVERAL[kind][0]())
    report = rd.inspect(model if where == "live" else _saved(model, tmp_path), num_heads=4)
    assert _shown(report) == {"query_key"}
    [said] = report.unhandled
    assert said.startswith("attn: its output projection was not found: to_out holds several matrices (")


def test_an_adapter_of_ones_own_that_is_merged_is_read() -> None:
    wrapper = _LitGPT()
    wrapper.merged = True
    [layer] = rd.find_attention(_model(to_q=wrapper))
    assert torch.equal(layer.query.tensor(), wrapper.linear.weight)


def test_the_command_line_names_several_matrices(tmp_path: Path, capsys) -> None:
    path = _saved(nn.ModuleList([_model(), _model(to_q=_Raschka())]), tmp_path)
    assert main(["inspect", path, "--num-heads", "4", "--strict"]) == 3
    assert "not handled: 1.attn: to_q holds several matrices (linear.weight, lora)" in capsys.readouterr().out


# ---- steps of a sequence -------------------------------------------------------------------------------------


def _behind(step: nn.Module) -> nn.Module:
    return nn.Sequential(_linear(), step)


def _before(step: nn.Module) -> nn.Module:
    return nn.Sequential(step, _linear())


#: The projections, which products are not shown, what is said of a live model, and of its file (None: as of the model).
STEPS: dict[str, tuple[dict[str, Callable[[], nn.Module]], str, str, str | None]] = {
    "dropout": ({n: lambda: nn.Sequential(_linear(), nn.Dropout(), nn.Identity()) for n in NAMES}, "", "", ""),
    "norms before": ({n: lambda: _before(nn.LayerNorm(32)) for n in NAMES[:3]}, "", "", ""),
    "activation": (
        {"to_q": lambda: _behind(nn.ReLU()), "to_k": lambda: _behind(nn.ReLU())},
        "query_key", "it puts ReLU between its projections and the scores", "",
    ),
    "batch norm": (
        {"to_k": lambda: _behind(nn.BatchNorm1d(32))},
        "query_key", "it normalises queries and keys over the batch", None,
    ),
    "norm": ({"to_q": lambda: _behind(nn.RMSNorm(32))}, "query_key", "queries and keys are normalised", None),
    "of values": (
        {"to_v": lambda: _behind(nn.GELU())},
        "value_output", "it puts GELU between values and the output projection", "",
    ),
    "norm of values": ({"to_v": lambda: _behind(nn.LayerNorm(32))}, "value_output", "it normalises values", None),
    "before the output": (
        {"to_out": lambda: nn.Sequential(nn.GELU(), _linear(), nn.Dropout())},
        "value_output", "it puts GELU between values and the output projection",
        "it puts a step without weights, which may be an activation, between values and the output projection",
    ),
    "norm before the output": (
        {"to_out": lambda: _before(nn.LayerNorm(32))},
        "value_output", "it normalises what its heads give before the output projection", None,
    ),
    "behind the output": ({"to_out": lambda: _behind(nn.LayerNorm(32))}, "", "", ""),
}  # fmt: skip


@pytest.mark.parametrize("kind", STEPS)
@pytest.mark.parametrize("where", ["live", "file"])
def test_what_stands_in_the_sequence_of_a_projection_is_said(kind: str, where: str, tmp_path: Path) -> None:
    projections, without, live, stored = STEPS[kind]
    model = _model(**{name: build() for name, build in projections.items()})
    report = rd.inspect(model if where == "live" else _saved(model, tmp_path), num_heads=4)
    said = live if where == "live" or stored is None else stored
    shown = _shown(report) & {"query_key", "value_output"}
    assert shown == {"query_key", "value_output"} - ({without} if said else set())
    assert any(note.startswith(f"layer 0: {said}") for note in report.notes)
    assert not report.unhandled


class _LeViT(nn.Module):
    """The projections of vit-pytorch's LeViT."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 4
        self.to_q, self.to_k = (nn.Sequential(nn.Conv2d(32, 32, 1), nn.BatchNorm2d(32)) for _ in range(2))
        self.to_v = nn.Sequential(nn.Conv2d(32, 64, 1), nn.BatchNorm2d(64))
        self.to_out = nn.Sequential(nn.GELU(), nn.Conv2d(64, 32, 1), nn.BatchNorm2d(32), nn.Dropout())


@pytest.mark.parametrize("where", ["live", "file"])
def test_levit_by_hand_has_no_products(where: str, tmp_path: Path) -> None:
    model = nn.ModuleDict({"attn": _LeViT()})
    report = rd.inspect(model if where == "live" else _saved(model, tmp_path), num_heads=4)
    assert _shown(report) == {"query", "key", "value", "output"}


# ---- tables of learned queries -------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [16, 32])
def test_learned_queries_are_no_projection(rows: int) -> None:
    with pytest.raises(ValueError, match="keys and values without a projection to queries"):
        rd.find_attention(_model(to_q=nn.Embedding(rows, 32)))
    attention: nn.Module = _model().attn
    del attention.to_q
    attention.register_parameter("to_q", nn.Parameter(torch.randn(rows, 32)))
    with pytest.raises(ValueError, match=r"to_q is a parameter of the module itself beside layers.*learned tokens"):
        rd.find_attention(attention)
    names = rd.AttentionNames(query="to_q", key="to_k", value="to_v", output="to_out", num_heads=4)
    if rows == 32:
        [layer] = rd.find_attention(attention, names)
        found: Tensor = layer.query.tensor()
        assert torch.equal(found, attention.to_q)


class _OfSAM(nn.Module):
    """_LoRA_qkv of SAMed: the factors stand beside the projection that they change."""

    def __init__(self, names: str) -> None:
        super().__init__()
        self.qkv = nn.Linear(32, 96)
        for name in names.split():
            into = "_a" in name or "down" in name or "A" in name
            self.add_module(name, nn.Linear(*((32, 4) if into else (4, 32)), bias=False))


@pytest.mark.parametrize(
    "names",
    ["linear_a_q linear_b_q linear_a_v linear_b_v", "lora_q_A lora_q_B", "lora_down lora_up", "linear_a_v linear_b_v"],
)
def test_factors_beside_a_fused_projection_are_refused_by_name(names: str, tmp_path: Path) -> None:
    attention = nn.ModuleDict({"qkv": _OfSAM(names), "proj": _linear()})
    attention.num_heads = 4
    model = nn.ModuleDict({"attn": attention, "other": _model()["attn"]})
    for source in (model, _saved(model, tmp_path)):
        report = rd.inspect(source, num_heads=4)
        assert {row["name"] for row in report.rows} == {"other"}
        [reason] = report.unhandled
        assert reason.startswith("attn.qkv: qkv holds several matrices (weight, ")
        assert all(f"{name} beside it" in reason for name in names.split())


def test_two_linear_layers_that_are_no_factors_stand_beside_projections() -> None:
    model = _model()
    model["attn"].update({"linear_a": nn.Linear(32, 32), "linear_b": nn.Linear(32, 4)})
    assert len(rd.find_attention(model)) == 1
    model["attn"].update({"lora_a_k": nn.Linear(32, 4), "lora_b_k": nn.Linear(4, 32)})
    with pytest.raises(ValueError, match=r"to_k holds several matrices .*lora_a_k beside it, lora_b_k beside it"):
        rd.find_attention(model)
