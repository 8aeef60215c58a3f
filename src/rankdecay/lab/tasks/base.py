"""Data set of a task: token sequences, their answers, and a split that leaks nothing.

Every task is a finite set of sequences of equal length whose answer is read at the last position. Splits are drawn
from a seed alone, so the same seed gives every arm of an experiment the same training set.
"""

from dataclasses import dataclass, replace

import numpy as np

from rankdecay.lab.errors import SettingError

TEST_EXAMPLES = 1000  # of a task whose examples are drawn
ORDINALS = ("1st", "2nd", "3rd", "4th", "5th", "6th", "7th", "8th", "9th")  # names of what a sequence holds several of


@dataclass(frozen=True)
class Dataset:
    """A task split into training and test examples.

    Attributes:
        train_tokens, test_tokens: int64 arrays of shape ``(examples, positions)``.
        train_targets, test_targets: int64 arrays of shape ``(examples,)``, values below ``outputs``.
        vocabulary: number of distinct input tokens.
        outputs: number of possible answers.
        positions: a name for each position, for labels.
        groups: the name of each possible *last* token, by token; attention maps are averaged over these groups.
        validation_tokens, validation_targets: what decides when to stop, to switch and which setting is best, where it
            was asked for; the test set then decides nothing.
    """

    train_tokens: np.ndarray
    train_targets: np.ndarray
    test_tokens: np.ndarray
    test_targets: np.ndarray
    vocabulary: int
    outputs: int
    positions: tuple[str, ...]
    groups: dict[int, str]
    validation_tokens: np.ndarray | None = None
    validation_targets: np.ndarray | None = None

    @property
    def length(self) -> int:
        """Number of positions of a sequence."""
        return self.train_tokens.shape[1]


def random_generator(seed: int, purpose: str, *index: int) -> np.random.Generator:
    """Random generator that depends on its arguments alone, so that any draw can be repeated without stored state."""
    return np.random.default_rng([seed, *purpose.encode(), *index])


def check_modulus(modulus: int) -> None:
    """Raise a `SettingError` unless there are at least two residues."""
    if modulus < 2:
        raise SettingError(f"`modulus` {modulus} is too small: choose at least 2")


def check_values(values: int, purpose: str) -> None:
    """Raise a `SettingError` unless a sequence has 2 to 9 values."""
    if not 2 <= values <= len(ORDINALS):
        raise SettingError(f"`values` {values} is outside 2 to {len(ORDINALS)}: {purpose}")


def split_drawn(tokens: np.ndarray, targets: np.ndarray, train_examples: int) -> tuple[np.ndarray, ...]:
    """Split drawn examples into train tokens, train targets, test tokens and test targets."""
    return tokens[:train_examples], targets[:train_examples], tokens[train_examples:], targets[train_examples:]


def last_drawn(data: Dataset, train_examples: int) -> Dataset:
    """A data set of drawn examples whose test examples beyond `TEST_EXAMPLES` are the validation set.

    Raises:
        SettingError: If there are none.
    """
    drawn = len(data.test_targets)
    if drawn <= TEST_EXAMPLES:
        raise SettingError(
            f"`validation`: there are no sequences left beside {train_examples} training and {TEST_EXAMPLES} test "
            "examples: give 0, so that the test set decides, or fewer `train_examples`"
        )
    return _validating(data, np.arange(drawn) >= TEST_EXAMPLES)


def with_validation(data: Dataset, validation: int, seed: int, classes: np.ndarray) -> Dataset:
    """A data set of which some of the test examples are the validation set, and the rest the test set.

    Args:
        data: without a validation set.
        validation: how many at least, up to half of the classes; whole classes are taken.
        seed: decides which.
        classes: a label per test example; examples of one label determine each other's answer.

    Raises:
        SettingError: If there is one class alone.
    """
    labels, inverse, counts = np.unique(classes, return_inverse=True, return_counts=True)
    order = random_generator(seed, "validation").permutation(len(labels))
    if len(labels) < 2:
        raise SettingError(
            f"`validation` {validation} leaves no test set of the {len(data.test_targets)} examples that are not "
            "trained on: give 0, so that the test set decides, or a smaller training set"
        )
    enough = int(np.searchsorted(np.cumsum(counts[order]), validation)) + 1
    chosen = order[: min(enough, len(labels) // 2)]
    return _validating(data, np.isin(inverse, chosen))


def _validating(data: Dataset, inside: np.ndarray) -> Dataset:
    """Make those test examples the validation set that are ``inside``, one truth value each."""
    return replace(
        data,
        test_tokens=data.test_tokens[~inside],
        test_targets=data.test_targets[~inside],
        validation_tokens=data.test_tokens[inside],
        validation_targets=data.test_targets[inside],
    )


def draw_distinct(
    task: str, total: int, train_examples: int, test_examples: int, validation: int, seed: int, modulus: int
) -> np.ndarray:
    """Draw distinct numbers below ``total``, for a task that numbers its sequences instead of listing them.

    Distinct numbers are distinct sequences, so the first ``train_examples`` can train and the rest test.

    Args:
        task: names the draw, so that two tasks do not share one.
        total: how many sequences there are.
        train_examples: at least 1.
        test_examples: how many more to draw.
        validation: how many to draw after those, or as many as can be.
        seed: decides the draw.
        modulus: for the messages.

    Returns:
        ``(train_examples + test_examples + validation,)`` or fewer, int64.

    Raises:
        SettingError: If there are too few sequences, or more than an int64 can number.
    """
    if train_examples < 1:
        raise SettingError(f"`train_examples` {train_examples} is too small: choose at least 1")
    if total > np.iinfo(np.int64).max:
        raise SettingError(
            f"`modulus` {modulus} gives {total:.1e} sequences, more than can be numbered: "
            "choose a smaller modulus or fewer `values`"
        )
    wanted = train_examples + test_examples
    if wanted > total // 2:  # beyond a half, drawing until all are distinct takes ever longer
        raise SettingError(
            f"`train_examples` {train_examples} with {test_examples} test examples is more than half of all {total} "
            f"sequences at `modulus` {modulus}: choose fewer examples or a larger modulus"
        )
    wanted = min(wanted + validation, total // 2)
    generator = random_generator(seed, task)
    codes = np.empty(0, dtype=np.int64)
    while len(codes) < wanted:
        drawn = np.concatenate([codes, generator.integers(0, total, 2 * wanted)])
        codes = drawn[np.sort(np.unique(drawn, return_index=True)[1])]
    return codes[:wanted]


def base_digits(codes: np.ndarray, base: int, count: int) -> np.ndarray:
    """The lowest ``count`` digits of ``codes`` (examples,) in ``base``, lowest first: ``(examples, count)``."""
    return codes[:, None] // base ** np.arange(count) % base


def check_fraction(fraction: float) -> None:
    """Raise a `SettingError` unless ``fraction`` is in (0, 1)."""
    if not 0 < fraction < 1:
        raise SettingError(f"`train_fraction` {fraction} is outside (0, 1): give a share such as 0.5")


def split_by_class(
    tokens: np.ndarray, targets: np.ndarray, classes: np.ndarray, fraction: float, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Split examples so that all members of a class fall on the same side.

    Args:
        tokens: ``(examples, positions)``.
        targets: ``(examples,)``.
        classes: ``(examples,)`` labels; examples with the same label determine each other's answer.
        fraction: share of the classes that goes to training, in (0, 1).
        seed: decides the split.

    Returns:
        Train tokens, train targets, test tokens, test targets.

    Raises:
        SettingError: If ``fraction`` leaves the training or the test set empty.
    """
    check_fraction(fraction)
    labels, inverse = np.unique(classes, return_inverse=True)
    chosen = round(fraction * len(labels))
    if chosen in (0, len(labels)):
        side = "training" if chosen == 0 else "test"
        raise SettingError(
            f"`train_fraction` {fraction} leaves the {side} set empty ({len(labels)} classes): "
            "choose a fraction nearer 0.5 or a larger modulus"
        )
    in_train = np.zeros(len(labels), dtype=bool)
    in_train[random_generator(seed, "split").permutation(len(labels))[:chosen]] = True
    train = in_train[inverse]
    return tokens[train], targets[train], tokens[~train], targets[~train]
