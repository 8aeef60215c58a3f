"""The same model with a smaller head and KV cache, as an ordinary checkpoint of its own class.

Rotary planes are dropped and values given fewer directions; the result needs no code of this library. Which planes
and directions go is chosen on a text where one is given, and by the weights alone, with a warning, where not.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor, nn

from rankdecay.compress import calibration as texts
from rankdecay.compress.card import card
from rankdecay.compress.choice import PlaneScores, kept_planes, lost_energy, lost_planes, with_losses
from rankdecay.compress.files import StoredModel, check_new, new_directory, write_checkpoint
from rankdecay.compress.original import Original, Smaller
from rankdecay.compress.reduction import Moments, NotReducible, cached_heads, unturned_energies, value_energies
from rankdecay.compress.result import Compression, Size, usual_sizes
from rankdecay.compress.skeleton import model_class
from rankdecay.files import read_bytes

#: What is told of progress: what is done, how much of it, and of how much.
Progress = Callable[[str, int, int], None]

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
        sizes: other head sizes to show the cost of; by default 7/8, 3/4 and 1/2 of d where there is a text.
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
        raise ValueError("head_dim=None: say the size of a head; rankdecay.compress.plan shows what sizes cost.")
    if out is not None:
        out = Path(out).expanduser()
        check_new(out)  # before any work
    tell = progress or _silent
    with _transformers(), torch.inference_mode(False), torch.no_grad():
        return _compressed(model, head_dim, out, calibration, tokenizer, window, windows, sizes, tell)


def _compressed(
    model: nn.Module | str | Path,
    head_dim: int,
    out: str | Path | None,
    calibration: str | Path | Tensor | None,
    tokenizer: Any,
    window: int,
    windows: int,
    sizes: Sequence[int] | None,
    tell: Progress,
) -> nn.Module | Compression:
    plan_, smaller, read, moments, stored = _planned(
        model, head_dim, calibration, tokenizer, window, windows, sizes, tell
    )
    assert smaller is not None
    if isinstance(model, nn.Module):
        for note in plan_.notes:
            warnings.warn(note, stacklevel=3)
    if stored is not None:
        assert out is not None
        with new_directory(Path(out)) as folder:
            say = _counted(tell, "writing tensors")
            write_checkpoint(stored, smaller, moments, folder, card(plan_), say)
        return _with_out(plan_, out)
    total = len(smaller.layers)
    small = smaller.model(read, moments, lambda done: tell("making layers smaller", done, total))
    assert isinstance(model, nn.Module)
    _as_before(small, model)
    if out is not None:
        with new_directory(Path(out)) as folder:
            assert isinstance(small, nn.Module)
            small.save_pretrained(folder)  # pyright: ignore[reportCallIssue]
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
            (folder / "README.md").write_text(card(plan_), "utf-8")
        plan_ = _with_out(plan_, out)
    small.compression = plan_  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]
    return small.to(next(model.parameters()).device)


def _as_before(small: nn.Module, model: nn.Module) -> None:
    """Give the smaller model how the original generates, and which of its parameters are trained."""
    if getattr(model, "generation_config", None) is not None:
        small.generation_config = copy.deepcopy(model.generation_config)  # pyright: ignore[reportAttributeAccessIssue]
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    for name, parameter in small.named_parameters():
        parameter.requires_grad_(trained.get(name, True))


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
    with _transformers(), torch.inference_mode(False), torch.no_grad():
        tell = progress or _silent
        return _planned(model, head_dim, calibration, tokenizer, window, windows, sizes, tell)[0]


@contextmanager
def _transformers() -> Iterator[None]:
    """Check that transformers is there, and keep its progress bars out of the way."""
    if find_spec("transformers") is None:
        raise ValueError(
            "compress needs transformers, for whose classes it writes: pip install 'rankdecay[transformers]'."
        )
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _planned(
    model: nn.Module | str | Path,
    head_dim: int | None,
    calibration: str | Path | Tensor | None,
    tokenizer: Any,
    window: int,
    windows: int,
    sizes: Sequence[int] | None,
    tell: Progress,
) -> tuple[Compression, Smaller | None, Callable[[str], Tensor], list[Moments] | None, StoredModel | None]:
    stored = StoredModel(model) if isinstance(model, (str, Path)) else None
    kind, config, read = _opened(model, stored)
    original = Original(kind, config)
    if isinstance(model, nn.Module):
        original.skeleton.check_same(model)
    if stored is not None:
        names = [name for layer in original.layers for name in layer.parameters]
        stored.check(original.skeleton.shapes, names)
    if sizes is not None and (isinstance(sizes, str) or not isinstance(sizes, Sequence)):
        raise TypeError(f"sizes must be a list of head sizes, got {sizes!r}.")
    for wanted in (*([] if head_dim is None else [head_dim]), *(sizes or ())):
        _check_size(original, wanted)
    scores = original.scores(read)
    moments: list[Moments] | None = None
    notes = list(original.warnings)
    losses: Callable[[Smaller | None], float] | None = None
    if calibration is not None:
        live, tokens = _text(model, kind, stored, calibration, tokenizer, window, windows, config, tell)
        choosing, reported = tokens[::2], tokens[1::2]
        layers, keys = original.with_positions(original.layers)
        if not math.isfinite(texts.loss(live, choosing[:1])):
            raise ValueError("the model's loss on the text is no number: do its weights hold NaN or infinity?")
        moments = texts.moments(live, original.layers, choosing)
        scores = with_losses(scores, texts.plane_losses(live, layers, keys, original.turned(), choosing, tell))

        losses = partial(_loss, live, read, moments, reported)
    else:
        notes.append(_ENERGY)
    energies = [value_energies(layer, read, moments[i] if moments else None) for i, layer in enumerate(original.layers)]
    table: list[Size] = []
    smaller: Smaller | None = None
    listed = [original.head_dim, *_shown(original.head_dim, head_dim, sizes)]
    for count, size in enumerate(listed):
        small = None
        if size != original.head_dim:
            kept = kept_planes(scores, original.head_dim, size)
            small = original.smaller(size, kept, _written(config, stored))
            smaller = small if size == head_dim else smaller
        table.append(_size(original, small, scores, energies, read, losses))
        if losses is not None:
            tell("measuring head sizes", count + 1, len(listed))
    if head_dim is not None and head_dim % 8:
        notes.append(f"head size {head_dim} is no multiple of 8: many attention kernels are slow there, or refuse it.")
    counts = (0, 0)
    if smaller is not None:
        counts = (_parameters(original.skeleton.model), _parameters(smaller.skeleton.model))
    result = Compression(
        str(model) if stored is not None else kind.__name__,
        str(config.model_type),
        original.head_dim,
        head_dim,
        table,
        {} if smaller is None else {key or "all": planes.tolist() for key, planes in smaller.kept.items()},
        "loss" if calibration is not None else "energy",
        smaller is not None and _is_exact(smaller, scores, read),
        counts,
        notes,
    )
    return result, smaller, read, moments, stored


def _loss(
    live: nn.Module, read: Callable[[str], Tensor], moments: list[Moments], tokens: Tensor, small: Smaller | None
) -> float:
    """Return the loss of the original, or of the same with a smaller head, which is built for it."""
    model = live if small is None else small.model(read, moments, lambda done: None).to(torch.float32)
    return texts.loss(model, tokens)


def _opened(
    model: nn.Module | str | Path, stored: StoredModel | None
) -> tuple[type[nn.Module], Any, Callable[[str], Tensor]]:
    """Return class, configuration and reader of a model."""
    from transformers import AutoConfig, PreTrainedModel

    if stored is not None:
        try:
            config = AutoConfig.from_pretrained(str(stored.path), trust_remote_code=False, local_files_only=True)
        except Exception as error:  # whatever transformers makes of a configuration
            raise NotReducible(f"{stored.path / 'config.json'} is not one that transformers reads: {error}") from None
        return model_class(config), config, stored.read
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"model must be a model of transformers or the path of one, got {type(model).__name__}; of a model in "
            "wrappers give what is inside, and merge adapters first (merge_and_unload)."
        )
    state = model.state_dict()
    if odd := next((name for name, t in state.items() if t.is_meta), None):
        raise ValueError(f"{odd} is on the meta device and has no values; load the weights first.")
    config = _of_plain_weights(model, state)

    def read(name: str) -> Tensor:
        if name not in state:
            raise NotReducible(
                f"the model has no {name}, which its class should have: merge adapters first (merge_and_unload)."
            )
        return state[name].detach().cpu()

    return type(model), config, read


def _of_plain_weights(model: Any, state: Mapping[str, Tensor]) -> Any:
    """Return the configuration of a live model, once its weights are sure to be plain numbers.

    Of GGUF transformers says that a model is quantised even where it has unpacked every weight in loading it.
    """
    names = (name for name, _ in model.named_parameters(remove_duplicate=False))
    packed = next((name for name in names if not state[name].is_floating_point()), None)
    quantised = vars(model.config).get("quantization_config")
    of_gguf = getattr(quantised, "quant_method", None) == "gguf"
    if packed is not None or (quantised is not None and not of_gguf):
        what = "the model is quantised" if packed is None else f"{packed} is quantised ({state[packed].dtype})"
        remedy = (
            "load it with quantization_config=transformers.GgufConfig(dequantize=True)"
            if of_gguf
            else "dequantise the model first (model.dequantize())"
        )
        raise NotReducible(f"{what}: {remedy}.")
    if not of_gguf:
        return model.config
    config = copy.deepcopy(model.config)
    del config.quantization_config
    return config


def _text(
    model: nn.Module | str | Path,
    kind: Any,
    stored: StoredModel | None,
    calibration: str | Path | Tensor,
    tokenizer: Any,
    window: int,
    windows: int,
    config: Any,
    tell: Progress,
) -> tuple[nn.Module, Tensor]:
    """Return a live model and the windows of the text."""
    if not isinstance(window, int) or window < 2:
        raise ValueError(f"window={window!r} must be at least 2 tokens.")
    if not isinstance(windows, int) or windows < 2:
        raise ValueError(f"windows={windows} must be at least 2: one chooses, one is reported.")
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    if kind.__name__ not in CAUSAL.values():
        raise NotReducible(
            f"{kind.__name__} is no causal language model, whose loss on a text could choose: leave it out."
        )
    longest = getattr(config, "max_position_embeddings", None) or window
    if isinstance(model, nn.Module):
        tokens = texts.windows_of(calibration, tokenizer, min(window, longest), windows)
        return model, _known(tokens, config)
    assert stored is not None
    if not isinstance(calibration, Tensor):
        read_bytes(calibration, texts.LARGEST_TEXT)  # a path that is wrong is said before anything else
    if tokenizer is None and not isinstance(calibration, Tensor):
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(str(stored.path), local_files_only=True)
        except Exception as error:  # whatever is missing
            reason = str(error).partition("\n")[0].rstrip(" :.")
            raise ValueError(
                f"{stored.path} has no tokenizer that transformers reads ({reason}): save it there, or call "
                "rankdecay.compress with tokenizer=."
            ) from None
    tokens = texts.windows_of(calibration, tokenizer, min(window, longest), windows)
    tell("loading the model", 0, 1)
    live = kind.from_pretrained(str(stored.path), dtype=torch.float32, local_files_only=True).eval()
    return live, _known(tokens, config)


def _known(tokens: Tensor, config: Any) -> Tensor:
    """Return tokens, all of which the model knows."""
    if int(tokens.min()) < 0 or int(tokens.max()) >= config.vocab_size:
        raise ValueError(
            f"calibration has token {int(tokens.max())}, and the model knows 0 to {config.vocab_size - 1}: is the "
            "tokenizer that of the model?"
        )
    return tokens


def _written(config: Any, stored: StoredModel | None) -> dict[str, Any]:
    """Return what ``config.json`` holds, with ``rope_parameters`` as the class completes them."""
    if stored is None:
        return config.to_dict()
    written = dict(stored.config)
    parameters = config.to_dict().get("rope_parameters")
    return written | ({"rope_parameters": parameters} if parameters else {})


def _check_size(original: Original, size: int) -> None:
    if not hasattr(size, "__index__") or isinstance(size, bool) or size < 2 or size % 2:
        raise ValueError(
            f"head_dim={size!r} must be an even number of at least 2: rotary planes are of two coordinates."
        )
    if size >= original.head_dim:
        raise ValueError(f"head_dim={size} must be smaller than {original.head_dim}, the size of the model's heads.")


def _shown(head_dim: int, wanted: int | None, sizes: Sequence[int] | None) -> list[int]:
    usual = usual_sizes(head_dim) if sizes is None else sizes
    chosen = {size for size in [*usual, *([wanted] if wanted else [])] if 2 <= size < head_dim}
    return sorted(chosen, reverse=True)


def _size(
    original: Original,
    small: Smaller | None,
    scores: Mapping[str | None, PlaneScores],
    energies: Sequence[Tensor],
    read: Callable[[str], Tensor],
    losses: Callable[[Smaller | None], float] | None,
) -> Size:
    head_dim = original.head_dim if small is None else small.head_dim
    # a checkpoint is loaded in the type that its configuration names
    named = getattr(original.config, "dtype", None)
    weights = read(original.layers[0].found.places["key"].parameter).dtype
    width = (named if isinstance(named, torch.dtype) else weights).itemsize
    planes = lost_planes(scores, small.kept) if small else 0.0
    lost = lost_energy(energies, head_dim) if small else 0.0
    loss = losses(small) if losses is not None else None
    return Size(head_dim, cached_heads(original.skeleton.found) * head_dim * width, planes, lost, loss)


def _is_exact(
    smaller: Smaller,
    scores: Mapping[str | None, PlaneScores],
    read: Callable[[str], Tensor],
) -> bool:
    """Whether only zeros go; of values, and of what has no positions, up to what rounding leaves of a lower rank.

    Whatever the inputs: what a text does not show may be what another one has.
    """
    if not all(scores[key].is_free(kept) for key, kept in smaller.kept.items()):
        return False
    for number, layer in enumerate(smaller.layers):
        planes = smaller.planes(number)
        left = smaller.head_dim - (0 if planes is None else 2 * len(planes))
        energy = unturned_energies(layer, read)
        if energy is not None and not _ends(energy, left):
            return False
    return all(_ends(value_energies(layer, read, None), smaller.head_dim) for layer in smaller.layers)


def _ends(energies: Tensor, count: int) -> bool:
    """Whether no more than the first of some energies, largest first, are more than rounding."""
    return bool((energies[:, count:] <= 1e-12 * energies[:, :1]).all())


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _with_out(result: Compression, out: str | Path) -> Compression:
    return replace(result, out=str(out))


def _counted(tell: Progress, what: str) -> Callable[[int, int], None]:
    return lambda done, total: tell(what, done, total)


def _silent(what: str, done: int, total: int) -> None:
    pass
