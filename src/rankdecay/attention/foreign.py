"""Formats of weights that are known and not read: what each is, and how to convert it."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

from rankdecay.attention.errors import CheckpointError

_SAVE = "save its tensors with safetensors.torch.save_file and give that file"
_IN_JAX = "restore it in JAX, " + _SAVE.replace("its tensors", "the arrays, as tensors,")
_BY_TRANSFORMERS = "load it with a version 4 of transformers (from_pretrained(..., {flag}=True)) and save_pretrained it"

#: Pattern of the end of a file's name, what the file is, and what to do.
_FILES: tuple[tuple[str, str, str], ...] = (
    (r"\.onnx|\.onnx_data", "an ONNX graph, whose weights have no names", "give the model it was exported from"),
    (r"\.msgpack", "a Flax checkpoint", _BY_TRANSFORMERS.format(flag="from_flax") + ", or " + _IN_JAX),
    (r"\.h5|\.hdf5|\.keras", "a TensorFlow or Keras checkpoint",
     _BY_TRANSFORMERS.format(flag="from_tf") + ", or " + _SAVE),
    (r"\.ckpt(-\d+)?\.(index|meta|data-.*)|\.data-\d+-of-\d+|\.index", "part of a TensorFlow checkpoint",
     "read it with tf.train.load_checkpoint, " + _SAVE),
    (r"\.pb|\.tflite", "a TensorFlow graph", "give the checkpoint it was exported from, as safetensors"),
    (r"\.npz|\.npy", "a NumPy archive",
     "convert it: safetensors.numpy.save_file(dict(numpy.load(file)), 'model.safetensors')"),
    (r"\.distcp", "a shard of a distributed checkpoint (DCP)",
     "convert its whole folder: python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER model.pt"),
    (r"(^|/)(bf16_)?zero_pp_rank_.*\.pt|_optim_states\.pt", "a shard of DeepSpeed (ZeRO)",
     "merge all shards with the zero_to_fp32.py beside them"),
    (r"\.nemo|\.tar|\.tgz|\.tar\.gz|\.zip|\.gz|\.7z", "a packed archive", "unpack it and give what is inside"),
    (r"\.pt2|\.pte|\.ptl", "an exported program", "save the state_dict() of the model it was exported from"),
    (r"\.mlmodel|\.mlpackage|\.engine|\.trt|\.plan", "a compiled model", "give the model it was compiled from"),
    (r"\.pkl|\.pickle", "a pickle, which can run code", "save the state_dict() as safetensors"),
)  # fmt: skip


def foreign_file(path: Path) -> str | None:
    """Return what a file is and what to do, if it is of a format that is known and not read."""
    for pattern, kind, remedy in _FILES:
        if re.search(f"(?:{pattern})$", path.name):
            return f"{path} is {kind}, which is not read; {remedy}."
    return None


def foreign_folder(folder: Path) -> str | None:
    """Return what a directory without readable weights is and what to do, if it is of a format that is known."""
    names = sorted(file.name for file in folder.iterdir())

    def has(pattern: str) -> bool:
        return any(re.fullmatch(pattern, name) for name in names)

    if has(r".*\.distcp") or (has(r"\.metadata") and not has(r".*\.safetensors")):
        return (
            f"{folder} is a distributed checkpoint (DCP), which is not read; make one file of it: python -m "
            f"torch.distributed.checkpoint.format_utils dcp_to_torch {folder} model.pt"
        )
    if has(r"(bf16_)?zero_pp_rank_.*|mp_rank_\d+_model_states\.pt|global_step\d+|zero_to_fp32\.py"):
        above = folder if has(r"global_step\d+|zero_to_fp32\.py") else folder.parent
        return (
            f"{folder} holds DeepSpeed shards (ZeRO), which are not read; make one file of them: python "
            f"{above / 'zero_to_fp32.py'} {above} {above / 'whole'}, and give that directory."
        )
    if has(r"_CHECKPOINT_METADATA|manifest\.ocdbt|ocdbt\.process_\d+|_METADATA|\.zarray|_sharding"):
        return f"{folder} is an Orbax checkpoint of JAX, which is not read; {_IN_JAX}."
    if has(r"mp_rank_\d+(_\d+)?|latest_checkpointed_iteration\.txt|iter_\d{7}"):
        return f"{folder} is a Megatron-LM checkpoint, which is not read; convert it to Hugging Face's format first."
    if has(r"saved_model\.pb"):
        return f"{folder} is a TensorFlow SavedModel, which is not read; load it in TensorFlow, {_SAVE}."
    return next((text for name in names if (text := foreign_file(folder / name))), None)


def check_archive(file: Path) -> None:
    """Refuse an archive that torch.save did not write: compressed ones could expand to any size.

    Raises:
        CheckpointError: If the file is such an archive; it says which.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError):
        return  # the format before torch 1.6, or damaged: torch.load finds out which
    inside = [entry.filename.partition("/")[2] for entry in entries]
    if any(name == "constants.pkl" or name.startswith("code/") for name in inside):
        raise CheckpointError(
            f"{file} is a TorchScript archive, which holds code and is not loaded; where you trust it, "
            "torch.save(torch.jit.load(file).state_dict(), 'model.pt') converts it to a state dict."
        )
    packed = [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
    if packed:
        raise CheckpointError(f"{file} is compressed ({packed[0]}), which torch.save does not do; it is not unpacked.")
