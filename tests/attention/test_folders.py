"""Directories as trainers and the hub leave them, and links."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rankdecay.attention.errors import CheckpointError
from rankdecay.attention.states import SeveralSets

from .test_states import FIRST, SECOND, is_read, queries

HALVES = [{name: tensor for name, tensor in FIRST.items() if f"layers.{i}." in name} for i in (0, 1)]


class _Arguments:
    """What a trainer pickles beside the weights: not loadable without running code."""


def folder(root: Path, files: dict[str, object]) -> Path:
    for name, content in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".safetensors":
            save_file(content, file)
        elif isinstance(content, str):
            file.write_text(content)
        else:
            torch.save(content, file)
    return root


def asks(path: Path, *candidates: str) -> None:
    with pytest.raises(SeveralSets, match="holds several sets of weights") as e:
        queries(path)
    assert sorted(e.value.candidates) == sorted(candidates)


TRAINER = {
    "scaler.pt": {"scale": 1.0},
    "rng_state.pth": {"cpu": torch.zeros(3, 3)},
    "rng_state_0.pth": {"cpu": torch.zeros(3, 3)},
    "training_args.bin": _Arguments(),
    "scheduler.pt": {},
    "optimizer.pt": {"state": SECOND},
    "optimizer.bin": {"state": SECOND},
    "random_states_0.pt": {},
    "zero_pp_rank_0_mp_rank_00_optim_states.pt": SECOND,
    "losses.pt": {"train": torch.zeros(9)},
    "trainer_state.json": "{}",
}


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model.pt"])
def test_what_trainers_leave_beside_weights_is_no_weights(name, tmp_path):
    assert is_read(folder(tmp_path, {name: FIRST, **TRAINER}), FIRST)


def test_checkpoints_of_a_trainer(tmp_path):
    folder(tmp_path, {"checkpoint-5/model.safetensors": FIRST, "runs/events": "x"})
    assert is_read(tmp_path, FIRST)
    folder(tmp_path, {"checkpoint-10/model.safetensors": SECOND})
    asks(tmp_path, "checkpoint-5", "checkpoint-10")
    assert is_read(tmp_path, SECOND, "checkpoint-10")
    save_file(FIRST, tmp_path / "model.safetensors")  # the final model
    assert is_read(tmp_path, FIRST)
    assert is_read(tmp_path, SECOND, "checkpoint-10")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("model.safetensors", "consolidated.safetensors"),
        ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors"),
        ("best.pt", "last.pt"),
        ("step_9.pt", "step_10.pt"),
        ("model.safetensors", "ema.pt"),
        ("model.safetensors", "model_1.safetensors"),
    ],
)
def test_several_files_are_asked_for(one, other, tmp_path):
    folder(tmp_path, {one: FIRST, other: SECOND, "optimizer.pt": {}})
    asks(tmp_path, one, other)
    assert is_read(tmp_path, FIRST, one)
    assert is_read(tmp_path, SECOND, other)


def test_an_index_beside_a_single_file(tmp_path):
    """Mistral's repositories hold the same weights twice, in two layouts."""
    index = {"weight_map": {name: f"model-0000{i + 1}-of-00002.safetensors" for i in (0, 1) for name in HALVES[i]}}
    files = {f"model-0000{i + 1}-of-00002.safetensors": HALVES[i] for i in (0, 1)}
    folder(tmp_path, files | {"model.safetensors.index.json": json.dumps(index)})
    assert is_read(tmp_path, FIRST)
    save_file(SECOND, tmp_path / "consolidated.safetensors")
    asks(tmp_path, "model.safetensors.index.json", "consolidated.safetensors")
    assert is_read(tmp_path, FIRST, "model.safetensors.index.json")


def test_a_shard_without_a_weight_that_its_index_lists(tmp_path):
    """As after a second save that was cut short; an output projection less would only leave its product out."""
    lost = "layers.1.self_attn.o_proj.weight"
    shard = "model-00001-of-00001.safetensors"
    names = [*FIRST, "lm_head.weight", "layers.0.rotary_emb.inv_freq"]  # tied, or computed anew: listed by some
    index = {"weight_map": dict.fromkeys(names, shard)}
    folder(tmp_path, {shard: FIRST, "model.safetensors.index.json": json.dumps(index)})
    assert is_read(tmp_path, FIRST)
    index["weight_map"][lost] = shard
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=rf"says that {lost} is in {shard}, which does not have it; download"):
        queries(tmp_path)


def test_shards_without_an_index(tmp_path):
    first, second = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    folder(tmp_path, {first: HALVES[0]})
    for path in (tmp_path, tmp_path / first):
        with pytest.raises(
            CheckpointError, match=rf"one of 2 files of a model, and {second} is not in .*--state {first}"
        ):
            queries(path)
        assert is_read(path, HALVES[0], first)
    save_file(HALVES[1], tmp_path / second)
    assert is_read(tmp_path, FIRST)
    assert is_read(tmp_path / second, FIRST)


def test_numbered_files_with_other_tensors_each_are_one_model(tmp_path):
    folder(tmp_path, {"hf_model_0001_0.pt": HALVES[0], "hf_model_0002_0.pt": HALVES[1]})
    assert is_read(tmp_path, FIRST)


def test_slices_of_every_matrix_are_refused(tmp_path):
    folder(tmp_path, {"consolidated.00.pth": FIRST, "consolidated.01.pth": SECOND, "params.json": "{}"})
    for path in (tmp_path, tmp_path / "consolidated.00.pth"):
        with pytest.raises(CheckpointError, match=r"one of 2 model-parallel shards .*convert_llama_weights_to_hf"):
            queries(path)


def test_the_same_weights_in_the_hubs_formats_are_read_once(tmp_path):
    folder(tmp_path, {"model.safetensors": FIRST, "pytorch_model.bin": FIRST, "tf_model.h5": "x", "a.onnx": "x"})
    assert is_read(tmp_path, FIRST)


def test_a_key_goes_through_directory_and_file(tmp_path):
    folder(tmp_path, {"run/both.pt": {"student": FIRST, "teacher": SECOND}, "run/optimizer.pt": {}})
    for state in ("teacher", "run/teacher", "run/both.pt/teacher"):
        assert is_read(tmp_path, SECOND, state)
    with pytest.raises(SeveralSets, match=r"both.pt has no weights 'x': it holds student, teacher"):
        queries(tmp_path, "x")


def test_parts_of_a_pipeline(tmp_path):
    folder(tmp_path, {"unet/diffusion_pytorch_model.safetensors": FIRST, "text_encoder/model.safetensors": SECOND})
    asks(tmp_path, "unet", "text_encoder")
    assert is_read(tmp_path, SECOND, "text_encoder")


def cached(root: Path) -> Path:
    """Write a repository as the hub's cache keeps it, with two revisions."""
    repository = root / "models--org--name"
    for revision, blob, content in (("aaa", "1f", FIRST), ("bbb", "2e", SECOND)):
        (repository / "blobs").mkdir(parents=True, exist_ok=True)
        save_file(content, repository / "blobs" / blob)
        (repository / "snapshots" / revision / "unet").mkdir(parents=True)
        (repository / "snapshots" / revision / "model.safetensors").symlink_to(f"../../blobs/{blob}")
        (repository / "snapshots" / revision / "unet" / "model.safetensors").symlink_to(f"../../../blobs/{blob}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("bbb\n")
    return repository


def test_the_cache_of_the_hub(tmp_path):
    repository = cached(tmp_path / "hub")
    for path in (tmp_path / "hub", repository, repository / "snapshots" / "bbb"):
        assert is_read(path, SECOND)
    assert is_read(repository / "snapshots" / "aaa" / "unet", FIRST)
    assert is_read(repository / "snapshots" / "aaa" / "model.safetensors", FIRST)
    assert is_read(repository / "blobs" / "1f", FIRST)
    assert is_read(repository, FIRST, "aaa")
    (repository / "refs" / "main").write_text("../../..")
    asks(repository, "aaa", "bbb")


def test_links_that_are_given_are_followed(tmp_path):
    run = folder(tmp_path / "run", {"model.safetensors": FIRST, "config.json": '{"num_attention_heads": 2}'})
    (tmp_path / "latest").symlink_to(run)
    (tmp_path / "model").symlink_to(run / "model.safetensors")
    (tmp_path / "m.safetensors").symlink_to(run / "model.safetensors")
    for link in ("latest", "model", "m.safetensors", "latest/model.safetensors"):
        assert is_read(tmp_path / link, FIRST)
    (tmp_path / "gone.pt").symlink_to(tmp_path / "nothing.pt")
    with pytest.raises(CheckpointError, match=r"gone.pt is a link to .*nothing.pt, which does not exist"):
        queries(tmp_path / "gone.pt")


def test_links_inside_that_lead_out_are_refused(tmp_path):
    run = folder(tmp_path / "run", {"model.safetensors": FIRST})
    (tmp_path / "evil").mkdir()
    (tmp_path / "evil" / "checkpoint-1").symlink_to(run)
    with pytest.raises(CheckpointError, match=r"leads out of .*give that directory itself"):
        queries(tmp_path / "evil")
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "m-00001-of-00002.safetensors").symlink_to(run / "model.safetensors")
    save_file(SECOND, tmp_path / "shards" / "m-00002-of-00002.safetensors")
    for path in (tmp_path / "shards", tmp_path / "shards" / "m-00002-of-00002.safetensors"):
        with pytest.raises(CheckpointError, match="leads out of"):
            queries(path)
