"""The frozen tables equal their generator, and the generator reproduces the tables others published."""

import numpy as np
import pytest

from rankdecay.linalg.minimax import CUSHION, LIMIT, SAFETY, SCHEDULES, SQUASH, evaluate, quintic, schedule

# matrix_functions.md, section 4.1: the Polar Express paper's table (last triple pinned to its limit).
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


@pytest.mark.parametrize("ell", sorted(SCHEDULES))
def test_frozen_table_equals_generator(ell):
    frozen = SCHEDULES[ell]
    regenerated = schedule(ell, len(frozen), cushion=CUSHION, safety=SAFETY)
    np.testing.assert_allclose(np.array(frozen), np.array(regenerated), rtol=1e-9)


@pytest.mark.parametrize("ell", sorted(SCHEDULES))
def test_frozen_schedule_keeps_its_promise(ell):
    x = np.geomspace(ell, 1, 40001)
    assert np.abs(1 - evaluate(SCHEDULES[ell], x)).max() < 2e-6
    # No prefix leaves the interval the next step is certified on.
    everywhere = np.concatenate([np.linspace(0, ell, 101), x])
    for steps in range(1, len(SCHEDULES[ell])):
        assert evaluate(SCHEDULES[ell][:steps], everywhere).min() >= 0
        assert evaluate(SCHEDULES[ell][:steps], everywhere).max() < 2


@pytest.mark.parametrize(
    ("published", "generated", "rtol"),
    [
        (PAPER[:-1], schedule(1e-3, 9, cushion=0.02407327424182761)[:7], 1e-8),
        (FIVE_STEP, schedule(1e-3, 5, cushion=0.02, safety=1.02), 1e-13),
        (DECAY, schedule(1e-6, 12)[:11], 1e-13),
    ],
    ids=["paper", "five-step", "decay"],
)
def test_reproduces_published_tables(published, generated, rtol):
    np.testing.assert_allclose(np.array(generated), np.array(published), rtol=rtol)


def test_pinned_rows_are_the_limit():
    np.testing.assert_allclose(schedule(1e-3, 9, cushion=0.02407327424182761)[-2:], [LIMIT] * 2, rtol=1e-8)
    np.testing.assert_allclose(schedule(1e-6, 12)[-1][0], 1.875000014, atol=2e-9)


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
    ("ell", "steps", "error"),
    [(1e-2, 4, 1e-2), (1e-2, 5, 1e-6), (1e-3, 6, 9e-4), (1e-5, 9, 3.3e-3), (1e-6, 11, 1.1e-4)],
)
def test_published_errors(ell, steps, error):
    x = np.geomspace(ell, 1, 40001)
    measured = np.abs(1 - evaluate(schedule(ell, steps), x)).max()
    assert 0.5 * error < measured < 1.5 * error


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
