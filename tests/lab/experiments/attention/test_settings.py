"""The arms of the experiments on the decay of attention, their grid of strengths, and what their settings refuse."""

import dataclasses

import pytest

from rankdecay.decay.policy import Frobenius, LowRank, Planes
from rankdecay.lab import experiment
from rankdecay.lab.errors import SettingError
from rankdecay.lab.experiments.attention.language.settings import Language
from rankdecay.lab.experiments.attention.settings import ARMS, FURTHER, AttentionDecay, check_shared, chosen_arms
from rankdecay.lab.experiments.attention.vision.settings import Vision
from tests.lab.tiny import make


def test_an_arm_decays_what_it_says():
    grid = AttentionDecay(rest_decay=0.2, every=3)
    low = LowRank(2.0, scale="relative", unit="head", every=3)
    absolute = dataclasses.replace(low, scale="absolute")
    rest = Frobenius(0.2)
    expected = {
        "l2": (Frobenius(2.0), Frobenius(2.0)),
        "l2_query_key": (Frobenius(2.0), rest),
        "low_rank": (low, rest),
        "low_rank_both": (low, low),
        "low_rank_absolute": (absolute, rest),
        "low_rank_both_absolute": (absolute, absolute),
    }
    assert {name: tuple(arm.how.decays(2.0, grid).values()) for name, arm in ARMS.items()} == expected
    assert list(ARMS["l2"].how.decays(2.0, grid)) == ["query_key", "value_output"]


def test_a_further_arm_decays_what_it_says_and_changes_what_it_says():
    grid = AttentionDecay(rest_decay=0.2)
    two, rest = Frobenius(2.0), Frobenius(0.2)
    both = {"query_key": two, "value_output": two}
    expected = {
        "l2_loss": (both, ("query_key", "value_output"), {}),
        "planes": ({"query_key": Planes(2.0, scope="head"), "value_output": rest}, (), {}),
        "positions": (both, (), {"scores": "positions"}),
        "frozen": ({"value_output": two}, (), {"scores": "frozen"}),
        "frozen_large": ({"value_output": two}, (), {"scores": "frozen_large"}),
        "uniform": ({"value_output": two}, (), {"scores": "uniform"}),
    }
    for name, arm in FURTHER.items():
        of_a_run = arm.how.of_a_run()
        assert (arm.how.decays(2.0, grid), of_a_run["in_loss"], of_a_run["model"]) == expected[name], name
    assert list(FURTHER) == list(expected)


def test_further_arms_have_to_be_named_and_are_for_experiments_that_have_them():
    assert [arm.name for arm in chosen_arms(Vision(arms=("uniform", "frozen"), strengths=()))] == ["uniform", "frozen"]
    with pytest.raises(SettingError, match="--arms 'planes' is unknown"):
        chosen_arms(Vision(arms=("planes",)))
    assert not set(FURTHER) & {arm.name for arm in chosen_arms(Language(arms=("all",), strengths=()))}
    assert [arm.name for arm in chosen_arms(Language(arms=("uniform", "l2_loss"), strengths=()))] == [
        "uniform", "l2_loss",
    ]  # fmt: skip
    with pytest.raises(SettingError, match=r"--arms 'uniform' is unknown: .*l2, l2_query_key"):
        chosen_arms(AttentionDecay(arms=("uniform",)))
    chosen_arms(Language(arms=("l2_loss",), strengths=("l2_loss=1e4",)))  # of the gradient, not of the weight


def test_all_arms_and_their_own_strengths():
    chosen = chosen_arms(AttentionDecay(arms=("all",), strengths=("low_rank=5,1",)))
    assert {arm.name: arm.strengths for arm in chosen} == {a.name: a.strengths for a in ARMS.values()} | {
        "low_rank": (1.0, 5.0)
    }


def test_config_json_has_the_keys_of_an_arm_that_it_always_had():
    assert ARMS["low_rank"].record() == {
        "name": "low_rank", "description": "Soft threshold of each head's W_Q and W_K, relative to their size.",
        "strengths": (0.1, 1.0, 10.0), "of": ("query_key",), "scale": "relative",
    }  # fmt: skip
    assert ARMS["l2"].record()["scale"] is None
    assert FURTHER["l2_loss"].record()["in_loss"] is True
    assert FURTHER["uniform"].record()["scores"] == "uniform"


BAD = [
    ({"arms": ()}, "--arms is empty: choose from l2"),
    ({"arms": ("low_rnk",)}, "--arms 'low_rnk' is unknown: did you mean 'low_rank'?"),
    ({"strengths": ("low_rnk=1",)}, "--strengths 'low_rnk' is unknown: did you mean 'low_rank'?"),
    ({"strengths": ("l2",)}, "--strengths l2 is not a list of numbers: give l2=0,0.1,1"),
    ({"strengths": ("l2=",)}, "--strengths l2= is not a list of numbers: give l2=0,0.1,1"),
    ({"strengths": ("l2=1,x",)}, "--strengths l2=1,x is not a list of numbers: give l2=0,0.1,1"),
    ({"strengths": ("l2=-1",)}, "--strengths l2=-1 is not a decay: give 0 for none, or more"),
    ({"strengths": ("l2=nan",)}, "--strengths l2=nan is not a decay"),
    ({"strengths": ("l2=1000",)}, "--strengths l2=1000 at --lr 0.001 would take more than all of a weight in one step"),
    ({"arms": ("low_rank_absolute",), "strengths": ("low_rank_absolute=inf",)}, "=inf is not a decay"),
    ({"mlp_decays": ()}, "--mlp-decays is empty: give for example 0.1"),
    ({"mlp_decays": (0.1, -2.0)}, "--mlp-decays -2 is not a decay"),
    ({"mlp_decays": (1e4,)}, "--mlp-decays 10000 at --lr 0.001 would take more"),
    ({"rest_decay": -0.1}, "--rest-decay -0.1 is not a decay"),
    ({"rest_decay": 1000.0}, "stay below 1000"),
    ({"qk_norm": "yes"}, "--qk-norm 'yes' is unknown"),
    ({"precision": "float8"}, "--precision 'float8' is unknown: did you mean 'float"),
    ({"compile": "no"}, "--compile 'no' is unknown"),
    ({"save": "last"}, "--save 'last' is unknown"),
    ({"seeds": 0}, "--seeds 0 is too small: give at least 1"),
    ({"steps": 0}, "--steps 0 is too small"),
    ({"batch_size": 0}, "--batch-size 0 is too small"),
    ({"accumulate": 0}, "--accumulate 0 is too small"),
    ({"evaluate_every": 0}, "--evaluate-every 0 is too small"),
    ({"every": 0}, "--every 0 is too small"),
    ({"lr": 0.0}, "--lr 0.0 must be a finite number > 0"),
    ({"lr": float("inf")}, "--lr inf must be a finite number > 0"),
    ({"lr": float("nan")}, "--lr nan must be a finite number > 0"),
    ({"clip": -1.0}, "--clip -1.0 must be a finite number >= 0; 0 switches it off"),
    ({"warmup": -1}, "--warmup -1 must be a finite number >= 0"),
    ({"warmup": 500}, "--warmup 500 must be less than --steps 500"),
    ({"steps": 510}, "--steps 510 is not a multiple of --evaluate-every 50: give for example --steps 500"),
    ({"steps": 60, "evaluate_every": 100}, "give for example --steps 100"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "words"), BAD, ids=[f"{'-'.join(c)} {i}" for i, (c, _) in enumerate(BAD)])
def test_a_setting_that_cannot_work_is_refused_in_one_line(tmp_path, changes, words):
    grid = AttentionDecay(**{"out": tmp_path / "run"} | changes)
    with pytest.raises(SettingError) as error:
        check_shared(grid)
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(SettingError):
        make(**dataclasses.asdict(grid))
    assert list(tmp_path.iterdir()) == []


def test_what_the_commands_share_is_no_command_itself():
    assert {"recall", "language", "vision"} <= set(experiment.names())
    assert "attention" not in experiment.names()
