import pytest

from rankdecay.lab.experiments.grok.verdict import verdict, wilson_interval


def _arm(name, generalised, steps=None, **more):
    return {"name": name, "seeds": 3, "generalised": generalised, "steps_to_generalise": steps} | more


def _verdict(*arms):
    result = verdict({"arms": list(arms), "settings": {"steps": 600}})
    return result.headline, dict(result.points)


def test_low_rank_alone():
    headline, points = _verdict(
        _arm("none", 0), _arm("l2_tuned", 0), _arm("low_rank", 3, 400), _arm("uniform_attention", 0)
    )
    assert headline == "Low-rank decay generalised in 3 of 3 seeds (median 400 steps); no other arm did."
    assert "none of its 3 seeds within 600 steps" in points["Tuned L2"]
    assert "Other strengths were not tried" in points["Tuned L2"]
    assert "switching attention off was not enough" in points["Uniform attention"]
    assert "between 44 and 100 %" in points["How far this goes"]


def test_tuned_l2_also_generalises_and_the_headline_says_so():
    headline, points = _verdict(_arm("l2_tuned", 3, 550), _arm("low_rank", 3, 400))
    assert headline.endswith("so did tuned L2 in 3 of 3 seeds (median 550 steps).")
    assert "did not require low-rank decay" in points["Tuned L2"]
    assert "150 steps earlier than tuned L2" in points["Tuned L2"]
    assert "an observation, not a test" in points["Tuned L2"]


def test_the_seeds_of_a_comparison_are_shown_when_known():
    seeds = "steps_to_generalise_by_seed"
    _, points = _verdict(
        _arm("l2_tuned", 3, 550, **{seeds: [500, 550, 1200]}), _arm("low_rank", 3, 400, **{seeds: [400, 350, 600]})
    )
    assert points["Tuned L2"].endswith("Seed by seed: 350–600 steps against 500–1,200.")


def test_a_verdict_prints_as_lines():
    result = verdict({"arms": [_arm("low_rank", 3, 400)]})
    assert str(result).splitlines()[0] == result.headline
    assert str(result).splitlines()[1].startswith("Uniform attention: Not in this run")


def test_tuned_l2_is_faster():
    _, points = _verdict(_arm("l2_tuned", 3, 300), _arm("low_rank", 3, 400))
    assert "100 steps later than tuned L2" in points["Tuned L2"]


def test_uniform_attention_also_generalises():
    headline, points = _verdict(_arm("uniform_attention", 2, 200), _arm("low_rank", 3, 400))
    assert "so did uniform attention in 2 of 3 seeds" in headline
    assert "cannot tell the benefit of a low-rank pattern" in points["Uniform attention"]


def test_nobody_generalises():
    headline, points = _verdict(_arm("l2", 0), _arm("low_rank", 0), _arm("uniform_attention", 0))
    assert headline == "No arm generalised within 600 steps, so this run does not tell the arms apart."
    assert list(points) == ["How far this goes"]
    assert "0 of 3 seeds is compatible with a true rate between 0 and 56 %" in points["How far this goes"]


def test_low_rank_does_not_but_another_does():
    headline, _ = _verdict(_arm("l2", 1), _arm("low_rank", 0))
    assert headline == "Low-rank decay generalised in none of its 3 seeds within 600 steps; L2 in 1 of 3 seeds did."


def test_missing_controls_are_named():
    headline, points = _verdict(_arm("low_rank", 3, 400))
    assert "no other arm to compare it with" in headline
    for control in ("Uniform attention", "Tuned L2", "No decay"):
        assert points[control].startswith("Not in this run")


def test_no_decay_generalises():
    _, points = _verdict(_arm("none", 3, 500), _arm("low_rank", 3, 400))
    assert "with no decay on queries and keys" in points["No decay"]


def test_success_that_was_lost_again():
    _, points = _verdict(_arm("prototype", 3, 400, test_accuracy=0.61), _arm("low_rank", 3, 400, test_accuracy=0.99))
    assert points["Not kept"].endswith("prototype (0.61).")


@pytest.mark.parametrize(("rank", "words"), [(1.2, "go together here"), (30.0, "does not separate")])
def test_rank_is_reported_as_association(rank, words):
    _, points = _verdict(
        _arm("low_rank", 3, 400, stable_rank=rank),
        _arm("l2", 0, stable_rank=20.0),
        _arm("none", 0, stable_rank=25.0),
    )
    assert words in points["Stable rank at the end"]


def test_uniform_attention_has_no_say_about_rank():
    _, points = _verdict(_arm("low_rank", 3, 400, stable_rank=1.2), _arm("uniform_attention", 0, stable_rank=0.0))
    assert "Stable rank at the end" not in points


def test_a_run_in_progress_states_no_result():
    result = verdict(None, 250)
    assert result.headline == "This run is not complete."
    assert "step 250" in result.points[0][1]


def test_an_experiment_that_does_not_count_generalisation():
    assert verdict({"arms": [{"name": "merged", "seeds": 3}]}).points == []


def test_wilson_interval():
    assert wilson_interval(3, 3) == pytest.approx((0.4385, 1.0), abs=1e-3)
    assert wilson_interval(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-3)
    assert wilson_interval(0, 0) == (0.0, 1.0)
