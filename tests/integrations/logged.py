"""Logs a short training to TensorBoard, W&B (offline) and trackio, and prints what their own packages stored.

    python tests/integrations/logged.py FOLDER    # run by test_loggers.py, in a process of its own

What is printed is JSON: by logger the scalars of one name by step, and the histograms of one name by step, as counts.
"""

from __future__ import annotations

import json
import os
import sqlite3
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RANK, SPECTRUM = "rank/query_key/effective_rank", "spectrum/attention/query_key"
STEPS, EVERY = 4, 2


def train(log: Any) -> list[float]:
    """Train a layer for a few steps with a monitor that logs, and return the ranks as a plain callable gets them."""
    import torch

    import rankdecay as rd

    torch.manual_seed(0)
    model = torch.nn.MultiheadAttention(16, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    rd.attach(optimizer, model, query_key=rd.LowRank(20.0))
    plain: list[dict[str, float]] = []
    for each in (log, plain.append):
        rd.Monitor(model, every=EVERY, log=each).attach(optimizer)
    x = torch.randn(5, 3, 16)
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(x, x, x)[0].square().mean().backward()
        optimizer.step()
    return [values[RANK] for values in plain]


def tensorboard(folder: Path) -> dict[str, Any]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    from rankdecay.integrations.loggers import TensorBoard

    writer = SummaryWriter(str(folder / "tensorboard"))
    plain = train(TensorBoard(writer))
    writer.close()
    stored = EventAccumulator(str(folder / "tensorboard"), size_guidance={"histograms": 0, "scalars": 0})
    stored.Reload()
    return {
        "plain": plain,
        "scalars": {event.step: event.value for event in stored.Scalars(RANK)},
        "histograms": {event.step: sum(event.histogram_value.bucket) for event in stored.Histograms(SPECTRUM)},
    }


def wandb(folder: Path) -> dict[str, Any]:
    import wandb
    from wandb.proto import wandb_internal_pb2 as protocol

    from rankdecay.integrations.loggers import WandB

    settings = wandb.Settings(console="off", silent=True, disable_git=True, x_disable_stats=True)
    run = wandb.init(project="rankdecay", mode="offline", dir=str(folder), settings=settings)
    plain = train(WandB(run))
    run.finish()
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")

    def written() -> list[Any]:
        return [protocol.Record.FromString(data) for data in records(file.read_bytes())]

    while not any(record.HasField("exit") for record in written()):  # by a process of its own
        time.sleep(0.1)
    rows = []
    for record in written():
        if record.HasField("history"):
            row: dict[str, Any] = {}
            for item in record.history.item:
                name, *inner = item.nested_key or [item.key]
                value = json.loads(item.value_json)
                row[name] = row.get(name, {}) | {inner[0]: value} if inner else value
            rows.append(row)
    return {
        "plain": plain,
        "scalars": {row["step"]: row[RANK] for row in rows},
        "histograms": {row["step"]: sum(row[SPECTRUM]["values"]) for row in rows},
    }


def records(content: bytes) -> Iterator[bytes]:
    """Yield the records of W&B's file of a run: LevelDB's log format, after a header of seven bytes."""
    block, at, whole = 32768, 7, b""
    while at + 7 <= len(content):
        if block - at % block < 7:  # no header fits: the rest of the block is padding
            at += block - at % block
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + 7])
        whole += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last of its pieces
            yield whole
            whole = b""


def trackio(folder: Path) -> dict[str, Any]:
    os.environ["TRACKIO_DIR"] = str(folder / "trackio")
    import trackio

    from rankdecay.integrations.loggers import Trackio

    trackio.init(project="rankdecay", auto_log_gpu=False)
    plain = train(Trackio(trackio.log))
    trackio.finish()
    (file,) = (folder / "trackio").glob("*.db")
    rows = {step: json.loads(text) for step, text in sqlite3.connect(file).execute("select step, metrics from metrics")}
    return {
        "plain": plain,
        "scalars": {step: row[RANK] for step, row in rows.items()},
        "histograms": {step: sum(row[SPECTRUM]["values"]) for step, row in rows.items()},
    }


if __name__ == "__main__":
    sys.path.append(str(Path(sys.prefix, "loggers")))
    out = Path(sys.argv[1])
    found = {made.__name__: made(out) for made in (tensorboard, wandb, trackio)}
    print(json.dumps(found))
