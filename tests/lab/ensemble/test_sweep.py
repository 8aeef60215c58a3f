"""A trial gives one row, and the same row whatever shared its places, in whatever order, interrupted or not."""

import itertools
import json
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from rankdecay.decay.policy import Frobenius, LowRank
from rankdecay.lab.ensemble import ensemble
from rankdecay.lab.ensemble.control import YOKED_SEED, Control
from rankdecay.lab.ensemble.ensemble import Ensemble
from rankdecay.lab.ensemble.members import Member, Training
from rankdecay.lab.ensemble.outcome import FIGURES, KEY, Key, key_of
from rankdecay.lab.ensemble.sweep import Saved, SweepPlan, Trial, TrialQueue, row, train
from rankdecay.lab.ensemble.transformer import TransformerConfig

HEAD = TransformerConfig(6, 3, 5, width=16, depth=1, heads=2, mlp_width=32)
NONE = replace(HEAD, qk_norm="none")
SMOOTH = LowRank(5.0, "smooth", "absolute", every=4, smoothing=0.13)
SOFT = replace(SMOOTH, strength=1.0)
# Full batches of an ordered split, whose test pairs mirror training pairs: this is generalised in 100 steps or so.
PLAN = SweepPlan(Training(batch_size=20, precision="float64"), budget=120, evaluate_every=20, threshold=0.6, places=2)


def trial(arm: str, seed: int = 0, decay=None, *, config=HEAD, fraction=0.8, stays=False, **options) -> Trial:
    options = {"lr": 1e-2, **options}
    data = {"task": "add", "modulus": 5, "split": "ordered", "train_fraction": fraction}
    return Trial(1.0, fraction, Member(arm, seed, decay, 1.0, **options), config, data, stays)


TRIALS = [
    trial("none", 4, fraction=0.9),
    trial("none", 1),
    trial("uniform", 0, uniform_attention=True),
    trial("uniform", 2, uniform_attention=True, fraction=0.9, stays=True),
    trial("soft", 4, SOFT, fraction=0.9),
    trial("no_qk_norm", 3, Frobenius(3.0), config=NONE, fraction=0.9),
    trial("kept_on", 3, SOFT, fraction=0.9, stays=True),
    trial("until_generalised", 3, SOFT, control=Control(schedule="until_generalised"), fraction=0.9, stays=True),
    trial("after_memorising", 1, SMOOTH, control=Control(schedule="after_memorising")),
    trial("no_qk_norm", 0, Frobenius(3.0), config=NONE),
    trial("diverging", 0, lr=1e30),
    trial("truncate", 1, control=Control(truncate_to=1)),
    trial("target_rank", 0, SMOOTH, control=Control(target_rank=2.0)),
    trial("yoked", 0, control=Control(yoked=SMOOTH)),
]
LONG = {t.key for t in TRIALS if t.stays}


def run(trials=TRIALS, plan: SweepPlan = PLAN, **options) -> dict[Key, dict]:
    rows = list(train(TrialQueue(trials), plan, **options))
    assert Counter(map(key_of, rows)) == Counter(t.key for t in trials), "exactly one row for every trial"
    return {key_of(r): json.loads(json.dumps(r)) for r in rows}


def assert_same_rows(got: dict[Key, dict], expected: dict[Key, dict]) -> None:
    assert got.keys() == expected.keys()
    for key, wanted in expected.items():
        found, items = flat(got[key]), flat(wanted)
        assert found.keys() == items.keys()
        for name, item in items.items():
            same = pytest.approx(item, rel=2e-3, abs=1e-6) if isinstance(item, float) else item
            assert found[name] == same, (key, name)


def flat(values: dict) -> dict:
    """A row without its nesting."""
    found = {}
    for name, value in values.items():
        for inner, items in value.items() if isinstance(value, dict) else [("", value)]:
            for index, item in enumerate(items if isinstance(items, list) else [items]):
                found[name, inner, index] = item
    return found


@pytest.fixture(scope="module")
def rows() -> dict[Key, dict]:
    return run()


def of(rows: dict[Key, dict], arm: str, seed: int) -> dict:
    (found,) = [r for r in rows.values() if (r["arm"], r["seed"]) == (arm, seed)]
    return found


# --- what ends, and when -------------------------------------------------------------------------------------------


def test_the_trials_end_in_every_way_there_is(rows):
    outcomes = {(r["arm"], r["seed"]): r["outcome"] for r in rows.values()}
    assert set(outcomes.values()) == {"generalised", "diverged", "budget"}
    assert outcomes["diverging", 0] == "diverged"
    for key, r in rows.items():
        if r["outcome"] == "generalised" and key not in LONG:
            assert r["steps"] == r["steps_to_generalise"] + PLAN.evaluate_every  # the evaluation that held it
        elif r["outcome"] != "diverged":
            assert r["steps"] == PLAN.budget
        assert (r["steps_to_generalise"] is not None) == (r["outcome"] == "generalised")
    early = [key for key, r in rows.items() if r["outcome"] == "generalised" and r["steps"] < PLAN.budget]
    assert len(early) >= 3
    assert all(rows[key]["outcome"] == "generalised" for key in LONG), "those stayed"


def test_a_row_says_when_its_schedule_acted_or_that_it_never_did(rows):
    truncated, late, until = (
        of(rows, *key) for key in (("truncate", 1), ("after_memorising", 1), ("until_generalised", 3))
    )
    assert truncated["acted_at"] == truncated["memorised_at"]
    assert late["acted_at"] == late["memorised_at"]
    assert until["acted_at"] == until["steps_to_generalise"] + PLAN.evaluate_every
    assert "acted_at" not in of(rows, "soft", 4), "nothing to wait for"
    short = replace(PLAN, budget=20)
    (never,) = run([t for t in TRIALS if t.member.arm == "until_generalised"], short).values()
    assert never["acted_at"] is None


def test_the_validation_set_decides_where_there_is_one():
    """The test set is measured and decides nothing: an accuracy that no test set can have is never looked for."""
    wanted = replace(
        trial("soft", 4, SOFT, fraction=0.9), data={**trial("soft").data, "train_fraction": 0.84, "validation": 1}
    )
    (three,) = run([wanted]).values()
    curve = three["curve"]
    assert curve["validation_accuracy"] != curve["test_accuracy"]
    held = [a >= PLAN.threshold for a in curve["validation_accuracy"]]
    first = next((step for step, *two in zip(curve["step"], held, held[1:], strict=False) if all(two)), None)
    assert three["steps_to_generalise"] == first
    assert three["validation_accuracy"] == curve["validation_accuracy"][-1]


def test_a_diverged_run_leaves_at_once(rows):
    r = of(rows, "diverging", 0)
    assert r["steps"] < PLAN.budget
    assert r["steps_to_generalise"] is None
    assert all(value is None or np.isfinite(value) for value in r["spectrum"])


def test_a_row_is_the_run_trained_alone(rows):
    """By hand: an ensemble of one member, evaluated as the plan says."""
    for wanted in (of(rows, "uniform", 0), of(rows, "soft", 4), of(rows, "no_qk_norm", 3)):
        (found,) = [t for t in TRIALS if t.key == key_of(wanted)]
        data = ensemble_data(found)
        alone = Ensemble(found.config, [found.member], [data], PLAN.training)
        first = alone.evaluate()[0][0]
        curve = []
        for _ in wanted["curve"]["step"]:
            alone.train(PLAN.evaluate_every)
            curve.append(alone.evaluate()[0][0])
        assert wanted["curve"]["step"] == [r["step"] for r in curve]
        for name in ("train_accuracy", "test_accuracy", "stable_rank", "query_norm"):
            assert wanted["curve"][name] == pytest.approx([r[name] for r in curve], rel=1e-3)
        for name in FIGURES:
            assert wanted[name] == (None if curve[-1][name] is None else pytest.approx(curve[-1][name], rel=1e-3)), name
        fell = (r["step"] for r in curve if r["stable_rank"] <= first["stable_rank"] / 2)
        assert wanted["rank_fell_at"] == (next(fell, None) if first["stable_rank"] else None)  # none to lose
        assert wanted["train_examples"] == len(data.train_targets)
        assert wanted["best_test_accuracy"] == pytest.approx(max(r["test_accuracy"] for r in curve), rel=1e-3)


def ensemble_data(of: Trial):
    from rankdecay.lab.tasks import make_dataset

    return make_dataset(seed=of.member.seed, **of.data)


def test_the_trials_memorise_and_lose_rank_and_generalise(rows):
    figures = [(r["memorised_at"], r["rank_fell_at"], r["accuracy_rose_at"]) for r in rows.values()]
    for number in range(3):
        steps = {figure[number] for figure in figures}
        assert len(steps - {None}) > 1
    for r in rows.values():
        if r["steps_to_generalise"] is not None:
            assert r["accuracy_rose_at"] <= r["steps_to_generalise"]


def test_what_every_row_holds(rows):
    for key, r in rows.items():
        assert tuple(r[name] for name in KEY) == key
        assert r["budget"] == PLAN.budget
        assert set(FIGURES) <= set(r)
        assert r["curve"]["step"] == list(range(PLAN.evaluate_every, r["steps"] + 1, PLAN.evaluate_every))
        assert {len(values) for values in r["curve"].values()} == {len(r["curve"]["step"])}
        index, spectrum = r["spectrum_index"], r["spectrum"]
        assert (index[0], index[-1], len(index)) == (1, HEAD.width, len(spectrum))
        assert index == sorted(set(index))
        if r["outcome"] != "diverged" and r["arm"] != "uniform":
            assert spectrum[0] == 1
            assert all(1 >= a >= b >= 0 for a, b in itertools.pairwise(spectrum))


def test_a_schedule_acts_from_its_moment_on(rows):
    plain, late = of(rows, "none", 1), of(rows, "after_memorising", 1)
    agree = agreement(plain, late)
    assert late["memorised_at"] is not None
    assert agree == late["memorised_at"]
    kept, dropped = of(rows, "kept_on", 3), of(rows, "until_generalised", 3)
    assert dropped["steps_to_generalise"] == kept["steps_to_generalise"]
    assert agreement(kept, dropped) == dropped["steps_to_generalise"] + PLAN.evaluate_every < PLAN.budget
    assert (kept["decay_size"] is None, dropped["decay_size"] is None) == (False, True)


def agreement(a: dict, b: dict) -> int:
    """The last step up to which two runs are the same run."""
    last = 0
    columns = [zip(*(r["curve"][name] for name in ("step", "stable_rank", "query_norm")), strict=True) for r in (a, b)]
    for one, other in zip(*columns, strict=False):
        if one != pytest.approx(other, rel=1e-3):
            break
        last = one[0]
    return last


# --- what a row does not depend on -----------------------------------------------------------------------------------


def test_rows_do_not_depend_on_the_order_and_the_places(rows):
    assert_same_rows(run(TRIALS[::-1], replace(PLAN, places=5)), rows)


def test_one_place_is_enough(rows):
    some = TRIALS[::3]
    assert_same_rows(run(some, replace(PLAN, places=1)), {t.key: rows[t.key] for t in some})


def test_rows_do_not_depend_on_the_other_trials(rows):
    some = TRIALS[1::3]
    assert_same_rows(run(some, replace(PLAN, places=3)), {t.key: rows[t.key] for t in some})


def interrupted(intervals: int, plan: SweepPlan = PLAN) -> tuple[dict[Key, dict], dict[Key, Saved]]:
    """Rows that ended within a number of intervals, and what was under way then."""
    stop, states, ended = threading.Event(), {}, {}
    seen = 0

    def after(under_way: Callable[[], dict[Key, Saved]]) -> None:
        nonlocal seen, states
        seen += 1
        if seen == intervals:
            states = under_way()
        if seen == intervals + 1:  # what was trained after the states were taken is forgotten
            stop.set()

    def collect() -> None:
        for r in train(TrialQueue(TRIALS), plan, stop=stop, after_interval=after):
            if seen <= intervals:
                ended[key_of(r)] = json.loads(json.dumps(r))

    with pytest.raises(InterruptedError):
        collect()
    return ended, states


@pytest.mark.parametrize(("intervals", "places"), [(1, 4), (8, 3), (15, 2)])
def test_rows_do_not_depend_on_an_interruption(rows, intervals, places, monkeypatch):
    ended, states = interrupted(intervals)
    assert states
    assert all(saved.state.step == saved.records[-1]["step"] for saved in states.values())
    assert all(saved.state.step == PLAN.evaluate_every * len(saved.records) for saved in states.values())
    trained = count_steps(monkeypatch)
    before = sum(saved.state.step for saved in states.values())
    rest = [t for t in TRIALS if t.key not in ended]
    assert_same_rows({**ended, **run(rest, replace(PLAN, places=places), saved=states)}, rows)
    assert sum(trained) == sum(rows[t.key]["steps"] for t in rest) - before, "nothing is trained twice"


def count_steps(monkeypatch) -> list[int]:
    """Steps of members that every ensemble trains from now on, call by call."""
    trained: list[int] = []
    original = Ensemble.train

    def spy(self, steps):
        trained.append(steps * sum(m.seed < YOKED_SEED for m in self.members))
        original(self, steps)

    monkeypatch.setattr(Ensemble, "train", spy)
    return trained


def test_what_is_under_way_does_not_change_while_training_goes_on():
    kept = []
    lengths = []

    def after(under_way):
        kept.append(under_way())
        lengths.append({key: len(saved.records) for key, saved in kept[-1].items()})

    run(TRIALS[:3], after_interval=after)
    assert [{key: len(saved.records) for key, saved in states.items()} for states in kept] == lengths
    assert len(kept) > 5


# --- places ----------------------------------------------------------------------------------------------------------


def watch_members(monkeypatch) -> list[tuple[TransformerConfig, list[tuple[str, int, int]]]]:
    """Who is trained, call by call: (network, [(arm, seed, step), …])."""
    seen = []
    original = Ensemble.train

    def spy(self, steps):
        who = [(m.arm, m.seed, step) for m, step in zip(self.members, self.steps, strict=True)]
        if self.members[0].seed < YOKED_SEED:  # not those whose norms others get
            seen.append((self.config, who))
        original(self, steps)

    monkeypatch.setattr(Ensemble, "train", spy)
    return seen


def test_the_next_trial_takes_the_place_of_one_that_ended(rows, monkeypatch):
    seen = watch_members(monkeypatch)
    run(plan=replace(PLAN, places=3))
    assert {config for config, _ in seen} == {HEAD, NONE}
    for config, who in seen:
        assert 1 <= len(who) <= 3
        waited = [t.member for t in TRIALS if t.config == config]
        assert {(arm, seed) for arm, seed, _ in who} <= {(m.arm, m.seed) for m in waited}
    mixed = [who for config, who in seen if config == HEAD and len({step for *_, step in who}) > 1]
    assert mixed, "members at different steps share an ensemble"
    full = [len(who) for config, who in seen if config == HEAD]
    assert full == sorted(full, reverse=True), "no place is empty while a trial waits"
    longest = sum(r["steps"] for r in rows.values() if r["arm"] != "no_qk_norm")
    assert len(full) * 10 < longest / 3 + PLAN.budget


def test_a_compiled_ensemble_keeps_its_number_of_members(rows, monkeypatch):
    """It is compiled for one; an ended run is ballast until another takes its place, and has one row all the same."""
    monkeypatch.setattr(ensemble.torch, "compile", lambda function, **options: function)
    seen = watch_members(monkeypatch)
    plan = replace(PLAN, places=3, training=replace(PLAN.training, compile=True))
    some = [t for t in TRIALS if t.config == HEAD][:7]
    assert_same_rows(run(some, plan), {t.key: rows[t.key] for t in some})
    assert {len(who) for _, who in seen} == {3}


def test_a_truncation_happens_once_on_memorising(rows, monkeypatch):
    calls = []
    original = Ensemble.truncate
    monkeypatch.setattr(
        Ensemble,
        "truncate",
        lambda self, index: (calls.append((self.members[index].arm, self.steps[index])), original(self, index))[1],
    )
    (cut,) = [t for t in TRIALS if t.member.arm == "truncate"]
    run([TRIALS[1], cut])
    r, plain = rows[cut.key], rows[TRIALS[1].key]
    assert [step for arm, step in calls if arm == "truncate"] == [r["memorised_at"]]
    assert agreement(plain, r) == r["memorised_at"] == plain["memorised_at"]
    after = r["curve"]["step"].index(r["memorised_at"]) + 1
    assert r["curve"]["stable_rank"][after] < 0.8 * plain["curve"]["stable_rank"][after]


def test_two_threads_share_a_source(rows):
    some = TRIALS[::2]
    source, found, lock = TrialQueue(some), [], threading.Lock()

    def work() -> None:
        for r in train(source, PLAN):
            with lock:
                found.append(r)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Counter(map(key_of, found)) == Counter(t.key for t in some)
    assert_same_rows({key_of(r): json.loads(json.dumps(r)) for r in found}, {t.key: rows[t.key] for t in some})


def test_a_source_names_the_network_with_the_most_trials():
    source = TrialQueue(TRIALS)
    assert source.network() == HEAD
    taken = []
    while (found := source.take(HEAD)) is not None:
        taken.append(found)
    assert taken == [t for t in TRIALS if t.config == HEAD]  # in order
    assert source.network() == NONE
    assert source.take(NONE)
    assert source.take(NONE)
    assert source.take(NONE) is None
    assert source.network() is None
    assert list(train(source, PLAN)) == []


# --- stopping --------------------------------------------------------------------------------------------------------


def test_a_stop_is_obeyed_before_anything_is_trained(monkeypatch):
    trained = count_steps(monkeypatch)
    stop = threading.Event()
    stop.set()
    with pytest.raises(InterruptedError):
        next(train(TrialQueue(TRIALS), PLAN, stop=stop))
    assert trained == []


def test_a_stop_is_obeyed_within_a_few_steps(monkeypatch):
    stop, trained = threading.Event(), []
    original = Ensemble.train

    def spy(self, steps):
        trained.append(steps)
        original(self, steps)
        if len(trained) == 3:
            stop.set()

    monkeypatch.setattr(Ensemble, "train", spy)
    plan = replace(PLAN, budget=1005, evaluate_every=1005)
    with pytest.raises(InterruptedError):
        next(train(TrialQueue(TRIALS), plan, stop=stop))
    assert trained == [10, 10, 10]


def test_an_interval_need_not_be_a_multiple_of_the_checks(monkeypatch):
    trained = count_steps(monkeypatch)
    rows = run(TRIALS[:1], replace(PLAN, budget=50, evaluate_every=25))
    assert trained == [5, 10, 10] * 2
    assert rows[TRIALS[0].key]["curve"]["step"] == [25, 50]


def test_a_batch_larger_than_a_training_set_is_refused():
    with pytest.raises(ValueError, match="batch_size 20 exceeds the smallest training set"):
        next(train(TrialQueue([TRIALS[0], trial("small", fraction=0.5)]), PLAN))


# --- a row of made-up evaluations ------------------------------------------------------------------------------------


def evaluations(**columns) -> list[dict]:
    names = ("train_loss", "test_loss", "rest_norm", "train_accuracy", *FIGURES, "decay_size")
    count = len(next(iter(columns.values())))
    return [
        dict.fromkeys(names, 0.5) | {"step": 20 * (n + 1)} | {name: values[n] for name, values in columns.items()}
        for n in range(count)
    ]


JUDGED = replace(PLAN, threshold=0.8)
SIGMA = np.array([[[4.0, 2.0, 1.0], [3.0, 3.0, 0.0]]])


def test_the_figures_of_a_row():
    records = evaluations(
        train_accuracy=(0.5, 0.9899, 0.99, 0.3, 1.0),
        test_accuracy=(0.1, 0.4999, 0.8, 0.7, 0.123456),
        stable_rank=(4.0, 3.0, 2.01, 2.0, 1.0),
    )
    r = row(TRIALS[0], records, 4.0, SIGMA, JUDGED)
    assert (r["memorised_at"], r["accuracy_rose_at"], r["rank_fell_at"]) == (60, 60, 80)
    assert (r["outcome"], r["steps_to_generalise"], r["steps"]) == ("budget", None, 100)
    assert (r["best_test_accuracy"], r["test_accuracy"]) == (0.8, 0.1235)  # four digits
    assert r["curve"]["step"] == [20, 40, 60, 80, 100]
    assert r["curve"]["test_accuracy"] == [0.1, 0.4999, 0.8, 0.7, 0.1235]
    assert r["spectrum_index"] == [1, 2, 3]
    assert r["spectrum"] == [1.0, 0.75, 0.125]  # the mean of (1, ½, ¼) and (1, 1, 0)


@pytest.mark.parametrize(
    ("accuracies", "outcome", "steps"),
    [
        ((0.1, 0.9, 0.8), "generalised", 40),
        ((0.1, 0.9, 0.7), "budget", None),
        ((0.1, 0.2, 0.9), "budget", None),
        ((0.9, 0.9, 0.1), "generalised", 20),  # lost again, by one that stays
    ],
)
def test_a_run_has_generalised_when_the_next_evaluation_holds(accuracies, outcome, steps):
    r = row(TRIALS[0], evaluations(test_accuracy=accuracies), 4.0, SIGMA, JUDGED)
    assert (r["outcome"], r["steps_to_generalise"]) == (outcome, steps)


def test_a_row_of_a_run_that_diverged_can_be_stored():
    records = evaluations(test_accuracy=(0.1, None), test_loss=(1.0, None), query_norm=(1.0, None))
    sigma = np.array([[[np.nan, np.nan, np.nan], [3.0, np.inf, 0.0]]])
    r = row(TRIALS[0], records, 4.0, sigma, JUDGED)
    assert r["outcome"] == "diverged"
    assert r["test_accuracy"] is None
    assert r["best_test_accuracy"] == 0.1
    assert "NaN" not in json.dumps(r, allow_nan=False)
    nothing = row(TRIALS[0], evaluations(test_accuracy=(None,), test_loss=(None,)), float("nan"), SIGMA * 0, JUDGED)
    assert nothing["best_test_accuracy"] is None
    assert nothing["rank_fell_at"] is None
    assert nothing["spectrum"] == [0.0, 0.0, 0.0]


def test_a_wide_spectrum_is_kept_at_few_points():
    sigma = np.sort(np.random.default_rng(0).random((2, 2, 128)))[..., ::-1]
    r = row(TRIALS[0], evaluations(test_accuracy=(0.1,)), 4.0, sigma, JUDGED)
    assert r["spectrum_index"][:4] == [1, 2, 3, 4]
    assert r["spectrum_index"][-1] == 128
    assert len(r["spectrum_index"]) <= 24
    relative = (sigma / sigma[..., :1]).reshape(4, 128).mean(0)
    assert r["spectrum"] == pytest.approx([relative[i - 1] for i in r["spectrum_index"]], rel=1e-3)


def test_the_key_of_a_row_is_the_key_of_its_trial():
    r = json.loads(json.dumps(row(TRIALS[3], evaluations(test_accuracy=(0.1,)), 4.0, SIGMA, JUDGED)))
    assert key_of(r) == TRIALS[3].key == ("uniform", 1.0, 1.0, 0.9, 2)
    assert hash(TRIALS[3]) == hash(replace(TRIALS[3], data={}))
