"""Every arm of a sweep: its treatment at each of its strengths, and the grid beyond its edges."""

from dataclasses import replace

import pytest

from rankdecay.decay.policy import Frobenius, LowRank
from rankdecay.lab.ensemble.accelerators import (
    Accelerator,
    CautiousDecay,
    GrokfastEMA,
    GrokfastMA,
    Muon,
    OrthoGrad,
    StableMax,
)
from rankdecay.lab.ensemble.control import PLAIN, Control
from rankdecay.lab.errors import SettingError
from rankdecay.lab.experiment import Arm
from rankdecay.lab.experiments.boundary.arms import PUBLISHED, Axis, BoundaryTreatment, every_arm, make_arms, wider
from rankdecay.lab.experiments.boundary.settings import ARMS, PRESETS, STANDARD_ARMS, Boundary

SMALL = Boundary()
KNOWN = every_arm(SMALL)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", KNOWN)
def test_an_arm_builds_a_treatment_at_each_of_its_strengths(preset, name):
    arm = every_arm(PRESETS[preset])[name]
    assert arm.name == name
    assert list(arm.strengths) == sorted(set(arm.strengths))
    treatments = [arm.how.treat(strength) for strength in arm.strengths or (0.0,)]
    assert len(set(treatments)) == len(treatments)  # and each is hashable, as a member is
    for strength, treatment in zip(arm.strengths, treatments, strict=False):
        assert 0 < strength < arm.how.limit
        assert strength == int(strength) or not arm.how.whole
        axis = [treatment.decay.strength] if treatment.decay else []
        control = treatment.control
        axis += [control.norm, control.query_key_lr, control.target_rank, control.truncate_to, control.sharpen]
        axis += [control.yoked.strength] if control.yoked else []
        axis += [treatment.lr, *vars(treatment.accelerator or Accelerator()).values()]
        assert strength in axis, "the strength is what the treatment varies"


@pytest.mark.parametrize("rule", ["smooth", "newton_schulz"])
@pytest.mark.parametrize("name", KNOWN)
def test_an_arm_says_what_it_does_in_a_sentence(rule, name):
    arm = every_arm(replace(SMALL, rule=rule))[name]
    assert arm.description[0].isupper()
    assert arm.description.endswith(".")
    assert "\n" not in arm.description
    assert 15 < len(arm.description) < 120
    if arm.control:
        assert arm.control
        assert not arm.control.endswith(".")


def test_names_that_others_rely_on():
    assert set(ARMS) < set(STANDARD_ARMS) < set(KNOWN)
    assert set(PUBLISHED) < set(KNOWN)
    assert all(set(preset.arms) <= set(KNOWN) for preset in PRESETS.values())
    assert [name for name, arm in KNOWN.items() if not arm.strengths] == ["none", "uniform_attention", "stablemax"]


def test_what_sets_the_arms_apart():
    smooth = LowRank(5.0, "smooth", "absolute", every=4, smoothing=0.13)
    expected = {
        "none": BoundaryTreatment(),
        "uniform_attention": BoundaryTreatment(uniform_attention=True),
        "l2": BoundaryTreatment(Frobenius(5.0)),
        "l2_all": BoundaryTreatment(Frobenius(5.0), rest_decay=5.0),
        "no_qk_norm": BoundaryTreatment(Frobenius(5.0), qk_norm=False),
        "prox": BoundaryTreatment(LowRank(5.0, "prox", "absolute", every=4)),
        "smooth": BoundaryTreatment(smooth),
        "prototype": BoundaryTreatment(LowRank(5.0, "newton_schulz", "absolute", every=1, lr_coupled=False)),
        "l2_ramp": BoundaryTreatment(Frobenius(5.0, warmup=200)),
        "radial": BoundaryTreatment(Frobenius(5.0, power=0, cap=0.1)),
        "power_2": BoundaryTreatment(Frobenius(5.0, power=2, cap=0.1)),
        "relative": BoundaryTreatment(replace(smooth, scale="relative")),
        "elastic": BoundaryTreatment(smooth, Control(also=Frobenius(30.0))),
        "ramp_low_rank": BoundaryTreatment(
            replace(smooth, preserve_norm=True), Control(also=Frobenius(30.0, warmup=200))
        ),
        "sphere_falling": BoundaryTreatment(control=Control(norm=5.0, norm_from=(64 / 3) ** 0.5, norm_steps=200)),
        "yoked": BoundaryTreatment(control=Control(yoked=smooth)),
        "sharpen": BoundaryTreatment(control=Control(sharpen=5)),
        "radial_no_qk_norm": BoundaryTreatment(smooth, Control(part="radial"), qk_norm=False),
        "radial_only": BoundaryTreatment(smooth, Control(part="radial")),
        "raise_rank": BoundaryTreatment(smooth, Control(part="reversed")),
        "sphere": BoundaryTreatment(control=Control(norm=5.0)),
        "sphere_low_rank": BoundaryTreatment(smooth, Control(norm=5.0)),
        "fast_query_key": BoundaryTreatment(control=Control(query_key_lr=5.0)),
        "truncate": BoundaryTreatment(control=Control(truncate_to=5)),
        "kept_on": BoundaryTreatment(smooth, stays=True),
        "until_generalised": BoundaryTreatment(smooth, Control(schedule="until_generalised"), stays=True),
        "learning_rate": BoundaryTreatment(lr=5.0),
        "grokfast_ema": BoundaryTreatment(accelerator=GrokfastEMA(5.0, 0.98)),
        "grokfast_ma": BoundaryTreatment(accelerator=GrokfastMA(5.0, 100)),
        "orthograd": BoundaryTreatment(lr=5.0, accelerator=OrthoGrad()),
        "stablemax": BoundaryTreatment(accelerator=StableMax()),
        "muon": BoundaryTreatment(accelerator=Muon(5.0, 0.95)),
        "cautious": BoundaryTreatment(Frobenius(5.0), rest_decay=5.0, accelerator=CautiousDecay()),
        "target_rank_head": BoundaryTreatment(replace(smooth, unit="head"), Control(target_rank=5.0)),
    }
    for name, treatment in expected.items():
        assert KNOWN[name].how.treat(5.0) == treatment, name


def test_settings_reach_the_treatments():
    known = every_arm(replace(SMALL, rule="polar", smoothing=0.2, strength=7.0, every=1, lr=0.01, width=32))
    assert known["smooth"].how.treat(1.0).decay == LowRank(1.0, "smooth", "absolute", every=1, smoothing=0.2)
    assert known["tangential_only"].how.treat(1.0) == BoundaryTreatment(
        LowRank(1.0, "polar", "absolute", every=1), Control(part="tangential")
    )
    assert known["sphere_low_rank"].how.treat(1.0).decay == LowRank(7.0, "polar", "absolute", every=1)
    assert known["l2"].how.limit == known["l2_all"].how.limit == known["no_qk_norm"].how.limit == pytest.approx(100)
    assert known["truncate"].how.limit == 32
    assert known["none"].how.treat(0.0).control == PLAIN


def test_a_learning_rate_leaves_something_of_the_rest():
    known = every_arm(replace(SMALL, rest_decays=(1.0, 4.0)))
    assert known["learning_rate"].how.limit == known["orthograd"].how.limit == 0.25
    assert every_arm(replace(SMALL, rest_decays=(0.0,)))["orthograd"].how.limit == float("inf")


def test_an_accelerator_that_the_budget_leaves_no_step_is_refused():
    asked = replace(SMALL, arms=("grokfast_ma", "muon"), strengths=(), steps=99, fractions=(0.5,), rest_decays=(1.0,))
    with pytest.raises(SettingError, match=r"--steps 99: grokfast_ma does nothing before step 100: give more"):
        make_arms(asked)
    assert [arm.name for arm in make_arms(replace(asked, steps=100))] == ["grokfast_ma", "muon"]
    every = {steps: {arm.name for arm in make_arms(replace(asked, arms=("all",), steps=steps))} for steps in (99, 100)}
    assert every[100] - every[99] == {"grokfast_ma"}


# --- widening --------------------------------------------------------------------------------------------------------


def arm(**options) -> Arm:
    return Arm("any", "Any.", Axis(lambda _: BoundaryTreatment(), **options), (1.0,))


@pytest.mark.parametrize(
    ("options", "strengths", "edge", "following"),
    [
        ({}, (1.25, 2.5, 5, 10), "highest", 20.0),
        ({}, (1.25, 2.5, 5, 10), "lowest", 0.625),
        ({}, (10, 1, 3), "highest", 33.3),  # in its own ratio there, and the order does not matter
        ({}, (10, 1, 3), "lowest", 0.333),
        ({}, (5,), "highest", 10.0),
        ({}, (5,), "lowest", 2.5),
        ({"limit": 500.0}, (100, 300), "highest", None),
        ({"limit": 500.0}, (200, 300), "highest", 450.0),
        ({"limit": 500.0}, (223.55, 334.3), "highest", None),  # 499.9, which rounds to the limit
        ({"whole": True}, (1, 2, 4, 8), "highest", 16.0),
        ({"whole": True}, (2, 4), "lowest", 1.0),
        ({"whole": True}, (1, 2), "lowest", None),
        ({"whole": True}, (1,), "lowest", None),
        ({"whole": True}, (3, 4), "lowest", 2.0),
        ({"whole": True, "limit": 64}, (8, 32), "highest", None),
        ({"whole": True, "limit": 64}, (16, 32), "highest", None),
    ],
)
def test_the_next_strength_beyond_an_edge(options, strengths, edge, following):
    got = wider(arm(**options), strengths, edge)
    assert got == following
    assert got is None or isinstance(got, float)


@pytest.mark.parametrize("edge", ["lowest", "highest"])
@pytest.mark.parametrize("name", [name for name, arm in KNOWN.items() if arm.strengths])
def test_every_grid_can_be_widened_to_strengths_its_arm_takes(name, edge):
    """Again and again, as `--widen` does, until there is none: never one that was tried, never one beyond the limit."""
    arm, tried = KNOWN[name], list(KNOWN[name].strengths)
    for _ in range(5):
        following = wider(arm, tried, edge)
        if following is None:
            break
        assert 0 < following < arm.how.limit
        assert following < min(tried) if edge == "lowest" else following > max(tried)
        assert isinstance(arm.how.treat(following), BoundaryTreatment)
        tried.append(following)
