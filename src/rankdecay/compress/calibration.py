"""Measurements on a text: the loss, the loss with one rotary plane left out, and the inputs of attention.

Half of the windows of the text, every second one, are for choosing, the other half for the loss that is reported.
"""

from __future__ import annotations

import codecs
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rankdecay.attention.errors import CheckpointError
from rankdecay.compress.opened import Opened
from rankdecay.compress.reduction import Layer, Moments, NotReducible, as_matrix
from rankdecay.files import read_bytes

WINDOW, MOST_WINDOWS = 512, 24
LARGEST_TEXT = 2**28

#: Byte order marks of what is no UTF-8, the longer ones first: that of UTF-16 is the beginning of another.
_OTHER_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}

#: What is told of progress: what is done, how much of it, and of how much.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Text:
    """A text as the user gives it.

    Attributes:
        given: path of a text file, or tokens.
        tokenizer: turns text into tokens; None: what is beside a model in files.
        window: tokens of a window, at the most.
        windows: number of windows.
    """

    given: str | Path | Tensor
    tokenizer: Any = None
    window: int = WINDOW
    windows: int = MOST_WINDOWS


def live_with_tokens(model: Opened, text: Text, progress: Progress) -> tuple[nn.Module, Tensor]:
    """Return a model alive, loaded if it is in files, and the windows of a text, all of whose tokens it knows.

    Raises:
        NotReducible: If it is no causal language model.
        ValueError: If the text is too short, or not in its tokens.
    """
    if not isinstance(text.window, int) or text.window < 2:
        raise ValueError(f"window={text.window!r} must be at least 2 tokens.")
    if not isinstance(text.windows, int) or text.windows < 2:
        raise ValueError(f"windows={text.windows} must be at least 2: one chooses, one is reported.")
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    if model.kind.__name__ not in CAUSAL.values():
        raise NotReducible(
            f"{model.kind.__name__} is not a causal language model, so no loss on a text can choose: omit the text."
        )
    length = min(text.window, getattr(model.config, "max_position_embeddings", None) or text.window)
    tokenizer = text.tokenizer
    if tokenizer is None and model.stored is not None:
        tokenizer = partial(_tokens_of, model.stored.path)
    tokens = windows_of(text.given, tokenizer, length, text.windows)
    if int(tokens.min()) < 0 or int(tokens.max()) >= model.config.vocab_size:
        raise ValueError(
            f"calibration has token {int(tokens.max())}, and the model knows 0 to {model.config.vocab_size - 1}: is "
            "the tokenizer that of the model?"
        )
    if model.live is not None:
        return model.live, tokens
    progress("loading the model", 0, 1)
    return _loaded(model), tokens


def _loaded(model: Opened) -> nn.Module:
    """Return a model in files alive, once its files are sure to hold all of it in the shapes of its configuration."""
    kind: Any = model.kind
    try:
        how = {"dtype": torch.float32, "local_files_only": True, "ignore_mismatched_sizes": True}
        live, found = kind.from_pretrained(model.name, output_loading_info=True, **how)
    except (OSError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"transformers does not load {model.name}: {reason}") from None
    odd = sorted([*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])])
    if odd:  # the class would draw it at random
        raise CheckpointError(
            f"{model.name} has no {odd[0]} of the shape that its configuration says: the weights are not those of this "
            "config.json."
        )
    return live.eval()


def _tokens_of(path: Path, text: str, **options: Any) -> Any:
    """Call the tokenizer beside a model, which is not loaded before there is a text."""
    from transformers import AutoTokenizer

    try:
        # left open, transformers asks on the terminal whether to run code that the files name
        tokenizer = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False, local_files_only=True)
    except Exception as error:  # whatever is missing
        reason = str(error).partition("\n")[0].rstrip(" :.")
        raise ValueError(
            f"{path} has no tokenizer that transformers reads ({reason}): save it there, or call rankdecay.compress "
            "with tokenizer=."
        ) from None
    return tokenizer(text, **options)


def windows_of(text: str | Path | Tensor, tokenizer: Any, length: int, most: int = MOST_WINDOWS) -> Tensor:
    """Return a text as windows of tokens, (windows, length).

    Args:
        text: path of a text file, or tokens: (tokens,), or (windows, length), which are taken as they are.
        tokenizer: turns text into tokens, as those of transformers do; not needed for tokens.
        length: tokens of a window.
        most: number of windows, spread over the text.

    Raises:
        ValueError: If the text is shorter than two windows, is no UTF-8, or there is no tokenizer for it.
    """
    if isinstance(text, Tensor):
        _check_tokens(text)
        tokens = text.long()
        if tokens.ndim == 2:
            return tokens
    elif not isinstance(text, (str, Path)):
        raise TypeError(f"calibration must be the path of a text or a tensor of tokens, got {type(text).__name__}.")
    else:
        if tokenizer is None:
            raise ValueError(f"calibration={str(text)!r} is text, and there is no tokenizer: pass tokenizer=.")
        tokens = torch.tensor(tokenizer(_read_text(text), add_special_tokens=False, verbose=False)["input_ids"])
    whole = len(tokens) // length
    if whole < 2:
        raise ValueError(
            f"calibration has {len(tokens)} tokens, fewer than two windows of {length}: give a longer text, or a "
            "smaller window."
        )
    chosen = torch.linspace(0, whole - 1, min(whole, most)).round().long()
    return tokens[: whole * length].view(whole, length)[chosen]


def _read_text(path: str | Path) -> str:
    """Return what a file of UTF-8 says, without its byte order mark.

    Raises:
        ValueError: If it cannot be read, or is in another encoding or no text at all.
    """
    content = read_bytes(path, LARGEST_TEXT, remedy="name a text file for calibration=.")
    for mark, encoding in _OTHER_MARKS.items():
        if content.startswith(mark):
            raise ValueError(
                f"calibration={str(path)!r} is {encoding.upper()}, by its byte order mark at byte 0, and should be "
                f"UTF-8: convert it, iconv -f {encoding} -t utf-8."
            )
    start = len(codecs.BOM_UTF8) if content.startswith(codecs.BOM_UTF8) else 0
    try:
        text = content[start:].decode("utf-8")
        at = content.find(b"\0")  # UTF-16 without a mark is UTF-8 where it holds ASCII, with a zero beside each letter
    except UnicodeDecodeError as error:
        text, at = "", start + error.start
    if at >= 0:
        raise ValueError(
            f"calibration={str(path)!r} is not UTF-8 text at byte {at}: if it is text, convert it from its encoding, "
            "such as iconv -f utf-16le -t utf-8; else name a text file."
        )
    return text


def _check_tokens(text: Tensor) -> None:
    if text.is_floating_point() or text.is_complex() or text.dtype == torch.bool or text.ndim not in (1, 2):
        raise ValueError(
            f"calibration is a tensor of {text.dtype} and shape {tuple(text.shape)}, expected numbers of tokens, "
            "(tokens,) or (windows, length)."
        )
    if text.ndim == 2 and text.shape[1] < 2:
        raise ValueError(f"calibration has windows of {text.shape[1]} tokens, expected at least 2.")
    if text.ndim == 2 and len(text) < 2:
        raise ValueError(f"calibration has {len(text)} window, expected at least 2: one chooses, one is reported.")


@torch.no_grad()
def loss(model: nn.Module, windows: Tensor) -> float:
    """Return the mean loss of a causal language model on windows of tokens, in nats per token, no window at once."""
    device = next(model.parameters()).device
    modes, total = [(module, module.training) for module in model.modules()], 0.0
    model.eval()  # without dropout
    try:
        for window in windows:
            tokens = window[None].to(device)
            logits = model(input_ids=tokens, use_cache=False).logits
            total += float(F.cross_entropy(logits[0, :-1].float(), tokens[0, 1:], reduction="sum"))
    finally:
        for module, training in modes:
            module.training = training
    return total / (windows.shape[0] * (windows.shape[1] - 1))


@torch.no_grad()
def moments(model: nn.Module, layers: Sequence[Layer], windows: Tensor) -> list[Moments]:
    """Return the second moments of what enters the projections of each layer, over windows of tokens."""
    sums: list[Tensor | None] = [None] * len(layers)

    def record(number: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].flatten(0, -2).float()
            x = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
            gram = (x.mT @ x).double().cpu()
            before = sums[number]
            sums[number] = gram if before is None else before.add_(gram)

        return hook

    hooks = []
    for number, layer in enumerate(layers):
        path = layer.found.places["value"].parameter.rpartition(".")[0]
        hooks.append(model.get_submodule(path).register_forward_pre_hook(record(number)))
    try:
        loss(model, windows)
    finally:
        for hook in hooks:
            hook.remove()
    return [Moments(total) for total in sums if total is not None]


@contextmanager
def _without_plane(model: nn.Module, layers: Sequence[Layer], plane: int) -> Iterator[None]:
    """Leave a plane out: its rows of W_Q and W_K, and of their biases, are zero. A smaller head computes the same."""
    parameters = dict(model.named_parameters())
    saved: dict[str, Tensor] = {}
    try:
        for layer in layers:
            assert layer.found.rotary is not None
            rows = layer.found.rotary.planes()[plane]
            for role in ("query", "key"):
                for name, window in layer.found.places[role].parts():
                    data = parameters[name].data
                    saved.setdefault(name, data.clone())
                    heads = window.heads(as_matrix(data)).clone()
                    heads[:, rows] = 0
                    with torch.inference_mode(data.is_inference()):  # what was loaded under it changes only there
                        window.write(as_matrix(data), heads)
        yield
    finally:
        for name, data in saved.items():
            with torch.inference_mode(parameters[name].is_inference()):
                parameters[name].data.copy_(data)


def plane_losses(
    model: nn.Module,
    layers: Sequence[Layer],
    keys: Sequence[str | None],
    planes: Mapping[str | None, int],
    windows: Tensor,
    progress: Progress,
) -> dict[str | None, Tensor]:
    """Return the loss with each plane left out in turn, by table of frequencies.

    Args:
        model: the model.
        layers: those with rotary positions.
        keys: the table of each.
        planes: number of planes of each table.
        windows: tokens.
        progress: is told what is done, and how much of it.
    """
    losses: dict[str | None, Tensor] = {}
    done, all_of_it = 0, sum(planes.values())
    for key, count in planes.items():
        layers_of_table = [layer for layer, table in zip(layers, keys, strict=True) if table == key]
        losses[key] = torch.zeros(count, dtype=torch.float64)
        for plane in range(count):
            with _without_plane(model, layers_of_table, plane):
                value = loss(model, windows)
            losses[key][plane] = value if math.isfinite(value) else torch.inf
            done += 1
            progress("leaving out one rotary plane at a time", done, all_of_it)
    return losses
