"""What an attention module does when heads of its matrices are changed, against what is said of it.

Nothing here knows how a family stores or forms its queries and keys. A module is run again by itself on what it was
called with; its scores are caught below its own code, as what goes into a softmax.

* **Heads.** Rows of some heads of W_Q change places: the scores of these heads change, and of no other; of W_K those of
  the heads that meet them. Norms over a head, or over all of them, see no difference. The heads are chosen by the bits
  of their numbers, so that log₂ of them tell each from all others.
* **Values and outputs.** Without heads of W_V the module gives what it gives without the columns of W_O that read them.
* **Products.** W_Kᵀ W_Q and W_O W_V describe the module if it does not matter how they are factored: R W_Q with R⁻ᵀ W_K
  gives the same scores for any R, R W_V with W_O R⁻¹ the same output. With rotary positions that holds for the R that
  commute with turning the planes, and for no other; with QK-norm it does not.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from rankdecay.attention import AttentionLayer, MatrixView
from rankdecay.attention.products import Rotary

from .interventions import _numbers

QUERIES = ("query", "query_rotary", "query_position", "query_sine")
KEYS = ("key", "key_rotary", "key_position")
_SOFTMAX = (torch.ops.aten._softmax.default, torch.ops.aten._safe_softmax.default)


class Scores(TorchDispatchMode):
    """What goes into every softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in _SOFTMAX:
            self.seen.append(args[0].detach().clone())
        return func(*args, **(kwargs or {}))


def check(model: nn.Module, layer: AttentionLayer, again: Callable[[], object]) -> Iterator[str]:
    """Yield what differs from what is said of a layer; nothing if all is so."""
    before, whole = _run(again)
    if not before:
        yield "no softmax"
        return
    slots = yield from _heads(model, layer, again, before)
    if layer.output is not None:
        yield from _mixing(model, layer, again, whole)
        yield from _writing(model, layer, again, whole)
    if slots is not None:
        yield from _scoring(model, layer, again, before, slots)


def _run(again: Callable[[], object]) -> tuple[list[Tensor], Tensor]:
    mode = Scores()
    with mode, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        out = _output(again())
    return mode.seen, out.float()


def _output(output: object) -> Tensor:
    """What attention gives: the first tensor, not its weights or positions; all numbers of a model's output."""
    if isinstance(output, tuple) and len(output) > 1 and all(isinstance(part, tuple) for part in output):
        return torch.cat([_output(part) for part in output])  # of two attentions
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], (Tensor, tuple)):
        return _output(output[0])
    return _numbers(output)


def _choices(heads: int) -> list[list[int]]:
    """Sets of heads that tell each from all others: by each bit of their numbers, set and not set."""
    bits = max(1, (heads - 1).bit_length())
    sets = ([i for i in range(heads) if (i >> bit & 1) == value] for bit in range(bits) for value in (0, 1))
    return [chosen for chosen in sets if chosen]


@contextmanager
def changed(model: nn.Module, *changes: tuple[MatrixView, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Change matrices, given and taken head by head, through their windows."""
    kept = {view.parameter_name: model.get_parameter(view.parameter_name) for view, _ in changes}
    before = {name: parameter.clone() for name, parameter in kept.items()}
    for view, how in changes:
        parameter = kept[view.parameter_name]
        view.window.write(parameter, how(view.window.heads(parameter).clone()))
    try:
        yield
    finally:
        for name, parameter in kept.items():
            parameter.copy_(before[name])


def _of(heads: Sequence[int], how: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def change(value: Tensor) -> Tensor:
        value[heads] = how(value[heads])
        return value

    return change


# ---- heads ------------------------------------------------------------------------------------------------


def _heads(
    model: nn.Module, layer: AttentionLayer, again: Callable[[], object], before: list[Tensor]
) -> Generator[str, None, int | None]:
    """Check that scores change with their own heads; returns which of those that were caught are the layer's."""
    possible = {(i, how) for i, scores in enumerate(before) for how in range(scores.ndim)}
    for view in layer.views:
        if view.role not in (*QUERIES, *KEYS):
            continue
        for chosen in _choices(view.num_heads):
            with changed(model, (view, _of(chosen, lambda weight: weight.roll(1, -2)))):
                after, _ = _run(again)
            expected = {slot for head in chosen for slot in _meeting(layer, view, head)}
            left = {
                (i, how)
                for i, how in possible
                if i < len(after) and _moved(before[i], after[i], how, layer.num_heads) == expected
            }
            if not left:
                found = [_moved(before[i], after[i], how, layer.num_heads) for i, how in sorted(possible)]
                yield f"heads: {chosen} of {view.role} move {[f for f in found if f is not None][:4]}, not {expected}"
                return None
            possible = left
    return min(i for i, _ in possible)


def _meeting(layer: AttentionLayer, view: MatrixView, head: int) -> set[int]:
    if view.role in QUERIES:
        return {head}
    if view.num_heads == 1:
        return set(range(layer.num_heads))
    return {slot for slot in range(layer.num_heads) if layer.key_head(slot) == head}


def _moved(before: Tensor, after: Tensor, how: int, heads: int) -> set[int] | None:
    """The heads whose scores differ; None if these scores have no such heads.

    Args:
        before: scores, (…, queries, keys).
        after: others of the same shape.
        how: the dimension of the heads; the last for all that come before queries and keys, example by example.
        heads: number of heads.
    """
    if before.shape != after.shape:
        return None
    last = how == before.ndim - 1
    if last:
        if before.ndim < 2 or before[..., 0, 0].numel() % heads:
            return None
        before, after = (s.reshape(-1, heads, *s.shape[-2:]).transpose(0, 1) for s in (before, after))
    elif before.shape[how] == heads:
        before, after = before.movedim(how, 0), after.movedim(how, 0)
    else:
        return None
    open_ = before.isfinite() & (before > -1e4)
    scale = before[open_].abs().median() if open_.any() else 1.0
    differ = ((before - after).abs() > 2e-4 * scale) & open_
    return {head for head in range(heads) if bool(differ[head].any())}


# ---- values and outputs ---------------------------------------------------------------------------------


def _mixing(model: nn.Module, layer: AttentionLayer, again: Callable[[], object], whole: Tensor) -> Iterator[str]:
    output = layer.output
    assert output is not None
    for chosen in _choices(layer.value.num_heads):
        readers = [i for i in range(layer.num_heads) if layer.key_head(i) in chosen]
        problems: list[str] = []
        for value, columns in (
            (torch.zeros_like, torch.zeros_like),
            (lambda weight: weight.roll(1, -2), lambda weight: weight.roll(-1, -1)),  # where a norm is between
        ):
            with changed(model, (layer.value, _of(chosen, value))):
                _, one = _run(again)
            with changed(model, (output, _of(readers, columns))):
                _, other = _run(again)
            if _same(one, whole, 1e-3):
                problems.append(f"values: heads {chosen} change nothing")
            elif not _same(one, other, 1e-3):
                problems.append(f"values: heads {chosen} are not what columns {readers} read")
            else:
                break
        else:
            yield problems[0]
            return


def _same(one: Tensor, other: Tensor, tolerance: float) -> bool:
    if one.shape != other.shape:
        return False
    finite = one.isfinite() & other.isfinite()
    scale = float(one[finite].square().mean().sqrt())
    return bool(((one - other)[finite].abs() <= 10 * tolerance * scale).all())


# ---- products -------------------------------------------------------------------------------------------


def _shares_window(layer: AttentionLayer) -> bool:
    """Whether the keys are the values, which cannot be factored apart."""
    key, value = layer.key, layer.value
    return (key.parameter_name, key.window) == (value.parameter_name, value.window)


def _writing(model: nn.Module, layer: AttentionLayer, again: Callable[[], object], whole: Tensor) -> Iterator[str]:
    """Check whether W_O W_V is all that heads write, however it is factored."""
    output = layer.output
    if output is None or _shares_window(layer):
        return
    change = _mixers(layer.value.num_heads, layer.value.window.head_dim, None)
    back = torch.linalg.inv(change)[[layer.key_head(head) for head in range(layer.num_heads)]]
    with changed(model, (layer.value, lambda value: change @ value), (output, lambda columns: columns @ back)):
        _, other = _run(again)
    is_product = _same(whole, other, 3e-3)
    if is_product != layer.has_value_product:
        yield f"W_O W_V: {'a product' if is_product else 'no product'}, and said: {layer.no_value_product!r}"


def _scoring(
    model: nn.Module, layer: AttentionLayer, again: Callable[[], object], before: list[Tensor], which: int
) -> Iterator[str]:
    """Check whether scores are those of a product, for all positions, or of one that positions turn plane by plane."""
    if _shares_window(layer):
        return
    pairs = [("query", layer.query, layer.key, None if "query_rotary" in layer.factors else layer.rotary)]
    if "query_rotary" in layer.factors:
        pairs.append(("rotary", layer.factors["query_rotary"], layer.factors["key_rotary"], layer.rotary))
    for name, query, key, rotary in pairs:
        expected: dict[Rotary | None, bool] = {None: layer.has_score_product and rotary is None}
        if layer.has_score_product and rotary is not None:
            expected[rotary] = True
        for commuting, is_product in expected.items():
            change = _mixers(key.num_heads, query.window.head_dim, commuting)
            meets = [layer.key_head(head) if key.num_heads > 1 else 0 for head in range(query.num_heads)]
            there, back = change[meets], torch.linalg.inv(change).mT
            with changed(model, (query, lambda q, by=there: by @ q), (key, lambda k, by=back: by @ k)):
                after, _ = _run(again)
            if _alike(before[which], after[which]) != is_product:
                kind = "" if commuting is None else ", turned by planes,"
                said = f"rotary={rotary}, qk_norm={layer.qk_norm}, {layer.no_product!r}"
                yield f"W_Kᵀ W_Q of {name}{kind} {'no' if is_product else 'a'} product, and said: {said}"


def _alike(before: Tensor, after: Tensor) -> bool:
    if before.shape != after.shape:
        return False
    seen = before.isfinite() & (before > -1e4)
    scale = float(before[seen].square().mean().sqrt())
    return bool(((before - after)[seen].abs() <= 1e-2 * scale).all())


def _mixers(count: int, size: int, rotary: Rotary | None) -> Tensor:
    """A matrix (size, size) per key head; one that commutes with turning the planes, if there are any."""
    generator = torch.Generator().manual_seed(3)

    def free(n: int) -> Tensor:
        left, right = (torch.linalg.qr(torch.randn(count, n, n, generator=generator)).Q for _ in range(2))
        return left @ torch.diag_embed(torch.rand(count, n, generator=generator) * 1.5 + 0.5) @ right

    if rotary is None:
        return free(size)
    mixers = torch.zeros(count, size, size)
    mixers[:, rotary.dims :, rotary.dims :] = free(size - rotary.dims)
    half = rotary.dims // 2
    for plane in range(half):
        a, b = (2 * plane, 2 * plane + 1) if rotary.interleaved else (plane, plane + half)
        angle, gain = torch.rand(count, generator=generator) * 6, torch.rand(count, generator=generator) * 1.5 + 0.5
        mixers[:, a, a] = mixers[:, b, b] = gain * angle.cos()
        mixers[:, a, b], mixers[:, b, a] = -gain * angle.sin(), gain * angle.sin()
    return mixers
