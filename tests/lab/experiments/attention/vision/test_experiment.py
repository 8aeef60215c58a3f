"""The vision transformer: its data, small runs of the whole command with either library, and what it refuses."""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import rankdecay as rd
from rankdecay import cli
from rankdecay.lab.experiments.attention.vision.experiment import VisionProblem
from rankdecay.lab.experiments.attention.vision.settings import Vision
from rankdecay.lab.store import read_metrics

TINY = ("--width", "16", "--heads", "2", "--depth", "2", "--mlp-width", "24", "--batch-size", "16", "--steps", "6")
TINY += ("--warmup", "2", "--evaluate-every", "3", "--device", "cpu")
SMALL = Vision(width=16, heads=2, depth=2, mlp_width=24)


def command(out: Path, *more: str) -> list[str]:
    return ["vision", *TINY, "--out", str(out), *more]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twelve bright and eight dark images, which anyone can tell apart, in colour and of uneven sizes."""
    root = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for name, count, low in (("bright", 12, 150), ("dark", 8, 0)):
        (root / name).mkdir()
        for i in range(count):
            pixels = random.integers(low, low + 100, (20 + i, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


def of_folder(folder: Path, **changes) -> Vision:
    return dataclasses.replace(SMALL, image_folder=str(folder), image_size=8, patch=4, **changes)


# --- what is learnt ---


def test_the_digits_are_split_and_known_by_the_summary():
    problem = VisionProblem(SMALL)
    facts = problem.facts()
    assert facts["train_images"] + facts["valid_images"] == 1797
    assert facts["valid_images"] == pytest.approx(0.2 * 1797, abs=5)
    assert facts["classes"] == list("0123456789")


def test_a_batch_depends_on_seed_and_step_alone(folder):
    problem, again = VisionProblem(of_folder(folder)), VisionProblem(of_folder(folder))
    first = problem.batch(0, 5, 7)
    problem.batch(0, 6, 7)
    for other in (problem.batch(0, 5, 7), again.batch(0, 5, 7)):
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert not torch.equal(first[0], problem.batch(0, 6, 7)[0])
    assert not torch.equal(first[0], problem.batch(1, 5, 7)[0])
    assert problem.size(first) == 7


@pytest.mark.parametrize("size", [1, 5, 16, 40])
def test_every_epoch_has_every_image_once(folder, size):
    problem = VisionProblem(of_folder(folder))
    count = len(problem.train.labels)
    assert count == 16
    steps = 2 * count * 5 // size  # several whole epochs, whatever the size
    pixels = torch.cat([problem.batch(0, step, size)[0] for step in range(steps)])
    all_images = sorted(map(bytes, problem.train.pixels))
    orders = [[bytes(image) for image in epoch.numpy()] for epoch in pixels.split(count) if len(epoch) == count]
    assert len(orders) == len(pixels) // count
    assert all(sorted(order) == all_images for order in orders)
    assert orders[0] != orders[1]


def test_an_image_keeps_its_label(folder):
    pixels, labels = VisionProblem(of_folder(folder)).batch(0, 0, 16)
    bright = pixels.float().mean((1, 2, 3)) > 125
    assert torch.equal(labels == 0, bright)


def test_the_model_sees_normalised_images(folder):
    problem = VisionProblem(of_folder(folder))
    seen = []
    model = problem.model(0, False)
    model.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    problem.logits(model, torch.from_numpy(problem.train.pixels))
    assert seen[0].mean((0, 2, 3)).tolist() == pytest.approx([0, 0, 0], abs=1e-4)
    assert seen[0].std((0, 2, 3)).tolist() == pytest.approx([1, 1, 1], abs=1e-4)


def test_validation_counts_what_is_right(folder):
    problem = VisionProblem(of_folder(folder, library="timm", valid_share=0.5))
    brightness = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 2))
    torch.nn.init.zeros_(brightness[1].bias)
    with torch.no_grad():
        brightness[1].weight.copy_(torch.tensor([[1.0], [-1.0]]).expand(2, 192))
    assert problem.evaluate(brightness, "cpu")[:3] == pytest.approx((0.0, 0.0, 1.0), abs=1e-3)
    with torch.no_grad():
        brightness[1].weight.zero_()
        brightness[1].bias.copy_(torch.tensor([1.0, 0.0]))  # always the first class, of which there are 6 in 10
    quality = problem.evaluate(brightness, "cpu")
    losses = torch.tensor([0.3132617] * 6 + [1.3132617] * 4)
    expected = (losses.mean().item(), losses.std().item() / 10**0.5, 0.6)
    assert quality[:3] == pytest.approx(expected, rel=1e-5)


def test_the_model_is_as_asked_for_and_follows_from_the_seed():
    problem = VisionProblem(dataclasses.replace(SMALL, depth=3))
    before = torch.random.get_rng_state()
    model, same, other = problem.model(0, False), problem.model(0, False), problem.model(1, False)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), same.parameters(), strict=True))
    layers = rd.find_attention(model)
    assert not torch.equal(layers[0].query.tensor(), rd.find_attention(other)[0].query.tensor())
    assert len(layers) == 3
    assert (layers[0].num_heads, layers[0].head_dim) == (2, 8)
    names = [name for name, _ in model.named_parameters()]
    assert not [name for name in names if name.endswith(("q_proj.bias", "k_proj.bias", "v_proj.bias"))]


# --- the command ---


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("vision") / "run"
    assert cli.main(command(out, "--strengths", "l2=0,1", "low_rank=1", "--quiet")) == 0
    return out, json.loads((out / "summary.json").read_text())


def test_the_summary_of_a_tiny_run(finished):
    _, summary = finished
    assert summary["command"] == "vision"
    assert summary["unit"] == "images"
    assert summary["train_images"] + summary["valid_images"] == 1797
    arms = [(arm["name"], arm["strength"], arm["mlp_decay"], arm["qk_norm"]) for arm in summary["arms"]]
    assert arms == [("l2", 0, 0.1, False), ("l2", 1, 0.1, False), ("low_rank", 1, 0.1, False)]
    for arm in summary["arms"]:
        assert 0 <= arm["accuracy"] <= 1
        assert arm["loss"] > 0
        assert arm["loss_error"] > 0
        assert len(arm["layers"]) == len(arm["untrained"]) == 2
        for layer in arm["layers"]:
            for part in ("query_key", "value_output"):
                assert 0 < layer[part]["pseudo_rank"] <= 1


def test_the_rows_of_a_tiny_run(finished):
    out, _ = finished
    rows = read_metrics(out)
    assert [row["step"] for row in rows] == [0, 3, 6] * 3
    for row in rows:
        assert row["images"] == 16 * row["step"]
        assert len(row["layers"]) == 2
    assert len({row["loss"] for row in rows if row["step"] == 0}) == 1  # all arms begin at the same weights


def test_the_trained_model_is_one_of_transformers(finished):
    from transformers import ViTForImageClassification

    out, summary = finished
    assert {path.name for path in (out / "models").iterdir()} == {
        "l2_0_mlp_0.1_seed_0", "l2_1_mlp_0.1_seed_0", "low_rank_1_mlp_0.1_seed_0",
    }  # fmt: skip
    model = ViTForImageClassification.from_pretrained(out / "models" / "low_rank_1_mlp_0.1_seed_0").eval()
    assert model.config.id2label == {i: str(i) for i in range(10)}
    quality = VisionProblem(SMALL).evaluate(model, "cpu")
    assert quality.loss == pytest.approx(summary["arms"][2]["loss"], rel=1e-5)
    assert quality.accuracy == summary["arms"][2]["accuracy"]


def test_images_of_ones_own_are_learnt(folder, tmp_path, capsys):
    more = ["--image-folder", str(folder), "--image-size", "8", "--patch", "4", "--steps", "30", "--evaluate-every"]
    more += ["30", "--arms", "l2", "--strengths", "l2=0.1", "--mlp-decays", "0", "0.1", "--save", "none", "--json"]
    assert cli.main([*command(tmp_path / "run"), *more]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["classes"] == ["bright", "dark"]
    assert [arm["mlp_decay"] for arm in summary["arms"]] == [0, 0.1]
    assert [arm["accuracy"] for arm in summary["arms"]] == [1, 1]


def test_the_controls_attend_uniformly_or_never_train_their_scores(tmp_path):
    from transformers import ViTForImageClassification

    names = ["frozen", "frozen_large", "uniform"]
    assert cli.main(command(tmp_path / "run", "--arms", *names, "--quiet")) == 0
    at_first = dict(VisionProblem(SMALL).model(0, False).named_parameters())
    for name in names:
        path = tmp_path / "run" / "models" / f"{name}_0.1_mlp_0.1_seed_0"
        model = ViTForImageClassification.from_pretrained(path, attn_implementation="eager").eval()
        trained = dict(model.named_parameters())
        scores = [key for key in trained if key.endswith(("q_proj.weight", "k_proj.weight"))]
        scale = {"frozen": 1.0, "frozen_large": 16**-0.5 / 0.02, "uniform": 0.0}[name]
        assert len(scores) == 2 * 2
        assert all(torch.equal(trained[key], scale * at_first[key]) for key in scores)
        assert not any(torch.equal(w, at_first[key]) for key, w in trained.items() if key.endswith("v_proj.weight"))
        attention = model(torch.randn(2, 1, 8, 8), output_attentions=True).attentions[1]
        is_uniform = torch.allclose(attention, torch.full_like(attention, 1 / attention.shape[-1]))
        assert is_uniform == (name == "uniform")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert [arm["name"] for arm in summary["arms"]] == names
    assert summary["arms"][2]["mean"]["query_key"]["pseudo_rank"] == 0


def test_timm_with_and_without_qk_norm(timm, tmp_path):
    more = ("--library", "timm", "--qk-norm", "both", "--arms", "low_rank", "--strengths", "low_rank=1", "--quiet")
    assert cli.main(command(tmp_path / "run", *more)) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    plain, normed = summary["arms"]
    assert (plain["qk_norm"], normed["qk_norm"]) == (False, True)
    assert all("query_key" in layer for layer in plain["layers"])
    assert all("query_key" not in layer and {"query", "key"} <= layer.keys() for layer in normed["layers"])
    settings = dataclasses.replace(SMALL, library="timm", qk_norm="both")
    problem = VisionProblem(settings)
    for arm, name in ((plain, "low_rank_1_mlp_0.1_seed_0"), (normed, "low_rank_1_mlp_0.1_qk_norm_seed_0")):
        model = problem.model(0, arm["qk_norm"])
        assert isinstance(model, timm.models.VisionTransformer)
        model.load_state_dict(load_file(tmp_path / "run" / "models" / name / "model.safetensors"))
        assert problem.evaluate(model.eval(), "cpu").loss == pytest.approx(arm["loss"], rel=1e-5)


# --- what it refuses ---


def refused(capsys, *arguments: str) -> str:
    assert cli.main(["vision", *arguments, "--device", "cpu", "--quiet"]) == 2
    return capsys.readouterr().err


def test_a_folder_that_cannot_work(tmp_path, capsys):
    assert "is not a folder" in refused(
        capsys, "--image-folder", str(tmp_path / "none"), "--out", str(tmp_path / "run")
    )
    (tmp_path / "empty").mkdir()
    assert "has no sub-folders" in refused(
        capsys, "--image-folder", str(tmp_path / "empty"), "--out", str(tmp_path / "run")
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        ("timm.models.vision_transformer", ("--library", "timm"), "--library timm cannot be imported"),
        ("transformers", (), "pip install 'rankdecay[transformers]', or give --library timm"),
        ("sklearn.datasets", (), "pip install 'rankdecay[lab]', or give --image-folder"),
    ],
)
def test_a_library_that_is_not_installed(module, arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    assert message in refused(capsys, *arguments, "--out", str(tmp_path / "run"))
