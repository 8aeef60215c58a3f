"""A script as a user with strict types writes it, with every public name: basedpyright checks it, strictly.

`.ci/package.py` checks and runs it against the installed wheel. `tests/test_public.py` checks that no name is missing.
"""

from __future__ import annotations

import warnings
from typing import assert_type

import torch
from torch import Tensor, nn

import rankdecay as rd

model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
x = torch.randn(3, 5, 16)


def loss() -> Tensor:
    out: Tensor = model(x)
    return out.square().mean()


# --- decays ---
low_rank = rd.LowRank(0.1, rule="prox", scale="relative", unit="head", every=1)
frobenius = rd.Frobenius(0.1, power=1.0, cap=None, warmup=10)
planes = rd.Planes(0.1, keep=2, scope="model")
groups = rd.param_groups(model, default=frobenius, query_key=low_rank)
of_groups = torch.optim.AdamW(groups, lr=1e-3)
grouped: rd.Attachment = rd.attach(of_groups)
described: str = str(grouped.describe())
grouped.detach()

optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
attachment = rd.attach(optimizer, model, query_key=low_rank, value_output=frobenius)
assert_type(attachment, rd.Attachment)
settings = rd.decays("query_key=LowRank:0.1")

# --- matrix functions and spectra ---
matrix = torch.randn(8, 4)
assert_type(rd.polar(matrix), Tensor)
assert_type(rd.soft_threshold(matrix, 0.1), Tensor)
measured = rd.spectrum(matrix)
assert_type(measured, rd.Spectrum)
rank: Tensor = measured.effective_rank

# --- attention ---
layers: list[rd.AttentionLayer] = rd.find_attention(model)
view: rd.MatrixView = layers[0].query
names = rd.AttentionNames(query="wq", key="wk", value="wv", output="wo")
report = rd.inspect(model)
assert_type(report, rd.Inspection)
audited: rd.AuditReport = rd.audit(model, loss)
row: rd.AuditRow = audited.rows[0]

# --- training ---
history: list[dict[str, float]] = []
monitor = rd.Monitor(model, every=1, log=history.append, collapse=1.5)
with warnings.catch_warnings():
    warnings.simplefilter("ignore", rd.RankCollapseWarning)
    for _ in range(2):
        optimizer.zero_grad()
        loss().backward()  # pyright: ignore[reportUnknownMemberType] - torch's own
        optimizer.step()  # pyright: ignore[reportUnknownMemberType] - torch's own
        monitor.step()
value: float = history[-1]["rank/query_key/effective_rank"]


def smaller(path: str, out: str) -> rd.Compression:
    result = rd.compress(path, 8, out)
    assert_type(result, rd.Compression)
    return result


print(f"{value:.3g}", len(layers), view.shape, row)
