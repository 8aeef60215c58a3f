"""The cost of a decay of sharded weights: the bytes a process sends and the time, beside AdamW's own step.

    python benchmarks/sharded.py                          # 1 to 4 gloo processes of this machine, about 3 minutes
    python benchmarks/sharded.py --json docs/data/sharded.json
    python benchmarks/sharded.py --device cuda            # one process, all of it on one GPU
    python benchmarks/sharded.py paper                    # 8 to 1024 GPUs, from bytes and operation counts alone
    python benchmarks/sharded.py paper --json docs/data/sharded_paper.json
    python benchmarks/sharded.py --show docs/data/sharded.json docs/data/sharded_paper.json

The model is a Llama, W_Q and W_K decayed by prox at every step, by the real hook.

**Measured.** Processes of one thread each; when there are more of them than cores they take turns, so that times of
several numbers of processes say nothing about speed-up. Rounds of every variant are interleaved; a time is the median
over rounds of the slowest process's.

=============  =========================================================================================================
column         meaning
=============  =========================================================================================================
AdamW          ms of ``optimizer.step`` of the whole model, with nothing attached
decay          ms of the hook after it
communicating  part of that inside collectives, waiting for other processes included
sent           bytes a process sends in a decay, and receives: counted from the tensors of every collective that ran,
               at what a ring sends for it
loopback       bytes per process that the machine's loopback interface carried meanwhile, headers included
=============  =========================================================================================================

**On paper.** Nothing is estimated that the code decides: the decay itself runs on ``meta`` tensors as rank 0 of a fake
process group of that many GPUs, and its collectives and products are counted. The assumptions are :data:`PAPER`;
latencies, and the n³ of a Cholesky factor beside 176 n³ of products, are left out.
"""

import argparse
import contextlib
import functools
import json
import math
import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from clock import now
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.multiprocessing.spawn import spawn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import rankdecay as rd
from rankdecay.decay.apply import Step, apply
from rankdecay.decay.groups import decays_in, windows_in
from rankdecay.decay.sharded import sums
from rankdecay.lab.machine import describe_machine, resolve_device, versions

#: Width, layers, heads, KV heads, MLP width, vocabulary.
MODELS = {
    "256 wide": (256, 4, 8, 8, 1024, 1000),
    "512 wide, 2 KV heads": (512, 4, 8, 2, 2048, 1000),
    "Llama-2 7B": (4096, 32, 32, 32, 11008, 32000),
    "Llama-2 70B": (8192, 80, 64, 8, 28672, 32000),
}
#: How the model lies on some processes: by their number.
MEASURED = {1: ("FSDP2",), 2: ("FSDP2", "TP"), 3: ("FSDP2",), 4: ("FSDP2", "HSDP 2 × 2", "FSDP2 2 × TP 2")}
#: Replicas and shards. AdamW's state of a 70B in float32 does not fit 8 GPUs.
ON_PAPER = {
    "Llama-2 7B": ((1, 8), (1, 64), (1, 256), (1, 1024), (8, 8), (32, 8), (128, 8)),
    "Llama-2 70B": ((1, 64), (1, 256), (1, 1024), (4, 64), (16, 64)),
}
UNITS = ("matrix", "head")
LEARNING_RATE, STRENGTH = 3e-4, 0.1
PAPER = {
    "GPU": "H100 SXM, nodes of 8",
    "memory": 80e9,
    "decay, operations/s": 60e12 * 0.5,  # float64 tensor cores, and float32 without TF32; half of their peak
    "training, operations/s": 989e12 * 0.4,  # bf16, communication hidden behind them
    "bytes/s inside a node": 450e9,
    "bytes/s between nodes": 50e9,  # per GPU
    "tokens per step": 4e6,
}


@dataclass
class Row:
    model: str
    layout: str
    processes: int
    unit: str
    adamw_ms: float = 0.0
    decay_ms: float = 0.0
    communicating: float = 0.0
    sent: dict[str, int] = field(default_factory=dict)
    loopback: int | None = None


@dataclass
class PaperRow:
    model: str
    layout: str
    gpus: int
    unit: str
    sent: dict[str, int]  # bytes of a decay, by collective
    collectives: int
    buffer: int  # bytes of the largest tensor of a collective
    operations: int
    decay_s: float
    of_that_communication_s: float
    step_sent: int
    step_operations: float
    step_s: float


# ---- bytes -------------------------------------------------------------------------------------------------


#: The operators of collectives, and the share of its whole tensor's bytes that a ring of P has each process send.
KINDS = {
    "_reduce_scatter_base_": "reduce-scatter",
    "_allgather_base_": "all-gather",
    "allreduce_": "all-reduce",
    "alltoall_base_": "all-to-all",
}
RING: dict[str, Callable[[int], float]] = {
    "reduce-scatter": lambda P: (P - 1) / P,
    "all-gather": lambda P: (P - 1) / P,
    "all-reduce": lambda P: 2 * (P - 1) / P,
}
#: Operators beside them that move nothing. Any other is an error, so that none goes uncounted.
SILENT = ("wait_tensor", "_wrap_tensor_autograd")

c10d: Any = dist  # with what it does not export to type checkers


class Traffic(TorchDispatchMode):
    """Counts what a process sends in collectives; it receives as much.

    Attributes:
        sent: bytes by kind of collective, as rings send them.
        calls: how many collectives.
        seconds: at the bandwidths of :data:`PAPER`.
        buffer: bytes of the largest tensor handed to one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counter[str] = Counter()
        self.calls, self.seconds, self.buffer = 0, 0.0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # its own collectives come next
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        if func.namespace in ("c10d", "_c10d_functional", "_dtensor") and name not in SILENT:
            kind = KINDS[name]
            flat = [t for value in (*args, out) for t in (value if isinstance(value, list | tuple) else [value])]
            whole = max(t.nbytes for t in flat if isinstance(t, Tensor))
            ranks = _ranks(args)
            if kind == "all-to-all":  # all but the stretch for itself; without sizes all stretches are alike
                values, sizes = args[1], args[4] or [len(args[1]) // len(ranks)] * len(ranks)
                sent = values.nbytes - sizes[ranks.index(dist.get_rank())] * values.element_size()
            else:
                sent = round(whole * RING[kind](len(ranks)))
            self.sent[kind] += sent
            self.calls += 1
            self.buffer = max(self.buffer, whole)
            one_node = len({rank // 8 for rank in ranks}) == 1
            self.seconds += sent / PAPER["bytes/s inside a node" if one_node else "bytes/s between nodes"]
        return out


def _ranks(args: tuple[Any, ...]) -> list[int]:
    """The processes of the group among the arguments of a collective: an object, or a name, behind the tensors."""
    for value in args:
        with contextlib.suppress(RuntimeError, TypeError):
            unboxed = (
                c10d.distributed_c10d._resolve_process_group(value)
                if isinstance(value, str)
                else dist.ProcessGroup.unbox(value)
            )
            return dist.get_process_group_ranks(unboxed)
    raise ValueError("a collective without a process group")


def loopback() -> int | None:
    """Bytes that the loopback interface has carried."""
    path = Path("/sys/class/net/lo/statistics/tx_bytes")
    return int(path.read_text()) if path.exists() else None


# ---- measured ----------------------------------------------------------------------------------------------


def llama(name: str) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    width, layers, heads, kv_heads, mlp, vocabulary = MODELS[name]
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            intermediate_size=mlp,
            vocab_size=vocabulary,
        )
    )


def shard(model: Any, layout: str, world: int, device: str) -> None:
    """Lay a model on the processes."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    shape, names = {
        "FSDP2": ((world,), ("shard",)),
        "TP": ((world,), ("tensor",)),
        "HSDP 2 × 2": ((2, 2), ("replicate", "shard")),
        "FSDP2 2 × TP 2": ((2, 2), ("shard", "tensor")),
    }[layout]
    mesh = init_device_mesh(device, shape, mesh_dim_names=names)
    if "tensor" in names:
        plan: dict[str, Any] = {f"self_attn.{one}_proj": ColwiseParallel() for one in "qkv"}
        plan["self_attn.o_proj"] = RowwiseParallel()
        for layer in model.model.layers:
            parallelize_module(layer, mesh["tensor"], plan)
    if "shard" in names:
        over = mesh if "replicate" in names else mesh["shard"]
        for module in (*model.model.layers, model):
            fully_shard(module, mesh=over)


@contextlib.contextmanager
def clocked(seconds: list[float]) -> Iterator[None]:
    """Append the seconds of every collective of a decay."""

    def timed(call: Any) -> Any:
        @functools.wraps(call)
        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            out = call(*args, **kwargs)
            seconds.append(time.perf_counter() - start)
            return out

        return run

    places = [(sums, "_reduce_scatter"), (sums, "_all_gather"), (dist, "all_reduce"), (dist, "all_to_all_single")]
    with contextlib.ExitStack() as stack:
        for owner, name in places:
            stack.enter_context(mock.patch.object(owner, name, timed(getattr(owner, name))))
        yield


class Steps:
    """Steps of one model in one layout, timed; made and called by all processes."""

    def __init__(self, name: str, layout: str, world: int, device: str) -> None:
        self.device = device
        torch.manual_seed(0)
        model = llama(name).to(device)
        shard(model, layout, world, device)
        groups = rd.param_groups(model, query_key=rd.LowRank(STRENGTH, every=1))
        self.optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE)
        for parameter in model.parameters():
            parameter.grad = 1e-3 * torch.ones_like(parameter)

    def together(self) -> float:
        """Seconds on a clock, once all processes are here."""
        now(self.device)
        dist.barrier()
        return now()

    def adamw(self) -> float:
        """Seconds of AdamW's own step."""
        start = self.together()
        self.optimizer.step()
        return now(self.device) - start

    def decay(self, unit: str, traffic: Traffic | None = None) -> tuple[float, float, int]:
        """Seconds of the hook and of its communication, and the bytes of the loopback interface."""
        for group in self.optimizer.param_groups:
            if "query_key_unit" in group:
                group["query_key_unit"] = unit
        times: list[float] = []
        inside: list[float] = []
        carried: list[int] = []
        counting = traffic or contextlib.nullcontext()

        def started(*_: object) -> None:
            carried.append(loopback() or 0)
            start = self.together()
            counting.__enter__()
            times.append(start)

        def stopped(*_: object) -> None:
            times.append(now(self.device))
            counting.__exit__(None, None, None)
            dist.barrier()
            carried.append(loopback() or 0)

        first = self.optimizer.register_step_post_hook(started)
        attachment = rd.attach(self.optimizer)
        last = self.optimizer.register_step_post_hook(stopped)
        with clocked(inside):
            self.optimizer.step()
        attachment.detach()
        first.remove()
        last.remove()
        return times[1] - times[0], sum(inside), carried[1] - carried[0]


def measure(name: str, layout: str, world: int, device: str, rounds: int) -> list[Row]:
    """The rows of one model in one layout; called by all processes, the same in all."""
    steps = Steps(name, layout, world, device)
    counted = {unit: Traffic() for unit in UNITS}
    for unit in UNITS:
        steps.decay(unit, counted[unit])
    steps.adamw()
    seconds: dict[str, list[Any]] = {"AdamW": [], **{unit: [] for unit in UNITS}}
    for _ in range(rounds):
        seconds["AdamW"].append(steps.adamw())
        for unit in UNITS:
            seconds[unit].append(steps.decay(unit))
    everywhere: list[Any] = [None] * world
    dist.all_gather_object(everywhere, (seconds, {unit: dict(counted[unit].sent) for unit in UNITS}))

    def median(values: Callable[[dict[str, list[Any]]], list[float]]) -> float:
        return statistics.median(map(max, zip(*(values(its) for its, _ in everywhere), strict=True)))

    rows: list[Row] = []
    for unit in UNITS:
        row = Row(name, layout, world, unit, adamw_ms=1e3 * median(lambda its: its["AdamW"]))
        row.decay_ms = 1e3 * median(lambda its, u=unit: [whole for whole, _, _ in its[u]])
        shares = [inside / whole for its, _ in everywhere for whole, inside, _ in its[unit]]
        row.communicating = statistics.median(shares)
        row.sent = max((sent[unit] for _, sent in everywhere), key=lambda sent: sum(sent.values()))
        if device == "cpu" and loopback() is not None:
            row.loopback = round(min(carried for its, _ in everywhere for _, _, carried in its[unit]) / world)
        rows.append(row)
    return rows


def _process(rank: int, world: int, folder: str, device: str, names: Sequence[str], rounds: int) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", store=c10d.FileStore(f"{folder}/store", world), rank=rank, world_size=world)
    rows = [row for name in names for layout in MEASURED[world] for row in measure(name, layout, world, device, rounds)]
    if rank == 0:
        Path(folder, "rows.json").write_text(json.dumps([asdict(row) for row in rows]))
    dist.destroy_process_group()


def measured_rows(world: int, device: str, names: Sequence[str], rounds: int) -> list[Row]:
    """The rows of one number of processes, which are started here."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(_process, (world, folder, device, names, rounds), nprocs=world)
        return [Row(**row) for row in json.loads(Path(folder, "rows.json").read_text())]


# ---- on paper ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def fake_ranks(world: int) -> Iterator[None]:
    """A process group of which this process is rank 0 and the others do not exist; its collectives return at once."""
    import torch.testing._internal.distributed.fake_pg  # makes the backend known

    dist.init_process_group("fake", store=c10d.HashStore(), rank=0, world_size=world)
    try:
        # products on tensors without values: `meta` has no autocast to ask about
        with mock.patch.object(torch, "is_autocast_enabled", return_value=False):
            yield
    finally:
        dist.destroy_process_group()


def dry_run(model: Any, replicas: int, shards: int, unit: Any) -> tuple[Traffic, int]:
    """Traffic and operations of the decay of a model on ``meta``, on rank 0: it has the largest share."""
    shape, placements = ((shards,), (Shard(0),)) if replicas == 1 else ((replicas, shards), (Replicate(), Shard(0)))
    mesh = init_device_mesh("meta", shape)
    groups = rd.param_groups(model, query_key=rd.LowRank(STRENGTH, unit=unit, every=1))
    traffic, operations = Traffic(), FlopCounterMode(display=False)
    with torch.no_grad(), operations, traffic:
        for group in groups:
            decay = decays_in(group).get("query_key")
            if isinstance(decay, rd.LowRank):
                laid: list[Tensor] = [
                    distribute_tensor(p.detach(), mesh, placements, src_data_rank=None) for p in group["params"]
                ]
                apply([Step(laid, windows_in(group, "query_key"), decay, LEARNING_RATE * STRENGTH, 0)], "auto")
    return traffic, operations.get_total_flops()


def paper_rows(name: str, replicas: int, shards: int) -> list[PaperRow]:
    with torch.device("meta"):
        model = llama(name)
    gpus, parameters = replicas * shards, sum(p.numel() for p in model.parameters())
    layout = f"{replicas} × {shards}" if replicas > 1 else f"{shards}"
    # bf16: gathered for the forward and the backward pass, gradients reduce-scattered, then summed over replicas
    step_sent = 6 * parameters * (shards - 1) / shards + 4 * parameters / shards * (replicas - 1) / replicas
    step_operations = 6 * parameters * PAPER["tokens per step"] / gpus
    rows: list[PaperRow] = []
    with fake_ranks(gpus):
        for unit in UNITS:
            traffic, operations = dry_run(model, replicas, shards, unit)
            rows.append(
                PaperRow(
                    name,
                    layout,
                    gpus,
                    unit,
                    dict(traffic.sent),
                    traffic.calls,
                    traffic.buffer,
                    operations,
                    traffic.seconds + operations / PAPER["decay, operations/s"],
                    traffic.seconds,
                    round(step_sent),
                    step_operations,
                    step_operations / PAPER["training, operations/s"],
                )
            )
    return rows


# ---- the tables --------------------------------------------------------------------------------------------


def size(count: float) -> str:
    """Bytes, or any number, with a prefix."""
    if not count:
        return "0"
    power = min(max(int(math.log10(count)) // 3, 0), 5)
    value = count / 1000**power
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} {('', 'k', 'M', 'G', 'T', 'P')[power]}".rstrip()


def _sent(by_kind: dict[str, int]) -> str:
    dealt, whole = by_kind.get("all-to-all", 0), sum(by_kind.values())
    return size(whole) + (f" ({size(dealt)} dealt)" if 0 < dealt < whole else "")


HEADER = (
    "| model | layout | processes | unit | AdamW ms | decay ms | communicating | sent, bytes | loopback, bytes |\n"
    "|---|---|--:|---|--:|--:|--:|--:|--:|"
)
PAPER_HEADER = (
    "| model | unit | GPUs | sent, bytes | collectives | largest buffer, bytes | operations | decay s | of that "
    "communication | step: sent, bytes | operations | s | decay/step, every=1 | every=8 |\n"
    "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|"
)


def line(row: Row | PaperRow) -> str:
    if isinstance(row, Row):
        loop = "" if row.loopback is None else size(row.loopback)
        times = f"{row.adamw_ms:.1f} | {row.decay_ms:.1f} | {row.communicating:.0%}"
        return f"| {row.model} | {row.layout} | {row.processes} | {row.unit} | {times} | {_sent(row.sent)} | {loop} |"
    cells = [row.model, row.unit, row.layout, _sent(row.sent), str(row.collectives), size(row.buffer)]
    cells += [size(row.operations), f"{row.decay_s:.3g}", f"{row.of_that_communication_s:.3g}", size(row.step_sent)]
    cells += [size(row.step_operations), f"{row.step_s:.3g}"]
    for every in (1, 8):
        ratio = row.decay_s / row.step_s / every
        cells.append(
            "does not fit" if row.buffer > PAPER["memory"] else f"{ratio:.1%}" if ratio < 1 else f"{ratio:.1f}×"
        )
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("measure", "paper"), default="measure")
    parser.add_argument("--processes", type=int, nargs="+", choices=MEASURED, help="default: 1 to 4; always 1 on a GPU")
    parser.add_argument("--models", nargs="+", choices=MODELS, help="default: the two small, or on paper the two large")
    parser.add_argument("--rounds", type=int, default=7, help="after the one that warms up")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", metavar="PATH", help="write the machine, or the assumptions, and every row")
    parser.add_argument("--show", nargs="+", metavar="PATH", help="print the tables of such files, and measure nothing")
    arguments = parser.parse_args()
    if arguments.show:
        for path in arguments.show:
            record = json.loads(Path(path).read_text())
            kind, header = (PaperRow, PAPER_HEADER) if "assumptions" in record else (Row, HEADER)
            print(record.get("machine") or record["assumptions"], header, sep="\n")
            print("\n".join(line(kind(**row)) for row in record["rows"]))
        return
    rows: list[Any] = []
    if arguments.what == "paper":
        record: dict[str, Any] = {"assumptions": PAPER}
        print(PAPER, PAPER_HEADER, sep="\n", flush=True)
        parts: list[Callable[[], list[Any]]] = [
            functools.partial(paper_rows, name, *split)
            for name in arguments.models or ON_PAPER
            for split in ON_PAPER[name]
        ]
    else:
        torch.set_num_threads(1)
        device = resolve_device(arguments.device).partition(":")[0]
        names = arguments.models or [name for name in MODELS if name not in ON_PAPER]
        worlds = [1] if device == "cuda" else arguments.processes or list(MEASURED)
        record = {"machine": f"{describe_machine(device)} per process, {os.cpu_count()} cores"}
        print(record["machine"], HEADER, sep="\n", flush=True)
        parts = [functools.partial(measured_rows, world, device, names, arguments.rounds) for world in worlds]
    for part in parts:
        new = part()
        print("\n".join(map(line, new)), flush=True)
        rows += new
    if arguments.json:
        record |= {"versions": versions(), "rows": [asdict(row) for row in rows]}
        Path(arguments.json).write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
