"""What the experiment compares, and what a run of it leaves."""

import dataclasses
import json

import pytest

from rankdecay.decay.policy import Frobenius, LowRank
from rankdecay.lab.errors import SettingError
from rankdecay.lab.experiment import load, run
from rankdecay.lab.experiments.grok.experiment import make_arms, make_datasets, make_ensembles
from rankdecay.lab.experiments.grok.settings import ARMS, PRESETS, Grok
from rankdecay.lab.report.terminal import print_summary
from rankdecay.lab.store import read_metrics
from rankdecay.rules import rule_names

TINY = Grok(task="add", modulus=5, train_fraction=0.6, seeds=2, batch_size=4, width=8, precision="float32")


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
    arms = {arm.name: arm.how.decay for arm in make_arms(settings)}
    assert arms["none"] is None
    assert arms["l2"] == Frobenius(2.0)
    assert arms["l2_tuned"] == Frobenius(70.0)
    low_rank = arms["low_rank"]
    assert isinstance(low_rank, LowRank)
    assert (low_rank.strength, low_rank.rule, low_rank.scale, low_rank.lr_coupled) == (0.3, "prox", "relative", True)
    assert arms["prototype"] == LowRank(0.01, rule="newton_schulz", scale="absolute", every=1, lr_coupled=False)


def test_an_arm_named_by_its_rule_is_the_decay_of_the_settings_by_that_rule():
    settings = Grok(arms=("low_rank", *rule_names()), strength=0.3, scale="relative", smoothing=0.2, every=2)
    arms = {arm.name: arm.how.decay for arm in make_arms(settings)}
    assert list(arms) == ["low_rank", *rule_names()]
    assert arms["smooth"] == arms["low_rank"]
    for rule in rule_names():
        assert arms[rule] == dataclasses.replace(arms["low_rank"], rule=rule)


def test_arms_are_stored_with_the_keys_they_always_had():
    records = {arm.name: arm.record() for arm in make_arms(Grok())}
    assert records["none"] == {
        "name": "none",
        "description": "No decay of W_Q and W_K.",
        "decay": None,
        "uniform_attention": False,
    }
    assert records["l2"]["decay"] == {"strength": 1.5}
    assert records["uniform_attention"]["uniform_attention"] is True


def test_the_prototype_preset_is_the_published_set_up():
    preset = PRESETS["prototype"]
    assert (preset.preset, preset.task, preset.modulus, preset.split) == ("prototype", "add", 113, "ordered")
    assert (preset.qk_norm, preset.width, preset.weight_decay, preset.lr) == ("width", 128, 0.1, 1e-3)
    arms = {arm.name: arm.how.decay for arm in make_arms(preset)}
    assert {"none", "l2", "prototype"} <= arms.keys()
    assert arms["l2"] == Frobenius(0.1)
    assert isinstance(arms["prototype"], LowRank)
    assert arms["prototype"].strength == 0.01
    assert not arms["prototype"].lr_coupled


def test_a_batch_larger_than_the_training_set_is_refused():
    with pytest.raises(SettingError, match=r"--batch-size 26 .*training set of \d+ examples: give at most"):
        make_datasets(dataclasses.replace(TINY, batch_size=26))


def test_the_smallest_training_set_of_all_seeds_decides():
    """Split by unordered pair, training sets differ in size with the number of (a, a) among them."""
    sizes = [len(data.train_targets) for data in make_datasets(dataclasses.replace(TINY, seeds=8)).values()]
    assert sizes[0] > min(sizes)
    with pytest.raises(SettingError, match=f"training set of {min(sizes)} examples: give at most {min(sizes)}"):
        make_datasets(dataclasses.replace(TINY, seeds=8, batch_size=sizes[0]))


# --- a run --------------------------------------------------------------------------------------------------------


def test_rules_are_compared_under_their_names(tmp_path, capsys):
    settings = dataclasses.replace(
        TINY, arms=("prox", "low_rank", "none"), steps=4, evaluate_every=2, device="cpu", out=tmp_path, quiet=True
    )
    experiment = load("grok")
    summary = run(experiment, settings, "")
    names = ["none", "prox", "smooth"]
    assert [arm["name"] for arm in summary["arms"]] == names
    assert [arm["name"] for arm in json.loads((tmp_path / "config.json").read_text())["arms"]] == names
    assert {row["arm"] for row in read_metrics(tmp_path)} == set(names)
    page = (tmp_path / "report.html").read_text(encoding="utf-8").split("<script")[0]
    assert "low-rank decay, smooth" in page
    assert "low-rank decay, prox" in page
    print_summary(experiment, summary)
    assert "No arm generalised within 4 steps" in capsys.readouterr().out
