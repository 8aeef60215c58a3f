import json
import re
import subprocess
import sys

import pytest

from rankdecay.lab.experiments.attention.verdict import verdict


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


def say(*cells):
    return verdict({"unit": "tokens", "arms": list(cells)})


def test_an_incomplete_experiment_has_no_result():
    assert verdict(None).headline.startswith("The run is not complete")
    assert verdict(None).points == []


def test_the_headline_says_what_the_numbers_say():
    found = say(make_cell(), make_cell(strength=10.0, loss=3.2, rank=0.3))
    assert (
        "lowered the pseudo rank of W_KᵀW_Q, 0.80 without decay (0.90 untrained), to 0.30 under L2 at 10"
        in found.headline
    )
    assert "The least loss, 3.0000 ± 0.0100, was that of L2 at 0." in found.headline


def test_a_rank_that_decay_does_not_lower():
    found = say(make_cell(), make_cell(strength=10.0, loss=2.9, rank=0.795))
    assert "was not lowered by decay: 0.80 under L2 at 10" in found.headline  # 0.795 for 0.80 is nothing to speak of
    assert "0.1000 ± 0.0141 below no decay" in found.headline
    mixed = say(make_cell(), make_cell(strength=10.0, rank=0.9), make_cell("low_rank", 1.0, rank=0.2))
    assert (
        "to 0.20 under low-rank decay at 1; it was not lowered to speak of by others: 0.90 under L2" in mixed.headline
    )


def test_a_difference_within_its_error_is_called_so():
    found = dict(say(make_cell(error=0.03), make_cell(strength=1.0, loss=2.98, error=0.04)).points)
    assert "not told apart from strength 0 (0.0200 ± 0.0500 below it)" in found["L2"]
    apart = dict(say(make_cell(error=0.003), make_cell(strength=1.0, loss=2.98, error=0.004)).points)
    assert "0.0200 ± 0.0050 below strength 0" in apart["L2"]
    assert "the strongest tried: a stronger one may do better" in apart["L2"]


def test_without_an_error_nothing_is_told_of_it():
    found = say(make_cell(error=None), make_cell(strength=1.0, loss=2.98, error=float("nan")))
    assert "0.0200 below no decay" in found.headline
    assert "±" not in dict(found.points)["L2"]


def test_the_usual_decay_is_compared_too():
    cells = [
        make_cell(),
        make_cell(strength=0.1, loss=2.9),
        make_cell(strength=1.0, loss=2.5),
        make_cell(strength=10.0),
    ]
    text = dict(say(*cells).points)["L2"]
    assert re.search(r"at 1: 0\.5000 ± \S+ below strength 0; 0\.4000 ± \S+ below strength 0\.1; .* strength 10\.", text)
    assert "tried" not in text


def test_an_arm_without_a_strength_of_0_is_held_against_another_arm():
    found = dict(say(make_cell(), make_cell("low_rank", 1.0, loss=2.9, rank=0.2)).points)
    assert "0.80 without decay, 0.20 at 1" in found["Low-rank decay"]
    assert "0.1000 ± 0.0141 below no decay" in found["Low-rank decay"]
    alone = say(make_cell("low_rank", 1.0, rank=0.2), make_cell("low_rank", 10.0, rank=0.1))
    assert "0.90 untrained, to 0.10 under low-rank decay at 10" in alone.headline
    assert "without decay" not in str(alone)


def test_a_rank_lower_in_between_is_named():
    cells = [make_cell(), make_cell(strength=1.0, rank=0.2), make_cell(strength=10.0, rank=0.5)]
    assert "0.50 at 10, lowest 0.20 at 1" in dict(say(*cells).points)["L2"]


def test_what_rank_costs():
    cells = [make_cell(), make_cell(strength=1.0, loss=3.005, rank=0.4), make_cell(strength=10.0, loss=3.5, rank=0.1)]
    text = dict(say(*cells).points)["What rank costs"]
    assert "0.10, is that of L2 at 10, at a loss of 3.5000 ± 0.0100, 0.5000 above the least" in text
    assert "(within a standard error of the difference), the lowest is 0.40, L2 at 1" in text
    free = dict(say(make_cell(loss=3.1), make_cell(strength=10.0, rank=0.1)).points)
    assert free["What rank costs"].endswith("the least of all.")


def test_qk_norm_is_about_the_matrices():
    cells = [
        make_cell(qk_norm=norm, name=name, strength=strength, rank=rank)
        for norm in (False, True)
        for name, strength, rank in (("l2", 0.0, 0.8), ("l2", 10.0, 0.8 if norm else 0.3), ("low_rank", 10.0, 0.1))
    ]
    found = dict(say(*cells).points)
    assert "L2 at 10 did not lower it, 0.80 to 0.80 (without the norm 0.80 to 0.30)" in found["Under QK-norm"]
    assert "low-rank decay at 10 lowered it, 0.80 to 0.10" in found["Under QK-norm"]
    assert "W_Q, W_K (mean): 0.90 untrained" in found["L2, QK-norm"]
    assert {"What rank costs, QK-norm", "What rank costs, no QK-norm"} <= set(found)
    assert "Under QK-norm" not in dict(say(*cells[:3]).points)
    alone = say(*cells[3:])
    assert "lowered the pseudo rank of W_Q, W_K (mean)" in alone.headline
    assert "without the norm" not in str(alone)


def test_balance_and_equal_time():
    cells = [
        make_cell(), make_cell(strength=10.0, loss_at_equal_time=2.5),
        make_cell("low_rank", 1.0, per_second=50.0, loss_at_equal_time=3.3),
    ]  # fmt: skip
    found = dict(say(*cells).points)
    assert "L2 at 10, W_KᵀW_Q 0.50 to 0.10" in found["Balance"]
    assert "2.5000 (L2 at 10); 3.3000 (low-rank decay at 1)" in found["Equal time"]
    assert "100 tokens per second (L2); of that, low-rank decay 50%" in found["Equal time"]
    assert "Equal time" not in dict(say(*cells[:2]).points)


def test_decays_of_the_mlps():
    cells = [make_cell(strength=s, mlp_decay=m, loss=3 + abs(s - m)) for m in (0.1, 1.0) for s in (0.0, 1.0)]
    found = say(*cells)
    assert "L2: 0 at 0.1 and 1 at 1, the least at MLP decay 1." in dict(found.points)["MLP decay"]
    assert "L2 at 1, MLP decay 1" in found.headline
    assert "decay of the MLPs is 0.1" in dict(found.points)["Limits"]
    assert "MLP decay" not in dict(say(*cells[:2]).points)
    none = [dict(cell, mlp_decay=None) for cell in cells[:2]]
    assert "MLP" not in str(say(*none))


def test_accuracy_where_there_is_one():
    cells = [make_cell(accuracy=0.5), make_cell(strength=1.0, loss=3.1, accuracy=0.75)]
    assert "Best accuracy 75.0% at 1" in dict(say(*cells).points)["L2"]
    assert "ccuracy" not in str(say(make_cell(), make_cell(strength=1.0)))
    even = [make_cell(accuracy=0.5), make_cell(strength=1.0, accuracy=0.5)]
    assert "Accuracy 50.0% at every strength" in dict(say(*even).points)["L2"]


LOST = {"loss": None, "loss_error": None, "mean": {}, "untrained_mean": {}, "per_second": None}


def test_cells_that_diverged():
    found = dict(say(make_cell(), make_cell(strength=10.0, diverged=1, **LOST)).points)
    assert "1 of 1 under L2 at 10" in found["Diverged"]
    assert "at its one strength, 0" in found["L2"]
    everything = say(make_cell(diverged=1, **LOST))
    assert everything.headline.startswith("No run ended with a finite loss")
    assert [lead for lead, _ in everything.points] == ["Diverged"]


def test_few_seeds_are_called_few():
    assert "One seed per cell" in dict(say(make_cell(), make_cell(strength=1.0)).points)["Limits"]
    few = dict(say(make_cell(seeds=3), make_cell(strength=1.0, seeds=3)).points)["Limits"]
    assert "over 3 seeds, of a difference seed by seed; of so few it is itself a rough guess" in few
    assert "rough" not in dict(say(make_cell(seeds=8), make_cell(strength=1.0, seeds=8)).points)["Limits"]


def test_one_cell_and_no_ranks():
    assert "no other cell to compare it with" in say(make_cell()).headline
    bare = say(make_cell(mean={}, untrained_mean={}), make_cell(strength=1.0, loss=2.9, mean={}, untrained_mean={}))
    assert bare.headline.startswith("The least loss")
    assert "What rank costs" not in dict(bare.points)
    assert verdict({"arms": []}).headline.startswith("No run ended")


@pytest.mark.parametrize("norms", [(False,), (True,), (False, True)])
@pytest.mark.parametrize("arms", [("l2",), ("low_rank",), ("l2", "low_rank", "low_rank_both", "unheard_of")])
def test_every_experiment_has_a_verdict(make_experiment, norms, arms):
    directory = make_experiment(arms, norms=norms, mlp_decays=(0.0, 0.1), diverged=[("l2", 10.0, 0)])
    text = str(verdict(json.loads((directory / "summary.json").read_text())))
    assert "None" not in text
    assert "nan" not in text


def test_torch_is_not_imported():
    code = "import sys, rankdecay.lab.experiments.attention.verdict; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
