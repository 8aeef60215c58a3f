"""The same model with a smaller head and KV cache, as an ordinary checkpoint of its own class.

Rotary planes are dropped and values given fewer directions; the result needs no code of this library. Which planes
and directions go is chosen on a text where one is given, and by the weights alone, with a warning, where not.
"""

from __future__ import annotations

import copy
import math
import operator
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor, nn

from rankdecay.compress import calibration as texts
from rankdecay.compress.calibration import Progress
from rankdecay.compress.card import card
from rankdecay.compress.choice import Scores, kept_planes, lost_energy, lost_planes, with_losses
from rankdecay.compress.files import check_new, new_directory, write_checkpoint, write_earlier_names
from rankdecay.compress.opened import Opened, opened
from rankdecay.compress.original import Original, Smaller
from rankdecay.compress.reduction import Moments, Read, cached_heads, unturned_energies, value_energies
from rankdecay.compress.result import Compression, Sample, Size, usual_sizes

_ENERGY = (
    "chosen without a text: planes by the energy of the weights, values as if all inputs counted alike. Energy is not "
    "loss: the fastest plane of SmolLM2-135M has little of it and is among those that cost most. Give a text of what "
    "the model is for (calibration=, --calibration)"
)


@overload
def compress(
    model: nn.Module,
    head_dim: int,
    out: str | Path | None = None,
    calibration: str | Path | Tensor | None = None,
    *,
    tokenizer: Any = None,
    window: int = texts.WINDOW,
    windows: int = texts.MOST_WINDOWS,
    sizes: Sequence[int] | None = None,
    progress: Progress | None = None,
) -> nn.Module: ...


@overload
def compress(
    model: str | Path,
    head_dim: int,
    out: str | Path | None = None,
    calibration: str | Path | Tensor | None = None,
    *,
    tokenizer: Any = None,
    window: int = texts.WINDOW,
    windows: int = texts.MOST_WINDOWS,
    sizes: Sequence[int] | None = None,
    progress: Progress | None = None,
) -> Compression: ...


def compress(
    model: nn.Module | str | Path,
    head_dim: int,
    out: str | Path | None = None,
    calibration: str | Path | Tensor | None = None,
    *,
    tokenizer: Any = None,
    window: int = texts.WINDOW,
    windows: int = texts.MOST_WINDOWS,
    sizes: Sequence[int] | None = None,
    progress: Progress | None = None,
) -> nn.Module | Compression:
    """Return a causal language model with a smaller head: fewer rotary planes, and values of lower rank.

    The result is of the class of the original and needs no code of ours; its KV cache is smaller by head_dim / d. What
    is dropped and is not zero costs loss: :func:`plan` shows how much, and training on wins some of it back
    (``docs/guides/compress.md``).

    Args:
        model: a model of transformers, or the directory of one (``save_pretrained``), which is read and written layer
            by layer, without building the model.
        head_dim: the size of a head wanted: even, smaller than the model's; a multiple of 8 for the kernels' sake.
        out: directory to write to, which must not exist. For a path it is needed.
        calibration: path of a text file, or tokens, (tokens,) or (windows, length): planes are chosen by the loss on
            every second window, values on what enters the layers there. Without it the weights alone decide, with a
            warning.
        tokenizer: of a live model, for a text; that of a directory is found beside it.
        window: tokens of a window.
        windows: number of windows, spread over the text; half of them choose.
        sizes: other head sizes to show the cost of; by default 7/8, 3/4 and 1/2 of d.
        progress: is told of progress: what, done, of how many.

    Returns:
        Of a live model the smaller model, in the same type on the same device, with its :class:`Compression` as
        ``compression``; of a path the :class:`Compression`.

    Raises:
        NotReducible: (a ``ValueError``) If its head cannot be made smaller in its class, with the reason.
        ValueError: If an argument cannot work, or files cannot be read or written.
    """
    if isinstance(model, (str, Path)) and out is None:
        raise ValueError("out is needed for a model in files: name a directory that does not exist yet.")
    if head_dim is None:
        raise ValueError("head_dim=None: pass the size of a head; rankdecay.compress.plan shows what sizes cost.")
    if out is not None:
        out = Path(out).expanduser()
        check_new(out)  # before any work
    tell = progress or _silent
    text = None if calibration is None else texts.Text(calibration, tokenizer, window, windows)
    with _transformers():
        planned = _planned(opened(model), head_dim, text, sizes, tell)
        if planned.given.live is None:
            assert out is not None
            return _to_files(planned, out, tell)
        for note in planned.result.notes:
            warnings.warn(note, stacklevel=2)
        return _to_model(planned, planned.given.live, out, tokenizer, tell)


def plan(
    model: nn.Module | str | Path,
    head_dim: int | None = None,
    calibration: str | Path | Tensor | None = None,
    *,
    tokenizer: Any = None,
    window: int = texts.WINDOW,
    windows: int = texts.MOST_WINDOWS,
    sizes: Sequence[int] | None = None,
    progress: Progress | None = None,
) -> Compression:
    """Return what :func:`compress` would do and cost, and write nothing; the arguments are the same.

    Without ``head_dim`` only the table of sizes.
    """
    text = None if calibration is None else texts.Text(calibration, tokenizer, window, windows)
    with _transformers():
        return _planned(opened(model), head_dim, text, sizes, progress or _silent).result


@contextmanager
def _transformers() -> Iterator[None]:
    """Check that transformers is there, keep its progress bars out of the way, and compute no gradients."""
    if find_spec("transformers") is None:
        raise ValueError(
            "compress needs transformers, for whose classes it writes: pip install 'rankdecay[transformers]'."
        )
    from transformers import __version__ as version
    from transformers.utils import logging

    if int(version.partition(".")[0]) < 5:  # whose configurations hold frequencies in another form
        raise ValueError(
            f"compress needs transformers 5 or later, this is {version}: pip install -U 'rankdecay[transformers]'; the "
            "smaller model is read by earlier ones too, where they know its class."
        )
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with torch.inference_mode(False), torch.no_grad():
            yield
    finally:
        if shown:
            logging.enable_progress_bar()


class _Choice(NamedTuple):
    """Scores by which planes and values are chosen.

    Attributes:
        scores: of the planes, by table of frequencies.
        moments: of the inputs of each layer; None without a text.
        loss: returns the loss that a smaller model has on the text, or the original for None; None without a text.
        measured_on: what that loss is measured on; None without a text.
    """

    scores: Scores
    moments: list[Moments] | None = None
    loss: Callable[[Smaller | None], float] | None = None
    measured_on: Sample | None = None


class _Planned(NamedTuple):
    """A model, what is to become of it (None if only the sizes were asked for), and what that costs."""

    given: Opened
    smaller: Smaller | None
    moments: list[Moments] | None
    result: Compression


def _planned(
    given: Opened, head_dim: int | None, text: texts.Text | None, sizes: Sequence[int] | None, tell: Progress
) -> _Planned:
    original = Original(given.kind, given.config)
    given.check(original)
    if sizes is not None and (isinstance(sizes, str) or not isinstance(sizes, Sequence)):
        raise TypeError(f"sizes must be a list of head sizes, got {sizes!r}.")
    if head_dim is not None:
        head_dim = _size(original, head_dim, f"head_dim={head_dim!r}")
    if sizes is not None:
        sizes = [_size(original, wanted, f"{wanted!r} in sizes={list(sizes)}") for wanted in sizes]
    choice = _Choice(original.scores(given.read))
    if text is not None:
        choice = _by_loss(given, original, choice.scores, text, tell)
    energies = _value_energies(given, original, choice.moments)
    table, smaller = _sizes(given, original, choice, energies, _shown(original.head_dim, head_dim, sizes), tell)
    made = smaller.get(head_dim) if head_dim is not None else None
    notes = [*original.warnings, *_unread(given, original), *([_ENERGY] if text is None else [])]
    if head_dim is not None and head_dim % 8:
        notes.append(
            f"head size {head_dim} is not a multiple of 8: many attention kernels are slow there, or refuse it."
        )
    result = Compression(
        source=given.name,
        model_type=str(given.config.model_type),
        head_dim=original.head_dim,
        new_head_dim=head_dim,
        sizes=table,
        chosen_by="energy" if text is None else "loss",
        measured_on=choice.measured_on,
        notes=notes,
    )
    if made is not None:
        # what a text does not show may be what another one has
        whatever = energies if choice.moments is None else _value_energies(given, original, None)
        result = replace(
            result,
            kept={key or "all": planes.tolist() for key, planes in made.kept.items()},
            exact=_is_exact(made, choice.scores, given.read, whatever),
            parameters=(_parameters(original.skeleton.model), _parameters(made.skeleton.model)),
        )
    return _Planned(given, made, choice.moments, result)


def _unread(given: Opened, original: Original) -> list[str]:
    """Return a note on attention in the files that the class does not read, as of a layer for speculative decoding."""
    if given.stored is None:
        return []
    ends = {tuple(name.split(".")[-2:]) for layer in original.layers for name in layer.parameters}
    attention_names = [name for name in given.stored.checkpoint.shapes if tuple(name.split(".")[-2:]) in ends]
    left = [name for name in attention_names if name not in original.skeleton.shapes]
    more = f" and {len(left) - 1} more" if len(left) > 1 else ""
    kind = original.kind.__name__
    note = f"attention that {kind} does not read, and what it does not read is copied with heads of the old size."
    return [f"{left[0]}{more}: {note}"] if left else []


def _value_energies(given: Opened, original: Original, moments: list[Moments] | None) -> list[Tensor]:
    of_layers = moments or [None] * len(original.layers)
    return [value_energies(layer, given.read, one) for layer, one in zip(original.layers, of_layers, strict=True)]


def _sizes(
    given: Opened, original: Original, choice: _Choice, energies: list[Tensor], head_dims: list[int], tell: Progress
) -> tuple[list[Size], dict[int, Smaller]]:
    """Return what head sizes cost, the original's first, and the smaller models by the size of their heads."""
    each = cached_heads(original.skeleton.found) * _itemsize(given, original)  # bytes of a coordinate
    table: list[Size] = []
    smaller: dict[int, Smaller] = {}
    for head_dim in (original.head_dim, *head_dims):
        kept = kept_planes(choice.scores, original.head_dim, head_dim)
        if head_dim != original.head_dim:
            smaller[head_dim] = original.smaller(head_dim, kept, given.written)
        size = Size(head_dim, each * head_dim, lost_planes(choice.scores, kept), lost_energy(energies, head_dim))
        if choice.loss is not None:
            size = replace(size, loss=choice.loss(smaller.get(head_dim)))
            tell("measuring head sizes", len(table) + 1, len(head_dims) + 1)
        table.append(size)
    return table, smaller


def _by_loss(given: Opened, original: Original, scores: Scores, text: texts.Text, tell: Progress) -> _Choice:
    """Return what a text chooses: planes by the loss without each, values by what enters the layers."""
    live, tokens = texts.live_with_tokens(given, text, tell)
    if given.live is None:
        original.skeleton.check_same(live)  # as embeddings that files hold twice, and differing, are not
    choosing, reported = tokens[::2], tokens[1::2]
    if not math.isfinite(texts.loss(live, choosing[:1])):
        raise ValueError("the model's loss on the text is NaN or infinite: do its weights hold NaN or infinity?")
    moments = texts.moments(live, original.layers, choosing)
    layers, keys = original.with_positions(original.layers)
    losses = texts.plane_losses(live, layers, keys, original.turned(), choosing, tell)
    state, attention = live.state_dict(), {name for layer in original.layers for name in layer.parameters}

    def read(name: str) -> Tensor:
        """Read attention as it is stored; files may hold the rest under other names, experts one by one."""
        return given.read(name) if name in attention else state[name].detach().cpu()

    def loss(smaller: Smaller | None) -> float:
        model = live if smaller is None else smaller.model(read, moments, lambda done: None).to(torch.float32)
        return texts.loss(model, reported)

    return _Choice(with_losses(scores, losses), moments, loss, Sample(*reported.shape))


def _to_files(planned: _Planned, out: Path, tell: Progress) -> Compression:
    """Write the smaller model of one in files, layer by layer."""
    assert planned.given.stored is not None
    assert planned.smaller is not None
    with new_directory(out) as folder:
        say = partial(tell, "writing tensors")
        write_checkpoint(planned.given.stored, planned.smaller, planned.moments, folder, card(planned.result), say)
    return replace(planned.result, out=str(out))


def _to_model(planned: _Planned, model: nn.Module, out: Path | None, tokenizer: Any, tell: Progress) -> nn.Module:
    """Return the smaller model of a live one, written too if that is asked for."""
    assert planned.smaller is not None
    total = len(planned.smaller.layers)
    small: Any = planned.smaller.model(
        planned.given.read, planned.moments, lambda done: tell("making layers smaller", done, total)
    )
    _as_before(small, model)
    small.compression = planned.result
    if out is not None:
        with new_directory(out) as folder:
            small.save_pretrained(folder)
            write_earlier_names(folder)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
            (folder / "README.md").write_text(card(planned.result), "utf-8")
        small.compression = replace(planned.result, out=str(out))
    return small.to(next(model.parameters()).device)


def _as_before(small: nn.Module, model: nn.Module) -> None:
    """Give the smaller model how the original generates, and which of its parameters are trained."""
    if getattr(model, "generation_config", None) is not None:
        small.generation_config = copy.deepcopy(model.generation_config)  # pyright: ignore[reportAttributeAccessIssue]
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    for name, parameter in small.named_parameters():
        parameter.requires_grad_(trained.get(name, True))


def _size(original: Original, wanted: int, given: str) -> int:
    """Return a head size as a plain number, of NumPy's too.

    Raises:
        ValueError: If no smaller head has it; ``given`` names it as the user has written it.
    """
    try:
        size = 0 if isinstance(wanted, bool) else operator.index(wanted)
    except TypeError:
        size = 0
    if size < 2 or size % 2:
        raise ValueError(f"{given} must be an even number of at least 2: rotary planes are of two coordinates.")
    if size >= original.head_dim:
        raise ValueError(f"{given} must be smaller than {original.head_dim}, the size of the model's heads.")
    return size


def _shown(head_dim: int, wanted: int | None, sizes: Sequence[int] | None) -> list[int]:
    usual = usual_sizes(head_dim) if sizes is None else sizes
    chosen = {size for size in [*usual, *([wanted] if wanted else [])] if 2 <= size < head_dim}
    return sorted(chosen, reverse=True)


def _itemsize(given: Opened, original: Original) -> int:
    """Return the bytes of a number in the cache: a checkpoint is loaded in the type that its configuration names."""
    named = getattr(given.config, "dtype", None)
    weights = given.read(original.layers[0].found.places["key"].parameter).dtype
    return (named if isinstance(named, torch.dtype) else weights).itemsize


def _is_exact(smaller: Smaller, scores: Scores, read: Read, values: Sequence[Tensor]) -> bool:
    """Whether only zeros go; of values, and of what has no positions, up to what rounding leaves of a lower rank."""
    if not all(scores[key].is_free(kept) for key, kept in smaller.kept.items()):
        return False
    for number, layer in enumerate(smaller.layers):
        planes = smaller.planes(number)
        left = smaller.head_dim - (0 if planes is None else 2 * len(planes))
        energy = unturned_energies(layer, read)
        if energy is not None and not _ends(energy, left):
            return False
    return all(_ends(energy, smaller.head_dim) for energy in values)


def _ends(energies: Tensor, count: int) -> bool:
    """Whether no more than the first of some energies, largest first, are more than rounding."""
    return bool((energies[:, count:] <= 1e-12 * energies[:, :1]).all())


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _silent(what: str, done: int, total: int) -> None:
    pass
