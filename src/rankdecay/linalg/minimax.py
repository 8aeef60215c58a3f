r"""Minimax polynomials for matmul-only matrix functions: their generator, and the frozen tables it produced.

An odd quintic :math:`p(x) = a x + b x^3 + c x^5` acts on the singular values of :math:`X` through products
alone, :math:`X (a I + b X^T X + c (X^T X)^2)`. A short composition of well-chosen quintics takes every
singular value in :math:`[\ell, 1]` to 1 and so gives the polar factor. The best choice is greedy (Amsel et
al., *The Polar Express*, arXiv 2505.16932): fit the quintic nearest to 1 on :math:`[\ell, u]` in the
maximum norm, then go on with :math:`\ell \leftarrow p(\ell)`, :math:`u \leftarrow 2 - \ell`. The first
T polynomials are the optimal composition of T (prefix property), so one schedule serves every shorter one.

Two knobs make a schedule safe in finite precision:

* ``cushion`` q: fit on :math:`[\max(\ell, q u), u]` only, then rescale so that p(l) + p(u) = 2. A gentler
  polynomial, which does not swing between 0 and 2 inside the interval.
* ``safety`` s: divide every triple but the last by (s, s^3, s^5), so that rounding cannot push an iterate
  above the interval the next polynomial was fitted on.

:data:`SCHEDULES` is what the library uses; :func:`schedule` is how it was made. The tests hold the one to the
other, and the generator to the tables published by others.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Triple = tuple[float, float, float]

#: The limit of the recursion: the quintic with p(1) = 1, p'(1) = p''(1) = 0 (Newton-Schulz of order three).
LIMIT: Triple = (1.875, -1.25, 0.375)

#: p(x) = (5 x^3 - 3 x^5) / 2 keeps 1 fixed (p'(1) = 0) and *squashes* small values (p'(0) = 0): whatever is
#: below sqrt(2/3) goes to 0 and whatever is above goes to 1. It ends a schedule where null directions must
#: stay
#: null: noise that the steep polynomials amplified is removed instead of being completed to 1.
SQUASH: Triple = (0.0, 2.5, -1.5)


def quintic(lower: float, upper: float) -> Triple:
    """Return (a, b, c) of the odd quintic nearest to 1 on ``[lower, upper]`` in the maximum norm.

    The error of the best fit takes its extreme value, with alternating signs, at four points (Chebyshev):
    both ends and the two stationary points of p. Remez exchange: solve for (a, b, c, error) at four points,
    move the inner two to the stationary points, repeat.

    Args:
        lower: Left end of the interval, ``0 < lower``.
        upper: Right end, ``lower <= upper``.

    Returns:
        The coefficients of x, x^3 and x^5.

    Raises:
        ValueError: If the interval is empty or touches zero.
    """
    if not 0 < lower <= upper:
        raise ValueError(f"quintic needs 0 < lower <= upper, got lower={lower!r}, upper={upper!r}.")
    if lower / upper > 1 - 5e-6:  # the interval is a point as far as float64 can tell: use the limit
        a, b, c = LIMIT
        return a / upper, b / upper**3, c / upper**5
    inner = np.array([0.75 * lower + 0.25 * upper, 0.25 * lower + 0.75 * upper])
    signs = np.array([1.0, -1.0, 1.0, -1.0])
    a = b = c = 0.0
    error = np.inf
    for _ in range(100):
        x = np.array([lower, inner[0], inner[1], upper])
        a, b, c, new_error = np.linalg.solve(np.stack([x, x**3, x**5, signs], axis=1), np.ones(4))
        if abs(new_error - error) <= 1e-15:
            break
        error = new_error
        # p'(x) = a + 3 b x^2 + 5 c x^4 = 0
        root = np.sqrt(max(9 * b * b - 20 * a * c, 0.0))
        inner = np.sqrt(np.array([(-3 * b - root) / (10 * c), (-3 * b + root) / (10 * c)]))
    return float(a), float(b), float(c)


def evaluate(triples: Sequence[Triple], x: np.ndarray | float) -> np.ndarray:
    """Return the composition of the quintics ``triples``, first one first, at the points ``x`` (float64)."""
    value = np.asarray(x, dtype=np.float64)
    for a, b, c in triples:
        square = value * value
        value = value * (a + square * (b + square * c))
    return value


def schedule(ell: float, steps: int, *, cushion: float = 0.0, safety: float = 1.0) -> tuple[Triple, ...]:
    """Return ``steps`` quintics whose composition takes ``[ell, 1]`` to 1 (module docstring).

    Args:
        ell: Smallest singular value to be taken to 1, relative to the normalisation; ``0 < ell <= 1``.
        steps: Number of quintics.
        cushion: Fraction q of the interval's upper end below which a step does not fit.
        safety: Factor s >= 1 by which every step but the last contracts.

    Returns:
        One (a, b, c) per step, first step first.

    Raises:
        ValueError: If an argument is outside its range.
    """
    if not 0 < ell <= 1:
        raise ValueError(f"ell={ell!r} is outside (0, 1]: it is a singular value relative to the norm.")
    if steps < 1:
        raise ValueError(f"steps={steps!r} must be at least 1.")
    if not 0 <= cushion < 1:
        raise ValueError(f"cushion={cushion!r} is outside [0, 1).")
    if safety < 1:
        raise ValueError(f"safety={safety!r} must be at least 1: below that the iteration can leave its interval.")
    lower, upper = ell, 1.0
    triples: list[Triple] = []
    for step in range(steps):
        a, b, c = quintic(max(lower, cushion * upper), upper)
        if cushion * upper > lower:
            ends = evaluate([(a, b, c)], np.array([lower, upper]))
            scale = 2.0 / float(ends.sum())
            a, b, c = a * scale, b * scale, c * scale
        if step < steps - 1:
            a, b, c = a / safety, b / safety**3, c / safety**5
        triples.append((a, b, c))
        lower = float(evaluate([(a, b, c)], lower))
        upper = 2.0 - lower
    return tuple(triples)


#: What every frozen schedule was generated with. The cushion costs no step here and is worth a factor of 20
#: in float32: without it a large singular value can pass near 0 on its way, and comes back from there with
#: noise. The safety is far above float32 rounding and far too small to cost a step.
CUSHION, SAFETY = 0.05, 1.001

#: Frozen schedules by ``ell``: each takes [ell, 1] to 1 within 2e-6 in exact arithmetic. Generated by
#: ``schedule(ell, len(SCHEDULES[ell]), cushion=CUSHION, safety=SAFETY)``; the tests regenerate them.
SCHEDULES: dict[float, tuple[Triple, ...]] = {
    1e-01: (
        (5.598096410230264, -13.842122316857461, 9.684891220896318),
        (2.1291635292458047, -1.5077707333122587, 0.4000483417750531),
        (1.8773791054946307, -1.2509646902643248, 0.3736007034793311),
        (1.875000036284588, -1.2500000419966442, 0.37500000571205644),
    ),
    3e-02: (
        (7.227149052250466, -19.602040782415607, 14.139191252658033),
        (2.9308157936223496, -2.1885291867172567, 0.47457627748309855),
        (2.0521228779283236, -1.4329809710127168, 0.3922022984793929),
        (1.874724524683092, -1.2480279685615472, 0.3733073505679489),
        (1.8750000165343568, -1.2500000311581543, 0.3750000146237975),
    ),
    1e-02: (
        (7.788617581579595, -21.124899786759148, 15.237648038471958),
        (3.6236101373664584, -2.6601614330199275, 0.5193540508696158),
        (2.6964392122037664, -2.0020401231519065, 0.4537759642012358),
        (1.9652763835371612, -1.3450293927812997, 0.3831171187011161),
        (1.8733750579741537, -1.2465326701498916, 0.37315807627710124),
        (1.8750016758100443, -1.250003351594243, 0.3750016757841986),
    ),
    3e-03: (
        (8.007026149334509, -21.71728464300169, 15.664942465137235),
        (3.9088263646724526, -2.7152872660476084, 0.5016192455851435),
        (3.54783233591698, -2.6484097557036907, 0.5257705715344162),
        (2.5476500806271662, -1.8793959951016257, 0.44021743273312625),
        (1.9279389758501682, -1.3057786237274063, 0.37911888386105347),
        (1.8750561515694164, -1.250062389217372, 0.3750062389765295),
    ),
    1e-03: (
        (8.071718958899638, -21.892749557625223, 15.791507449545339),
        (4.002858911630266, -2.7362586951945977, 0.49743120983073436),
        (3.861753534023068, -2.705233628231584, 0.503980816714044),
        (3.367842651936215, -2.5201580568854287, 0.5119301755334249),
        (2.3469247841121943, -1.7070707404014687, 0.42138650494854146),
        (1.894974504583172, -1.2702759292169168, 0.3755356640283091),
        (1.8750039101096327, -1.2500043445642004, 0.3750004344610105),
    ),
    1e-04: (
        (8.101173975529093, -21.972639765097497, 15.849133231228148),
        (4.047219671675874, -2.746521249862142, 0.4956762991286706),
        (4.032028346641212, -2.742982022351295, 0.4962623748937404),
        (3.9720015615255257, -2.729254540483349, 0.4987325071123053),
        (3.7519904152481125, -2.6831336025418424, 0.5102839163583333),
        (3.0132293927776153, -2.252493311439807, 0.4817506178827499),
        (2.0925562595163574, -1.4725698856874072, 0.39634281242652336),
        (1.875922157767934, -1.249353665392992, 0.3734397462177615),
        (1.875000010289296, -1.250000011335151, 0.3750000010458551),
    ),
    1e-05: (
        (8.104131313820096, -21.980660890076177, 15.854918966570397),
        (4.0517282437210635, -2.7475764843222943, 0.49550526843070297),
        (4.050197726653891, -2.747218019754097, 0.4955631800973115),
        (4.044011415040607, -2.7457716957407476, 0.49579880849735014),
        (4.019198666634572, -2.740012955677961, 0.4967693158828811),
        (3.9227124613856286, -2.718312360653193, 0.5009579217708882),
        (3.59043684913591, -2.6548316631966404, 0.5220543137014654),
        (2.6282475113795534, -1.946297059273513, 0.44759968375936443),
        (1.9466507807355402, -1.3255696595087918, 0.38113022631246357),
        (1.875130486842638, -1.2501449777385907, 0.375014498069824),
    ),
    1e-06: (
        (8.104427166415956, -21.981463324702567, 15.855497772459858),
        (4.05217983506417, -2.747682300342809, 0.49548821008341093),
        (4.052026668905067, -2.747646408283618, 0.49549399428300567),
        (4.051406161737227, -2.7475010280892467, 0.49551744276537263),
        (4.048894305436531, -2.7469129427803254, 0.49561261861030664),
        (4.038757933084291, -2.744546734190746, 0.49600087248266506),
        (3.9983674173513153, -2.735232142756462, 0.4976164020795922),
        (3.845346409914723, -2.7018059882277043, 0.5048494112100655),
        (3.3089335375152715, -2.4764455633535816, 0.5069873113773653),
        (2.293837425717643, -1.6598602755431984, 0.41628314051965626),
        (1.889122304263393, -1.2638822654136443, 0.37489389806570567),
        (1.8750015803089772, -1.2500017558877212, 0.37500017557979665),
    ),
    1e-07: (
        (8.104456752863612, -21.981543571387586, 15.855555655373143),
        (4.05222500154917, -2.7476928848734308, 0.49548650469602934),
        (4.05220968378812, -2.7476892952113015, 0.49548708304631023),
        (4.052147614270755, -2.7476747497016305, 0.4954894267504357),
        (4.051896120149507, -2.7476158182452637, 0.49549892555099984),
        (4.050877432291721, -2.747377183427925, 0.4955374426927257),
        (4.046756430409521, -2.7464129524430123, 0.49569394681417883),
        (4.030170771078636, -2.7425509971375477, 0.49633508838435736),
        (3.964786234562698, -2.727633441871963, 0.49904675939196247),
        (3.7273043806210815, -2.6784536611147027, 0.5118732313380876),
        (2.9450286890803783, -2.19961464005696, 0.47581836324060783),
        (2.058687651641265, -1.4394623736856182, 0.3928781338702052),
        (1.8748914613895742, -1.2482128324809354, 0.37332580973234514),
        (1.8750000048488367, -1.2500000071748385, 0.37500000232600167),
    ),
}
