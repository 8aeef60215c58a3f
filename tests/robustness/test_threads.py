"""Threads and processes: attaching and training side by side, forks after use, and how many threads compute."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankdecay as rd
from rankdecay.decay.attachment import attached
from tests import needs
from tests.robustness.forked import forked
from tests.robustness.samples import attention


def side_by_side(*acts: Callable[[], None]) -> None:
    """Run functions in a thread each, and raise what one of them raised."""
    raised: list[BaseException] = []

    def guarded(act: Callable[[], None]) -> None:
        try:
            act()
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=guarded, args=(act,)) for act in acts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads)
    if raised:
        raise raised[0]


def model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.MultiheadAttention(8, 2, batch_first=True)


def attach(of: nn.Module) -> tuple[torch.optim.Optimizer, rd.Attachment]:
    optimizer = torch.optim.AdamW(of.parameters(), lr=1e-2)
    return optimizer, rd.attach(optimizer, of, query_key=rd.LowRank(0.5), backend="exact")


def test_attaching_in_several_threads() -> None:
    """The attachments are looked through while others come and go; threads take turns as often as Python allows."""

    held = [attach(nn.MultiheadAttention(2, 1)) for _ in range(30)]

    def often(of: nn.Module) -> None:
        for _ in range(20):
            attach(of)[1].detach()

    def look() -> None:
        for _ in range(20_000):
            attached()

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        side_by_side(look, *(partial(often, model(i)) for i in range(3)))
    finally:
        sys.setswitchinterval(before)
    for _, attachment in held:
        attachment.detach()


def train(of: nn.Module, steps: int = 30) -> list[Tensor]:
    """Train a model on batches of its own, and return its parameters."""
    optimizer, attachment = attach(of)
    batches = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(4, 5, 8, generator=batches)
        optimizer.zero_grad()
        of(x, x, x)[0].square().mean().backward()
        optimizer.step()
    attachment.detach()
    return [parameter.detach().clone() for parameter in of.parameters()]


def test_two_trainings_in_two_threads_are_those_one_after_the_other() -> None:
    """Also where one attaches while the other is in the middle of a step, whose groups are cut for its length."""
    alone = [train(model(seed)) for seed in (0, 1)]
    for _ in range(5):
        models = [model(seed) for seed in (0, 1)]  # made here: the seed of torch is one for all threads
        together: dict[int, list[Tensor]] = {}
        side_by_side(*(lambda i=i: together.update({i: train(models[i])}) for i in (0, 1)))  # noqa: B023 - it waits
        for i, parameters in enumerate(alone):
            assert all(torch.equal(ours, theirs) for ours, theirs in zip(together[i], parameters, strict=True))


def test_attaching_in_the_middle_of_a_step_of_another_thread() -> None:
    """What happens by chance above, made to happen: the other's groups must stay cut until its step ends."""
    first, second = attention(), model(1)
    cut: list[int] = []

    class Watched(torch.optim.AdamW):
        def step(self, closure: Any = None) -> Any:
            cut.append(len(self.param_groups))
            side_by_side(lambda: attach(second)[1].detach())
            cut.append(len(self.param_groups))
            return super().step(closure)

    optimizer = Watched(first.parameters(), lr=1e-2)
    attachment = rd.attach(optimizer, first, query_key=rd.LowRank(0.5))
    whole = len(optimizer.param_groups)
    for parameter in first.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert cut[0] == cut[1] > whole
    assert len(optimizer.param_groups) == whole
    attachment.detach()


@needs.fork
def test_a_fork_after_use_computes_the_same() -> None:
    """What the library keeps (attachments, caches) is as good in a child; torch's own pool of threads is not."""
    if torch.get_num_threads() > 1:
        pytest.skip(needs.ONE_THREAD)
    expected, report = train(model(0)), str(rd.inspect(model(0)))

    def child() -> int:
        same = all(torch.equal(ours, theirs) for ours, theirs in zip(train(model(0)), expected, strict=True))
        return 0 if same and str(rd.inspect(model(0))) == report else 1

    ended = forked(child, seconds=60)
    assert (ended.how, ended.code) == ("exit", 0), ended.err.decode()


def test_one_thread_and_two_agree_to_rounding() -> None:
    """What is promised: the same numbers up to the order of torch's own sums, and bitwise the same for one number."""
    before = torch.get_num_threads()
    torch.manual_seed(0)
    large = nn.MultiheadAttention(96, 4)
    start = {name: value.clone() for name, value in large.state_dict().items()}

    def decayed() -> Tensor:
        large.load_state_dict(start)
        optimizer, attachment = attach(large)
        for parameter in large.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        attachment.detach()
        assert large.in_proj_weight is not None
        return large.in_proj_weight.detach().clone()

    try:
        results = {}
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results[threads] = decayed()
            assert torch.equal(results[threads], decayed()), threads
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(results[1], results[2], rtol=1e-5, atol=1e-6)


@needs.fork
def test_a_process_has_its_own_attachments() -> None:
    if torch.get_num_threads() > 1:
        pytest.skip(needs.ONE_THREAD)
    small = model(0)
    optimizer, attachment = attach(small)

    def child() -> int:
        for parameter in small.parameters():
            parameter.grad = torch.zeros_like(parameter)
        before = [parameter.detach().clone() for parameter in small.parameters()]
        optimizer.step()
        return int(all(torch.equal(a, b) for a, b in zip(before, small.parameters(), strict=True)))

    ended = forked(child, seconds=60)
    assert (ended.how, ended.code) == ("exit", 0), ended.err.decode()
    attachment.detach()
