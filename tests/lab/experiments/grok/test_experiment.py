"""What the experiment compares, and how its figures follow from the records."""

import dataclasses
import math
import subprocess
import sys

import pytest

from rankdecay.decay.policy import Frobenius, LowRank
from rankdecay.lab.errors import SettingError
from rankdecay.lab.experiment import NOT_IDENTITY, identity
from rankdecay.lab.experiments.grok.experiment import (
    ARMS,
    PRESETS,
    Grok,
    check,
    make_arms,
    make_datasets,
    make_ensembles,
    steps_to_hold,
    summarise,
    summarise_arm,
)

TINY = Grok(task="add", modulus=5, train_fraction=0.6, seeds=2, batch_size=4, width=8, precision="float32")


def history(accuracies, arm: str = "none", seed: int = 0, **changes) -> list[dict]:
    record = {
        "arm": arm,
        "seed": seed,
        "train_accuracy": 1.0,
        "test_loss": 0.5,
        "stable_rank": 3.0 + seed,
        "effective_rank": 5.0,
        "product_stable_rank": 2.0,
        "product_effective_rank": 4.0,
        "query_norm": 1.0,
        "key_norm": 2.0,
        "decay_size": None,
        "radial_share": None,
        "tangential_share": None,
        "step_seconds": 0.01,
    }
    return [record | {"step": 50 * i, "test_accuracy": value} | changes for i, value in enumerate(accuracies)]


# --- when a member has generalised ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("accuracies", "expected"),
    [
        ([0.1, 0.96, 0.97, 0.2], 50),
        ([0.95, 0.95], 0),
        ([0.1, 0.96, 0.2, 0.96, 0.99], 150),
        ([0.1, 0.96, 0.94, 0.96, 0.94], None),  # reached, never held
        ([0.1, 0.2, 0.99], None),  # nobody knows yet whether it holds
        ([0.1, 0.949999], None),
        ([0.1, 0.99, None], None),  # diverged
        ([None, 0.99, 0.99], 50),
        ([0.99], None),
        ([], None),
    ],
)
def test_steps_to_hold(accuracies, expected):
    assert steps_to_hold(history(accuracies), 0.95) == expected


REACHED, LATER, NEVER = [0.1, 1.0, 1.0, 1.0], [0.1, 0.2, 1.0, 1.0], [0.1, 0.2, 0.2, 0.2]


@pytest.mark.parametrize(
    ("members", "generalised", "steps"),
    [
        ([REACHED, REACHED, LATER], 3, 50),
        ([REACHED, LATER, NEVER], 2, 100),  # the seed that never got there counts as later than any other
        ([REACHED, NEVER, NEVER], 1, None),
        ([NEVER, NEVER, NEVER], 0, None),
        ([REACHED, LATER], 2, 75),
        ([REACHED], 1, 50),
        ([NEVER], 0, None),
    ],
)
def test_median_steps_to_generalise(members, generalised, steps):
    summary = summarise_arm("none", [history(a, seed=i) for i, a in enumerate(members)], 0.95)
    assert summary["seeds"] == len(members)
    assert summary["generalised"] == generalised
    assert summary["steps_to_generalise"] == steps


@pytest.mark.parametrize("members", [[REACHED, NEVER], [REACHED, LATER, NEVER, NEVER]])
def test_half_of_the_seeds_is_not_fewer_than_half(members):
    """docs/run_directory.md: the median is null if *fewer* than half of the seeds got there."""
    summary = summarise_arm("none", [history(a, seed=i) for i, a in enumerate(members)], 0.95)
    assert summary["steps_to_generalise"] is not None


def test_other_figures_are_means_over_seeds_at_the_last_evaluation():
    members = [history([0.1, 0.4], seed=0), history([0.1, 0.8], seed=1, decay_size=0.25)]
    summary = summarise_arm("none", members, 0.95)
    assert summary["name"] == "none"
    assert summary["test_accuracy"] == pytest.approx(0.6)
    assert summary["stable_rank"] == pytest.approx(3.5)
    assert summary["decay_size"] == 0.25  # of the seed that has one
    assert summary["radial_share"] is None
    assert summary["steps_per_second"] == pytest.approx(100)


def test_records_are_sorted_into_arms_whatever_their_order():
    records = [r for arm, a in (("low_rank", LATER), ("none", NEVER)) for s in (1, 0) for r in history(a, arm, s)]
    arms = summarise(records[::-1], ["none", "low_rank"], 0.95)
    assert [arm["name"] for arm in arms] == ["none", "low_rank"]
    assert [arm["seeds"] for arm in arms] == [2, 2]
    assert [arm["steps_to_generalise"] for arm in arms] == [None, 100]


# --- arms ---------------------------------------------------------------------------------------------------------


def test_arms_come_in_their_order_and_have_descriptions():
    arms = make_arms(Grok())
    assert tuple(arm.name for arm in arms) == ARMS
    assert len({arm.description for arm in arms}) == len(arms)
    assert [a.name for a in make_arms(Grok(arms=("low_rank", "none")))] == ["none", "low_rank"]


def test_an_arm_differs_from_its_control_in_one_thing():
    """Decay of W_Q and W_K, or attention: never both, and never anything else of a member."""
    ensembles = make_ensembles(TINY, make_arms(TINY), make_datasets(TINY), "cpu")
    members = {(m.arm, m.seed): m for e in ensembles for m in e.members}
    assert set(members) == {(arm, seed) for arm in ARMS for seed in range(2)}
    for (arm, seed), member in members.items():
        control = members["none", seed]
        changed = {f.name for f in dataclasses.fields(member) if getattr(member, f.name) != getattr(control, f.name)}
        expected = {"none": set(), "uniform_attention": {"arm", "uniform_attention"}}.get(arm, {"arm", "decay"})
        assert changed == expected, arm
        assert member.rest_decay == TINY.weight_decay


def test_all_arms_start_from_the_same_weights_and_data():
    ensembles = make_ensembles(TINY, make_arms(TINY), make_datasets(TINY), "cpu")
    start = {(m.arm, m.seed): (e, i) for e in ensembles for i, m in enumerate(e.members)}
    for (arm, seed), (of, index) in start.items():
        control, at = start["none", seed]
        for name, value in of.parameters.items():
            if arm == "uniform_attention" and name.split(".")[0] in ("query", "key"):
                assert (value[index] == 0).all()
            else:
                assert (value[index] == control.parameters[name][at]).all()
        assert start[arm, 0][0].config == control.config
        assert of.training == control.training


def test_decays_are_those_the_settings_name():
    settings = Grok(weight_decay=2.0, tuned_strength=70.0, strength=0.3, rule="prox", scale="relative")
    arms = {arm.name: arm for arm in make_arms(settings)}
    assert arms["none"].decay is None
    assert arms["l2"].decay == Frobenius(2.0)
    assert arms["l2_tuned"].decay == Frobenius(70.0)
    low_rank = arms["low_rank"].decay
    assert isinstance(low_rank, LowRank)
    assert (low_rank.strength, low_rank.rule, low_rank.scale, low_rank.lr_coupled) == (0.3, "prox", "relative", True)
    prototype = arms["prototype"].decay
    assert prototype == LowRank(0.01, rule="newton_schulz", scale="absolute", lr_coupled=False)


# --- presets and settings ---------------------------------------------------------------------------------------


def test_the_prototype_preset_is_the_published_set_up():
    preset = PRESETS["prototype"]
    assert (preset.preset, preset.task, preset.modulus, preset.split) == ("prototype", "add", 113, "ordered")
    assert (preset.qk_norm, preset.width, preset.weight_decay, preset.lr) == ("width", 128, 0.1, 1e-3)
    arms = {arm.name: arm.decay for arm in make_arms(preset)}
    assert {"none", "l2", "prototype"} <= arms.keys()
    assert arms["l2"] == Frobenius(0.1)
    assert isinstance(arms["prototype"], LowRank)
    assert arms["prototype"].strength == 0.01
    assert not arms["prototype"].lr_coupled


@pytest.mark.parametrize("name", PRESETS)
def test_presets_can_run(name):
    check(PRESETS[name])
    assert PRESETS[name].preset == name
    assert set(PRESETS[name].arms) <= set(ARMS)


def test_where_and_how_it_is_shown_is_not_what_is_computed():
    settings = Grok()
    assert set(identity(settings)) == {f.name for f in dataclasses.fields(settings)} - set(NOT_IDENTITY)
    assert {"out", "quiet", "json"} <= set(NOT_IDENTITY)
    for name in ("seeds", "steps", "task", "strength", "lr", "precision"):
        assert name in identity(settings)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": 0}, ["--steps 0", "at least 1"]),
        ({"seeds": 0}, ["--seeds 0", "at least 1"]),
        ({"batch_size": -1}, ["--batch-size -1", "at least 1"]),
        ({"evaluate_every": 0}, ["--evaluate-every 0", "at least 1"]),
        ({"strength": -0.5}, ["--strength -0.5", ">= 0"]),
        ({"strength": math.inf}, ["--strength inf", "finite"]),
        ({"weight_decay": -1.0}, ["--weight-decay -1.0", ">= 0"]),
        ({"tuned_strength": math.nan}, ["--tuned-strength nan", "finite"]),
        ({"lr": -1e-3}, ["--lr -0.001", ">= 0"]),
        ({"weight_decay": 1000.0}, ["--weight-decay 1000", "below 500"]),
        ({"tuned_strength": 200.0, "lr": 0.01}, ["--tuned-strength 200", "--lr 0.01", "below 100"]),
        ({"threshold": 0.0}, ["--threshold 0.0", "0.95"]),
        ({"threshold": 1.1}, ["--threshold 1.1", "0.95"]),
        ({"width": 10}, ["--width 10", "multiple of the 4 heads"]),
        ({"width": 0}, ["--width 0", "multiple of the 4 heads"]),
        ({"arms": ()}, ["--arms", "empty", "low_rank"]),
        ({"arms": ("none", "lowrank")}, ["--arms 'lowrank'", "'low_rank'"]),
        ({"task": "ad"}, ["--task 'ad'", "'add'"]),
    ],
)
def test_settings_that_cannot_work(changes, words):
    with pytest.raises(SettingError) as error:
        check(dataclasses.replace(Grok(), **changes))
    assert all(word in str(error.value) for word in words)
    assert "\n" not in str(error.value)


def test_a_batch_larger_than_the_training_set_is_refused():
    with pytest.raises(SettingError, match=r"--batch-size 26 .*training set of \d+ examples: give at most"):
        make_datasets(dataclasses.replace(TINY, batch_size=26))


def test_the_smallest_training_set_of_all_seeds_decides():
    """Split by unordered pair, training sets differ in size with the number of (a, a) among them."""
    sizes = [len(data.train_targets) for data in make_datasets(dataclasses.replace(TINY, seeds=8)).values()]
    assert sizes[0] > min(sizes)
    with pytest.raises(SettingError, match=f"training set of {min(sizes)} examples: give at most {min(sizes)}"):
        make_datasets(dataclasses.replace(TINY, seeds=8, batch_size=sizes[0]))


def test_importing_the_settings_imports_neither_torch_nor_numpy():
    code = (
        "import sys, rankdecay.lab.experiments.grok.experiment; sys.exit(bool({'torch', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
