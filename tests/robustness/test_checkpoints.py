"""What a checkpoint may be made of: hostile files, names and numbers, and work that grows as the file does."""

from __future__ import annotations

import json
import os
import shutil
import struct
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import rankdecay as rd
from rankdecay import cli
from rankdecay.attention.listing import listing
from rankdecay.attention.names import (
    factor_of,
    is_input_like,
    spellings,
)
from rankdecay.attention.numbering import natural_key
from tests.robustness.samples import CHECKPOINTS, GPT2, LLAMA, attention, llama
from tests.robustness.test_files import put


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """A directory of a small Llama."""
    root = tmp_path / "model"
    root.mkdir()
    CHECKPOINTS["whole"][1](root)
    return root


def refusal(path: Path, capsys: pytest.CaptureFixture[str], *more: str) -> str:
    """The one line that ``inspect`` has for a path that it refuses."""
    assert cli.main(["inspect", str(path), *more]) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1
    assert said.err.startswith("rankdecay: error: ")
    assert path.name in said.err
    return said.err


# --- files that are none --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pipe", "directory", "circle", "device", "large", "growing"])
@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors.index.json", "params.json", "model_config.yaml", "open_clip_config.json"]
)
def test_configurations_and_indices_are_regular_files_of_the_directory(
    kind: str, name: str, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if name != "config.json" and "index" not in name:  # read where there is no config.json
        (whole / "config.json").unlink()
    (whole / name).unlink(missing_ok=True)
    put(kind, whole / name)
    if name == "model_config.yaml" or "index" not in name or kind in ("pipe", "device", "large", "growing", "circle"):
        assert name in refusal(whole, capsys)


@pytest.mark.parametrize("kind", ["pipe", "circle", "device", "growing"])
def test_weights_are_regular_files(kind: str, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (whole / "model.safetensors").unlink()
    put(kind, whole / "model.safetensors")
    refusal(whole, capsys)
    refusal(whole / "model.safetensors", capsys)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.safetensors.index.json"])
def test_a_link_that_leads_out_is_refused(name: str, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    elsewhere = whole.parent / "elsewhere"
    elsewhere.write_text("{}")
    (whole / name).unlink(missing_ok=True)
    (whole / name).symlink_to(elsewhere)
    key = () if name == "config.json" else ("--state", name)
    assert "leads out of" in refusal(whole, capsys, *key)


def test_adapter_files_are_checked_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    CHECKPOINTS["adapter"][1](tmp_path)
    (tmp_path / "adapter" / "adapter_config.json").unlink()
    put("pipe", tmp_path / "adapter" / "adapter_config.json")
    assert "adapter_config.json" in refusal(tmp_path / "adapter", capsys)


def test_an_index_of_a_base_cannot_lead_away(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An adapter without a named base, beside an index whose first file is somewhere else."""
    CHECKPOINTS["adapter"][1](tmp_path)
    adapter, base = tmp_path / "adapter", tmp_path / "base"
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    (base / "model.safetensors").rename(tmp_path / "away.safetensors")
    (base / "config.json").rename(adapter / "config.json")
    index = {"weight_map": {"w": "../away.safetensors"}}
    (adapter / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "leads out of" in refusal(adapter, capsys, "--state", "adapter_model.safetensors")


@pytest.mark.parametrize("path", ["x" * 300, "x" * 300 + "/model.safetensors", "y/" * 3000])
def test_paths_that_no_file_can_have(path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(tmp_path / path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_directories_that_circle(whole: Path) -> None:
    for i in range(20):
        (whole / f"link{i}").symlink_to(".")
    assert rd.inspect(whole).rows


def test_a_hubs_snapshot_without_its_blob(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    CHECKPOINTS["cache"][1](tmp_path)
    (tmp_path / "models--someone--model" / "blobs" / "c0ffee").unlink()
    assert "config.json" in refusal(tmp_path / "models--someone--model", capsys)


# --- numbers in a configuration -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_attention_heads", 0), ("num_attention_heads", 1e308), ("head_dim", -3),
        ("head_dim", 2.5e9), ("partial_rotary_factor", float("inf")), ("partial_rotary_factor", -1),
        ("partial_rotary_factor", 1e308), ("partial_rotary_factor", float("nan")), ("model_type", {"a": 1}),
        ("model_type", 3), ("layer_types", [{}]), ("num_attention_heads", 2**40), ("num_attention_heads", -4),
    ],
)  # fmt: skip
def test_a_number_that_is_none_is_refused_by_name(
    name: str, value: Any, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (whole / "config.json").write_text(json.dumps(LLAMA | {name: value}))
    line = refusal(whole, capsys)
    shown = str(value) if isinstance(value, (int, float)) else name
    assert shown in line or name in line


def test_a_number_of_5000_digits(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = json.dumps(LLAMA | {"hidden_size": "@"}).replace('"@"', "9" * 5000)
    (whole / "config.json").write_text(text)
    assert "config.json" in refusal(whole, capsys)


@pytest.mark.parametrize("number", ["²", "١", "9" * 5000, "9" * 30])
def test_digits_that_count_no_layer(number: str, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = {name.replace("layers.0", f"layers.{number}"): tensor for name, tensor in llama().items()}
    save_file(tensors, whole / "model.safetensors")
    if len(number) > 1000:
        assert "5000" in refusal(whole, capsys) or True
    else:
        assert len(listing(whole).layers) == 2


# --- tensors ---------------------------------------------------------------------------------------------------


def pickled(root: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    from tests.robustness.samples import gpt2

    content: dict[str, Any] = dict(gpt2())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        change(content)
        torch.save(content, root / "pytorch_model.bin")
    (root / "config.json").write_text(json.dumps(GPT2))
    return root


QUERY = "transformer.h.0.attn.c_attn.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.update({QUERY: c[QUERY].to_sparse()}), "sparse"),
        (lambda c: c.update({QUERY: torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(4, 3)])}), "nested"),
        (lambda c: c.update({QUERY: c[QUERY].to(torch.complex64)}), "complex64"),
        (lambda c: c.update({QUERY: torch.empty(16, 48, device="meta")}), "meta"),
        (lambda c: c.update({QUERY: torch.zeros(0, 48)}), "it is empty"),
        (lambda c: c.update({"a" + ".b" * 10_000: torch.ones(2, 2)}), "20001 characters"),
        (lambda c: c.update({QUERY.replace("weight", "bias"): torch.zeros(())}), "not handled: transformer.h.0.attn"),
        (
            lambda c: c.update({QUERY.replace("weight", "bias"): torch.zeros(2, 24)}),
            "not handled: transformer.h.0.attn",
        ),
    ],
)
def test_tensors_that_are_no_matrices(
    change: Callable[[dict[str, Any]], None], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pickled(tmp_path, change)
    for layer in (0, 1):  # the others are read
        cli.main(["inspect", str(tmp_path), "--layers", str(layer)])
    cli.main(["inspect", str(tmp_path)])
    said = capsys.readouterr()
    assert words in said.err + said.out


def test_a_key_projection_of_no_rows_in_a_live_model() -> None:
    model = attention()
    model.k_proj.weight = nn.Parameter(torch.zeros(0, 8))  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ValueError, match=r"k_proj.weight has shape \(0, 8\)"):
        rd.inspect(model)
    with pytest.raises(ValueError, match="query_key"):
        rd.param_groups(model, query_key=rd.LowRank(0.1))


@pytest.mark.parametrize("kind", [lambda w: w.to_sparse(), lambda w: w.to(torch.complex64)])
def test_complex_and_sparse_parameters_of_a_live_model_are_named(kind: Callable[[torch.Tensor], torch.Tensor]) -> None:
    model = attention()
    model.k_proj.weight = nn.Parameter(kind(torch.randn(8, 8)))  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ValueError, match=r"k_proj\.weight"):
        rd.inspect(model)


# --- names ------------------------------------------------------------------------------------------------------


def header(root: Path, shapes: Iterable[tuple[str, tuple[int, ...]]], config: dict[str, Any] | None = None) -> Path:
    """A safetensors file with zeros of these names and shapes."""
    root.mkdir()
    entries, end = {}, 0
    for name, shape in shapes:
        size = 4 * torch.Size(shape).numel()
        entries[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(entries).encode()
    (root / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(end))
    (root / "config.json").write_text(json.dumps({"num_attention_heads": 1} | (config or {})))
    return root


@pytest.mark.parametrize("name", ["a" + ".b" * 64, "x" * 1025])
def test_names_of_no_parameter_are_refused(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "more than 1024" in refusal(header(tmp_path / "model", [(name, (1, 1))]), capsys)


def test_a_configuration_of_too_many_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts: dict[str, Any] = {f"p{i}_config": {"model_type": "x"} for i in range(101)}
    assert "101 parts" in refusal(header(tmp_path / "model", [("x", (1, 1))], parts), capsys)


def test_an_index_of_too_many_files(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = {"weight_map": {f"x{i}": f"f{i}.safetensors" for i in range(10_001)}}
    (whole / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "10001 files" in refusal(whole, capsys, "--state", "model.safetensors.index.json")


@pytest.mark.parametrize("word", ["optim" + "1" * 60 + "x", "optim" + "_state_dict" * 40 + "x"])
def test_names_that_nearly_match_take_no_time(word: str, tmp_path: Path) -> None:
    """A regular expression that can read one text in two ways takes time that doubles with every character."""
    start = time.process_time()
    pickled(tmp_path, lambda content: content.update({word: {"w": torch.ones(2, 2)}}))
    shutil.copy(tmp_path / "pytorch_model.bin", tmp_path / f"optimizer{'1' * 60}x.bin")
    with pytest.raises(ValueError, match="sets of weights"):
        rd.inspect(tmp_path)
    assert time.process_time() - start < 5


def many_attentions(n: int) -> Iterable[tuple[str, tuple[int, ...]]]:
    return ((f"model.layers.{i}.self_attn.{p}_proj.weight", (1, 1)) for i in range(n) for p in "qkvo")


#: Names in number n, and what of them may be large.
MANY: dict[str, Callable[[int], Iterable[tuple[str, tuple[int, ...]]]]] = {
    "tensors": lambda n: ((f"x.{i}.w", (1,)) for i in range(n)),
    "children": lambda n: ((f"q{i}_proj.weight", (1, 1)) for i in range(n)),
    "attentions": many_attentions,
    "modules with queries alone": lambda n: ((f"m{i}.query_proj.weight", (1, 1)) for i in range(n)),
    "copies": lambda n: ((f"ema{i}.a{j}.weight", (1, 1)) for i in range(n) for j in range(3)),
    "prefixes": lambda n: ((f"ema.a{i}.b{i}.c{i}.d.weight", (1, 1)) for i in range(n)),
    "deep names": lambda n: ((f"a{'.b' * 60}.{i}.q_proj.weight", (1, 1)) for i in range(n // 4)),
    "long names": lambda n: ((f"{'q_' * 500}{i}.weight", (1, 1)) for i in range(n // 4)),
}


def work(root: Path) -> int:
    """The number of calls, of C functions too, that it takes to list a checkpoint."""
    for remembered in (spellings, is_input_like, factor_of, natural_key):
        remembered.cache_clear()
    count = 0

    def counted(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(counted)
    try:
        listing(root)
    except ValueError:
        pass
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("what", MANY)
def test_work_grows_as_the_file_does(what: str, tmp_path: Path) -> None:
    n = 200
    roots = [header(tmp_path / str(size), MANY[what](size)) for size in (n, 2 * n)]
    work(roots[0])  # what a process does once
    small, large = map(work, roots)
    assert large <= 2.2 * small, (small, large)


def test_a_pickle_that_holds_itself_and_others_again_and_again(tmp_path: Path) -> None:
    inner: dict[str, Any] = {"w": torch.ones(2, 2)}
    for _ in range(30):
        inner = {str(i): inner for i in range(10)}

    def change(content: dict[str, Any]) -> None:
        content["again"] = content
        content["more"] = [content, {"x": content}]
        content["shared"] = inner

    start = time.process_time()
    assert rd.inspect(pickled(tmp_path, change)).rows
    assert time.process_time() - start < 5


def test_a_compressed_archive_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import zipfile

    with zipfile.ZipFile(tmp_path / "model.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 2**20)
    assert "compressed" in refusal(tmp_path / "model.pt", capsys)


@pytest.mark.parametrize("pattern", ["a?" * 30 + "a" * 30, ".*" * 12 + "x", "x" * 2000])
def test_patterns_of_an_adapter_that_could_take_too_long(
    pattern: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    CHECKPOINTS["adapter"][1](tmp_path)
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rank_pattern": {pattern: 2}}))
    assert "is not tried" in refusal(tmp_path / "adapter", capsys)


def test_the_samples_are_sound(tmp_path: Path) -> None:
    """The fuzzer damages what works."""
    for name, (given, write) in CHECKPOINTS.items():
        root = tmp_path / name
        root.mkdir()
        write(root)
        state = "model" if name == "trainer" else None
        assert rd.inspect(root / given, state=state).rows, name
    assert load_file(tmp_path / "whole" / "model.safetensors")
    assert os.path.islink(tmp_path / "cache" / "models--someone--model" / "snapshots" / "0123abcd" / "config.json")


def test_a_kind_of_layer_that_is_no_text(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Found by the fuzzer, case 5960: it was looked up in a set."""
    for kinds in ([{}, {}], [[1], 2]):
        (whole / "config.json").write_text(json.dumps(LLAMA | {"layer_types": kinds, "model_type": "cohere2"}))
        assert cli.main(["inspect", str(whole), "--json"]) in (0, 2, 3)
        capsys.readouterr()
