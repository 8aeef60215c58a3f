"""The table of the cells, for the terminal and the page, and the note under it."""

from collections.abc import Sequence
from functools import partial

from rankdecay.lab.experiments.attention.summary import Cell, of
from rankdecay.lab.report.table import Column, has, several
from rankdecay.lab.report.words import Facts, figure_text, is_number

PRODUCTS = {"QK": "query_key", "VO": "value_output"}


def make_columns(unit: str) -> Sequence[Column]:
    """The columns, narrow enough for a terminal of 80 characters.

    Args:
        unit: what the problem counts.
    """
    each = PRODUCTS.items()
    return (
        Column("decay", "strength", "g"),
        Column("MLP", "mlp_decay", "g", when=several("mlp_decay")),
        Column("QK\nnorm", lambda cell: "yes" if cell["qk_norm"] else "no", when=several("qk_norm")),
        Column("seeds", "seeds", ",d", _diverged, where="page"),
        Column("loss", "loss", lambda loss: figure_text(loss, ".4f") if is_number(loss) else "diverged", _error),
        Column("±", "loss_error", ".4f", where="terminal"),
        Column("accuracy", "accuracy", ".1%", when=has("accuracy")),
        *(Column(f"rank\n{name}", partial(of, part=part), ".2f", partial(_untrained, part)) for name, part in each),
        *(Column(f"imb.\n{name}", partial(of, part=part, measure="imbalance"), ".2f") for name, part in each),
        *(Column(f"gap\n{name}", partial(of, part=part, measure="nuclear_gap"), where="page") for name, part in each),
        Column(f"{unit}\n/s", "per_second", ",.0f"),
        Column("loss at equal time", "loss_at_equal_time", ".4f", where="page"),
    )


def _error(cell: Cell) -> str | None:
    return f"± {cell['loss_error']:.4f}" if is_number(cell.get("loss_error")) else None


def _diverged(cell: Cell) -> str | None:
    return f"{cell['diverged']:,} diverged" if cell.get("diverged") else None


def _untrained(part: str, cell: Cell) -> str | None:
    before = of(cell, part, when="untrained_mean")
    matrices = part == "query_key" and bool(cell.get("mean")) and part not in cell["mean"]
    texts = ["" if before is None else f"untrained {before:.3f}", "W_Q, W_K" if matrices else ""]
    return " ".join(filter(None, texts)) or None


def note(facts: Facts) -> str:
    """Note under the table."""
    first = next((cell for cells in facts.arms.values() for cell in cells if cell.get("untrained_mean")), None)
    untrained = ""
    if first is not None:
        ranks = [
            f"{name} {figure_text(of(first, part, when='untrained_mean'), '.3f')}" for name, part in PRODUCTS.items()
        ]
        untrained = f" Untrained pseudo rank: {', '.join(ranks)}."
    return (
        "Means over seeds, layers and heads at the end. QK is W_KᵀW_Q, under QK-norm W_Q and W_K themselves; VO is "
        "W_O W_V. The rank is the pseudo rank, the share of singular values that make up 95 % of their sum; imb. is "
        "the imbalance of the two factors of a product, from 0 to 2; the gap is what half the squared norms of the "
        "factors are above the nuclear norm of the product. Equal time: as many seconds of training as the quickest "
        f"run took.{untrained}"
    )
