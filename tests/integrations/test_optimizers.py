"""Every optimizer of docs/guides/optimizers.md, from the packages of those who publish them."""

from __future__ import annotations

import copy
import importlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankdecay as rd
from rankdecay.attention.layer import WHOLE
from rankdecay.decay.apply import Step
from rankdecay.decay.averaged import decay_averaged
from tests import needs
from tests.decay.models import make_model
from tests.integrations.third_party import LR, PACKAGES, Two, build, classes_of, run, steps

# What these packages warn of is not ours.
pytestmark = pytest.mark.filterwarnings("ignore")

PAGE = (Path(__file__).parents[2] / "docs" / "guides" / "optimizers.md").read_text(encoding="utf-8")
STEPS, SHARE = 13, 0.05  # two averages of Lookahead are made on the way
#: Left of a matrix where the parameters are stepped and nothing else moves them.
LEFT = (1 - SHARE) ** STEPS
#: They move a weight without gradients by themselves.
RESTLESS = ("FOCUS", "Gravity")


def _rows(first_cell: str) -> list[list[str]]:
    """Cells of the table whose header starts with this."""
    lines = PAGE.split(f"| {first_cell} |", 1)[1].split("\n\n", 1)[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


TABLE = [
    (row[0].strip("`"), name, how)
    for row in _rows("module")
    for how, cell in zip(("plain", "lags", "averages", "refused", "not run"), row[1:], strict=True)
    for name in cell.split(", ")
    if name != "-"
]
PLAIN, LAGS, AVERAGES, REFUSED = (
    [pytest.param(package, name, id=f"{package}.{name}") for package, name, how in TABLE if how == wanted]
    for wanted in ("plain", "lags", "averages", "refused")
)


@pytest.fixture(scope="module", autouse=True)
def published(optimizers: Path, request: pytest.FixtureRequest) -> Iterator[None]:
    """All packages, and the process group that some of them need."""
    importlib.import_module("badam")  # which imports transformers' trainer, before torchvision can be seen
    request.getfixturevalue("timm")
    importlib.import_module("heavyball.utils").compile_mode = None
    needs.package("bitsandbytes")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def _kind(package: str, name: str) -> Any:
    return classes_of(package)[name]


def _attach(decay: rd.Frobenius | rd.LowRank) -> Callable[[Any, nn.Module], rd.Attachment]:
    return lambda optimizer, model: rd.attach(optimizer, model, other=decay, exclude="driver")


PER_STEP = rd.Frobenius(SHARE, lr_coupled=False)


def _left(kind: Any, decay: rd.Frobenius = PER_STEP) -> float:
    alone, _ = run(kind, STEPS)
    decayed, _ = run(kind, STEPS, _attach(decay))
    return float(decayed.still.weight.norm() / alone.still.weight.norm())


def test_the_page_names_every_class_of_every_package() -> None:
    named = {(package, name) for package, name, _ in TABLE}
    assert len(named) == len(TABLE)
    assert named == {(package, name) for package in PACKAGES for name in classes_of(package)}


@pytest.mark.parametrize(("package", "name"), PLAIN)
def test_decays_the_parameters(package: str, name: str) -> None:
    assert _left(_kind(package, name)) == pytest.approx(LEFT, rel=0.07 if name in RESTLESS else 1e-4)


@pytest.mark.parametrize(("package", "name"), LAGS)
def test_what_lags_leaves_what_its_own_l2_leaves(package: str, name: str) -> None:
    kind = _kind(package, name)
    left = _left(kind)
    assert LEFT + 0.05 < left < 0.75
    own, optimizer = run(kind, STEPS, decay=SHARE / LR)
    if name not in ("RangerQH", "Ranger21"):  # coupled, or divided by a mean of the gradients
        assert float(own.still.weight.norm() / Two().still.weight.norm()) == pytest.approx(left, rel=0.03)
    attachment = _attach(PER_STEP)(optimizer, own)
    assert f"note: {name} averages the weights with slow ones" in attachment.describe()


@pytest.mark.parametrize(("package", "name"), REFUSED)
def test_refuses_what_undoes_a_decay(package: str, name: str) -> None:
    model = Two()
    optimizer = build(_kind(package, name), model)
    [reason] = [why for names, why in _rows("optimizer |it …".replace("|", "| ")) if name in names.split(", ")]
    with pytest.raises((ValueError, TypeError), match=f"^{name} {re.escape(reason)}"):
        _attach(PER_STEP)(optimizer, model)


# ---- schedule-free ---------------------------------------------------------------------------------------


def _point(optimizer: Any, model: Two) -> tuple[Tensor, Tensor, float]:
    """The average and the iterate in float64, and β."""
    group = optimizer.param_groups[0]
    beta = group["betas"][0] if "betas" in group else group["momentum"]
    p, z = model.still.weight.detach().double(), optimizer.state[model.still.weight]["z"].double()
    return p if "Closure" in type(optimizer).__name__ else p.lerp(z, 1 - 1 / beta), z, beta


def _thresholded(W: Tensor, tau: Tensor) -> Tensor:
    u, s, vh = torch.linalg.svd(W, full_matrices=False)
    return (u * (s - tau).clamp_min(0)) @ vh


def _in_range(X: Tensor, Z: Tensor, tau: Tensor) -> Tensor:
    u, s, vh = torch.linalg.svd(Z, full_matrices=False)
    keep = s**2 / (s**2 + tau**2)
    return (u * keep) @ u.mT @ X @ (vh.mT * keep) @ vh


@pytest.mark.parametrize("low_rank", [False, True])
@pytest.mark.parametrize(("package", "name"), AVERAGES)
def test_schedule_free_by_the_formulas_in_float64(package: str, name: str, low_rank: bool) -> None:
    kind, strength = _kind(package, name), 0.4
    decay = rd.LowRank(strength, lr_coupled=False) if low_rank else rd.Frobenius(strength, lr_coupled=False)
    model = Two()
    optimizer = build(kind, model)
    before: list[tuple[Tensor, Tensor, float]] = []
    optimizer.register_step_post_hook(lambda *_: before.append(_point(optimizer, model)))
    _attach(decay)(optimizer, model)
    for _ in steps(optimizer, model, range(8)):
        x, z, beta = before[-1]
        new_x, new_z, _ = _point(optimizer, model)
        if low_rank:
            tau = strength * z.norm() / 6**0.5
            want_z = _thresholded(z, tau)
            kept = _in_range(x, want_z, tau)
            want_x = kept + _thresholded(x - kept, tau)
        else:
            want_x, want_z = x, z - strength * (beta * x + (1 - beta) * z)
        torch.testing.assert_close(new_z, want_z, atol=2e-6, rtol=1e-4)
        torch.testing.assert_close(new_x, want_x, atol=4e-6, rtol=1e-4)


@pytest.mark.parametrize(("package", "name"), AVERAGES)
def test_schedule_free_l2_leaves_what_its_own_leaves(package: str, name: str) -> None:
    """In training and in evaluation mode; by the hook, and by the optimizer, to which it is left."""
    kind, strength, lefts = _kind(package, name), 0.8, []
    settings = {"lr": 1e-3 / 0.1, "d0": 0.1} if "Prodigy" in name else {}
    for way in ("own", "attached", "hook"):
        model = Two()
        optimizer = build(kind, model, decay=strength if way == "own" else 0.0, **settings)
        if way == "attached":
            _attach(rd.Frobenius(strength))(optimizer, model)
        rates: list[float] = []
        for _ in steps(optimizer, model, range(40)):
            group = optimizer.param_groups[0]
            rates.append(float(group.get("scheduled_lr", LR)) if "d" not in group else group["d_prev"] * group["lr"])
            if way == "hook":
                with torch.no_grad():
                    step = Step([model.still.weight], [WHOLE], rd.Frobenius(strength), strength * rates[-1], 0)
                    decay_averaged(optimizer, group, step, "auto")
        trained = model.still.weight.norm().item()
        if callable(getattr(optimizer, "eval", None)):
            optimizer.eval()
        lefts.append((trained, model.still.weight.norm().item()))
    own, attached, hook = lefts
    assert own[0] < 0.99 * Two().still.weight.norm()
    assert attached == own
    assert hook == pytest.approx(own, rel=1.1 * strength * LR)  # which the average sees a step later


def test_schedule_free_evaluates_weights_of_low_rank() -> None:
    ranks = {}
    for kind in (_kind("schedulefree", "AdamWScheduleFree"), torch.optim.AdamW):
        model = make_model()
        optimizer = kind(model.parameters(), lr=5e-3, weight_decay=0.0)
        attachment = rd.attach(optimizer, model, query_key=rd.LowRank(20.0))
        if kind is not torch.optim.AdamW:
            optimizer.train()
            assert "averages: a low-rank decay acts on its base iterate" in attachment.describe()
        for step in range(150):
            ids = torch.randint(9, (8,), generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(ids), ids).backward()
            optimizer.step()
        if kind is not torch.optim.AdamW:
            optimizer.eval()
        weight = model.layers[0]["attention"].q_proj.weight.detach()
        ranks[kind] = float(rd.spectrum(weight).numerical_rank())
        assert weight.norm() > 0
    averaged, plain = ranks.values()
    assert plain <= averaged <= plain + 3 < 10


def test_schedule_free_in_16_bits_decays_on_average() -> None:
    """A thousandth a step is below the last digit of z and of y."""
    model = Two(torch.bfloat16)
    with torch.no_grad():
        model.still.weight.copy_(torch.rand(8, 6) + 0.5)
    optimizer = build(_kind("schedulefree", "SGDScheduleFree"), model)
    _attach(rd.Frobenius(0.1))(optimizer, model)
    start, expected = model.still.weight.detach().double().sum(), torch.tensor(0.0, dtype=torch.float64)
    for _ in steps(optimizer, model, range(400)):
        expected += LR * 0.1 * model.still.weight.detach().double().sum()
    z = optimizer.state[model.still.weight]["z"].double().sum()
    assert float(start - z) == pytest.approx(float(expected), rel=0.05)
    assert expected > 0.1 * start


# ---- rates -----------------------------------------------------------------------------------------------

RELATIVE = {"lr": None, "relative_step": True, "scale_parameter": True}
#: Class, its settings, and those of its own decoupled decay.
RATES = [
    ("prodigyopt", "Prodigy", {}, {}),
    ("prodigyopt", "Prodigy", {"use_bias_correction": True}, {}),
    ("pytorch_optimizer", "Prodigy", {"bias_correction": True}, {}),
    ("dadaptation", "DAdaptAdam", {"decouple": True}, {}),
    ("dadaptation", "DAdaptAdam", {"decouple": True, "use_bias_correction": True}, {}),
    ("dadaptation", "DAdaptAdan", {"no_prox": True}, {}),
    ("dadaptation", "DAdaptLion", {}, {}),
    ("pytorch_optimizer", "DAdaptAdam", {}, {"weight_decouple": True}),
    ("pytorch_optimizer", "DAdaptLion", {}, {"weight_decouple": True}),
    ("prodigyplus", "ProdigyPlusScheduleFree", {"use_schedulefree": False}, {}),
    ("prodigyplus", "ProdigyPlusScheduleFree", {"use_schedulefree": False, "use_bias_correction": True}, {}),
    ("transformers.optimization", "Adafactor", RELATIVE, {}),
    ("torch_optimizer", "Adafactor", RELATIVE, {}),
    ("timm.optim", "Adafactor", {"lr": None}, {}),
    ("pytorch_optimizer", "AdaFactor", {"relative_step": True, "scale_parameter": True}, {}),
    ("torch.optim", "Adafactor", {}, {}),
    ("torch.optim", "AdamW", {}, {}),
]


@pytest.mark.parametrize(("package", "name", "settings", "own"), RATES)
def test_a_decay_has_the_rate_of_the_optimizers_own(package: str, name: str, settings: dict, own: dict) -> None:
    """Absolute shrinkage of a number takes strength · rate from it, and L2 of its own that share."""
    if package == "timm.optim":
        settings = {key: value for key, value in settings.items() if key in ("lr",)}
    kind, strength = _kind(package, name), 1e-2
    shares: list[list[float]] = []
    for ours in (False, True):
        model = Two()
        optimizer = build(kind, model, **({} if ours else {"decay": 1e-2} | own), **settings)
        attachment = None
        if ours:
            decay = rd.LowRank(strength, scale="absolute")
            attachment = _attach(decay)(optimizer, model)
        found = []
        before = model.still.weight.detach().clone()
        for _ in steps(optimizer, model, range(8)):
            now = model.still.weight.detach().clone()
            if ours:
                found.append(float((torch.linalg.svdvals(before) - torch.linalg.svdvals(now))[0]) / strength)
            else:
                found.append(float((before - now).norm() / before.norm()) / strength)
            before = now
        assert attachment is None or attachment.active
        shares.append(found)
    theirs, measured = shares
    assert max(theirs) > 0
    assert measured == pytest.approx(theirs, rel=0.02, abs=2e-4)


WARM = {"num_warmup_iterations": 3, "num_epochs": 1, "num_batches_per_epoch": 8, "warmdown_start_pct": 0.5}
WARM_DOWN = {"num_iterations": 5, "num_warm_up_iterations": 2, "num_warm_down_iterations": 2}
#: Class, its settings, and lr · what its own schedule makes of it in each step.
SCHEDULES = [
    *(("heavyball", name, {"warmup_steps": 4}, [0.2, 0.4, 0.6, 0.8, 1, 1]) for name in ("AdamW", "SGD", "Muon")),
    ("heavyball", "AdamW", {}, [1, 1, 1]),
    ("pytorch_optimizer", "ApolloDQN", {"warmup_steps": 4, "init_lr": LR / 5}, [0.4, 0.6, 0.8, 1, 1]),
    ("pytorch_optimizer", "Ranger21", {"num_iterations": 20, "num_warm_up_iterations": 5}, [0.2, 0.4, 0.6, 0.8]),
    ("pytorch_optimizer", "Ranger21", WARM_DOWN | {"warm_down_min_lr": LR / 10}, [0.5, 1, 0.7, 0.4]),
    ("pytorch_optimizer", "Ranger21", WARM_DOWN | {"disable_lr_scheduler": True}, [1, 1, 1, 1]),
    ("torch_optimizer", "Apollo", {"warmup": 4, "init_lr": LR / 5}, [0.2, 0.4, 0.6, 0.8, 1, 1]),
    ("torch_optimizer", "Apollo", {}, [1, 1, 1]),
    ("ranger21", "Ranger21", WARM | {"warmdown_min_lr": LR / 5}, [1 / 3, 2 / 3, 1, 0.84]),
    ("ranger21", "Ranger21abel", {"num_warmup_iterations": 4}, [0.25, 0.5, 0.75, 1, 1]),
    ("torch.optim", "Adagrad", {"lr_decay": 1.0}, [1, 1 / 2, 1 / 3, 1 / 4]),
    ("torch.optim", "Adagrad", {"lr_decay": 1.0, "foreach": True}, [1, 1 / 2, 1 / 3, 1 / 4]),
    ("torch.optim", "Adagrad", {"lr_decay": 1.0, "fused": True}, [1, 1 / 2, 1 / 3, 1 / 4]),
    ("torch.optim", "ASGD", {"alpha": 300.0}, [(1 + 1e-4 * LR * step) ** -300.0 for step in range(5)]),
]


@pytest.mark.parametrize(("package", "name", "settings", "shares"), SCHEDULES)
def test_a_decay_follows_the_warm_up_and_the_schedule_of_an_optimizers_own(
    package: str, name: str, settings: dict, shares: list[float]
) -> None:
    """Also where its groups are divided, and on what has no part in the first steps."""
    strength, found = 1e-2, []
    for own in (0.0,) if package == "ranger21" or name == "ASGD" else (0.0, 0.1):  # the former decays another's weight
        model, found = Two(), []
        optimizer = build(_kind(package, name), model, decay=own, **settings)
        _attach(rd.LowRank(strength, scale="absolute"))(optimizer, model)
        before = torch.linalg.svdvals(model.still.weight.detach().double())
        for _ in steps(optimizer, model, range(len(shares))):
            now = torch.linalg.svdvals(model.still.weight.detach().double())
            found.append(float((before - now).mean()) / strength / LR)
            before = now
        slack = 0.06 if "Ranger21" in name else 0.01  # whose norm loss moves a weight by itself
        assert found == pytest.approx(shares, abs=slack), own


@pytest.mark.parametrize(("name", "settings"), [("Adagrad", {"lr_decay": 0.1}), ("ASGD", {})])
def test_what_counts_the_steps_of_each_parameter_takes_every_step(name: str, settings: dict) -> None:
    model = Two()
    optimizer = build(_kind("torch.optim", name), model, **settings)
    with pytest.raises(ValueError, match=f"{name} has another rate for each parameter in each step; use every=1"):
        _attach(rd.LowRank(0.1, every=2))(optimizer, model)


def test_a_parameter_that_joins_late_begins_with_the_first_rate() -> None:
    model = Two().double()
    optimizer = torch.optim.Adagrad(model.parameters(), lr=LR, lr_decay=1.0)
    _attach(rd.Frobenius(1.0))(optimizer, model)
    for step in range(4):
        model.loss(step).backward()
        if step < 2:
            model.still.weight.grad = None
        before = model.still.weight.detach().clone()
        optimizer.step()
        optimizer.zero_grad()
        share = {2: LR, 3: LR / 2}.get(step, 0.0)
        torch.testing.assert_close(model.still.weight.detach(), before * (1 - share))


def test_what_a_strength_means_is_said_at_the_rate_that_acts() -> None:
    model = Two()
    optimizer = _kind("prodigyopt", "Prodigy")(model.parameters(), lr=1.0, d0=1e-4)
    assert (
        "at the present rate of 0.0001 a step takes 5e-05 of" in _attach(rd.Frobenius(0.5))(optimizer, model).describe()
    )


def test_no_rate_is_refused() -> None:
    model = Two()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.param_groups[0]["lr"] = None
    with pytest.raises(ValueError, match="SGD has no 'lr' in its groups; use lr_coupled=False"):
        _attach(rd.LowRank(0.1))(optimizer, model)
    with pytest.raises(ValueError, match="another rate for each parameter in each step; use every=1"):
        _attach(rd.LowRank(0.1, every=2))(build(_kind("transformers.optimization", "Adafactor"), model), model)


# ---- wrappers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("package", ["sam", "pytorch_optimizer"])
@pytest.mark.parametrize("to_base", [False, True])
@pytest.mark.parametrize("two_steps", [False, True])
def test_sam_is_decayed_once_a_round(package: str, to_base: bool, two_steps: bool) -> None:
    model = Two()
    optimizer = build(_kind(package, "SAM"), model)
    base = optimizer.optim if package == "sam" else optimizer.base_optimizer
    _attach(PER_STEP)(base if to_base else optimizer, model)
    before = model.still.weight.norm()
    for step in range(3):
        if two_steps and hasattr(optimizer, "first_step"):
            model.loss(step).backward()
            optimizer.first_step(zero_grad=True)
            model.loss(step).backward()
            optimizer.second_step(zero_grad=True)
        else:

            def closure(step: int = step) -> Tensor:
                optimizer.zero_grad()
                loss = model.loss(step)
                loss.backward()
                return loss

            optimizer.step(closure)
    torch.testing.assert_close(model.still.weight.norm(), before * (1 - SHARE) ** 3)


def test_gradient_release_decays_each_parameter_in_the_backward_pass() -> None:
    optimi = importlib.import_module("optimi")
    model = Two()
    optimizer = optimi.AdamW(model.parameters(), lr=LR, weight_decay=0.0, gradient_release=True)
    optimi.prepare_for_gradient_release(model, optimizer)
    _attach(PER_STEP)(optimizer, model)
    before = model.still.weight.norm()
    for step in range(3):
        model.loss(step).backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(model.still.weight.norm(), before * (1 - SHARE) ** 3)
    other = Two()
    optimizer = optimi.AdamW(other.parameters(), lr=LR, gradient_release=True)
    with pytest.raises(ValueError, match=r"gradient_release=True AdamW steps each parameter by itself.*use every=1"):
        _attach(rd.LowRank(0.1, every=2))(optimizer, other)
    optimizer.param_groups[0]["weight_decay"] = 0.5
    with pytest.raises(ValueError, match="AdamW cannot step a part of group 0 without its weight_decay"):
        _attach(PER_STEP)(optimizer, other)


def test_one_optimizer_for_each_parameter_stepped_by_a_hook() -> None:
    model = Two()
    its = {p: torch.optim.SGD([p], lr=LR) for p in model.parameters()}
    for parameter, optimizer in its.items():

        def stepped(p: Tensor, optimizer: torch.optim.Optimizer = optimizer) -> None:
            optimizer.step()
            optimizer.zero_grad()

        parameter.register_post_accumulate_grad_hook(stepped)
    rd.attach(its[model.still.weight], model, other=PER_STEP)
    before = model.still.weight.norm()
    for step in range(3):
        model.loss(step).backward()
    torch.testing.assert_close(model.still.weight.norm(), before * (1 - SHARE) ** 3)


def test_what_only_looks_like_an_optimizer_is_a_type_error() -> None:
    class Steps:
        def __init__(self, parameters: Any) -> None:
            self.param_groups = [{"params": list(parameters), "lr": LR}]

        def step(self) -> None: ...

    model = Two()
    with pytest.raises(TypeError, match="got Steps, which has param_groups but no step hooks: subclass torch"):
        _attach(PER_STEP)(Steps(model.parameters()), model)


class _Clips(torch.optim.Optimizer):
    """Holds an optimizer and steps it, and calls no `Optimizer.__init__`, as the wrapper of Opacus."""

    def __init__(self, held: torch.optim.Optimizer, under: str) -> None:
        if under:
            setattr(self, under, held)
        self._held = lambda: held

    @property
    def param_groups(self) -> Any:
        return self._held().param_groups

    def step(self, closure: Any = None) -> Any:
        return self._held().step(closure)


@pytest.mark.parametrize("under", ["original_optimizer", "base"])
def test_a_wrapper_that_is_an_optimizer_without_hooks_is_seen_through_or_refused(under: str) -> None:
    model = Two()
    before = model.still.weight.detach().clone()
    inside = torch.optim.SGD(model.parameters(), lr=LR)
    with pytest.raises(TypeError, match=r"^_Clips has no step hooks.*attach to the optimizer it steps"):
        _attach(PER_STEP)(_Clips(inside, ""), model)
    wrapper = _Clips(inside, under)
    attachment = _attach(PER_STEP)(wrapper, model)
    assert attachment.optimizer is inside
    model.loss(0).backward()
    wrapper.step()
    torch.testing.assert_close(model.still.weight.detach(), before * (1 - SHARE))


def test_opacus() -> None:
    """A virtual step, which only gathers gradients, decays nothing."""
    wrapper = needs.package("opacus.optimizers").DPOptimizer
    model = Two()
    before = model.still.weight.detach().clone()
    private = {"noise_multiplier": 0.0, "max_grad_norm": 1.0, "expected_batch_size": 2}
    optimizer = wrapper(torch.optim.SGD(model.parameters(), lr=LR), **private)
    _attach(PER_STEP)(optimizer, model)
    for skipped, left in ((True, 1.0), (False, 1 - SHARE)):
        for p in model.parameters():
            p.grad_sample = torch.zeros(2, *p.shape)
        optimizer.signal_skip_step(skipped)
        optimizer.step()
        torch.testing.assert_close(model.still.weight.detach(), before * left)
        optimizer.zero_grad()


@pytest.mark.parametrize("name", ["AdamW8bit", "Lion"])
@pytest.mark.parametrize("by", ["roles", "groups"])
def test_bitsandbytes_resumes_in_mid_cycle(name: str, by: str) -> None:
    """Its load_state_dict calls no hooks."""
    kind, decay = _kind("bitsandbytes.optim", name), rd.LowRank(0.5, every=4)

    def attached(model: Two) -> Any:
        if by == "roles":
            optimizer = build(kind, model)
            _attach(decay)(optimizer, model)
        else:
            optimizer = kind(rd.param_groups(model, other=decay, exclude="driver"), lr=LR)
            rd.attach(optimizer)
        return optimizer

    whole = Two()
    optimizer = attached(whole)
    for _ in steps(optimizer, whole, range(6)):
        pass
    model, state = copy.deepcopy((whole.state_dict(), optimizer.state_dict()))
    for _ in steps(optimizer, whole, range(6, 9)):
        pass
    resumed = Two()
    other = attached(resumed)
    resumed.load_state_dict(model)
    other.load_state_dict(state)
    for _ in steps(other, resumed, range(6, 9)):
        pass
    assert torch.equal(resumed.still.weight, whole.still.weight)


def test_bitsandbytes_groups_of_a_run_without_decay_are_noticed() -> None:
    kind = _kind("bitsandbytes.optim", "AdamW")
    plain, model = Two(), Two()
    saved, _ = build(kind, plain), None
    for _ in steps(saved, plain, range(1)):
        pass
    state = copy.deepcopy(saved.state_dict())
    groups = rd.param_groups(model, other=rd.LowRank(0.1))
    optimizer = kind(groups, lr=LR)
    rd.attach(optimizer)
    optimizer.load_state_dict(state)
    model.loss(0).backward()
    with pytest.raises(ValueError, match="the loaded optimizer state has no decay for other in group 0"):
        optimizer.step()


# ---- weights of an optimizer's own, in a class that nobody knows -------------------------------------------


class _FromStart(torch.optim.SGD):
    """Computes the parameters from their start and a sum of gradients."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for p in self.param_groups[0]["params"]:
            state = self.state[p]
            state.setdefault("origin", p.detach().clone())
            state.setdefault("total", torch.zeros_like(p)).add_(p.grad)
            p.copy_(state["origin"] - LR * state["total"])


class _Nested(_FromStart):
    """The same, in a dictionary of the state."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for p in self.param_groups[0]["params"]:
            its = self.state[p].setdefault(0, {"origin": p.detach().clone()})
            its["origin"].sub_(p.grad, alpha=LR)
            p.copy_(its["origin"])


class _Masters(torch.optim.SGD):
    """Steps copies in float32, in a list."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, lr=LR)
        self.masters = [p.detach().float().clone() for p in self.param_groups[0]["params"]]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for p, master in zip(self.param_groups[0]["params"], self.masters, strict=True):
            master.sub_(p.grad.float(), alpha=LR)
            p.copy_(master)


class _SlowWeights(torch.optim.SGD):
    """Puts the parameters back to an average after each step."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for p in self.param_groups[0]["params"]:
            slow = self.state[p].setdefault("anchor", p.detach().clone())
            slow.lerp_(p - LR * p.grad, 0.1)
            p.copy_(slow)


class _FlatMasters(torch.optim.SGD):
    """Keeps all weights one behind the other, in 32 bits, as fused optimizers do."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        trained = [p for p in self.param_groups[0]["params"] if p.grad is not None]
        if "flat" not in vars(self):
            self.flat = torch.cat([p.flatten().float() for p in trained])
        self.flat.sub_(torch.cat([p.grad.flatten() for p in trained]), alpha=LR)
        for p, value in zip(trained, self.flat.split([p.numel() for p in trained]), strict=True):
            p.copy_(value.view_as(p))


class _GroupsOfMasters(torch.optim.SGD):
    """Keeps them in groups like its own, as Apex does."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        if "masters" not in vars(self):
            self.masters = [{"wide": [p.float().clone() for p in group["params"]]} for group in self.param_groups]
        for p, wide in zip(self.param_groups[0]["params"], self.masters[0]["wide"], strict=True):
            if p.grad is not None:
                p.copy_(wide.sub_(p.grad, alpha=LR))


class _FlatWeights(torch.optim.SGD):
    """Steps one vector, of which the parameters are parts: nothing is a copy."""

    def __init__(self, parameters: Any, lr: float) -> None:
        held = list(parameters)
        super().__init__(held, lr)
        self.flat = torch.cat([p.detach().flatten() for p in held])
        for p, value in zip(held, self.flat.split([p.numel() for p in held]), strict=True):
            p.data = value.view_as(p)


def test_parameters_that_are_parts_of_one_vector_are_decayed() -> None:
    model = Two()
    before = model.still.weight.norm().item()
    optimizer = _FlatWeights(model.parameters(), LR)
    _attach(PER_STEP)(optimizer, model)
    model.loss(0).backward()
    optimizer.step()
    assert model.still.weight.norm().item() == pytest.approx(before * (1 - SHARE))


@pytest.mark.parametrize(
    ("kind", "entry", "dtype"),
    [
        (_FlatMasters, "flat", torch.float32),
        (_FlatMasters, "flat", torch.bfloat16),
        (_GroupsOfMasters, "wide", torch.bfloat16),
        (_FromStart, "origin", torch.float32),
        (_Nested, "origin", torch.float32),
        (_Masters, "masters", torch.bfloat16),
        (_SlowWeights, "anchor", torch.float32),
    ],
)
def test_an_unknown_optimizer_that_keeps_weights_is_refused_at_its_first_step(kind, entry, dtype) -> None:
    model = Two(dtype)
    optimizer = kind(model.parameters(), **({} if kind is _Masters else {"lr": LR}))
    _attach(PER_STEP)(optimizer, model)
    model.loss(0).backward()
    with pytest.raises(ValueError, match=f"{kind.__name__} keeps a copy of the weights in its state \\('{entry}'\\)"):
        optimizer.step()


# ---- the optimizer's own L2 ------------------------------------------------------------------------------

TENSOR_COUNTS = [("optimi", name) for name in ("Adam", "AdamW", "Adan", "RAdam", "StableAdamW")] + [
    ("timm.optim", "Lamb"), ("muon", "SingleDeviceMuonWithAuxAdam"), ("lion_pytorch", "Lion"),
    ("pytorch_optimizer", "MuonClip"), ("bitsandbytes.optim", "AdamW"),
]  # fmt: skip


@pytest.mark.parametrize(("package", "name"), TENSOR_COUNTS)
def test_a_group_stepped_in_two_parts_is_stepped_once(package: str, name: str) -> None:
    """The other parameter is trained as if nothing were attached, and the named one has no L2."""
    kind = _kind(package, name)
    alone, _ = run(kind, 6, decay=0.5)
    named, _ = run(kind, 6, _attach(rd.Frobenius(0.0)), decay=0.5)
    assert torch.equal(alone.driver.weight, named.driver.weight)
    assert torch.equal(named.still.weight, Two().still.weight)
    assert not torch.equal(alone.still.weight, named.still.weight)


@pytest.mark.parametrize("package", ["torch_optimizer", "pytorch_optimizer"])
def test_what_cannot_be_divided_is_refused_only_where_it_must_be(package: str) -> None:
    kind = _kind(package, "AdaBound")
    with pytest.raises(ValueError, match="AdaBound cannot step a part of group 0 without its weight_decay: give the"):
        run(kind, 1, _attach(PER_STEP), decay=0.5)
    decayed, _ = run(kind, 2, _attach(PER_STEP))
    torch.testing.assert_close(decayed.still.weight.norm(), Two().still.weight.norm() * (1 - SHARE) ** 2)


def test_a_group_of_all_that_is_named_is_not_divided() -> None:
    """Queries and keys that differ in shape, as grouped ones do, are spared the same weight decay."""
    model = make_model()
    named = [p for name, p in model.named_parameters() if name.endswith(("q_proj.weight", "k_proj.weight"))]
    rest = [p for p in model.parameters() if all(p is not each for each in named)]
    optimizer = _kind("pytorch_optimizer", "AdaBound")([{"params": rest}, {"params": named}], lr=LR, weight_decay=0.5)
    rd.attach(optimizer, model, query_key=PER_STEP, exclude="layers.2")
    before = [p.norm() for p in named]
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    torch.testing.assert_close([p.norm() for p in named], [norm * (1 - SHARE) for norm in before])


def test_a_group_with_lists_beside_its_parameters_is_not_divided() -> None:
    peft = needs.package("peft")
    optimizers = needs.package("peft.optimizers")

    def adapted(weight_decay: float) -> tuple[nn.Module, Any]:
        config = peft.LoraConfig(target_modules=["still", "driver"], r=2, init_lora_weights=False)
        torch.manual_seed(1)
        model = peft.inject_adapter_in_model(config, Two())
        model.active_adapters, model.peft_config = ["default"], {"default": config}
        how = {"r": 2, "lora_alpha": 8, "lr": LR, "weight_decay": weight_decay}
        return model, optimizers.create_lorafa_optimizer(model, **how)

    model, optimizer = adapted(0.5)
    of_every = "which has names and scaling_factors of every parameter"
    with pytest.raises(ValueError, match=f"LoraFAOptimizer cannot step a part of group 0 .*, {of_every}: give the"):
        _attach(PER_STEP)(optimizer, model)
    model, optimizer = adapted(0.0)
    _attach(PER_STEP)(optimizer, model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.step()
    for name, p in model.named_parameters():
        left = 1 - SHARE if "still.lora_B" in name else 1
        torch.testing.assert_close(p.detach(), before[name] * left, msg=name)


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [("DeMo", {"decay": 0.5}, "weight_decay=0.5"), ("SaRA", {"lambda_rank": 0.1}, "lambda_rank=0.1")],
)
def test_a_decay_that_no_group_switches_off_is_refused(name: str, settings: dict, words: str) -> None:
    with pytest.raises(ValueError, match=f"{name} decays group 0 by its own {words}, which cannot be switched off"):
        run(_kind("pytorch_optimizer", name), 1, _attach(PER_STEP), **settings)


class _OwnKey(torch.optim.SGD):
    """An optimizer that nobody has listed, with a setting of its own in every group."""

    def __init__(self, params: Any, key: str, value: Any) -> None:
        super().__init__(params, LR)
        for group in self.param_groups:
            group[key] = value


@pytest.mark.parametrize(
    "key", ["decoupled_wd", "wd_factor", "l2_reg", "weight_decay_coefficient", "head_weight_decay"]
)
def test_a_key_that_reads_as_a_decay_is_refused(key: str) -> None:
    model = Two()
    with pytest.raises(ValueError, match=f"_OwnKey decays group 0 by its own {key}=0.1, .*; build it with {key}=0"):
        _attach(PER_STEP)(_OwnKey(model.parameters(), key, 0.1), model)
    for value in (0.0, True):
        _attach(PER_STEP)(_OwnKey(model.parameters(), key, value), model).detach()


@pytest.mark.parametrize("key", ["wd_ratio", "lr_decay", "momentum_decay", "beta2_decay", "decay_rate", "ema_decay"])
def test_a_key_that_is_no_decay_is_none(key: str) -> None:
    model = Two()
    _attach(PER_STEP)(_OwnKey(model.parameters(), key, 0.1), model).detach()
