"""Data sets: one file per family. `make_dataset` is the one place that knows them all."""

from rankdecay.lab.errors import SettingError, check_name
from rankdecay.lab.tasks.base import Dataset, last_drawn, with_validation
from rankdecay.lab.tasks.modular import OPERATIONS, Split, modular, modular_sequences, pair_classes
from rankdecay.lab.tasks.permutations import SEQUENCES, permutation_composition
from rankdecay.lab.tasks.recall import recall, recall_sequences
from rankdecay.lab.tasks.selection import selection, selection_sequences

SAMPLED = ("selection", "recall")  # too many sequences to list: the training set is a number of draws, not a share
TASKS = (*SAMPLED, *OPERATIONS, "s5")


def sequences(task: str, *, modulus: int, values: int, named: int) -> int:
    """Number of distinct sequences of a task; for a task that is split by fraction, the examples on both sides.

    Args:
        task: one of `TASKS`.
        modulus: for every task but ``s5``.
        values: for the tasks in `SAMPLED`.
        named: for ``selection``.
    """
    check_name("`task`", task, TASKS)
    if task == "selection":
        return selection_sequences(modulus, values, named)
    if task == "recall":
        return recall_sequences(modulus, values)
    return SEQUENCES if task == "s5" else modular_sequences(task, modulus)


def make_dataset(
    task: str,
    seed: int,
    *,
    modulus: int = 31,
    train_fraction: float = 0.5,
    train_examples: int = 3000,
    values: int = 4,
    named: int = 2,
    split: Split = "unordered",
    validation: int = 0,
) -> Dataset:
    """Build the data set of a task.

    Args:
        task: one of `TASKS`.
        seed: decides the split and, for the tasks in `SAMPLED`, the examples.
        modulus: for every task but ``s5``.
        train_fraction: for every task but those in `SAMPLED`.
        train_examples: for the tasks in `SAMPLED`.
        values: for the tasks in `SAMPLED`.
        named: for ``selection``.
        split: for the commutative operations.
        validation: examples of a third set, beside training and test; 0 for none. The training set does not depend on
            it. For the tasks in `SAMPLED` they are drawn in addition, as many as there are sequences for, and the test
            set does not depend on it either; for the others they are taken from the test set, at most half of it.

    Raises:
        SettingError: If a setting is out of range, or nothing would be left to validate or to test on.
    """
    check_name("`task`", task, TASKS)
    if validation < 0:
        raise SettingError(f"`validation` {validation} is negative: give 0 for none")
    if task == "selection":
        data = selection(modulus, train_examples, seed, values=values, named=named, validation=validation)
    elif task == "recall":
        data = recall(modulus, train_examples, seed, values=values, validation=validation)
    elif task == "s5":
        data = permutation_composition(train_fraction, seed)
    else:
        data = modular(task, modulus, train_fraction, seed, split)
    if not validation:
        return data
    if task in SAMPLED:
        return last_drawn(data, train_examples)
    return with_validation(data, validation, seed, pair_classes(data.test_tokens, task, split))


__all__ = ["SAMPLED", "TASKS", "Dataset", "make_dataset", "sequences"]
