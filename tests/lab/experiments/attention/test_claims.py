"""Claims flip when the numbers do, and name a control that did not run."""

import json

import pytest

from rankdecay.lab.experiments.attention.claims import CHECKS, STYLES, headline
from rankdecay.lab.report.words import Verdict, verdict


def make_cell(name="l2", strength=0.0, loss=3.0, error=0.01, rank=0.8, **more):
    """A cell of summary.json; `rank` is of both products and of W_Q and W_K, untrained all of them are at 0.9."""
    norm = more.get("qk_norm", False)
    parts = ("value_output", "query", "key") if norm else ("query_key", "value_output", "query", "key")

    def values(pseudo, imbalance):
        return {
            part: {"pseudo_rank": pseudo, **({} if part in ("query", "key") else {"imbalance": imbalance})}
            for part in parts
        }

    return {
        "name": name, "strength": strength, "mlp_decay": 0.1, "qk_norm": norm, "seeds": 1, "diverged": 0,
        "loss": loss, "loss_error": error, "accuracy": None, "per_second": 100.0, "loss_at_equal_time": loss,
        "layers": [], "untrained": [], "mean": values(rank, 0.5 - 0.04 * strength), "untrained_mean": values(0.9, 0.6),
        **more,
    }  # fmt: skip


def say(*cells) -> Verdict:
    return verdict({"unit": "tokens", "arms": list(cells)}, headline, CHECKS, STYLES)


def points(*cells) -> dict[str, tuple[bool | None, str]]:
    return {point.claim: (point.holds, point.text) for point in say(*cells).points}


L2_RANK, L2_LOSS = "L2 lowers the rank", "L2 lowers the loss"
PROX_RANK, PROX_LOSS = (f"Low-rank decay (prox, per head) lowers the {what}" for what in ("rank", "loss"))


def test_the_headline_says_what_the_numbers_say():
    found = say(make_cell(), make_cell(strength=10.0, loss=3.2, rank=0.3)).headline
    assert "lowered the pseudo rank of W_KᵀW_Q: 0.80 without decay to 0.30 at 10 under L2" in found
    assert "The least loss, 3.0000 ± 0.0100, was that of L2 at 0." in found
    kept = say(make_cell(), make_cell(strength=10.0, loss=2.9, rank=0.795)).headline
    assert "did not lower the pseudo rank of W_KᵀW_Q: 0.80 without decay to 0.80 at 10 under L2" in kept
    assert "0.1000 ± 0.0141 below no decay" in kept
    mixed = say(make_cell(), make_cell(strength=10.0, rank=0.9), make_cell("low_rank", 1.0, rank=0.2)).headline
    assert "to 0.20 at 1 under low-rank decay (prox, per head). Not: 0.80 without decay to 0.90 at 10 under L2" in mixed


def test_a_rank_that_falls_and_one_that_does_not():
    holds, text = points(make_cell(), make_cell(strength=1.0, rank=0.2), make_cell(strength=10.0, rank=0.5))[L2_RANK]
    assert holds
    assert "W_KᵀW_Q 0.80 without decay to 0.50 at 10 (lowest 0.20 at 1)" in text
    assert not points(make_cell(), make_cell(strength=10.0, rank=0.795))[L2_RANK][0]


def test_a_missing_control_is_named():
    alone = points(make_cell("low_rank", 1.0, rank=0.2), make_cell("low_rank", 10.0, rank=0.1))
    assert alone[L2_RANK] == (None, "l2 not in this run: it is open whether plain L2 lowers the rank too.")
    assert "0.90 untrained to 0.10 at 10" in alone[PROX_RANK][1]
    assert alone[PROX_LOSS][0] is None  # nothing without decay to compare with
    assert points(make_cell())[PROX_RANK][0] is None


def test_a_loss_is_lower_where_it_is_by_more_than_its_error():
    near = points(make_cell(error=0.03), make_cell(strength=1.0, loss=2.98, error=0.04))[L2_LOSS]
    assert not near[0]
    assert "not told apart from no decay (0.0200 ± 0.0500 below it)" in near[1]
    apart = points(make_cell(error=0.003), make_cell(strength=1.0, loss=2.98, error=0.004))[L2_LOSS]
    assert apart[0]
    assert "0.0200 ± 0.0050 below no decay" in apart[1]
    assert "the strongest tried: a stronger one may do better" in apart[1]
    unknown = points(make_cell(error=None), make_cell(strength=1.0, loss=2.98, error=float("nan")))[L2_LOSS][1]
    assert "0.0200 below no decay" in unknown
    assert "±" not in unknown
    other = points(make_cell(), make_cell("low_rank", 1.0, loss=2.9), make_cell("low_rank", 10.0, loss=3.1))[PROX_LOSS]
    assert "0.1000 ± 0.0141 below no decay, 0.2000 ± 0.0141 below strength 10" in other[1]


def test_accuracy_where_there_is_one():
    text = points(make_cell(accuracy=0.5), make_cell(strength=1.0, loss=3.1, accuracy=0.75))[L2_LOSS][1]
    assert "best accuracy 75.0% at 1" in text
    assert "accuracy" not in str(say(make_cell(), make_cell(strength=1.0)))


def test_what_rank_costs():
    cells = [make_cell(), make_cell(strength=1.0, loss=3.005, rank=0.4), make_cell(strength=10.0, loss=3.5, rank=0.1)]
    holds, text = points(*cells)["A low rank costs no loss"]
    assert not holds
    assert "is 0.10, of L2 at 10 at a loss of 3.5000 ± 0.0100, 0.5000 above the least" in text
    assert "not told apart from the least loss, 0.40, of L2 at 1" in text
    assert points(make_cell(loss=3.1), make_cell(strength=10.0, rank=0.1))["A low rank costs no loss"][0]


def test_qk_norm_is_about_the_matrices():
    cells = [
        make_cell(qk_norm=norm, name=name, strength=strength, rank=rank)
        for norm in (False, True)
        for name, strength, rank in (("l2", 0.0, 0.8), ("l2", 10.0, 0.8 if norm else 0.3), ("low_rank", 10.0, 0.1))
    ]
    claim = "The rank of W_Q and W_K falls under QK-norm too"
    found = points(*cells)
    holds, text = found[claim]
    assert not holds
    assert "L2 0.80 without decay to 0.80 at 10 (0.80 without decay to 0.30 at 10 without the norm)" in text
    assert "with QK-norm pseudo rank of W_Q, W_K (mean) 0.80 without decay to 0.10 at 10" in found[PROX_RANK][1]
    assert claim not in points(*cells[:3])
    assert points(cells[3], cells[5])[claim][0]


def test_balance_and_equal_time():
    cells = [
        make_cell(), make_cell(strength=10.0, loss_at_equal_time=2.5),
        make_cell("low_rank", 1.0, per_second=50.0, loss_at_equal_time=3.3),
    ]  # fmt: skip
    found = points(*cells)
    holds, text = found["Decay balances the factors"]
    assert holds
    assert "of W_KᵀW_Q under L2 0.50 without decay to 0.10 at 10" in text
    claim = "In equal time another decay is ahead of L2"
    holds, text = found[claim]
    assert not holds
    assert "2.5000, L2 at 10 (100 tokens per second); 3.3000, low-rank decay (prox, per head) at 1 (50 tokens" in text
    assert points(*cells[:2], cells[2] | {"loss_at_equal_time": 2.0})[claim][0]
    control = make_cell("uniform", 0.1, loss_at_equal_time=1.0)  # of no decay
    assert points(*cells, control)[claim] == points(*cells)[claim]
    assert claim not in points(*cells[:2])


def test_decays_of_the_mlps():
    cells = [make_cell(strength=s, mlp_decay=m, loss=3 + abs(s - m)) for m in (0.1, 1.0) for s in (0.0, 1.0)]
    claim = "The best decay is the same whatever that of the MLPs"
    found = points(*cells)
    holds, text = found[claim]
    assert not holds
    assert "L2 0 at MLP decay 0.1 and 1 at MLP decay 1, the least at MLP decay 1." in text
    assert "decay of the MLPs is 0.1" in found["There are enough seeds to put the strengths in order"][1]
    assert "L2 at 1, MLP decay 1" in say(*cells).headline
    assert points(*(cell | {"loss": cell["strength"]} for cell in cells))[claim][0]
    assert "MLP" not in say(*(dict(cell, mlp_decay=None) for cell in cells[:2])).headline


LOST = {"loss": None, "loss_error": None, "mean": {}, "untrained_mean": {}, "per_second": None}


def test_cells_that_diverged():
    claim = "Every run ended with a finite loss"
    holds, text = points(make_cell(), make_cell(strength=10.0, diverged=1, **LOST))[claim]
    assert not holds
    assert text == "left out of every mean, 1 of 1 under L2 at 10."
    assert say(make_cell(diverged=1, **LOST)).headline.startswith("No run ended with a finite loss")
    assert claim not in points(make_cell())


@pytest.mark.parametrize(("seeds", "enough"), [(1, False), (3, False), (8, True)])
def test_few_seeds_are_called_few(seeds, enough):
    cells = [make_cell(seeds=seeds), make_cell(strength=1.0, seeds=seeds)]
    holds, text = points(*cells)["There are enough seeds to put the strengths in order"]
    assert holds == enough
    assert ("one seed per cell" in text) == (seeds == 1)
    assert ("rough guess" in text) == (seeds == 3)


def test_one_cell_and_no_ranks():
    assert say(make_cell()).headline == "The least loss, 3.0000 ± 0.0100, was that of L2 at 0."
    bare = say(make_cell(mean={}, untrained_mean={}), make_cell(strength=1.0, loss=2.9, mean={}, untrained_mean={}))
    assert bare.headline.startswith("The least loss")
    assert say().headline.startswith("No run ended")


@pytest.mark.parametrize("norms", [(False,), (True,), (False, True)])
@pytest.mark.parametrize("arms", [("l2",), ("low_rank",), ("l2", "low_rank", "low_rank_both", "unheard_of")])
def test_every_experiment_has_a_verdict(make_experiment, norms, arms):
    directory = make_experiment(arms, norms=norms, mlp_decays=(0.0, 0.1), diverged=[("l2", 10.0, 0)])
    summary = json.loads((directory / "summary.json").read_text())
    text = str(verdict(summary, headline, CHECKS, STYLES))
    assert "None" not in text
    assert "nan" not in text
