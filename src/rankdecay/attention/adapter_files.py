"""LoRA adapters in files: merged with their base model, as PEFT's ``merge_and_unload`` does.

An adapter alone says nothing about the rank of an attention matrix: it is a change of low rank to a base. Where the
base is at hand (the directory that the adapter names, or beside it) the weight is W + s · B A, with s = α / r, or
α / √r for rsLoRA. Other kinds of adapters, and LoRA that is more than that sum, are refused: merge them first.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from rankdecay.attention.errors import CheckpointError
from rankdecay.attention.folders import ADAPTER_CONFIG, check_inside, files_of_index, read_json
from rankdecay.files import real

if TYPE_CHECKING:
    from rankdecay.attention.checkpoints import Checkpoint

_INSIDE = "base_model.model."
_FACTORS = {"lora_A.weight": "A", "lora_B.weight": "B", "lora_embedding_A": "A", "lora_embedding_B": "B"}
#: Names of the factors in adapters of several libraries.
_FACTOR = re.compile(r"(?:^|[._])(?:lora|hada|lokr|oft|ia3|vera)[._]")
#: Files of a base that lies in the adapter's own directory, or the one above.
_MODELS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
#: Settings that make LoRA more than the sum W + s · B A.
_MORE = ("use_dora", "layer_replication", "use_qalora", "alora_invocation_tokens", "use_bdlora", "arrow_config",
         "kasa_config", "monteclora_config", "lora_bias", "trainable_token_indices", "megatron_config")  # fmt: skip
#: Initialisations that leave the base as it is; the others change it too.
_PLAIN_INITIALISATION = (None, True, False, "gaussian", "orthogonal", "eva")


_LONGEST_PATH = 4096
#: Most patterns, and most ways to match one with a name: a second of work in all.
_MOST_PATTERNS, _MOST_WAYS = 1000, 10**7
_LARGEST_ALPHA = 1e9  # no number that is meant: what it scales would be all that is left


class _Delta(NamedTuple):
    """Change of one weight, B A · scaling."""

    down: str
    up: str
    scaling: float
    transposed: bool


def is_adapter(file: Path, shapes: Mapping[str, Any]) -> bool:
    """Whether the tensors are those of an adapter, and not a model."""
    if file.stem == "adapter_model":
        return True
    matrices = [name for name, shape in shapes.items() if len(shape) >= 2]
    return bool(matrices) and all(_FACTOR.search(name) for name in matrices)


def merge(adapter: Checkpoint, file: Path, open_base: Callable[[Path], Checkpoint]) -> dict[str, Any]:
    """Return the fields of a checkpoint: an adapter merged into its base.

    Args:
        adapter: the adapter's tensors.
        file: the file that holds them; ``adapter_config.json`` is beside it.
        open_base: opens the base.

    Returns:
        ``shapes``, ``config`` and ``load`` of a :class:`~rankdecay.attention.checkpoints.Checkpoint`.

    Raises:
        CheckpointError: If the adapter is of another kind, or its base is not at hand or does not fit.
    """
    folder = file.parent
    if not os.path.lexists(folder / ADAPTER_CONFIG):
        raise CheckpointError(f"{file} is an adapter without {ADAPTER_CONFIG} beside it; merge it with its base first.")
    config = read_json(folder / ADAPTER_CONFIG)
    named = config.get("base_model_name_or_path")
    if not isinstance(named, str | None) or len(named or "") > _LONGEST_PATH:
        raise CheckpointError(
            f"{folder / ADAPTER_CONFIG}: base_model_name_or_path is not a path: {str(named)[:100]!r}."
        )
    how = (
        f"merge it first: PeftModel.from_pretrained(base, {str(folder)!r}).merge_and_unload().save_pretrained(...), "
        "and give that directory"
    )
    if more := _more(config):
        raise CheckpointError(f"{file} is an adapter with {more}, which is more than a sum of products; {how}.")
    base = _base(str(named or ""), folder, open_base)
    if base is None:
        raise CheckpointError(
            f"{file} is an adapter, and its base {named!r} is not a directory here; put it beside, or {how}."
        )
    try:
        deltas, own = _changes(adapter, base, config)
    except ValueError as error:
        raise CheckpointError(f"{file} does not fit its base {base}: {error}; {how}.") from None

    def load(name: str) -> Tensor:
        if name in own:
            return adapter.load(own[name])
        weight = base.load(name)
        if name not in deltas:
            return weight
        down, up = (_at_least_single(adapter.load(factor)) for factor in (deltas[name].down, deltas[name].up))
        delta = up @ down
        delta = (delta.mT if deltas[name].transposed else delta) * deltas[name].scaling
        return weight.clone().add_(delta)  # in place, as PEFT: the sum is formed in the wider type

    shapes = dict(base.shapes) | {name: adapter.shapes[stored] for name, stored in own.items()}
    return {"shapes": shapes, "config": base.config, "load": load}


def _at_least_single(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.element_size() < 4 else tensor


def _more(config: Mapping[str, Any]) -> str | None:
    """Return the setting that makes the adapter more than W + s · B A."""
    if str(config.get("peft_type")).upper() != "LORA":
        return f"peft_type {config.get('peft_type')}"
    if config.get("target_parameters"):
        return "target_parameters"
    if config.get("init_lora_weights") not in _PLAIN_INITIALISATION:
        return f"init_lora_weights {config['init_lora_weights']!r}"
    return next((name for name in _MORE if config.get(name)), None)


def _base(named: str, folder: Path, open_base: Callable[[Path], Checkpoint]) -> Checkpoint | None:
    """Open the base: the directory that is named, from here or from the adapter, or one of its name beside it."""
    if named:
        last = Path(named).name
        for place in (Path(named), folder / named, folder.parent / named, folder / last, folder.parent / last):
            if os.path.isdir(place) and real(place) != real(folder):
                return open_base(place)
    for place in (folder, folder.parent):
        if os.path.isfile(place / "config.json"):
            found = next((place / model for model in _MODELS if os.path.isfile(place / model)), None)
            if found is not None:
                first = files_of_index(found)[0] if found.suffix == ".json" else found
                check_inside(first, place)
                return open_base(first)
    return None


def _changes(
    adapter: Checkpoint, base: Checkpoint, config: Mapping[str, Any]
) -> tuple[dict[str, _Delta], dict[str, str]]:
    """Return the change of each weight of the base by its name, and the adapter's own tensors by the name they take."""
    factors: dict[str, dict[str, str]] = {}
    replacements: dict[str, str] = {}
    for name in adapter.shapes:
        module, leaf = _split(name)
        if leaf in _FACTORS:
            factors.setdefault(module, {})[_FACTORS[leaf]] = name
        else:
            plain = f"{module}.{leaf}".replace(".base_layer.", ".").replace(".modules_to_save.", ".")
            if "lora_" in plain:
                raise ValueError(f"{name} is not a factor of plain LoRA")
            replacements[plain] = name
    align = _alignment([f"{module}.weight" for module in factors], base)
    deltas = {}
    for module, pair in factors.items():
        if set(pair) != {"A", "B"}:
            raise ValueError(f"{module} has one factor of two")
        deltas[align(f"{module}.weight")] = _delta(module, pair, adapter, config)
    return dict(_oriented(deltas, adapter, base, config)), {
        align(name): stored for name, stored in replacements.items()
    }


def _split(name: str) -> tuple[str, str]:
    """Return the module and the rest: ``lora_A.weight``, ``lora_embedding_A``, or the leaf of an ordinary name."""
    name = name.removeprefix(_INSIDE)
    found = re.fullmatch(r"(.+?)\.(lora_(?:embedding_)?[AB](?:\.weight)?)", name)
    if found:
        return found[1], found[2]
    module, _, leaf = name.rpartition(".")
    return module, leaf


def _alignment(names: list[str], base: Checkpoint) -> Callable[[str], str]:
    """Return a function from names in the adapter's model to names in the base's files, which differ by one prefix."""
    heads = ("", *{name.partition(".")[0] + "." for name in (*names, *base.shapes)})
    for prefix in heads:
        if all(name.startswith(prefix) and name[len(prefix) :] in base.shapes for name in names):
            return lambda name: name.removeprefix(prefix)
        if all(prefix + name in base.shapes for name in names):
            return lambda name: prefix + name
    missing = next((name for name in names if name not in base.shapes), names[0])
    raise ValueError(f"the base has no {missing}")


def _delta(module: str, pair: dict[str, str], adapter: Checkpoint, config: Mapping[str, Any]) -> _Delta:
    for name in pair.values():
        if len(adapter.shapes[name]) != 2 or 0 in adapter.shapes[name]:
            raise ValueError(f"{name} has shape {adapter.shapes[name]}; a LoRA factor must be a non-empty matrix")
    rank = adapter.shapes[pair["A"]][0]
    stated_rank = _by_pattern(config.get("rank_pattern"), module, config.get("r"))
    if stated_rank != rank or adapter.shapes[pair["B"]][-1] != rank:
        raise ValueError(f"{module} has rank {rank} where {ADAPTER_CONFIG} says {stated_rank}")
    alpha = _by_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha"))
    if not isinstance(alpha, (int, float)) or not abs(alpha) < _LARGEST_ALPHA:
        raise ValueError(f"lora_alpha is {str(alpha)[:100]}")
    scaling = alpha / (rank**0.5 if config.get("use_rslora") else rank)
    return _Delta(pair["A"], pair["B"], scaling, transposed="embedding" in pair["A"])


def _by_pattern(patterns: object, module: str, default: object) -> object:
    """Return the value of the first pattern, a regular expression, that a module's name ends with, as in PEFT."""
    if isinstance(patterns, Mapping) and len(patterns) > _MOST_PATTERNS:
        raise ValueError(f"{ADAPTER_CONFIG} has {len(patterns)} patterns, and no more than {_MOST_PATTERNS} are tried")
    for pattern, value in patterns.items() if isinstance(patterns, Mapping) else ():
        repeats = len(re.findall(r"[*+{?]", pattern))
        ways = math.comb(len(module) + repeats + 1, repeats + 1)  # to share a name out among them
        if len(pattern) > 1000 or ways > _MOST_WAYS or (repeats and "(" in pattern):
            raise ValueError(f"the pattern {pattern[:200]!r} is not tried: matching it could take too long")
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        except re.error as error:
            raise ValueError(f"the pattern {pattern!r} is not a regular expression: {error}") from None
    return default


def _oriented(
    deltas: dict[str, _Delta], adapter: Checkpoint, base: Checkpoint, config: Mapping[str, Any]
) -> Iterator[tuple[str, _Delta]]:
    """Yield the changes oriented as their weights: Conv1D stores (in, out), which only a square shape hides."""
    seen: dict[str, set[bool]] = {}
    shape = {name: (adapter.shapes[delta.up][0], adapter.shapes[delta.down][-1]) for name, delta in deltas.items()}
    for name, delta in deltas.items():
        rows, columns = shape[name]
        if base.shapes[name] not in ((rows, columns), (columns, rows)):
            raise ValueError(f"{name} has shape {base.shapes[name]}, its change {(rows, columns)}")
        if rows != columns and not delta.transposed:
            seen.setdefault(_above(name), set()).add(base.shapes[name] != (rows, columns))
    whole = set().union(*seen.values())
    for name, delta in deltas.items():
        rows, columns = shape[name]
        if delta.transposed:
            yield name, delta
        elif rows != columns:
            yield name, delta._replace(transposed=base.shapes[name] != (rows, columns))
        else:
            evidence = seen.get(_above(name), whole) or {bool(config.get("fan_in_fan_out"))}
            if len(evidence) > 1:
                raise ValueError(f"{name} is square, and whether it is stored transposed is not known")
            yield name, delta._replace(transposed=next(iter(evidence)))


def _above(name: str) -> str:
    """Return the module that holds the one a weight belongs to."""
    return name.rpartition(".")[0].rpartition(".")[0]
