"""The language experiment: its figures, its files, what it refuses, and a run that a kill cannot spoil."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

import rankdecay as rd
from rankdecay import cli
from rankdecay.lab.experiments.attention.language.experiment import LanguageModelling
from rankdecay.lab.experiments.attention.language.settings import PRESETS, Language
from rankdecay.lab.experiments.attention.language.text import load
from rankdecay.lab.session.session import Session
from rankdecay.lab.store import read_metrics

SENTENCES = (
    "the rank of attention falls as its weights decay. ",
    "a head that looks at one place alone has rank one, and a decay cannot make it less. ",
    "what the loss does not see, the decay takes away. ",
)
TINY = (
    "--context 8 --width 16 --depth 2 --heads 2 --mlp-width 16 --batch-size 4 --valid-windows 24 "
    "--steps 6 --evaluate-every 3 --warmup 1 --lr 1e-2 --device cpu"
)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(SENTENCES[(i * i) % 3] for i in range(120)))
    return path


def language(text: Path, out: Path, *options: str) -> list[str]:
    return ["language", *TINY.split(), "--text", str(text), "--out", str(out), *options]


def untimed(directory: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in ("seconds", "wall")} for row in read_metrics(directory)]


@pytest.fixture(scope="module")
def finished(text, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("language") / "run"
    arms = ["--arms", "l2", "low_rank_both", "--strengths", "l2=0,10", "low_rank_both=10"]
    assert cli.main(language(text, path, *arms, "--quiet")) == 0
    return path


# --- the figures ---

ARM_KEYS = (
    "name strength mlp_decay qk_norm seeds diverged loss loss_error per_second loss_at_equal_time layers untrained "
    "mean untrained_mean"
)


def test_the_summary_of_a_small_run(finished, text):
    summary = json.loads((finished / "summary.json").read_text())
    assert (summary["command"], summary["unit"]) == ("language", "tokens")
    assert summary["wall_seconds"] > 0
    assert summary["settings"]["context"] == 8
    assert summary["settings"]["text_sha1"] == summary["text"]["sha1"]
    size = text.stat().st_size
    assert summary["text"]["training_tokens"] + summary["text"]["validation_tokens"] == size
    assert summary["text"]["evaluated_tokens"] == 24 * 8
    assert summary["model"]["parameters"] == 256 * 16 + 2 * (4 * 16**2 + 3 * 16 * 16) + 5 * 16
    assert [(arm["name"], arm["strength"]) for arm in summary["arms"]] == [
        ("l2", 0), ("l2", 10), ("low_rank_both", 10),
    ]  # fmt: skip
    for arm in summary["arms"]:
        assert set(ARM_KEYS.split()) <= arm.keys()
        assert (arm["seeds"], arm["diverged"], arm["mlp_decay"], arm["qk_norm"]) == (1, 0, 0.1, False)
        assert 0 < arm["loss"] < 5.6  # of 256 bytes, all alike: 5.55
        assert 0 < arm["loss_error"] < 1
        assert arm["per_second"] > 0
        assert len(arm["layers"]) == len(arm["untrained"]) == 2
        for part in ("query_key", "value_output"):
            assert 0 < arm["mean"][part]["pseudo_rank"] <= 1
            assert (
                arm["untrained_mean"][part]["pseudo_rank"] == summary["arms"][0]["untrained_mean"][part]["pseudo_rank"]
            )
    free, held = summary["arms"][0], summary["arms"][1]
    assert held["mean"]["query_key"]["nuclear_norm"] < free["mean"]["query_key"]["nuclear_norm"]


def test_the_rows_and_files_of_a_small_run(finished):
    rows = read_metrics(finished)
    assert [row["step"] for row in rows] == [0, 3, 6] * 3
    assert [row["tokens"] for row in rows] == [0, 3 * 4 * 8, 6 * 4 * 8] * 3
    first = [row for row in rows if row["step"] == 0]
    assert all(row["loss"] == first[0]["loss"] and row["layers"] == first[0]["layers"] for row in first)
    assert rows[0]["loss"] == pytest.approx(5.55, abs=0.1)  # knows nothing yet
    assert {path.name for path in (finished / "models").iterdir()} == {
        "l2_0_mlp_0.1_seed_0", "l2_10_mlp_0.1_seed_0", "low_rank_both_10_mlp_0.1_seed_0",
    }  # fmt: skip
    assert not list(finished.glob("*.safetensors"))
    assert (finished / "report.html").exists()


def test_the_saved_model_is_the_one_that_was_evaluated(finished, text):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(finished / "models" / "low_rank_both_10_mlp_0.1_seed_0").eval()
    settings = dataclasses.replace(
        Language(), context=8, width=16, depth=2, heads=2, mlp_width=16, batch_size=4, valid_windows=24
    )
    problem = LanguageModelling(settings, load(text=str(text), dataset=None, tokenizer=None, share=0.1))
    with torch.no_grad():
        quality = problem.evaluate(lambda tokens: model(tokens).logits, "cpu")  # type: ignore[arg-type]
    row = read_metrics(finished)[-1]
    assert (quality.loss, quality.error) == pytest.approx((row["loss"], row["loss_error"]), rel=1e-5)


def test_inspect_reads_the_saved_model_and_agrees_with_the_rows(finished, capsys):
    path = finished / "models" / "l2_10_mlp_0.1_seed_0"
    assert cli.main(["inspect", str(path), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    stored = next(r for r in read_metrics(finished) if (r["arm"], r["strength"], r["step"]) == ("l2", 10, 6))
    for layer in range(2):
        for part in ("query_key", "value_output"):
            found = [r["pseudo_rank"] for r in rows if (r["layer"], r["product"]) == (layer, part)]
            assert sum(found) / len(found) == pytest.approx(stored["layers"][layer][part]["pseudo_rank"], rel=1e-4)


def test_json_is_all_that_is_on_standard_output(finished, text, tmp_path, capsys):
    assert cli.main(language(text, tmp_path / "run", "--arms", "l2", "--strengths", "l2=0.1", "--json")) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == json.loads((tmp_path / "run" / "summary.json").read_text())
    assert "tokens/s" in captured.err
    assert "ETA" in captured.err


def test_a_person_gets_a_table(finished, text, capsys):
    arms = ["--arms", "l2", "low_rank_both", "--strengths", "l2=0,10", "low_rank_both=10"]
    assert cli.main(language(text, finished, *arms)) == 0
    out = capsys.readouterr().out
    for word in ("is complete", "l2", "low_rank_both", "loss", "pseudo rank", "Untrained", "report.html"):
        assert word in out


def test_an_arm_alone_does_as_in_company(finished, text, tmp_path):
    assert cli.main(language(text, tmp_path / "run", "--arms", "l2", "--strengths", "l2=10", "--quiet")) == 0
    assert untimed(tmp_path / "run") == [
        row for row in untimed(finished) if (row["arm"], row["strength"]) == ("l2", 10)
    ]  # fmt: skip


def test_learned_positions_with_and_without_qk_norm(text, tmp_path, capsys):
    options = "--positions learned --qk-norm both --arms l2 --strengths l2=0.1 --mlp-decays 0 0.1 --vocabulary 300"
    assert cli.main(language(text, tmp_path / "run", *options.split())) == 0
    captured = capsys.readouterr()
    assert captured.out.count("no class in transformers") == 1
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["model"]["vocabulary"] == 300
    assert [(arm["qk_norm"], arm["mlp_decay"]) for arm in summary["arms"]] == [
        (False, 0), (False, 0.1), (True, 0), (True, 0.1),
    ]  # fmt: skip
    models = sorted((tmp_path / "run" / "models").iterdir())
    assert len(models) == 4
    assert all(len(rd.inspect(path).rows) == 2 * 2 * (3 if "qk_norm" in path.name else 2) for path in models)


# --- what is refused ---


def refused(capsys, arguments: list[str]) -> str:
    code = cli.main(arguments)
    captured = capsys.readouterr()
    assert code == 2
    line = captured.err.splitlines()[-1]
    assert line.startswith("rankdecay: error: ")
    return line


REFUSED = [
    ("--valid-share 0", ["--valid-share 0", "between 0 and 1", "0.1"]),
    ("--valid-share 1", ["--valid-share 1", "between 0 and 1"]),
    ("--context 100000", ["too few", "--context 100000", "smaller --context"]),
    ("--context 700", ["for validation", "--valid-share"]),
    ("--text /nowhere", ["/nowhere", "does not exist", "give a text file"]),
    ("--dataset wikitext", ["--text", "--dataset wikitext", "one of them"]),
    ("--vocabulary 100", ["--vocabulary 100", "256 tokens", "at least 256"]),
    ("--vocabulary -1", ["--vocabulary -1", "give 0"]),
    ("--valid-windows 1", ["--valid-windows 1", "at least 2"]),
    ("--heads 3", ["--width 16", "3 heads"]),
    ("--mlp-width 0", ["--mlp-width 0", "at least 1"]),
    ("--depth 0", ["--depth 0", "at least 1"]),
    ("--arms l3", ["--arms 'l3'", "did you mean 'l2'"]),
    ("--strengths l2=100", ["--strengths l2=100", "--lr 0.01", "below 100"]),
    ("--strengths l2=-1", ["l2=-1", "not a decay"]),
    ("--steps 5", ["--steps 5", "--evaluate-every 3", "--steps 3"]),
    ("--accumulate 3", ["--batch-size 4", "--accumulate 3", "multiple of 3"]),
    ("--tokenizer /nowhere/tokenizer.json", ["--tokenizer /nowhere/tokenizer.json", "cannot be loaded"]),
]


@pytest.mark.parametrize(("options", "words"), REFUSED, ids=[options for options, _ in REFUSED])
def test_bad_input_is_one_line_with_a_remedy(text, tmp_path, capsys, monkeypatch, options, words):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    line = refused(capsys, language(text, tmp_path / "run", *options.split()))
    assert all(word in line for word in words), line
    assert list(tmp_path.iterdir()) == []  # nothing was written


def test_another_text_is_refused(text, tmp_path, capsys):
    copy = tmp_path / "text.txt"
    copy.write_text(text.read_text())
    out = tmp_path / "run"
    assert cli.main(language(copy, out, "--arms", "l2", "--strengths", "l2=0", "--quiet")) == 0
    copy.write_text(text.read_text() + "more")
    line = refused(capsys, language(copy, out, "--arms", "l2", "--strengths", "l2=0", "--quiet"))
    assert "another configuration (text_sha1 is" in line


def test_a_loss_that_is_no_number_stops_the_run_and_says_where(text, tmp_path, capsys):
    wild = ["--arms", "l2", "--strengths", "l2=0", "--mlp-decays", "0", "--rest-decay", "0"]
    wild += ["--lr", "1e30", "--steps", "30", "--warmup", "0"]
    line = refused(capsys, language(text, tmp_path / "run", *wild))
    for word in ("not finite at step", "l2 0", "seed 0", "--lr 1e+30", "smaller --lr", "--skip-diverged"):
        assert word in line
    assert not (tmp_path / "run" / "summary.json").exists()
    assert cli.main(language(text, tmp_path / "other", *wild, "--skip-diverged")) == 0
    summary = json.loads((tmp_path / "other" / "summary.json").read_text())
    assert (summary["arms"][0]["diverged"], summary["arms"][0]["loss"]) == (1, None)


# --- sizes ---


@pytest.mark.parametrize(("size", "parameters"), [("tiny", 0.82e6), ("small", 10.7e6), ("gpt2", 124.4e6)])
def test_sizes_have_the_parameters_that_the_help_names(text, size, parameters):
    from rankdecay.lab.session.gpt import Decoder

    settings = dataclasses.replace(PRESETS[size], valid_share=0.5)
    config = LanguageModelling(settings, load(text=str(text), dataset=None, tokenizer=None, share=0.5)).config
    with torch.device("meta"):
        decoder = Decoder(config)
    assert sum(p.numel() for p in decoder.parameters()) == pytest.approx(parameters, rel=0.02)


# --- the problem ---


def test_the_loss_is_that_of_the_next_token_and_its_error_that_of_stretches(text):
    settings = dataclasses.replace(
        Language(), context=8, width=16, depth=1, heads=2, mlp_width=16, batch_size=5, valid_windows=40
    )
    problem = LanguageModelling(settings, load(text=str(text), dataset=None, tokenizer=None, share=0.5))
    (windows,) = batch = problem.batch(0, 3, 5)
    assert windows.shape == (5, 9)
    assert problem.size(batch) == 40
    assert bytes(windows[0].tolist()).decode() in text.read_text()
    known = torch.zeros(5, 8, 256)
    known[:, :, 32] = 3.0  # always expects a space
    logs = known.log_softmax(-1)
    wanted = -logs.gather(2, windows[:, 1:, None]).mean()
    torch.testing.assert_close(problem.loss(lambda tokens: known, batch), wanted)  # type: ignore[arg-type]

    def spaces(tokens):
        return known[:1].expand(len(tokens), 8, 256)

    quality = problem.evaluate(spaces, "cpu")  # type: ignore[arg-type]
    at_space = -known[0, 0].log_softmax(-1)[32]
    elsewhere = -known[0, 0].log_softmax(-1)[0]
    assert at_space < quality.loss < elsewhere
    assert 0 < quality.error < 0.1


def test_a_model_learns_the_text(text):
    from rankdecay.lab.experiments.attention.runs import all_runs, make_plan

    settings = dataclasses.replace(
        Language(), arms=("low_rank",), strengths=("low_rank=1",), context=16, width=32, depth=2, heads=2,
        mlp_width=32, batch_size=16, lr=1e-2, steps=60, evaluate_every=60, valid_windows=32, precision="float32",
    )  # fmt: skip
    problem = LanguageModelling(settings, load(text=str(text), dataset=None, tokenizer=None, share=0.2))
    session = Session(all_runs(settings)[0], problem, make_plan(settings, "cpu"))
    before = session.evaluate()["loss"]
    for _ in session.train(60):
        pass
    after = session.evaluate()
    assert before > 5
    assert after["loss"] < 3.2  # of letters alone by their frequency
    assert after["accuracy"] is None


# --- the arms that have to be named ---


def test_further_arms_train_what_they_say_and_keep_the_rest(text, tmp_path, capsys):
    names = ["l2_loss", "planes", "positions", "frozen", "frozen_large", "uniform"]
    path = tmp_path / "run"
    assert cli.main(language(text, path, "--arms", *names, "--strengths", "l2_loss=0.1", "planes=10")) == 0
    shown = capsys.readouterr().out
    summary = json.loads((path / "summary.json").read_text())
    cells = {cell["name"]: cell for cell in summary["arms"]}
    assert list(cells) == names
    assert all(name in shown for name in names)
    rank = {name: (cell["mean"]["query"]["pseudo_rank"], cell["untrained_mean"]["query"]["pseudo_rank"])
            for name, cell in cells.items()}  # fmt: skip
    for name in ("frozen", "frozen_large"):
        assert rank[name][0] == pytest.approx(rank[name][1], rel=1e-6)
    assert rank["uniform"] == (0, 0)
    assert cells["l2_loss"]["mean"]["query"]["nuclear_norm"] < cells["frozen"]["mean"]["query"]["nuclear_norm"]
    assert len({cell["loss"] for cell in cells.values()}) == len(names)
    assert (path / "models" / "positions_0.1_mlp_0.1_seed_0" / "model.safetensors").exists()
