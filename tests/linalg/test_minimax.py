"""The frozen tables equal their generator, and the generator reproduces the tables others published."""

from collections.abc import Sequence
from functools import cache

import numpy as np
import pytest
from minimax import evaluate, quintic, schedule

from rankdecay.linalg.minimax import CUSHION, LIMIT, SAFETY, SCHEDULES, SQUASH, Triple

# docs/theory.md section 3.3: the Polar Express paper's table (last triple pinned to its limit), the five steps of
# public Muon implementations, and a table for float32 by another program.
PAPER = [
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
]
FIVE_STEP = [
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
]
DECAY = [
    (8.514258082455058, -25.281575954766751, 18.767309358053609),
    (4.257075196727443, -3.160166288472385, 0.586476765868896),
    (4.256827871287443, -3.159995222216543, 0.586457252783993),
    (4.255775367659370, -3.159267214384515, 0.586374210907872),
    (4.251301905827496, -3.156172446623364, 0.586021200839982),
    (4.232387470106779, -3.143078118361266, 0.584527604831898),
    (4.154156380575221, -3.088757958066137, 0.578332235615587),
    (3.858359158845007, -2.880825305421170, 0.554631634126124),
    (3.049598399522744, -2.284988803856789, 0.487060827425703),
    (2.112055937418368, -1.493836472666293, 0.400102502637572),
    (1.878383656950666, -1.253754501517080, 0.375375648142240),
]


# --- how two tables are compared ---
# The last intervals of a schedule are so narrow that its linear systems have condition numbers of up to 3e11: another
# BLAS, or another order of summation, gives coefficients that differ by 1e-5. What the polynomials do does not change
# with them: a solver that is backward stable meets the four equations to rounding whatever the condition number, so
# the *values* on the interval differ by a few eps of the sum of the terms' sizes, S(x) = |a| x + |b| x^3 + |c| x^5. In
# units of S, a relative error of at most d in every coefficient moves a value by at most d, and an error of d in one
# coefficient alone by d times its share of S, which is at least 0.1 for each of them at some point of its interval.
#
# Frozen tables are held to 2.4e-7, two roundings of float32, in which the products are computed: coefficients off by
# 3e-8 pass whatever their signs (8 times less), and one that is off by 1e-5 fails (more than 4 times as much). Tables
# that others published to all digits were made by other programs, so 1e-13 holds them: eps times a few hundred.
FROZEN, PUBLISHED = 2.0**-22, 1e-13


def difference(triples: Sequence[Triple], expected: Sequence[Triple], ell: float) -> float:
    """The largest difference of the values of two schedules' steps on their intervals, in units of S."""
    lower, upper, largest = ell, 1.0, 0.0
    for ours, theirs in zip(triples, expected, strict=True):
        x = np.linspace(lower, upper, 1001)
        size = evaluate([tuple(map(abs, theirs))], x)
        largest = max(largest, float((np.abs(evaluate([ours], x) - evaluate([theirs], x)) / size).max()))
        lower = float(evaluate([theirs], lower))
        upper = 2 - lower
    return largest


def error(triples: Sequence[Triple], ell: float) -> float:
    """How far from 1 a schedule leaves a singular value of [ell, 1]."""
    return float(np.abs(1 - evaluate(triples, np.geomspace(ell, 1, 40001))).max())


@cache
def regenerated(ell: float) -> tuple[Triple, ...]:
    return schedule(ell, len(SCHEDULES[ell]), cushion=CUSHION, safety=SAFETY)


def check(triples: Sequence[Triple], ell: float) -> None:
    expected = regenerated(ell)
    assert difference(triples, expected, ell) < FROZEN
    # all steps but the last end where the next is flat: what is left of their differences is less than the last one's
    assert abs(error(triples, ell) - error(expected, ell)) < FROZEN * float(evaluate([tuple(map(abs, triples[-1]))], 1))


@pytest.mark.parametrize("ell", sorted(SCHEDULES))
def test_frozen_table_equals_generator(ell):
    check(SCHEDULES[ell], ell)


@pytest.mark.parametrize("ell", sorted(SCHEDULES))
def test_what_another_solver_may_change_passes(ell):
    frozen = np.array(SCHEDULES[ell])
    rng = np.random.default_rng(0)
    for change in [*rng.uniform(-1, 1, (20, *frozen.shape)), np.sign(frozen)]:  # the last moves every value the most
        check((frozen * (1 + 3e-8 * change)).tolist(), ell)


EACH = [(ell, step, i) for ell in sorted(SCHEDULES) for step in range(len(SCHEDULES[ell])) for i in range(3)]


@pytest.mark.parametrize(("ell", "step", "coefficient"), EACH)
def test_any_wrong_coefficient_fails(ell, step, coefficient):
    for relative in (1e-5, -1e-5):
        wrong = np.array(SCHEDULES[ell])
        wrong[step, coefficient] *= 1 + relative
        with pytest.raises(AssertionError):
            check(wrong.tolist(), ell)


@pytest.mark.parametrize("ell", sorted(SCHEDULES))
def test_frozen_schedule_keeps_its_promise(ell):
    assert error(SCHEDULES[ell], ell) < 2e-6
    # No prefix leaves the interval the next step is certified on.
    everywhere = np.concatenate([np.linspace(0, ell, 101), np.geomspace(ell, 1, 40001)])
    for steps in range(1, len(SCHEDULES[ell])):
        assert evaluate(SCHEDULES[ell][:steps], everywhere).min() >= 0
        assert evaluate(SCHEDULES[ell][:steps], everywhere).max() < 2


@pytest.mark.parametrize(
    ("published", "ell", "generated"),
    [
        (PAPER[:-1], 1e-3, schedule(1e-3, 9, cushion=0.02407327424182761)[:7]),
        (FIVE_STEP, 1e-3, schedule(1e-3, 5, cushion=0.02, safety=1.02)),
        (DECAY, 1e-6, schedule(1e-6, 12)[:11]),
    ],
    ids=["paper", "five-step", "decay"],
)
def test_reproduces_published_tables(published, ell, generated):
    assert difference(generated, published, ell) < PUBLISHED
    wrong = np.array(published)
    wrong[-1, 2] *= 1 + 1e-11
    assert difference(wrong.tolist(), published, ell) > PUBLISHED


def test_pinned_rows_are_the_limit():
    np.testing.assert_allclose(schedule(1e-3, 9, cushion=0.02407327424182761)[-2:], [LIMIT] * 2, rtol=1e-8)
    # The last system has a condition number of 2e8, which times eps is all that another solver can be held to.
    np.testing.assert_allclose(schedule(1e-6, 12)[-1][0], 1.875000014, atol=5e-8)


def test_cans_table():
    # CANS (arXiv 2506.10935) is the recursion at ell = 1e-3 without cushion; published to four decimals.
    cans = [
        (8.4703, -25.1081, 18.6293),
        (4.1828, -3.1087, 0.5806),
        (3.9619, -2.9541, 0.5630),
        (3.2866, -2.4647, 0.5074),
        (2.2737, -1.6447, 0.4162),
    ]
    np.testing.assert_allclose(schedule(1e-3, 5), cans, atol=6e-5)


def test_prefix_property():
    np.testing.assert_array_equal(schedule(1e-4, 9)[:4], schedule(1e-4, 4))


@pytest.mark.parametrize(
    ("ell", "steps", "published"),
    [(1e-2, 4, 1e-2), (1e-2, 5, 1e-6), (1e-3, 6, 9e-4), (1e-5, 9, 3.3e-3), (1e-6, 11, 1.1e-4)],
)
def test_published_errors(ell, steps, published):
    assert 0.5 * published < error(schedule(ell, steps), ell) < 1.5 * published


@pytest.mark.parametrize(("lower", "upper"), [(1e-6, 1.0), (0.1, 1.0), (0.9, 1.1)])
def test_quintic_equioscillates(lower, upper):
    x = np.linspace(lower, upper, 200001)
    residual = evaluate([quintic(lower, upper)], x) - 1
    worst = np.abs(residual).max()
    # Chebyshev: the best odd quintic touches its bound at four points with alternating signs.
    touching = np.sign(residual[np.abs(residual) > worst * (1 - 1e-6)])
    assert np.count_nonzero(np.diff(touching)) == 3


def test_quintic_of_a_point_is_the_limit():
    assert quintic(1.0, 1.0) == LIMIT


def test_squash_keeps_one_and_kills_noise():
    assert evaluate([SQUASH], 1.0) == 1.0
    assert abs(float(evaluate([SQUASH], 1 + 1e-4)) - 1) < 1e-7
    assert float(evaluate([SQUASH] * 3, 0.3)) < 1e-8


@pytest.mark.parametrize(
    "call",
    [
        lambda: schedule(0.0, 3),
        lambda: schedule(2.0, 3),
        lambda: schedule(0.1, 0),
        lambda: schedule(0.1, 3, cushion=1.0),
        lambda: schedule(0.1, 3, safety=0.9),
        lambda: quintic(0.0, 1.0),
        lambda: quintic(2.0, 1.0),
    ],
)
def test_refuses_what_makes_no_schedule(call):
    with pytest.raises(ValueError, match=r"lower|ell|steps|cushion|safety"):
        call()
