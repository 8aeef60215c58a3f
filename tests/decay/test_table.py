"""The table of `Attachment.describe`."""

import pytest
import torch
from torch import nn

import rankdecay as rd
from rankdecay.attention.layer import WHOLE, Window
from rankdecay.decay.table import Row, table
from tests.decay.models import groups_of, make_model, query_key, zero_gradients

LR = 0.1


def test_describe_names_every_parameter_with_its_decay_and_the_reason():
    model = make_model()
    optimizer = torch.optim.AdamW(rd.param_groups(model, rd.Frobenius(0.1), query_key=rd.LowRank(0.3, every=2)), lr=LR)
    text = rd.attach(optimizer).describe()
    for name, _ in model.named_parameters():
        assert name in text
    lines = text.splitlines()
    assert "  query_key: 6 × low-rank prox, 0.3, relative, every 2 steps, by rankdecay" in lines
    fused = [line for line in lines if line.startswith("layers.2.attention.query_key_value.weight")]
    assert len(fused) == 3
    assert "24×10 rows 0:6 of each 12" in fused[0]
    assert fused[0].endswith("query")
    assert "L2 0.1" in fused[2]
    assert fused[2].endswith("value")


def test_describe_says_how_far_a_cycle_is():
    model = make_model()
    optimizer = torch.optim.SGD(groups_of(model, every=3), lr=LR)
    attachment = rd.attach(optimizer)
    for _ in range(4):
        zero_gradients(model)
        optimizer.step()
    assert "query_key: 1 of 3 steps since its last decay" in attachment.describe(ranks=True)


def test_describe_shows_the_ranks_falling():
    model = make_model()
    optimizer = torch.optim.SGD(groups_of(model), lr=1.0)
    attachment = rd.attach(optimizer)
    for _ in range(2):
        zero_gradients(model)
        optimizer.step()
    lines = attachment.describe(ranks=True).splitlines()
    table = [line for line in lines if line.startswith("layers.")]
    assert len(table) == 6
    ranks = [int(line.split()[-1]) for line in table]
    assert sorted(ranks) == sorted(int(rd.spectrum(m).numerical_rank(1e-5)) for m in query_key(model))
    assert max(ranks) < 8


ROWS = [
    Row("norm", torch.ones(4), "norm", WHOLE, "none", "", "gain of LayerNorm"),
    Row("up", torch.eye(3), "mlp", WHOLE, "low-rank prox, 1", "rankdecay", "", low_rank=True),
    Row("experts", torch.ones(2, 3, 5), "mlp", WHOLE, "low-rank prox, 1", "rankdecay", "", low_rank=True),
    Row("fused", torch.ones(4, 12), "query_key", Window("rows", 4, 8, 12, 2, transposed=True, label="key"), "L2 1",
        "AdamW", "key"),
]  # fmt: skip


def test_low_rank_decays_come_first_and_every_shape_is_told():
    text = table(ROWS, ranks=False, state="detached from AdamW: what follows is not applied")
    assert text.startswith("rankdecay, detached from AdamW: what follows is not applied")
    assert "  mlp: 2 × low-rank prox, 1, by rankdecay" in text.splitlines()
    lines = text.split("\n\n")[1].splitlines()
    assert [line.split()[0] for line in lines] == ["parameter", "up", "experts", "norm", "fused"]
    assert [line.split()[1] for line in lines[1:]] == ["3×3", "2×3×5", "4", "4×12"]
    assert "4×12 transposed rows 4:8  query_key" in lines[4]


def test_ranks_are_those_of_the_matrix_in_the_window():
    row = Row("fused", nn.Parameter(torch.ones(4, 12)), "query_key", ROWS[3].window, "", "", "", low_rank=True)
    [_, shown] = table([ROWS[1], row], ranks=True, state="attached to SGD").splitlines()[-2:]
    assert shown.split() == ["fused", "4×4", "key", "query_key", "4", "1", "1", "1"]
    assert row.matrix().shape == (4, 4)
    assert ROWS[2].matrix().shape == (2, 3, 5)
    assert ROWS[1].matrix() == pytest.approx(torch.eye(3))
