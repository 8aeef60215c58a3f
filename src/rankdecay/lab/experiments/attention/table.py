"""The table of the cells, for the terminal and the page, and the note under it."""

from collections.abc import Callable, Sequence

from rankdecay.lab.experiments.attention.summary import Cell, of, rank_of
from rankdecay.lab.report.table import Column, has, several
from rankdecay.lab.report.words import Facts, is_number, shown

PRODUCTS = {"QK": "query_key", "VO": "value_output"}


def make_columns(unit: str) -> Sequence[Column]:
    """The columns, narrow enough for a terminal of 80 characters.

    Args:
        unit: what the problem counts.
    """
    return (
        Column("decay", "strength", "g"),
        Column("MLP", "mlp_decay", "g", when=several("mlp_decay")),
        Column("QK\nnorm", lambda cell: "yes" if cell["qk_norm"] else "no", when=several("qk_norm")),
        Column("seeds", "seeds", ",d", _diverged, where="page"),
        Column("loss", _loss, small=_error),
        Column("±", "loss_error", ".4f", where="terminal"),
        Column("accuracy", "accuracy", ".1%", when=has("accuracy")),
        *(
            Column(f"rank\n{name}", _of(part, "pseudo_rank"), ".2f", _untrained(part))
            for name, part in PRODUCTS.items()
        ),
        *(Column(f"imb.\n{name}", _of(part, "imbalance"), ".2f") for name, part in PRODUCTS.items()),
        *(Column(f"gap\n{name}", _of(part, "nuclear_gap"), ".3g", where="page") for name, part in PRODUCTS.items()),
        Column(f"{unit}\n/s", "per_second", ",.0f"),
        Column("loss at equal time", "loss_at_equal_time", ".4f", where="page"),
    )


def _of(part: str, measure: str) -> Callable[[Cell], float | None]:
    return lambda cell: of(cell.get("mean") or {}, part, measure)


def _loss(cell: Cell) -> str:
    return "diverged" if not is_number(cell.get("loss")) else f"{cell['loss']:.4f}"


def _error(cell: Cell) -> str | None:
    return f"± {cell['loss_error']:.4f}" if is_number(cell.get("loss_error")) else None


def _diverged(cell: Cell) -> str | None:
    return f"{cell['diverged']:,} diverged" if cell.get("diverged") else None


def _untrained(part: str) -> Callable[[Cell], str | None]:
    def words(cell: Cell) -> str | None:
        before = rank_of(cell, part, "untrained_mean")
        matrices = part == "query_key" and bool(cell.get("mean")) and part not in cell["mean"]
        texts = ["" if before is None else f"untrained {before:.3f}", "W_Q, W_K" if matrices else ""]
        return " ".join(filter(None, texts)) or None

    return words


def note(facts: Facts) -> str:
    """What the figures are."""
    first = next((cell for cells in facts.arms.values() for cell in cells if cell.get("untrained_mean")), None)
    untrained = ""
    if first is not None:
        ranks = {name: shown(rank_of(first, part, "untrained_mean"), ".3f") for name, part in PRODUCTS.items()}
        untrained = f" Untrained pseudo rank: {', '.join(f'{name} {rank}' for name, rank in ranks.items())}."
    return (
        "Means over seeds, layers and heads at the end. QK is W_KᵀW_Q, under QK-norm W_Q and W_K themselves; VO is "
        "W_O W_V. The rank is the pseudo rank, the share of singular values that make up 95 % of their sum; imb. is "
        "the imbalance of the two factors of a product, from 0 to 2; the gap is what half the squared norms of the "
        "factors are above the nuclear norm of the product. Equal time: as many seconds of training as the quickest "
        f"run took.{untrained}"
    )
