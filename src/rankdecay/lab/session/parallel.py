"""How the processes of ``torchrun`` share one run of a GPT, so that together they train what one process alone trains.

========  ===================================================================  ===================
parallel  what a process holds                                                 what it gets
========  ===================================================================  ===================
ddp       the whole model                                                      its share of a batch
fsdp2     a part of every parameter; a block is whole while it computes        its share of a batch
tp        some heads of every layer and some units of every MLP; the rest      the whole batch
fsdp2_tp  a part of what tp leaves to it: two processes share the layers       its pair's share
========  ===================================================================  ===================

Parameters that a process holds in part are DTensors of the whole shape. Importing this module imports no torch.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from rankdecay.lab.errors import SettingError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.distributed.device_mesh import DeviceMesh

    from rankdecay.lab.session.gpt import GPT

Parallel = Literal["ddp", "fsdp2", "tp", "fsdp2_tp"]
PAIR = 2  # processes that share the layers in fsdp2_tp


@dataclass(frozen=True)
class Layout:
    """Which process has what; made where the processes have joined.

    Attributes:
        parallel: the strategy; one process alone has everything, whatever it is.
        kind: of the devices, ``"cpu"`` or ``"cuda"``.

    Raises:
        SettingError: for a number of processes that the strategy cannot use.
    """

    parallel: Parallel = "ddp"
    kind: str = "cpu"

    def __post_init__(self) -> None:
        count, _ = _group()
        if self.parallel == "fsdp2_tp" and count > 1 and (count % PAIR or count < 2 * PAIR):
            raise SettingError(
                f"--parallel fsdp2_tp cannot use {count} processes: start 4, 6, 8, … of them, or give --parallel fsdp2"
            )

    @property
    def sharded(self) -> bool:
        """Whether the processes hold parts of the model: then whatever uses it needs all of them."""
        return self.parallel != "ddp" and _group()[0] > 1

    @property
    def tensor(self) -> int:
        """How many processes share each layer, and so a batch."""
        count, _ = _group()
        return min(count, {"tp": count, "fsdp2_tp": PAIR}.get(self.parallel, 1))

    @property
    def shares(self) -> int:
        """How many shares a batch is cut into."""
        return _group()[0] // self.tensor

    @property
    def share(self) -> int:
        """Which of them is this process's."""
        return _group()[1] // self.tensor

    @functools.cached_property
    def mesh(self) -> DeviceMesh:
        """The processes as (data, tensor); made once, since each makes groups of its own that stay."""
        from torch.distributed.device_mesh import init_device_mesh

        return init_device_mesh(self.kind, (self.shares, self.tensor), mesh_dim_names=("data", "tensor"))

    def check(self, heads: int, mlp_width: int) -> None:
        """Raises a `SettingError` unless the layers of a model can be shared evenly."""
        for name, size in (("--heads", heads), ("--mlp-width", mlp_width)):
            if size % self.tensor:
                raise SettingError(
                    f"--parallel {self.parallel} cannot share {name} {size} among {self.tensor} processes: give a "
                    f"multiple of {self.tensor}, or --parallel fsdp2"
                )

    def shard(self, model: nn.Module) -> None:
        """Leaves this process its part of a GPT, in place; before its parameters go to an optimizer."""
        if not self.sharded:
            return
        from rankdecay.lab.session.gpt import GPT

        assert isinstance(model, GPT), f"only a GPT can be sharded, not a {type(model).__name__}"
        self.check(model.config.heads, model.config.mlp_width)
        if self.parallel == "fsdp2_tp":  # torch warns that gathering over both dimensions takes two operations
            logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
        if self.parallel in ("tp", "fsdp2_tp"):
            _share_layers(model, self.mesh["tensor"])
        if self.parallel in ("fsdp2", "fsdp2_tp"):
            _share_parameters(model, self.mesh["data"])


def _group() -> tuple[int, int]:
    """How many processes there are, and which of them this is."""
    from rankdecay.lab.session import distributed

    return distributed.processes(), distributed.rank()


def _share_layers(model: GPT, mesh: DeviceMesh) -> None:
    """Tensor parallelism: whole heads and whole units, so that a block is summed up over the processes only twice.

    Embeddings and the norms of the stream stay whole, as plain tensors: every process computes the same with them. The
    norms of QK-norm meet its own heads alone, so that their gradient is a sum over the processes too.
    """
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        ParallelStyle,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    plan: dict[str, ParallelStyle] = {f"self_attn.{name}_proj": ColwiseParallel() for name in "qkv"}
    plan |= {f"self_attn.{name}_norm": SequenceParallel(sequence_dim=2, use_local_output=True) for name in "qk"}
    plan |= {f"mlp.{name}_proj": ColwiseParallel() for name in ("gate", "up")}
    plan |= {name: RowwiseParallel() for name in ("self_attn.o_proj", "mlp.down_proj")}
    for block in model.model.layers:
        there = dict(block.named_modules())
        parallelize_module(block, mesh, {name: style for name, style in plan.items() if name in there})


def _share_parameters(model: GPT, mesh: DeviceMesh) -> None:
    """FSDP2. The root is given back after its forward pass too, or it would stay whole where no backward follows."""
    from torch.distributed.fsdp import fully_shard

    for module in (*model.model.layers, model):
        fully_shard(module, mesh=mesh, reshard_after_forward=True)


def clip_gradients(parameters: Iterable[Tensor], largest: float) -> None:
    """`nn.utils.clip_grad_norm_`, by the norm over all processes.

    Args:
        parameters: plain tensors, which every process has alike, and DTensors of any meshes.
        largest: norm that the gradient is scaled down to.
    """
    import torch
    from torch import nn

    from rankdecay.dtensor import whole

    by_mesh: dict[DeviceMesh | None, list[Tensor]] = {}  # torch combines only what lies on one mesh
    for parameter in parameters:
        by_mesh.setdefault(getattr(parameter, "device_mesh", None), []).append(parameter)
    norms = []
    for alike in by_mesh.values():
        norms.append(whole(nn.utils.get_total_norm([p.grad for p in alike if p.grad is not None])))
    total = torch.linalg.vector_norm(torch.stack(norms))
    for alike in by_mesh.values():
        nn.utils.clip_grads_with_norm_(alike, largest, total)


def parted(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, or this process's part of it if it is to be ``like`` a DTensor; all processes have to ask."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)


def gathered(state: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """Copies of whole tensors on the CPU, one after another; all processes have to ask, and those that ``keep`` get."""
    from rankdecay.dtensor import whole

    found = {}
    for name, tensor in state.items():
        full = whole(tensor)
        if keep:
            found[name] = full.to("cpu", copy=True)
    return found
