"""Models with known symmetries, and how to find a row of a report."""

import torch
from torch import nn

from rankdecay.audit import AuditReport, AuditRow
from tests.attention import families


def language_model(name, dtype=torch.float64):
    """A model of a family and its loss, at positions that turn."""
    model = families.build(name).to(dtype)
    ids = torch.randint(3, families.VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(1))

    def loss():
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        return nn.functional.cross_entropy(logits.flatten(0, 1).to(torch.float64), ids[:, 1:].flatten())

    return model, loss


def kinds(report: AuditReport, part, head=False):
    """The kinds of one of attention's matrices, whole or by head, in all layers."""
    rows = [row for row in report.rows if row.part == part and row.role != "bias" and (row.head is not None) == head]
    assert rows
    return {row.kind for row in rows}


def row(report: AuditReport, name: str, part: str = "", head: int | None = None) -> AuditRow:
    [found] = [row for row in report.rows if (row.name, row.part, row.head) == (name, part, head)]
    return found


INVARIANT, PAIR, NEITHER, UNKNOWN = {"scale_invariant"}, {"pair"}, {"neither"}, {"unknown"}
