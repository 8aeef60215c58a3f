"""Small models of every type with real weights, the random input they run on, and what reaches their attention.

:func:`build` makes a model narrow: four heads or so, as wide as they are in the family. :func:`calls` runs it, and each
model inside it, on random input, and keeps what each attention module is called with, so that the module can be run
again by itself.
"""

from __future__ import annotations

import copy
import inspect
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rankdecay.attention import AttentionLayer
from rankdecay.attention.locate import find_layers, locate
from rankdecay.attention.module.found import Found
from rankdecay.attention.source import ModuleSource

from . import comparison, every_type

TOKENS = 6
HEADS = 4
VOCABULARY = 600

_HEADS = re.compile(
    r"(\w+_)?(num_attention_heads|attention_heads|num_heads|n_heads?|nhead|num_kv_heads|num_key_value_heads|heads|kv_heads)"
)
_KEY_HEADS = re.compile(r".*(kv|key_value)_heads")
_WIDTH = re.compile(
    r"hidden_size|d_model|n_embd|embed_dim|dim|width|hidden_dim|encoder_dim|(en|de)coder_hidden_(size|dim)|emb_dim"
)
_INNER = re.compile(r"(\w+_)?(intermediate_size|ffn_dim|d_ff|d_inner|n_inner|ffn_hidden_size|feed_forward_size)")
_EXPERTS = re.compile(r"(num|n)_(\w+_)?experts")
#: Types that are too large to be built as wide as they are, and those that cannot be built narrower.
NARROW = {"deepseek_ocr2"}
COSTLY = {"csm", "dots3_note", "emu3", "evolla", "minimax_m3_vl", "minimax_m3_vl_text", "sapiens2",
          "vibevoice_acoustic_tokenizer"}  # fmt: skip
WIDE = {"lilt", "clvp", "perceiver"}


class Call(NamedTuple):
    """What a module is called with."""

    module: nn.Module
    arguments: tuple[Any, ...]
    named: dict[str, Any]

    def again(self) -> Any:
        """Run the module again on the same; a cache is used as it was."""
        arguments, named = copy.deepcopy((self.arguments, self.named))
        return self.module(*arguments, **named)

    def lively(self) -> Call:
        """The same on numbers of ordinary size, where those are all zero, too large or none."""
        generator = torch.Generator().manual_seed(2)

        def mend(value: Any, name: str = "") -> Any:
            if isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):
                return type(value)(mend(part, name) for part in value)
            if not isinstance(value, Tensor) or not value.is_floating_point() or "mask" in name or value.ndim < 2:
                return value
            ordinary = value.isfinite().all() and 1e-2 < float(value.std()) < 100
            square = value.shape[-1] == value.shape[-2]  # a mask, or biases
            if ordinary or square or "position" in name or "bias" in name or value.shape[1:-2] == (1,):
                return value
            return torch.randn(value.shape, generator=generator)

        named = {name: mend(value, name) for name, value in self.named.items()}
        return Call(self.module, tuple(map(mend, self.arguments)), named)


def build(kind: str, narrow: bool = True) -> nn.Module:
    """The model of a type on the CPU, with weights that tell heads apart."""
    import transformers

    config = every_type.configuration(kind)
    if narrow:
        _narrow(config)
    torch.manual_seed(0)
    with every_type.without_packages(), _without_initialisation():
        if kind in every_type.CLASSES:
            config._attn_implementation = "eager"
            model = attrgetter(every_type.CLASSES[kind])(transformers)(config)
        else:
            model = transformers.AutoModel.from_config(config, attn_implementation="eager")
    return _filled(model)


def _filled(model: nn.Module, gain: float = 1.5) -> nn.Module:
    """Random matrices, of which the largest repeat themselves; no biases, no dropout, and norms that do nothing."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2:
                parameter.fill_(0.0 if "bias" in name.rpartition(".")[2] else 1.0)
                continue
            if not parameter.numel():
                continue
            some = torch.randn(min(parameter.numel(), 2**21)) * gain * parameter[0].numel() ** -0.5
            times = -(-parameter.numel() // len(some))
            parameter.copy_(some.repeat(times)[: parameter.numel()].view_as(parameter))
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_()
    return model.eval()


@contextmanager
def _without_initialisation() -> Iterator[None]:
    """Leave out the initialisation, which :func:`prepared` does anew."""
    from transformers import initialization

    with initialization.no_init_weights():
        yield


def _narrow(config: Any) -> None:
    from transformers import PretrainedConfig

    settings = vars(config)
    tokens: list[str] = []  # whose numbers are beyond the vocabulary
    heads = [v for n, v in settings.items() if type(v) is int and _HEADS.fullmatch(n) and not _KEY_HEADS.fullmatch(n)]
    widths = [v for n, v in settings.items() if type(v) is int and _WIDTH.fullmatch(n)]
    by = 1
    for factor in (16, 12, 10, 8, 7, 6, 5, 4, 3, 2):
        if (
            heads
            and all(v % factor == 0 and v // factor >= HEADS for v in heads)
            and all(v % factor == 0 for v in widths)
        ):
            by = factor
            break
    for name, value in list(settings.items()):
        if isinstance(value, PretrainedConfig):
            _narrow(value)
        elif name == "image_size" and isinstance(value, (list, tuple)) and min(value) > 128:
            setattr(config, name, type(value)([128, 128]))
        elif type(value) is not int:
            continue
        elif name.startswith("vocab_size") and value > VOCABULARY:
            setattr(config, name, VOCABULARY)
        elif name.endswith(("token_id", "token_index")) and value >= VOCABULARY:
            tokens.append(name)
            setattr(config, name, VOCABULARY - len(tokens))
        elif _KEY_HEADS.fullmatch(name):
            setattr(config, name, _key_heads(value, by, max(heads, default=0) // by))
        elif _HEADS.fullmatch(name) or _WIDTH.fullmatch(name):
            setattr(config, name, value // by)
        elif name in ("image_size", "img_size") and value > 128:
            setattr(config, name, 224 if value % 32 or "window_size" in settings else 128)
        elif _INNER.fullmatch(name):
            setattr(config, name, min(value, 128))
        elif _EXPERTS.fullmatch(name):
            setattr(config, name, min(value, 8))


def _key_heads(value: int, by: int, heads: int) -> int:
    if value % by == 0:
        return value // by
    return next((n for n in (value, 4, 2) if heads and n <= heads and heads % n == 0 and n <= value), 1)


# ---- what is run ------------------------------------------------------------------------------------------


def container(model: nn.Module, layer: Found) -> str:
    """The smallest module that holds the layer's own matrices and its output, by its path."""
    module = layer.module.split(".") if layer.module else []
    paths = [place.parameter.split(".") for role, place in layer.places.items() if role not in ("key", "value")]
    common = module
    for path in paths:
        n = 0
        while n < min(len(common), len(path)) and common[n] == path[n]:
            n += 1
        common = common[:n]
    while common and isinstance(model.get_submodule(".".join(common)), (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
        common = common[:-1]
    return ".".join(common)


def calls(model: nn.Module, paths: Sequence[str]) -> dict[str, Call]:
    """What modules are called with when the model, and the models in it, are run on random input as far as they go."""
    from transformers import PreTrainedModel

    found: dict[str, Call] = {}
    roots = [(path, module) for path, module in model.named_modules() if isinstance(module, PreTrainedModel)]
    for path, root in roots:
        inside = [p for p in paths if f"{p}.".startswith(f"{path}.") or not path]
        missing = [p for p in inside if p not in found]
        if not missing:
            continue
        handles = [model.get_submodule(p).register_forward_pre_hook(_keep(found, p), with_kwargs=True) for p in missing]
        try:
            run(root)
        except Exception:
            pass
        finally:
            for handle in handles:
                handle.remove()
    return found


def _keep(found: dict[str, Call], path: str) -> Any:
    def hook(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        if path not in found:
            try:
                found[path] = Call(module, copy.deepcopy(arguments), copy.deepcopy(named))
            except Exception:
                found[path] = Call(module, arguments, named)

    return hook


def run(model: nn.Module) -> Any:
    """Run a model on random input."""
    return model(**inputs(model))


def _configs(config: Any) -> Iterator[Any]:
    """A configuration, then those of its parts."""
    from transformers import PretrainedConfig

    yield config
    for part in list(vars(config).values()):
        if isinstance(part, PretrainedConfig):
            yield from _configs(part)


def inputs(model: nn.Module) -> dict[str, Any]:
    """Random input for a model, by the names in its signature and the sizes in its configuration."""
    config: Any = model.config
    takes = inspect.signature(model.forward).parameters
    generator = torch.Generator().manual_seed(1)
    given: dict[str, Any] = {}

    def size(*names: str, default: int = 0) -> int:
        for holder in _configs(config):
            for name in names:
                value = getattr(holder, name, None)
                if type(value) is int:
                    return value
                if isinstance(value, (list, tuple)) and value and type(value[0]) is int:
                    return value[-1]
        return default

    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    vocabulary = getattr(text, "vocab_size", None) or 50
    ids = torch.randint(
        5, max(6, min(vocabulary if isinstance(vocabulary, int) else 50, 300)), (1, TOKENS), generator=generator
    )
    makers = {
        "input_ids": lambda: ids,
        "decoder_input_ids": lambda: ids[:, :5],
        "pixel_values": lambda: torch.randn(
            1,
            size("num_channels", "in_channels", "in_chans", default=3),
            *[size("image_size", "img_size", default=64)] * 2,
            generator=generator,
        ),
        "input_features": lambda: torch.randn(
            1,
            size("num_mel_bins", "input_dim", "feature_size", "input_feat_per_channel", default=80),
            64,
            generator=generator,
        ),
        "input_values": lambda: torch.randn(1, 4000, generator=generator),
        "encoder_hidden_states": lambda: torch.randn(
            1,
            TOKENS,
            size("cross_attention_hidden_size", "encoder_hidden_size", "hidden_size", "d_model"),
            generator=generator,
        ),
        "bbox": lambda: (
            torch.rand(1, TOKENS, size("dim_bbox", default=4), generator=generator)
            if "dim_bbox" in vars(config)
            else torch.arange(4).expand(1, TOKENS, 4)
        ),
        "hidden_states": lambda: torch.randn(1, TOKENS, size("hidden_size", "d_model"), generator=generator),
        "query_embeds": lambda: torch.randn(1, TOKENS, size("hidden_size", "d_model"), generator=generator),
    }
    named: Any = model.main_input_name
    main: list[str] = [named] if isinstance(named, str) else list(named)
    required = [name for name, parameter in takes.items() if parameter.default is inspect.Parameter.empty]
    also = [name for name in ("bbox",) if name in takes]
    composite = any(True for _ in list(_configs(config))[1:])
    for name in ("input_ids", "decoder_input_ids", *main, *required, *also, *(["pixel_values"] if composite else [])):
        if name in takes and name in makers:
            given[name] = makers[name]()
    if main[0] in takes and main[0] not in given:
        raise LookupError(f"no random {main[0]}")
    if "use_cache" in takes:
        given["use_cache"] = False
    return given


# ---- a module by itself -----------------------------------------------------------------------------------

_QUERY_INPUT = (
    "hidden_states",
    "hidden_state",
    "x",
    "query",
    "queries",
    "q",
    "inputs",
    "input",
    "query_states",
    "query_tensor",
    "input_tensor",
    "latents",
)
_KEY_INPUT = (
    "key",
    "keys",
    "k",
    "key_states",
    "key_tensor",
    "memory",
    "encoder_hidden_states",
    "key_value_states",
    "context",
    "cross_attention_states",
    "kv",
)
_VALUE_INPUT = ("value", "values", "v", "value_states", "value_tensor")


def direct(model: nn.Module, path: str, layer: Any) -> Iterator[Call]:
    """Ways to call a module by itself, by its signature."""
    module: Any = model.get_submodule(path)
    takes = inspect.signature(module.forward).parameters
    width, of_key, of_value = (
        view.window.matrix(view.weight()).shape[1] for view in (layer.query, layer.key, layer.value)
    )
    generator = torch.Generator().manual_seed(1)
    dims = layer.rotary.dims if layer.rotary else layer.head_dim
    window: Any = getattr(module, "window_size", None)
    tokens = math.prod(window) if isinstance(window, (tuple, list)) else window if isinstance(window, int) else 16
    angle = torch.arange(tokens)[:, None] * 10000.0 ** (-torch.arange(dims // 2) * 2 / dims)
    cross = any(word in layer.name for word in ("cross", "encoder_attn", "encoder_decoder"))

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    shapes: list[tuple[int, ...]] = [(1, tokens), (tokens,), (1, 4, 4)]
    relative = re.search("Conformer|Encoder|Asr|Relative", type(module).__name__)
    for lead in shapes:
        for doubled in (True, False):
            turned = torch.cat([angle, angle], -1) if doubled else angle
            if layer.rotary and layer.rotary.interleaved and doubled:
                turned = angle.repeat_interleave(2, -1)
            flat = len(lead) == 1
            given: dict[str, Any] = {}
            for name, parameter in takes.items():
                needed = parameter.default is inspect.Parameter.empty
                if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
                    continue
                if name in _QUERY_INPUT:
                    given[name] = noise(*lead, width)
                elif name in _KEY_INPUT and (needed or cross):
                    given[name] = noise(*lead, of_key)
                elif name in _VALUE_INPUT and (needed or cross):
                    given[name] = noise(*lead, of_value)
                elif name in ("position_embeddings", "rotary_pos_emb") and cross and not needed:
                    continue
                elif name in ("position_embeddings", "rotary_pos_emb"):
                    given[name] = tuple(part if flat else part[None] for part in (turned.cos(), turned.sin()))
                    if relative and not layer.rotary:
                        given[name] = noise(1, 2 * tokens - 1, width)
                elif name == "relative_position_embeddings":
                    given[name] = noise(1, 2 * tokens - 1, width)
                elif name == "attention_dists":
                    size = getattr(module, "context_size", tokens)
                    given[name] = (torch.arange(size)[:, None] - torch.arange(size)).clamp(-5, 5) + 5
                elif name == "cu_seqlens":
                    given[name] = torch.tensor([0, tokens], dtype=torch.int32)
                elif name == "max_seqlen":
                    given[name] = tokens
                elif name == "position_ids":
                    given[name] = torch.arange(tokens)[None]
                elif name in ("attention_mask", "encoder_attention_mask", "mask") and needed:
                    given[name] = None
                elif name in ("height", "width"):
                    given[name] = 4
                elif needed:
                    given[name] = None
            yield Call(module, (), given)
            if any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes.values()):
                yield Call(module, (), {"attention_mask": None} | given)


# ---- comparison -------------------------------------------------------------------------------------------


def compare(kind: str) -> dict[str, list[str]]:
    """What differs in the layers of a type, by the class of their module; one layer of each kind that is said.

    A layer that could not be run has one text that begins with ``not run``.
    """
    described = every_type.describe(kind)
    wanted = {_class(described, layer) for layer in locate(ModuleSource(described))[0]}
    failures: list[str] = []
    for narrow in (False,) if kind in WIDE else (True,) if kind in NARROW else (True, False):
        try:
            return _compare(build(kind, narrow), wanted)
        except Exception as error:
            failures.append(f"not run: {type(error).__name__}: {error}")
    return {kind: failures[-1:]}


def _compare(model: nn.Module, wanted: set[str]) -> dict[str, list[str]]:
    source = ModuleSource(model)
    found, _ = locate(source)
    if wanted != {_class(model, layer) for layer in found}:
        raise ValueError("the small model has other attention than that of the usual size")
    layers = {layer.name: layer for layer in find_layers(source)[0]} if found else {}
    kinds: dict[tuple[object, ...], list[Found]] = {}
    for layer in found:
        windows = {role: (str(place.window), place.bias is None) for role, place in layer.places.items()}
        said = str(windows), layer.rotary, layer.qk_norm, layer.grouping, layer.no_product, layer.no_value_product
        kinds.setdefault((_class(model, layer), *said, layer.name.partition(":")[2]), []).append(layer)
    paths = {layer.name: container(model, layer) for alike in kinds.values() for layer in alike}
    called = calls(model, sorted(set(paths.values())))
    problems: dict[str, list[str]] = {}
    for alike in kinds.values():
        layer = next((layer for layer in alike if paths[layer.name] in called), alike[0])
        path, name = paths[layer.name], layer.name.partition(":")[2]
        ways = [called[path].lively()] if path in called else []
        key = _class(model, layer) + (f":{name}" if name else "")
        problems.setdefault(key, []).extend(
            _tried(model, layers[layer.name], [*ways, *direct(model, path, layers[layer.name])])
        )
    return problems


def _class(model: nn.Module, layer: Found) -> str:
    return type(model.get_submodule(layer.module)).__name__.replace("Sdpa", "")


def _tried(model: nn.Module, layer: AttentionLayer, ways: Sequence[Call]) -> list[str]:
    """The differences by the first way to call the module that works."""
    failures: list[str] = []
    for call in ways:
        try:
            return list(comparison.check(model, layer, call.again))
        except Exception as error:
            failures.append(f"not run: {type(error).__name__}: {error}")
    return [failures[0].partition("\n")[0]]
