"""The precision of a run: from what the machine multiplies fast, stored with its reason, kept when the run goes on."""

import contextlib
import dataclasses
import io
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rankdecay.lab import cli, precision
from rankdecay.lab.ensemble.members import Training
from rankdecay.lab.errors import SettingError
from rankdecay.lab.experiments.attention.recall.settings import Recall
from rankdecay.lab.experiments.grok.settings import Grok
from rankdecay.lab.experiments.margin.settings import FLOWS
from rankdecay.lab.precision import WORTHWHILE, Products, bfloat16_gain, resolve
from rankdecay.lab.session.session import Plan
from rankdecay.lab.store import read_metrics
from tests.comparing import timeless
from tests.lab.interruption import interrupt
from tests.waiting import HANG

PRODUCTS = Products(2, 64, 32, 128)
SLOW = {"ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
TINY = shlex.split(
    "grok --width 16 --mlp-width 64 --steps 20 --evaluate-every 10 --seeds 2 --batch-size 64 --modulus 7 "
    "--train-examples 200 --arms none low_rank --device cpu"
)
BOUNDARY = shlex.split(
    "boundary --task subtract --modulus 5 --arms none --fractions 0.5 --steps 20 --evaluate-every 20 --batch-size 8 "
    "--width 8 --mlp-width 8 --device cpu"
)


@pytest.fixture
def said() -> list[str]:
    return []


def settled(said: list[str], tmp_path: Path, asked: str = "auto", device: str = "cpu", products=PRODUCTS):
    settings = Grok(precision=asked, out=tmp_path / "run")  # type: ignore[arg-type]
    return resolve(settings, "grok", device, said.append, narrow="mixed", products=products)


def go(out: Path, *options: str, slow: bool = False) -> subprocess.CompletedProcess[str]:
    """Run the small command, in a process of its own where it is to find another processor."""
    arguments = [*TINY, "--out", str(out), *options]
    if slow:
        command = [sys.executable, "-m", "rankdecay.cli", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | SLOW, timeout=HANG)
        assert "Traceback" not in done.stderr
        return done
    with contextlib.redirect_stdout(io.StringIO()) as stdout, contextlib.redirect_stderr(io.StringIO()) as stderr:
        code = cli.main(arguments)
    return subprocess.CompletedProcess(arguments, code, stdout.getvalue(), stderr.getvalue())


# --- choosing ---


def test_auto_is_what_the_products_say(said, tmp_path):
    gain = bfloat16_gain(PRODUCTS)
    settings, choice = settled(said, tmp_path)
    assert settings.precision == choice.value
    assert choice.asked == "auto"
    assert "times as fast as float32" in choice.reason
    assert str(PRODUCTS) in choice.reason
    if gain > 1.2 * WORTHWHILE:
        assert choice.value == "mixed"
    if gain < WORTHWHILE / 1.2:
        assert choice.value == "float32"
    assert said == []


def test_without_products_a_cpu_takes_float32_and_measures_nothing(said, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "bmm", lambda *_: pytest.fail("measured"))
    assert settled(said, tmp_path, products=None)[1].value == "float32"


@pytest.mark.parametrize(("capability", "value"), [((7, 5), "float32"), ((8, 0), "mixed"), ((9, 0), "mixed")])
def test_a_gpu_is_asked_for_its_capability(said, tmp_path, monkeypatch, capability, value):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A card")
    choice = settled(said, tmp_path, device="cuda:0")[1]
    assert choice.value == value
    assert f"A card, compute capability {capability[0]}.{capability[1]}" in choice.reason


def test_mps_is_float32(said, tmp_path):
    assert settled(said, tmp_path, device="mps")[1].value == "float32"


def test_a_probe_that_fails_says_so_in_a_line_and_takes_float32(said, tmp_path, monkeypatch):
    real = torch.bmm

    def bmm(a, b):
        if a.dtype == torch.bfloat16:
            raise RuntimeError("could not create a primitive\nand more")
        return real(a, b)

    monkeypatch.setattr(torch, "bmm", bmm)
    choice = settled(said, tmp_path)[1]
    assert choice.value == "float32"
    [line] = said
    assert line.startswith("--precision auto: bfloat16 products could not be timed (could not create a primitive)")
    assert "--precision mixed" in line


def test_a_precision_that_the_device_has_not_is_refused(said, tmp_path, monkeypatch):
    def ones(*_, **__):
        raise TypeError("no float64 here")

    monkeypatch.setattr(torch, "ones", ones)
    with pytest.raises(SettingError, match=r"--precision float64: cpu cannot multiply in float64 .*: give --precision"):
        settled(said, tmp_path, "float64")


def test_auto_never_reaches_training():
    with pytest.raises(ValueError, match="precision 'auto' must be one of float32, mixed, float64"):
        Training(precision="auto")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="precision 'auto' must be one of float32, bfloat16, float16"):
        Plan(1, 1, 1e-3, precision="auto")  # type: ignore[arg-type]


@pytest.mark.parametrize("command", ["recall", "language", "vision"])
def test_a_plain_model_on_a_cpu_is_float32_without_a_measurement(tmp_path, monkeypatch, command):
    monkeypatch.setattr(precision, "bfloat16_gain", lambda products: pytest.fail("measured"))
    options = [] if command == "recall" else ["--depth", "1", "--mlp-width", "16"]
    options += ["--valid-windows", "4", "--context", "16"] if command == "language" else []
    options += ["--valid-sequences", "16"] if command == "recall" else []
    out = tmp_path / "run"
    arguments = shlex.split(
        "--width 16 --heads 2 --steps 2 --warmup 1 --evaluate-every 2 --batch-size 4 --arms l2 --strengths l2=0 "
        "--device cpu --quiet --save none"
    )
    assert cli.main([command, *arguments, *options, "--out", str(out)]) == 0
    config = json.loads((out / "config.json").read_text())
    assert config["precision"] == {"asked": "auto", "value": "float32", "reason": "always float32 on cpu"}
    assert config["settings"]["precision"] == "float32"


def test_bfloat16_is_what_plain_models_take_on_a_gpu_that_has_it(said, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A card")
    settings = Recall(out=tmp_path / "run")
    assert resolve(settings, "recall", "cuda", said.append, narrow="bfloat16")[0].precision == "bfloat16"
    assert resolve(settings, "recall", "mps", said.append, narrow="bfloat16")[0].precision == "float32"


@pytest.mark.parametrize(
    "config",
    [
        {"command": "grok", "settings": "lost"},
        {"command": "grok", "settings": {"precision": "auto"}},
        {"command": "grok", "settings": {"precision": ["mixed"]}},
        {"command": "grok"},
        {"command": "boundary", "settings": {"precision": "float64"}},
    ],
)
def test_a_configuration_without_a_precision_decides_nothing(said, tmp_path, config):
    """Whether the directory belongs to the command is for the comparison that follows."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    assert settled(said, tmp_path, products=None)[1].value == "float32"
    assert go(tmp_path / "run").returncode == 2


# --- on a machine that emulates bfloat16 ---


def test_where_bfloat16_is_emulated_a_run_takes_float32_and_says_why_everywhere(tmp_path):
    out = tmp_path / "run"
    done = go(out, slow=True)
    assert done.returncode == 0
    config, summary = (json.loads((out / f"{name}.json").read_text()) for name in ("config", "summary"))
    assert config["settings"]["precision"] == "float32"
    assert config["precision"]["asked"] == "auto"
    assert config["precision"]["value"] == "float32"
    assert "1.3 would be worth it" in config["precision"]["reason"]
    assert summary["precision"] == config["precision"]
    assert " ".join(done.stdout.split()).count("precision float32: bfloat16 products of 2 × ") == 1
    assert "float32: bfloat16 products of 2 × " in (out / "report.html").read_text()


def test_mixed_goes_on_in_mixed_where_it_is_emulated_at_the_cost_of_a_line(tmp_path):
    out = tmp_path / "run"
    interrupt([*TINY, "--precision", "mixed", "--quiet"], out, checkpoints=2)  # of steps 0 and 10
    before = read_metrics(out)
    assert {record["step"] for record in before} == {0, 10}
    done = go(out, slow=True)
    assert done.returncode == 0
    lines = [line for line in done.stdout.splitlines() if "continues in mixed" in line]
    assert len(lines) == 1
    assert "bfloat16 products take" in " ".join(done.stdout.split())
    assert json.loads((out / "summary.json").read_text())["settings"]["precision"] == "mixed"
    after = read_metrics(out)
    assert after[: len(before)] == before
    assert {record["step"] for record in after[len(before) :]} == {20}
    assert {tuple(record) for record in after} == {tuple(before[0])}  # of the same keys


def test_a_complete_sweep_warns_when_it_grows_and_not_when_it_is_shown(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(precision, "bfloat16_gain", lambda products: 0.02)  # as where it is emulated
    command = [*BOUNDARY, "--out", str(tmp_path / "run")]

    def warnings(*options: str) -> list[str]:
        assert cli.main([*command, *options]) == 0
        return [line for line in capsys.readouterr().out.splitlines() if "times as long" in line]

    took = "on this machine bfloat16 products take 50 times as long as float32 ones"
    assert warnings("--precision", "mixed", "--seeds", "1") == [f"--precision mixed: {took}"]
    assert warnings("--seeds", "1") == []
    assert warnings("--seeds", "2") == [f"{tmp_path / 'run'} continues in mixed, as it began: {took}"]
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["settings"]["precision"], config["fixed"]["precision"]) == ("mixed", "mixed")
    assert config["precision"] == {"asked": "auto", "value": "mixed", "reason": "as asked"}


def test_products_that_cannot_be_timed_are_a_line_where_the_precision_is_settled(said, tmp_path, monkeypatch):
    def fails(products):
        raise RuntimeError("could not create a primitive")

    monkeypatch.setattr(precision, "bfloat16_gain", fails)
    assert settled(said, tmp_path, "mixed")[1] == precision.Choice("mixed", "mixed", "as asked")
    assert said == ["--precision mixed: bfloat16 products could not be timed (could not create a primitive)"]


# --- presets and seeds ---

STANDARD = {
    "grok": {"modulus": 31, "width": 128, "mlp_width": 512, "steps": 640, "train_examples": 3000, "lr": 1e-3,
             "batch_size": 256, "strength": 10.0, "tuned_strength": 100.0, "weight_decay": 3.0},
    "boundary": {"arms": ("none", "l2", "prox", "smooth", "prototype", "uniform_attention"), "strengths": (),
                 "widen": 1},
    "factor": {"seeds": 50, "steps": 1000},
    "margin": {"datasets": 20, "steps": 30_000, "margin": 1e8, "parametrisation": FLOWS},
    "recall": {"steps": 1000, "strengths": ()},
    "language": {"steps": 450, "strengths": (), "size": "tiny"},
    "vision": {"steps": 1000, "strengths": ()},
}  # fmt: skip


@pytest.mark.parametrize("command", STANDARD)
def test_standard_has_the_sizes_that_were_the_defaults(command):
    settings = cli.parse([command, "--preset", "standard"])
    assert {name: getattr(settings, name) for name in STANDARD[command]} == STANDARD[command]
    assert settings.out.name == f"{command}-standard"
    assert cli.parse([command]).preset == "default"
    assert cli.parse([command, "--preset", "standard", "--first-seed", "100"]).first_seed == 100


@pytest.mark.parametrize("command", STANDARD)
def test_an_unknown_preset_is_one_line(command, capsys):
    assert cli.main([command, "--preset", "enormous"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "--preset 'enormous'" in line
    assert "standard" in line


def test_the_first_seed_decides_which_seeds_run(tmp_path):
    both, second = tmp_path / "both", tmp_path / "second"
    assert go(both, "--precision", "float32").returncode == 0
    assert go(second, "--precision", "float32", "--first-seed", "1", "--seeds", "1").returncode == 0

    def of_second_seed(out: Path) -> list[dict]:
        return [record for record in timeless(read_metrics(out)) if record["seed"] == 1]

    assert of_second_seed(second) == of_second_seed(both)
    assert len(of_second_seed(both)) == 2 * 3


@pytest.mark.parametrize("command", STANDARD)
def test_a_negative_first_seed_is_refused(command, tmp_path, capsys):
    out = tmp_path / "run"
    assert cli.main([command, "--first-seed", "-1", "--out", str(out)]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "--first-seed -1" in line
    assert not out.exists()


def test_strengths_of_a_preset_do_not_bind_who_chooses_other_arms():
    from rankdecay.lab.experiments.attention.language.settings import Language
    from rankdecay.lab.experiments.attention.settings import chosen_arms
    from rankdecay.lab.experiments.boundary.arms import make_arms
    from rankdecay.lab.experiments.boundary.settings import Boundary, check

    assert [arm.name for arm in make_arms(check(Boundary(arms=("none",))))] == ["none"]
    [arm] = chosen_arms(dataclasses.replace(Language(), arms=("l2_query_key",)))
    assert arm.name == "l2_query_key"
    with pytest.raises(SettingError, match="--strengths 'l2'"):
        make_arms(check(Boundary(arms=("none",), strengths=("l2=7",))))


def test_described_is_none_where_there_was_no_choice():
    assert precision.described({"settings": {}}) is None
