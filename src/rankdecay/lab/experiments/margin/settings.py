"""The settings of `rankdecay margin`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rankdecay.lab.errors import SettingError, check_name
from rankdecay.lab.settings import Settings, check_arms, check_counts, check_effect, check_numbers, check_seeds

FLOWS = ("merged", "separate", "diagonal", "separate_l2", "merged_l2", "low_rank", "recipe", "recipe_bare")
BEYOND = ("descent", "normalised", "adam", "trained_head")  # the theory: steps of finite length, and a head that moves
ARMS = (*FLOWS, *BEYOND)
KINDS = ("generic", "equal", "aligned")  # of data that are drawn
LARGEST_MARGIN = 1e100  # squares of larger weights leave the range of a float64
BETA1 = 0.9  # of adam
LARGEST_WITH_HEAD = 600  # the gradient of a value head is about e^margin times that of W


@dataclass(frozen=True)
class Margin(Settings):
    """Which max-margin problem does softmax attention solve? The flow of one layer against two SVMs.

    Follows gradient flow on one-layer attention to margins far beyond float64's softmax, with W merged, K and Q apart
    or diagonal, with and without an explicit decay, and measures its direction against the SVMs of least nuclear and
    least Frobenius norm. Leaves config.json, metrics.jsonl, summary.json, snapshots and report.html in --out; an
    interrupted run begins again. The default takes at most three minutes on a slow core.
    """

    parametrisation: tuple[str, ...] = tuple(name for name in FLOWS if name != "low_rank")
    """Which arms to compare: these; low_rank, which takes longest; descent, normalised and adam, steps of size --lr; or
    trained_head. Those in _l2, low_rank and recipe have an explicit decay of size --l2."""
    data: str = "generic"
    """generic, equal (all but the best token of an example share a score), aligned (both SVMs coincide), or an .npz."""
    dimension: int = 12
    """Dimension of tokens and queries, d."""
    tokens: int = 4
    """Tokens of an example, L."""
    examples: int = 4
    """Examples of a data set, n."""
    datasets: int = 8
    """How many data sets to draw, each from a seed of its own; a file has its own number."""
    score: float = 4.0
    """Score of the best tokens of equal and aligned data."""
    inner: int = 0
    """d_e, columns of K and Q; by default as many as the dimension."""
    loss: Literal["exponential", "logistic"] = "exponential"
    """Loss of an example, a function of its label times the output."""
    init: Literal["paper", "random"] = "paper"
    """paper: K = √2 scale I, Q = 0. random: both Gaussian. W begins as their product."""
    scale: float = 1.0
    """Size of the initial weights."""
    l2: float = 2.2e-16
    """ε of the explicit decay ε(‖K‖² + ‖Q‖²), ε‖W‖² or 2ε‖W‖_*, in the arms that have one."""
    rate: float = 4e-3
    """Largest relative change of the weights per step of the flow."""
    lr: float = 0.1
    """Learning rate of descent, normalised and adam."""
    beta2: float = 0.999
    """β₂ of adam: the margin grows by at most about -½ ln β₂ a step."""
    epsilon: float = 1e-8
    """ε of adam; with 0 its steps do not fade when the gradient does."""
    steps: int = 20_000
    """Steps of the flow, or of training, at most; it ends at --margin."""
    margin: float = 1e6
    """Margin at which the flow of a data set ends."""
    evaluate_every: int = 200
    """Steps between what is recorded."""
    out: Path = Path("runs/margin")
    """Where results go; a complete run there is shown again."""


PRESETS = {
    "default": Margin(),
    "standard": Margin(
        preset="standard",
        parametrisation=FLOWS,
        datasets=20,
        steps=30_000,
        margin=1e8,
        out=Path("runs/margin-standard"),
    ),
}
EXAMPLES = {
    "rankdecay margin --datasets 2": "two data sets: under a minute",
    "rankdecay margin --data aligned --tokens 5 --out runs/aligned": "data on which both problems agree",
}


def check(settings: Margin) -> Margin:
    """Return the settings, before anything is built or written.

    Raises:
        SettingError: For settings that cannot work.
    """
    check_arms(settings.parametrisation, ARMS, "parametrisation")
    check_seeds(settings)
    check_counts(settings, "examples", "datasets", "steps", "evaluate_every")
    check_numbers(settings, "score", "scale", "rate", "lr", "margin")
    check_numbers(settings, "l2", "epsilon", zero=True)
    if settings.dimension < 2:
        raise SettingError(f"--dimension {settings.dimension} is too small: a direction needs at least 2")
    if settings.tokens < 2:
        raise SettingError(f"--tokens {settings.tokens} leaves nothing to choose between: give at least 2")
    if settings.inner < 0:
        raise SettingError(f"--inner {settings.inner} is negative: give at least 1, or 0 for the dimension")
    if settings.rate > 0.1:
        raise SettingError(
            f"--rate {settings.rate:g} is too large for a flow: a step may change weights by at most 0.1 of their norm"
        )
    if not 1 <= settings.margin <= LARGEST_MARGIN:
        raise SettingError(f"--margin {settings.margin:g} must be between 1 and {LARGEST_MARGIN:g}")
    if not BETA1**2 < settings.beta2 < 1:
        raise SettingError(
            f"--beta2 {settings.beta2:g} is outside ({BETA1**2:g}, 1): below, steps of Adam grow without bound as "
            "gradients fall; give for example 0.999 or 0.95"
        )
    if "trained_head" in settings.parametrisation and settings.margin > LARGEST_WITH_HEAD:
        raise SettingError(
            f"--margin {settings.margin:g} is beyond what trained_head can follow: give at most {LARGEST_WITH_HEAD}"
        )
    _check_data(settings)
    _check_effects(settings)
    return settings


def _check_effects(settings: Margin) -> None:
    arms = set(settings.parametrisation)
    readers = {
        "lr": ("descent", "normalised", "adam"),
        "beta2": ("adam",),
        "epsilon": ("adam",),
        "l2": tuple(arm for arm in ARMS if arm.endswith("_l2") or arm in ("low_rank", "recipe")),
    }
    for name, of in readers.items():
        check_effect(settings, name, not arms.isdisjoint(of), f"without one of the arms {', '.join(of)}")


def _check_data(settings: Margin) -> None:
    if settings.data not in KINDS and settings.first_seed and settings.init == "paper":
        raise SettingError(
            f"--first-seed {settings.first_seed} has no effect on --data {settings.data} with --init paper, where "
            "nothing is drawn: leave it out"
        )
    if settings.data not in KINDS and not settings.data.endswith(".npz"):
        check_name("--data", settings.data, (*KINDS, "FILE.npz"))
    if settings.data == "aligned":
        if settings.tokens % 2 == 0:
            raise SettingError(f"--tokens {settings.tokens}: aligned data have tokens in pairs beside the best: give 5")
        if settings.examples >= settings.dimension:
            raise SettingError(
                f"--examples {settings.examples} of aligned data have orthogonal best tokens: --dimension "
                f"{settings.dimension} must be larger"
            )
