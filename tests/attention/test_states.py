"""Which set of weights: obvious ones are read, copies are asked for, parts of one model are read together."""

from __future__ import annotations

import argparse

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import rankdecay as rd
from rankdecay.attention.checkpoints import open_checkpoint
from rankdecay.attention.errors import CheckpointError
from rankdecay.attention.states import SeveralSets

NAMES = ("q_proj", "k_proj", "v_proj", "o_proj")


def weights(seed: int, prefix: str = "", width: int = 8) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    names = [f"{prefix}layers.{i}.attn.{name}.weight" for i in range(2) for name in NAMES]
    return {name: torch.randn(width, width, generator=draw) for name in names}


FIRST, SECOND = weights(1), weights(2)
ADAM = {"state": {0: {"exp_avg": torch.zeros(8, 8), "exp_avg_sq": torch.zeros(8, 8)}}, "param_groups": [{"lr": 1.0}]}


def queries(path, state=None) -> list[Tensor]:
    return [layer.query.tensor() for layer in rd.find_attention(path, num_heads=2, state=state)]


def is_read(path, expected: dict[str, Tensor], state=None) -> bool:
    found = queries(path, state)
    stored = [tensor for name, tensor in expected.items() if "q_proj" in name]
    return len(found) == len(stored) and all(map(torch.equal, found, stored))


@pytest.mark.parametrize(
    "content",
    [
        {"model": FIRST, "optimizer": ADAM, "epoch": 3, "rng": torch.get_rng_state(), "scaler": {"scale": 1.0}},
        {"state_dict": {f"module.{name}": t for name, t in FIRST.items()}, "optimizer_states": [ADAM], "callbacks": {}},
        {"model": FIRST, "exp_avg": SECOND, "exp_avg_sq": SECOND, "momentum_buffer": SECOND},
        {"net": FIRST, "adam": ADAM, "loss": {"weight": torch.zeros(3, 3)}},
        {"args": argparse.Namespace(lr=1.0), "module": FIRST, "queue": torch.zeros(4, 4)},
        {**FIRST, **{f"exp_avg.{name}": tensor for name, tensor in SECOND.items()}},
        {"layers": {str(i): {"attn": {n: {"weight": FIRST[f"layers.{i}.attn.{n}.weight"]} for n in NAMES}}
                    for i in range(2)}},
    ],
)  # fmt: skip
def test_obvious_weights_are_read_without_asking(content, tmp_path):
    torch.save(content, tmp_path / "train.pt")
    assert is_read(tmp_path / "train.pt", FIRST)


COPIES = [
    ("student", "teacher"),
    ("model", "ema"),
    ("state_dict", "state_dict_ema"),
    ("online_model", "ema_model"),
    ("context_encoder", "target_encoder"),
    ("actor", "critic"),
    ("policy", "ref_policy"),
    ("generator", "discriminator"),
    ("encoder_q", "momentum_encoder"),
    ("text_encoder", "text_encoder_m"),
    ("net", "swaNet"),
    ("best", "last"),
]


@pytest.mark.parametrize(("one", "other"), COPIES)
@pytest.mark.parametrize("wrapper", ["", "module."])
def test_copies_in_one_flat_file_are_asked_for(one, other, wrapper, tmp_path):
    file = tmp_path / "both.safetensors"
    save_file(
        {**weights(1, f"{wrapper}{one}."), **weights(2, f"{wrapper}{other}."), "head.weight": torch.ones(2, 2)}, file
    )
    with pytest.raises(
        SeveralSets, match=r"both.safetensors holds several sets.*--state KEY \(state= in Python\)"
    ) as e:
        rd.inspect(file, num_heads=2)
    assert sorted(e.value.candidates) == sorted((f"{wrapper}{one}", f"{wrapper}{other}"))
    assert is_read(file, FIRST, f"{wrapper}{one}")
    assert is_read(file, SECOND, f"{wrapper}{other}")
    assert rd.inspect(file, num_heads=2, state=f"{wrapper}{one}").rows[0]["name"] == "layers.0.attn"


@pytest.mark.parametrize(("one", "other"), [*COPIES, ("0", "1"), ("model", "initial_model")])
def test_nested_sets_are_asked_for(one, other, tmp_path):
    torch.save({"epoch": 1, "all": {one: FIRST, other: SECOND}, "optimizer": ADAM}, tmp_path / "both.pt")
    with pytest.raises(SeveralSets) as e:
        queries(tmp_path / "both.pt")
    assert e.value.candidates == (f"all.{one}", f"all.{other}")
    assert is_read(tmp_path / "both.pt", SECOND, f"all.{other}")
    with pytest.raises(SeveralSets, match=r"has no weights 'al': it holds all\."):
        queries(tmp_path / "both.pt", "al")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("text_model", "vision_model"),
        ("encoder", "decoder"),
        ("doc_encoder", "query_encoder"),
        ("question_encoder", "passage_encoder"),
        ("text_encoder", "text_encoder_2"),
        ("encoder_a", "encoder_b"),
        ("source_encoder", "target_encoder"),
        ("language_model", "audio_tower"),
    ],
)
def test_parts_of_one_model_are_read_together(one, other, tmp_path):
    """Two towers, siamese encoders and the like are one model, and no alarm is raised."""
    save_file({**weights(1, f"{one}."), **weights(2, f"{other}.")}, tmp_path / "model.safetensors")
    found = queries(tmp_path / "model.safetensors")
    assert len(found) == 4
    if one != "source_encoder":
        torch.save({one: FIRST, other: SECOND}, tmp_path / "model.pt")
        assert sum(map(torch.equal, queries(tmp_path / "model.pt"), found)) == 4


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("model", "ema_model.module"),  # AveragedModel
        ("student.module", "teacher"),
        ("student.backbone", "teacher.encoder"),
        ("model._orig_mod", "ema_model"),
        ("model", "ema.ema_model"),
        ("encoder_q", "encoder_k"),
        ("initial_model", "model"),
        ("model", "model_copy"),
    ],
)
def test_copies_of_which_one_is_wrapped_are_asked_for(one, other, tmp_path):
    torch.save(weights(1, f"{one}.") | weights(2, f"{other}."), tmp_path / "model.pt")
    with pytest.raises(SeveralSets) as error:
        rd.find_attention(tmp_path / "model.pt", num_heads=2)
    assert set(error.value.candidates) == {one.partition(".")[0], other.partition(".")[0]}
    assert is_read(tmp_path / "model.pt", SECOND, state=other)


def test_a_copy_beside_names_without_a_prefix(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file(FIRST | weights(2, "ema."), file)
    with pytest.raises(SeveralSets) as e:
        queries(file)
    assert e.value.candidates == (".", "ema")
    assert is_read(file, FIRST, ".")
    assert is_read(file, SECOND, "ema")


def test_a_copy_whose_names_lost_their_dots(tmp_path):
    """Latent diffusion keeps its EMA as buffers, whose names can have no dots."""
    file = tmp_path / "model.safetensors"
    save_file(weights(1, "model.") | {f"model_ema.{n.replace('.', '')}": t for n, t in SECOND.items()}, file)
    with pytest.raises(SeveralSets):
        queries(file)
    assert is_read(file, FIRST, "model")
    assert is_read(file, SECOND, "model_ema")


def test_an_average_without_names_is_no_silent_choice(tmp_path):
    torch.save({"model": FIRST, "ema": {"decay": 0.9, "shadow_params": list(SECOND.values())}}, tmp_path / "a.pt")
    with pytest.raises(SeveralSets):
        queries(tmp_path / "a.pt")
    assert is_read(tmp_path / "a.pt", FIRST, "model")
    with pytest.raises(CheckpointError, match=r"ema.shadow_params in .* is a list of tensors without names"):
        queries(tmp_path / "a.pt", "ema.shadow_params")


def test_an_average_that_a_callback_keeps_is_no_silent_choice(tmp_path):
    torch.save(
        {"state_dict": FIRST, "callbacks": {"EMA": {"weights": SECOND}, "Stop": {"x": SECOND}}}, tmp_path / "a.pt"
    )
    with pytest.raises(SeveralSets) as e:
        queries(tmp_path / "a.pt")
    assert e.value.candidates == ("state_dict", "callbacks.EMA.weights")
    assert is_read(tmp_path / "a.pt", SECOND, "callbacks.EMA.weights")


def test_copies_inside_of_a_chosen_set_are_asked_for_too(tmp_path):
    torch.save({"model": weights(1, "student.") | weights(2, "teacher."), "model_ema": FIRST}, tmp_path / "a.pt")
    with pytest.raises(SeveralSets) as e:
        queries(tmp_path / "a.pt")
    assert e.value.candidates == ("model", "model_ema")
    with pytest.raises(SeveralSets) as e:
        queries(tmp_path / "a.pt", "model")
    assert sorted(e.value.candidates) == ["student", "teacher"]
    assert is_read(tmp_path / "a.pt", SECOND, "model.teacher")


def test_a_teacher_of_another_size_is_a_copy_and_a_single_matrix_is_none(tmp_path):
    save_file(weights(1, "student.") | weights(2, "teacher.", width=16), tmp_path / "a.safetensors")
    with pytest.raises(SeveralSets):
        queries(tmp_path / "a.safetensors")
    one = {"target_proj.weight": torch.ones(2, 2), "online_proj.weight": torch.ones(2, 2)}
    save_file(FIRST | one, tmp_path / "b.safetensors")
    assert is_read(tmp_path / "b.safetensors", FIRST)


def test_small_heads_of_one_shape_are_no_copies(tmp_path):
    """DAB-DETR's decoder has several heads of the same names, one of them called ref_point_head."""
    names = ("ref_point_head.layers.0", "ref_point_head.layers.1", "query_scale.layers.0", "query_scale.layers.1")
    trunk = {f"layers.{i}.attn.{name}.weight": torch.ones(4, 4) for i in range(12) for name in NAMES}
    save_file(trunk | {f"decoder.{name}.weight": torch.ones(2, 2) for name in names}, tmp_path / "a.safetensors")
    assert len(queries(tmp_path / "a.safetensors")) == 12


def test_moments_beside_weights_are_asked_for_when_their_names_are_short(tmp_path):
    save_file(weights(1, "params.") | weights(2, "mu.") | weights(3, "nu."), tmp_path / "a.safetensors")
    with pytest.raises(SeveralSets):
        queries(tmp_path / "a.safetensors")
    assert is_read(tmp_path / "a.safetensors", FIRST, "params")


def test_containers_that_refer_to_themselves_end(tmp_path):
    around: dict = {"model": FIRST}
    around |= {"a": around, "b": around, "c": around}
    torch.save(around, tmp_path / "a.pt")
    assert is_read(tmp_path / "a.pt", FIRST, "model")


def test_what_is_no_state_dict(tmp_path):
    for content, message in (
        ([FIRST], "contains no state dict"),
        (torch.ones(2, 3), r"is one tensor of shape \(2, 3\)"),
    ):
        torch.save(content, tmp_path / "a.pt")
        with pytest.raises(CheckpointError, match=message):
            queries(tmp_path / "a.pt")


def test_state_is_of_files():
    with pytest.raises(TypeError, match="state='ema' names weights in a checkpoint"):
        rd.find_attention(torch.nn.MultiheadAttention(8, 2), state="ema")


def test_the_candidates_stay_known(tmp_path):
    torch.save({"student": FIRST, "teacher": SECOND}, tmp_path / "a.pt")
    assert open_checkpoint(tmp_path / "a.pt", "teacher").candidates == ("student", "teacher")
