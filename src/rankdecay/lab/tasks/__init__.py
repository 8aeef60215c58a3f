"""Data sets: one file per family. `make_dataset` is the one place that knows them all."""

from rankdecay.lab.errors import check_name
from rankdecay.lab.tasks.base import Dataset
from rankdecay.lab.tasks.modular import OPERATIONS, Split, modular
from rankdecay.lab.tasks.permutations import permutation_composition
from rankdecay.lab.tasks.selection import selection

TASKS = ("selection", *OPERATIONS, "s5")


def make_dataset(
    task: str,
    seed: int,
    *,
    modulus: int = 31,
    train_fraction: float = 0.5,
    train_examples: int = 3000,
    values: int = 4,
    split: Split = "unordered",
) -> Dataset:
    """Builds the data set of a task.

    Args:
        task: one of `TASKS`.
        seed: decides the split and, for ``selection``, the examples.
        modulus: for every task but ``s5``.
        train_fraction: for every task but ``selection``.
        train_examples: for ``selection``.
        values: for ``selection``.
        split: for the commutative operations.
    """
    check_name("--task", task, TASKS)
    if task == "selection":
        return selection(modulus, train_examples, seed, values=values)
    if task == "s5":
        return permutation_composition(train_fraction, seed)
    return modular(task, modulus, train_fraction, seed, split)


__all__ = ["TASKS", "Dataset", "make_dataset"]
