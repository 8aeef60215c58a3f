"""Strategies by which the processes of ``torchrun`` train one GPT together, with the result of a single process.

========  ===================================================================  ===================
parallel  parameters of a process                                              batch of a process
========  ===================================================================  ===================
ddp       all                                                                  its share
fsdp2     a shard of each; a block is gathered while it computes               its share
tp        some heads of every layer and some units of every MLP; the rest      all of it
fsdp2_tp  a shard of its part under tp, with two processes per layer           the share of its pair
========  ===================================================================  ===================

Sharded parameters are DTensors of the whole shape. Importing this module imports no torch.
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
    """Distribution of a model and its batches over the processes; to be made after they have joined.

    Attributes:
        parallel: the strategy; a process alone has everything under any of them.
        kind: of the devices, ``"cpu"`` or ``"cuda"``.

    Raises:
        SettingError: For a number of processes that the strategy cannot use.
    """

    parallel: Parallel = "ddp"
    kind: str = "cpu"

    def __post_init__(self) -> None:
        count, _ = _group()
        if self.parallel == "fsdp2_tp" and count > 1 and (count % PAIR or count < 2 * PAIR):
            raise SettingError(
                f"`parallel` fsdp2_tp cannot use {count} processes: start 4, 6, 8, … of them, or give `parallel` fsdp2"
            )

    @property
    def sharded(self) -> bool:
        """Whether the model is sharded, so that every use of it is collective."""
        return self.parallel != "ddp" and _group()[0] > 1

    @property
    def tensor(self) -> int:
        """Number of processes that share each layer, and so a batch."""
        count, _ = _group()
        return min(count, {"tp": count, "fsdp2_tp": PAIR}.get(self.parallel, 1))

    @property
    def data_parallel_size(self) -> int:
        """Number of shares that a batch is cut into."""
        return _group()[0] // self.tensor

    @property
    def data_rank(self) -> int:
        """Index of this process's share."""
        return _group()[1] // self.tensor

    @functools.cached_property
    def mesh(self) -> DeviceMesh:
        """Device mesh (data, tensor); cached, because every mesh creates process groups that stay."""
        from torch.distributed.device_mesh import init_device_mesh

        return init_device_mesh(self.kind, (self.data_parallel_size, self.tensor), mesh_dim_names=("data", "tensor"))

    def check(self, heads: int, mlp_width: int) -> None:
        """Raise a `SettingError` unless the layers of a model can be shared evenly."""
        for name, size in (("`heads`", heads), ("`mlp_width`", mlp_width)):
            if size % self.tensor:
                raise SettingError(
                    f"`parallel` {self.parallel} cannot share {name} {size} among {self.tensor} processes: give a "
                    f"multiple of {self.tensor}, or `parallel` fsdp2"
                )

    def shard(self, model: nn.Module) -> None:
        """Shard a GPT in place; call it before an optimizer gets the parameters."""
        if not self.sharded:
            return
        from rankdecay.lab.session.gpt import GPT

        assert isinstance(model, GPT), f"only a GPT can be sharded, not a {type(model).__name__}"
        self.check(model.config.heads, model.config.mlp_width)
        if self.parallel == "fsdp2_tp":  # torch warns that a gather over both dimensions takes two collectives
            logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
        if self.parallel in ("tp", "fsdp2_tp"):
            _share_layers(model, self.mesh["tensor"])
        if self.parallel in ("fsdp2", "fsdp2_tp"):
            _share_parameters(model, self.mesh["data"])


def _group() -> tuple[int, int]:
    """Number of processes, and the rank of this one."""
    from rankdecay.lab.session import distributed

    return distributed.processes(), distributed.rank()


def _share_layers(model: GPT, mesh: DeviceMesh) -> None:
    """Tensor parallelism by whole heads and whole units, so that a block needs two all-reduces.

    Embeddings and the norms of the stream are replicated as plain tensors. The norms of QK-norm see the heads of their
    process alone, so that their gradient is a sum over the processes too.
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
        modules = dict(block.named_modules())
        parallelize_module(block, mesh, {name: style for name, style in plan.items() if name in modules})


def _share_parameters(model: GPT, mesh: DeviceMesh) -> None:
    """FSDP2. The root is resharded after its forward pass too: in an evaluation no backward pass would do it."""
    from torch.distributed.fsdp import fully_shard

    for module in (*model.model.layers, model):
        fully_shard(module, mesh=mesh, reshard_after_forward=True)


def clip_gradients(parameters: Iterable[Tensor], largest: float) -> None:
    """Clip by the norm over all processes, as `nn.utils.clip_grad_norm_` does in one.

    Args:
        parameters: replicated plain tensors, and DTensors of any meshes.
        largest: norm that the gradient is scaled down to.
    """
    import torch
    from torch import nn

    from rankdecay.dtensor import whole

    by_mesh: dict[DeviceMesh | None, list[Tensor]] = {}  # torch combines norms of one mesh alone
    for parameter in parameters:
        by_mesh.setdefault(getattr(parameter, "device_mesh", None), []).append(parameter)
    norms = []
    for on_mesh in by_mesh.values():
        norms.append(whole(nn.utils.get_total_norm([p.grad for p in on_mesh if p.grad is not None])))
    total = torch.linalg.vector_norm(torch.stack(norms))
    for on_mesh in by_mesh.values():
        nn.utils.clip_grads_with_norm_(on_mesh, largest, total)


def distribute_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Distribute a whole tensor as the DTensor ``like`` is, a collective; return it as it is for a plain one."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)


def gather_to_cpu(state: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """Gather tensors on the CPU, one after another, a collective; processes that do not ``keep`` get none."""
    from rankdecay.dtensor import whole

    found = {}
    for name, tensor in state.items():
        full = whole(tensor)
        if keep:
            found[name] = full.to("cpu", copy=True)
    return found
