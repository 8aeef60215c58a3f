"""Checkpoints in files: layouts, what is copied, what is refused, and that nothing half-written is left."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import rankdecay as rd
from rankdecay.compress import files, plan
from tests import needs
from tests.compress import small

pytestmark = pytest.mark.filterwarnings("ignore:chosen without a text")


def _logits(folder: Path) -> torch.Tensor:
    model = needs.package("transformers").AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        return model(small.tokens()).logits


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_every_layout_gives_the_same_tensors(tmp_path):
    model = small.model()
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    (tmp_path / "pickle").mkdir()
    torch.save(model.state_dict(), tmp_path / "pickle" / "pytorch_model.bin")
    (tmp_path / "pickle" / "config.json").write_bytes((tmp_path / "one" / "config.json").read_bytes())
    for layout in ("one", "shards", "pickle"):
        rd.compress(tmp_path / layout, 8, tmp_path / f"{layout} made")
    one = _tensors(tmp_path / "one made")
    for layout in ("shards", "pickle"):
        other = _tensors(tmp_path / f"{layout} made")
        assert one.keys() == other.keys()
        assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_large_checkpoints_are_written_in_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_BIG_SHARD", 20_000)
    small.saved(tmp_path / "model")
    rd.compress(tmp_path / "model", 8, tmp_path / "made")
    shards = sorted(tmp_path.glob("made/model-*.safetensors"))
    assert len(shards) > 2
    index = json.loads((tmp_path / "made" / "model.safetensors.index.json").read_text())
    held = {}
    for file in shards:
        with safe_open(file, framework="pt") as opened:
            held |= dict.fromkeys(opened.keys(), file.name)
    assert index["weight_map"] == held
    assert index["metadata"]["total_size"] == sum(t.numel() * 4 for t in _tensors(tmp_path / "made").values())
    assert _logits(tmp_path / "made").isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_type_of_the_weights_stays(tmp_path, dtype):
    small.model().to(dtype).save_pretrained(tmp_path / "model")
    rd.compress(tmp_path / "model", 8, tmp_path / "made")
    assert {tensor.dtype for tensor in _tensors(tmp_path / "made").values()} == {dtype}
    assert json.loads((tmp_path / "made" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


def test_tied_embeddings_stay_tied(tmp_path):
    small.saved(tmp_path / "model", tie_word_embeddings=True)
    rd.compress(tmp_path / "model", 8, tmp_path / "made")
    assert "lm_head.weight" not in _tensors(tmp_path / "made")
    model = needs.package("transformers").AutoModelForCausalLM.from_pretrained(tmp_path / "made")
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_tied_embeddings_that_files_hold_once_are_measured_on_a_text(tmp_path):
    folder = small.saved(tmp_path / "model", tie_word_embeddings=True)
    from_files = plan(folder, 8, small.tokens(), sizes=[])
    live = small.model(tie_word_embeddings=True)
    assert [size.loss for size in from_files.sizes] == pytest.approx(
        [size.loss for size in plan(live, 8, small.tokens(), sizes=[]).sizes]
    )
    made = rd.compress(live, 8, calibration=small.tokens(), sizes=[])
    assert made.lm_head.weight is made.model.embed_tokens.weight
    with torch.no_grad():
        assert made(small.tokens()[1::2], labels=small.tokens()[1::2]).loss.item() == pytest.approx(
            from_files.sizes[1].loss, abs=1e-4
        )


def test_experts_that_files_hold_one_by_one_are_measured_on_a_text(tmp_path):
    folder = small.saved(tmp_path / "model", "Mixtral", num_local_experts=4)
    assert any(".experts.0." in name for name in _tensors(folder))
    with torch.no_grad():
        live = needs.package("transformers").AutoModelForCausalLM.from_pretrained(folder)
        assert not any(".experts.0." in name for name in live.state_dict())
    made = rd.compress(folder, 8, tmp_path / "made", small.tokens(), sizes=[])
    held = small.tokens()[1::2]
    with torch.no_grad():
        loaded = needs.package("transformers").AutoModelForCausalLM.from_pretrained(tmp_path / "made")
        assert made.sizes[0].loss == pytest.approx(live(held, labels=held).loss.item(), abs=1e-4)
        assert made.sizes[1].loss == pytest.approx(loaded(held, labels=held).loss.item(), abs=1e-4)


def test_what_belongs_to_the_model_is_copied_and_nothing_else(tmp_path):
    folder = small.saved(tmp_path / "model")
    small.text_tokenizer(folder)
    (folder / "LICENSE").write_text("as it is")
    (folder / "README.md").write_text("the original's card")
    (folder / "optimizer.pt").write_bytes(b"large")
    (folder / "params.json").write_text('{"head_dim": 16}')
    (folder / "spiece.spm").write_bytes(b"words")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    (folder / "modeling_own.py").write_text("raise SystemExit")
    rd.compress(folder, 8, tmp_path / "made")
    made = {file.name for file in (tmp_path / "made").iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "README.md", "LICENSE"} <= made
    assert {"tokenizer.json", "tokenizer_config.json"} <= made
    assert "spiece.spm" in made
    assert (tmp_path / "made" / "additional_chat_templates" / "tools.jinja").read_text() == "{{ tools }}"
    assert not made & {"optimizer.pt", "modeling_own.py", "params.json"}
    assert "the original's card" not in (tmp_path / "made" / "README.md").read_text()


def test_attention_that_the_class_does_not_read_is_spoken_of(tmp_path):
    """Such as the layer for speculative decoding that GLM-4.5's files hold behind the others."""
    folder = small.saved(tmp_path / "model")
    assert not [note for note in plan(folder, 8).notes if "does not read" in note]
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    (note,) = [note for note in plan(folder, 8).notes if "does not read" in note]
    assert note.startswith("model.layers.1.self_attn.")
    assert "and 3 more: attention that LlamaForCausalLM does not read" in note
    rd.compress(folder, 8, tmp_path / "made")
    assert note in (tmp_path / "made" / "README.md").read_text("utf-8")
    assert _tensors(tmp_path / "made")["model.layers.1.self_attn.k_proj.weight"].shape == (32, 48)


def test_the_original_is_not_touched(tmp_path):
    folder = small.saved(tmp_path / "model")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    rd.compress(folder, 8, tmp_path / "made")
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_a_directory_that_exists_is_not_written_to(tmp_path):
    folder = small.saved(tmp_path / "model")
    with pytest.raises(ValueError, match="exists"):
        rd.compress(folder, 8, folder)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="exists"):
        rd.compress(folder, 8, tmp_path / "file")
    (tmp_path / "empty").mkdir()
    rd.compress(folder, 8, tmp_path / "empty")
    assert (tmp_path / "empty" / "model.safetensors").exists()


def test_a_full_disk_leaves_nothing(tmp_path):
    """A limit on the size of a file stands for the disk: writing fails in the middle of the weights."""
    folder = small.saved(tmp_path / "model")
    before, ignored = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(ValueError, match=r"made cannot be written \(File too large\)"):
            rd.compress(folder, 8, tmp_path / "made")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


def test_what_a_kill_left_is_replaced(tmp_path):
    folder = small.saved(tmp_path / "model")
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    left = tmp_path / f".made.rankdecay-{int(ended.stdout)}"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    at_work = tmp_path / f".made.rankdecay-{os.getppid()}"  # of a process that is there
    at_work.mkdir()
    mine = tmp_path / "made.part"
    mine.mkdir()
    rd.compress(folder, 8, tmp_path / "made")
    assert not left.exists()
    assert at_work.exists()
    assert mine.exists()
    assert _logits(tmp_path / "made").isfinite().all()


def test_what_this_process_left_under_its_own_number_is_replaced(tmp_path):
    """In a container each start of a program may have the same number, so that a kill leaves a directory of one's own.

    Args:
        tmp_path: a directory.
    """
    left = tmp_path / f".made.rankdecay-{os.getpid()}-00c0ffee"
    left.mkdir()
    rd.compress(small.saved(tmp_path / "model"), 8, tmp_path / "made")
    assert {path.name for path in tmp_path.iterdir()} == {"model", "made"}


@pytest.mark.parametrize("names", [("x" * 70 + "1", "x" * 70 + "2"), ("made", "made")])
def test_two_compressions_at_once_in_one_process(tmp_path, names):
    folder = small.saved(tmp_path / "model")
    begun, go_on, failed = threading.Event(), threading.Event(), []

    def wait(what: str, done: int, total: int) -> None:
        if what == "writing tensors" and done == 3:
            begun.set()
            assert go_on.wait(60)

    def first() -> None:
        try:
            rd.compress(folder, 8, tmp_path / names[0], progress=wait)
        except ValueError as error:
            failed.append(str(error))

    thread = threading.Thread(target=first)
    thread.start()
    assert begun.wait(60)
    rd.compress(folder, 8, tmp_path / names[1])
    go_on.set()
    thread.join()
    assert {path.name for path in tmp_path.iterdir()} == {"model", *names}
    assert all(_logits(tmp_path / name).isfinite().all() for name in names)
    assert [("exists" in error) for error in failed] == [True] * (names[0] == names[1])


@pytest.mark.parametrize("error", [BrokenPipeError("mine"), KeyboardInterrupt("mine"), ZeroDivisionError("mine")])
def test_what_a_callback_raises_comes_out_as_it_is(tmp_path, error):
    folder = small.saved(tmp_path / "model")

    def tell(what: str, done: int, total: int) -> None:
        if what == "writing tensors" and done == 5:
            raise error

    with pytest.raises(type(error), match="mine"):
        rd.compress(folder, 8, tmp_path / "made", progress=tell)
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


def test_the_current_directory_is_not_replaced(tmp_path, monkeypatch):
    folder = small.saved(tmp_path / "model")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    for out in (".", "../empty"):
        with pytest.raises(ValueError, match="is the current directory"):
            rd.compress(folder, 8, out)


def test_of_several_sets_of_weights_that_which_transformers_loads_is_read(tmp_path):
    folder = small.saved(tmp_path / "model")
    rd.compress(folder, 8, tmp_path / "alone")
    save_file({"layers.0.attention.wq.weight": torch.zeros(64, 48)}, folder / "consolidated.safetensors")
    rd.compress(folder, 8, tmp_path / "made")
    assert torch.equal(_logits(tmp_path / "made"), _logits(tmp_path / "alone"))


def test_frequencies_that_an_old_release_stored_are_not_copied(tmp_path):
    folder = small.saved(tmp_path / "model")
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    save_file(_tensors(folder) | {name: torch.ones(8)}, folder / "model.safetensors", {"format": "pt"})
    rd.compress(folder, 8, tmp_path / "made")
    assert name not in _tensors(tmp_path / "made")


def test_embeddings_that_are_stored_twice_and_differ_are_refused_with_a_text(tmp_path):
    """The class of transformers does not tie them then, and a loss measured with tied ones would not be its own.

    Args:
        tmp_path: a directory.
    """
    folder = small.saved(tmp_path / "model", tie_word_embeddings=True)
    tensors = _tensors(folder)
    head = {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}
    save_file(tensors | head, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="set tie_word_embeddings=False"):
        plan(folder, 8, small.tokens(), sizes=[])


def test_weights_that_are_not_those_of_the_configuration(tmp_path):
    folder = small.saved(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.self_attn.k_proj.weight"
    save_file(tensors | {name: torch.zeros(16, 48)}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"k_proj.weight of .* has shape \(16, 48\)"):
        plan(folder)
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"has no model\.layers\.1\.self_attn\.k_proj\.weight"):
        plan(folder)


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight"])
def test_weights_beside_attention_that_are_not_there_are_refused_with_a_text(tmp_path, name):
    """The class would draw them at random, and the loss be that of another model."""
    folder = small.saved(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"has no {name} of the shape"):
        plan(folder, 8, small.tokens(), sizes=[])
    save_file(tensors | {name: torch.zeros(3, 3)}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=rf"{name} of .* has shape \(3, 3\), and its configuration says"):
        plan(folder, 8, sizes=[])  # which no class loads, with a text or without


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised weights"),
        ({"auto_map": {"AutoModelForCausalLM": "modeling.Own"}}, "needs code of its own"),
        ({"model_type": "unheard_of"}, "'unheard_of' cannot be compressed: .* has not been compared"),
        ({"model_type": "lama"}, "did you mean 'llama'"),
        ({"model_type": None, "architecture": "vit_tiny_patch16_224", "pretrained_cfg": {}}, "has no model_type"),
        ({"num_attention_heads": "4"}, r"reads: Validation error for field 'num_attention_heads': TypeError"),
        ({"attn_implementation": "kernels-community/flash-attn2"}, "names a kernel of the hub.*remove attn_impl"),
        ({"vocab_size": 60}, r"has shape \(50, 48\), and its configuration says \(60, 48\)"),
        ({"rope_parameters": {"rope_type": "unheard_of", "rope_theta": 1e4}}, "unheard_of"),
        ({"head_dim": 0}, "head_dim|built|reads"),
        ({"num_hidden_layers": 10**12}, "says num_hidden_layers=1000000000000"),
        ({"head_dim": 10**9}, "says head_dim=1000000000"),
        ({"vocab_size": 10**30}, "says vocab_size=1000"),
    ],
)
def test_configurations_that_are_refused(tmp_path, settings, says):
    folder = small.saved(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | settings))
    with pytest.raises(ValueError, match=says):
        rd.compress(folder, 8, tmp_path / "made")
    assert not (tmp_path / "made").exists()


def test_a_configuration_of_no_quantisation_is_read(tmp_path):
    """As exporters write it that fill in every key."""
    folder = small.saved(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": None}))
    rd.compress(folder, 8, tmp_path / "made")
    assert (tmp_path / "made" / "model.safetensors").exists()


def test_names_of_classes_that_are_none_do_not_count(tmp_path):
    folder = small.saved(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": [3, "logging", "OfAFork"]}))
    assert rd.compress(folder, 8, tmp_path / "made").new_head_dim == 8
