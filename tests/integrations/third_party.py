"""How to build any optimizer of the packages that the tests install, and one run of it.

The packages are in a folder beside the environment, which the fixture `optimizers` of tests/conftest.py opens.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

#: Modules whose optimizers are meant, in the order of docs/guides/optimizers.md.
PACKAGES = ["torch.optim", "schedulefree", "prodigyopt", "prodigyplus", "dadaptation", "madgrad", "pytorch_optimizer",
            "torch_optimizer", "timm.optim", "transformers.optimization", "bitsandbytes.optim", "heavyball", "optimi",
            "pytorch_ranger", "ranger21", "sam", "muon", "lion_pytorch", "galore_torch", "apollo_torch", "lomo_optim",
            "adam_mini", "came_pytorch", "badam"]  # fmt: skip
_WRAPPERS = ("Lookahead", "ScheduleFreeWrapper", "ScheduleFreeWrapperReference", "PCGrad", "SafeFP16Optimizer",
             "SAMWrapper", "SplitOpt", "TRAC", "OrthoGrad", "Magma", "SAM", "LookSAM", "FriendlySAM", "WSAM", "GSAM",
             "CPUOffloadOptimizer", "BlockOptimizer", "BlockOptimizerRatio")  # fmt: skip
_ABSTRACT = ("Optimizer", "BaseOptimizer", "CoreOptimiser", "PSGDBase", "SOAPBase", "Optimizer8bit", "Optimizer1State",
             "Optimizer2State", "OptimiOptimizer")  # fmt: skip
LR = 0.01


def classes_of(package: str) -> dict[str, Any]:
    """The optimizers and wrappers that a module exports, by name; not those of torch that it passes on."""
    module = importlib.import_module(package)
    found = {}
    for name, kind in sorted(vars(module).items()):
        ours = inspect.isclass(kind) and (issubclass(kind, Optimizer) or name in _WRAPPERS)
        if not ours or name in _ABSTRACT or name != kind.__name__:
            continue
        if kind.__module__.partition(".")[0] == package.partition(".")[0]:
            found[name] = kind
    return found


class Two(nn.Module):
    """A matrix without gradients, and one that drives whatever an optimizer estimates."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.still, self.driver = nn.Linear(6, 8, bias=False), nn.Linear(6, 8, bias=False)
        self.to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.loss(0)

    def loss(self, step: int) -> torch.Tensor:
        g = torch.randn(8, 6, generator=torch.Generator().manual_seed(step)).to(self.driver.weight.dtype)
        return (self.driver.weight * g).sum() + 0.5 * (self.driver.weight**2).sum() + (self.still.weight**2 * 0).sum()


_NEEDED = {"num_iterations": 10_000, "num_epochs": 100, "num_batches_per_epoch": 100, "num_data": 100, "max_lr": LR}
_MOMENTUM = ("LARS", "LARS32bit", "LARS8bit", "PytorchLARS", "SGD", "SGD32bit", "SGD8bit")
_PROJECTED = {"rank": 2, "update_proj_gap": 5, "scale": 1.0, "proj": "random", "proj_type": "std",
              "scale_type": "tensor", "projection_type": "std"}  # fmt: skip


def build(kind: Any, model: Two, decay: float = 0.0, **settings: Any) -> Any:
    """An optimizer of a model's parameters, with a weight decay of its own."""
    name, package = kind.__name__, kind.__module__.partition(".")[0]
    accepted = inspect.signature(kind.__init__).parameters
    how: dict[str, Any] = {"lr": LR} if "lr" in accepted else {}
    how |= {key: decay for key in ("weight_decay", "wd") if key in accepted}
    how |= {"lr": 1.0, "d0": 0.01} if "d0" in accepted else {}
    how |= {key: value for key, value in _NEEDED.items() if key in accepted}
    how |= {"momentum": 0.9} if package == "bitsandbytes" and name in _MOMENTUM else {}
    how |= {"relative_step": False, "scale_parameter": False} if "relative_step" in accepted else {}
    how |= {"compile_step": False} if package == "heavyball" else {}
    how |= settings
    parameters = list(model.parameters())
    inner: Any = torch.optim.AdamW
    inner_how: dict[str, Any] = {"lr": LR, "weight_decay": decay}
    if name.startswith("ScheduleFreeWrapper"):
        return kind(torch.optim.SGD(parameters, lr=LR))
    if name in ("Lookahead", "TRAC", "OrthoGrad", "Magma", "PCGrad", "SafeFP16Optimizer"):
        return kind(inner(parameters, **inner_how), **settings)
    if name in ("SAM", "LookSAM", "FriendlySAM") and package == "pytorch_optimizer":
        return kind(parameters, inner, **inner_how)
    if name == "SAM":
        return kind(parameters, inner(parameters, **inner_how))
    if name == "WSAM":
        return kind(model, parameters, inner, **inner_how)
    if name == "SAMWrapper":
        heavyball = importlib.import_module("heavyball")
        return kind(parameters, heavyball.AdamW(parameters, compile_step=False, **inner_how))
    if name == "SplitOpt":
        return kind([{"params": parameters, "optimizer": inner, **inner_how}])
    if name == "BlockOptimizer":
        blocks = [["still"], ["driver"]]
        return kind(inner(parameters, **inner_how), list(model.named_parameters()), block_prefix_list=blocks)
    if name == "LayerWiseDummyOptimizer":
        return kind({p: inner([p], **inner_how) for p in parameters}, **inner_how)
    if name in ("AdamMini", "LOMO", "AdaLOMO", "Lomo", "AdaLomo"):
        return kind(model, **how)
    if name == "Adam_mini":
        return kind(list(model.named_parameters()), **how)
    if (
        name in ("Muon", "AdaMuon", "AdaGO", "NorMuon", "MuonClip", "DistributedMuon")
        and package == "pytorch_optimizer"
    ):
        return kind([{"params": parameters, "use_muon": True}], **how)
    if name.endswith("MuonWithAuxAdam"):
        return kind([{"params": parameters, "use_muon": True, "lr": LR, "weight_decay": decay}])
    if name.startswith("GaLore") or package == "apollo_torch":
        return kind([{"params": parameters, **_PROJECTED}], **how)
    return kind(parameters, **how)


def steps(optimizer: Any, model: Two, numbers: range) -> Iterator[None]:
    """Makes steps, by whatever way the class has."""
    stepped = optimizer.step
    wants_closure = "Closure" in type(optimizer).__name__ or type(optimizer).__name__ in (
        "LBFGS", "AliG", "BSAM", "SAM", "LookSAM", "FriendlySAM", "WSAM", "SAMWrapper")  # fmt: skip
    graph = type(optimizer).__name__ in ("AdaHessian", "Adahessian", "SophiaH")
    if callable(getattr(optimizer, "train", None)) and type(optimizer).__name__ != "SAMWrapper":
        optimizer.train()
    for number in numbers:

        def closure(number: int = number) -> torch.Tensor:
            optimizer.zero_grad()
            loss = model.loss(number)
            loss.backward(create_graph=graph)
            for parameter in model.parameters() if type(optimizer).__name__ == "SparseAdam" else ():
                parameter.grad = None if parameter.grad is None else parameter.grad.to_sparse()
            return loss

        if type(optimizer).__name__ == "AliG":
            loss = float(closure())
            stepped(lambda loss=loss: loss)
        elif wants_closure:
            stepped(closure)
        elif type(optimizer).__name__ == "PCGrad":
            optimizer.zero_grad()
            optimizer.pc_backward([model.loss(number)])
            stepped()
        else:
            closure()
            stepped()
        yield


def run(kind: Any, count: int, attach: Callable[[Any, Two], object] | None = None, **how: Any) -> tuple[Two, Any]:
    """Trains for some steps; without gradients of the matrix that is decayed."""
    model = Two()
    optimizer = build(kind, model, **how)
    torch.manual_seed(1)
    if attach is not None:
        attach(optimizer, model)
    for _ in steps(optimizer, model, range(count)):
        pass
    return model, optimizer
