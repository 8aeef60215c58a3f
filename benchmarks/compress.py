r"""What a smaller head costs: small models on text, by every way to get there, beside the controls of every claim.

    python benchmarks/compress.py --stage time                    # minutes that it takes here, from measured steps
    python benchmarks/compress.py --stage tune --family llama     # seed 100; ends by freezing DIR/tuned-llama.json
    python benchmarks/compress.py --stage train --family llama    # seeds 0-4
    python benchmarks/compress.py --stage rivals --family llama   # on the dense models of those seeds, before healing
    python benchmarks/compress.py --stage predicted --family llama
    python benchmarks/compress.py --stage decoding --family llama
    python benchmarks/compress.py --stage report                  # the tables of docs/findings, from the stored rows

    python benchmarks/compress.py --stage pretrained --model DIR  # a real checkpoint: cut, healed, and the control
    python benchmarks/compress.py --stage files                   # how long a large checkpoint takes, beside copying it

The families are a Llama and a Qwen3 (QK-norm) of 0.76 million parameters, head 32, on the bytes of Python's standard
library, the text of `rankdecay language`. Rows are in DIR (docs/data/compress), one file per stage; every stage goes on
where it was interrupted; weights that stages share are in WORK (runs/compress), trained again if they are not there.

All arms see the same batches, as many tokens, and one learning-rate schedule. The first part of it is trained once per
seed and shared (but by the small head from the start):

==============  =======================================================================================================
dense           goes on as it is
cut             compressed at once (planes and values chosen on training text), then trained for all that is left
planes          ``Planes(keep)``, and ``LowRank(keep)`` of W_V per key head, for a while, then compressed and trained on
l2              L2 of W_Q, W_K, W_V and W_O, tuned, in their place
low_rank        ``LowRank(keep)`` of each head of W_Q and W_K in the place of ``Planes``
small           the small head from the first step on
==============  =======================================================================================================

Strengths are tuned at half the head on another seed and other windows of the validation text than are reported.
AdamW's moments go along with the parameters that a cut does not touch; those of the others start anew.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import importlib.util
import json
import math
import os
import shutil
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from clock import Clock, seconds_of
from compress_heads import (
    Heads,
    attentions,
    changed,
    fisher,
    flat_gains,
    keys_by_svd,
    largest,
    losses_of,
    put_values,
    rows_by_magnitude,
    scores_by_svd,
    values_at,
    values_by_magnitude,
)
from stored import read_lines
from torch import Tensor, nn

import rankdecay as rd
from rankdecay.compress import calibration as texts
from rankdecay.compress import compress
from rankdecay.compress.choice import with_losses
from rankdecay.compress.opened import opened
from rankdecay.compress.original import Original
from rankdecay.compress.reduction import Moments as Inputs
from rankdecay.compress.reduction import value_energies
from rankdecay.lab.experiments.attention.language import text
from rankdecay.lab.machine import describe_machine, versions

Row = dict[str, Any]
Moments = dict[str, dict[str, Tensor]]
Decays = dict[str, Any]

FAMILIES = ("llama", "qwen3")
ARMS = ("dense", "cut", "planes", "l2", "low_rank", "small")
GRIDS = {"planes": (8.0, 24.0, 72.0), "low_rank": (8.0, 24.0, 72.0), "l2": (0.3, 1.0, 3.0, 10.0)}
REST = 0.1  # L2 of all matrices that no decay is named for


@dataclasses.dataclass(frozen=True)
class Protocol:
    """Settings of training; smaller ones are for trying the command."""

    width: int = 128
    depth: int = 4
    heads: int = 4
    key_heads: int = 2
    head_dim: int = 32
    mlp_width: int = 344
    context: int = 128
    batch_size: int = 4
    lr: float = 2e-3
    warmup: int = 40
    shared: int = 420  # steps that all but the small head share
    decayed: int = 180  # steps under a decay
    steps: int = 720
    sizes: tuple[int, ...] = (16, 8)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    tune_seeds: tuple[int, ...] = (100,)
    windows: int = 192  # of the validation text: every second one is reported, the others tune
    calibration: int = 32  # windows of the training text, half of which choose

    def rate(self, step: int) -> float:
        """The learning rate of a step, from 0: a warm-up and a cosine to a tenth."""
        cosine = 0.55 + 0.45 * math.cos(math.pi * step / self.steps)
        return self.lr * min(1.0, (step + 1) / self.warmup) * cosine


TINY = Protocol(
    width=32, depth=2, heads=2, key_heads=1, head_dim=16, mlp_width=64, context=32, batch_size=2, warmup=2, shared=6,
    decayed=4, steps=14, sizes=(8,), seeds=(0, 1), windows=8, calibration=4,
)  # fmt: skip


# --- models and training ---


def fresh(protocol: Protocol, family: str, seed: int, head_dim: int) -> nn.Module:
    """A model as it is before training."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    config, kind = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}[family]
    torch.manual_seed(seed)
    made: Any = config(
        vocab_size=text.BYTES, hidden_size=protocol.width, intermediate_size=protocol.mlp_width,
        num_hidden_layers=protocol.depth, num_attention_heads=protocol.heads, num_key_value_heads=protocol.key_heads,
        head_dim=head_dim, max_position_embeddings=4 * protocol.context, tie_word_embeddings=True,
    )  # fmt: skip
    return kind(made)


def train(
    model: nn.Module,
    moments: Moments,
    protocol: Protocol,
    corpus: text.Corpus,
    seed: int,
    steps: range,
    decays: Mapping[str, Any] | None = None,
) -> Moments:
    """Train a model in place for some steps of the schedule and return AdamW's moments, by the names of parameters."""
    decays = dict(decays or {})
    # Rank d' of a key head's W_V is enough for M = [W_O,1; ...] W_V to have it; W_O stays the optimizer's.
    exclude = ("*.o_proj.weight",) if isinstance(decays.get("value_output"), rd.LowRank) else ()
    groups = rd.param_groups(model, rd.Frobenius(REST), exclude=exclude, **decays)
    optimizer = torch.optim.AdamW(groups, lr=protocol.lr, betas=(0.9, 0.95), weight_decay=REST, fused=True)
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    for parameter, name in names.items():
        held = moments.get(name)
        if held is not None and held["exp_avg"].shape == parameter.shape:
            optimizer.state[parameter] = {key: value.clone() for key, value in held.items()}
    attachment = rd.attach(optimizer)
    model.train()
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = protocol.rate(step)
        windows = text.random_windows(corpus.training, protocol.context, protocol.batch_size, seed, step)
        optimizer.zero_grad()
        losses_of(model, windows).mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    attachment.detach()
    model.zero_grad()
    kept = ("step", "exp_avg", "exp_avg_sq")
    return {
        names[parameter]: {key: state[key].clone() for key in kept}
        for parameter, state in optimizer.state.items()
        if "exp_avg" in state
    }


@torch.no_grad()
def judged(model: nn.Module, windows: Tensor) -> float:
    """Loss on windows of the validation text."""
    model.eval()
    return float(torch.cat([losses_of(model, some) for some in windows.split(16)]).mean())


def cut(model: nn.Module, head_dim: int, protocol: Protocol, corpus: text.Corpus, seed: int) -> nn.Module:
    """The model with a smaller head, chosen on training text."""
    tokens = text.random_windows(corpus.training, protocol.context, protocol.calibration, seed, 10**6)[:, :-1]
    small = compress(model, head_dim, calibration=tokens, sizes=[])  # pyright: ignore[reportArgumentType]
    assert isinstance(small, nn.Module)
    return small


def decays_of(arm: str, strength: float, head_dim: int) -> Decays:
    """The decays of W_Q and W_K, and of W_V, in an arm."""
    if arm == "l2":
        return {"query_key": rd.Frobenius(strength), "value_output": rd.Frobenius(strength)}
    values = rd.LowRank(strength, keep=head_dim, unit="head")
    both = {
        "planes": rd.Planes(strength, keep=head_dim // 2, scope="model"),
        "low_rank": rd.LowRank(strength, keep=head_dim, unit="head"),
    }
    return {"query_key": both[arm], "value_output": values}


@torch.no_grad()
def cache_bytes(model: nn.Module, tokens: int = 16) -> float:
    """Bytes per token, counted from the tensors of the cache."""
    cache = model(input_ids=torch.zeros(1, tokens, dtype=torch.long), use_cache=True).past_key_values
    return sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values)) / tokens


class Stage:
    """Rows of one stage, in a file to which what is missing is added.

    Args:
        arguments: of the command line.
        name: of the file.
        keys: fields that tell one row from another.
    """

    def __init__(self, arguments: argparse.Namespace, name: str, keys: Sequence[str]) -> None:
        self.path, self.keys = arguments.dir / f"{name}.jsonl", keys
        self.rows = read_lines(self.path)
        self._there = {tuple(row[key] for key in keys) for row in self.rows}

    def has(self, **key: Any) -> bool:
        return tuple(key[name] for name in self.keys) in self._there

    def add(self, **row: Any) -> None:
        self.rows.append(row)
        self._there.add(tuple(row[name] for name in self.keys))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps({key: shortened(value) for key, value in row.items()}) + "\n")
        print(json.dumps({key: shortened(value) for key, value in row.items()}), flush=True)


def shortened(value: Any) -> Any:
    return round(value, 5) if isinstance(value, float) else value


class Lab:
    """Text, windows of it, and models that were trained already: shared by the stages."""

    def __init__(self, arguments: argparse.Namespace, protocol: Protocol) -> None:
        self.arguments, self.protocol = arguments, protocol
        self.corpus = text.load(text=None, dataset=None, tokenizer=None, share=0.1)
        windows = text.even_windows(self.corpus.validation, protocol.context, protocol.windows)
        self.reported, self.tuning = windows[::2], windows[1::2]

    def shared(self, family: str, seed: int) -> tuple[nn.Module, Moments]:
        """The model after the steps that all arms share."""
        return self._kept(family, seed, "shared", self._train_shared)

    def dense(self, family: str, seed: int) -> nn.Module:
        """The model after all steps, with the head it had."""
        return self._kept(family, seed, "dense", self._train_dense)[0]

    def _train_shared(self, family: str, seed: int) -> tuple[nn.Module, Moments]:
        model = fresh(self.protocol, family, seed, self.protocol.head_dim)
        return model, train(model, {}, self.protocol, self.corpus, seed, range(self.protocol.shared))

    def _train_dense(self, family: str, seed: int) -> tuple[nn.Module, Moments]:
        model, moments = self.shared(family, seed)
        steps = range(self.protocol.shared, self.protocol.steps)
        return model, train(model, moments, self.protocol, self.corpus, seed, steps)

    def _kept(
        self, family: str, seed: int, name: str, make: Callable[[str, int], tuple[nn.Module, Moments]]
    ) -> tuple[nn.Module, Moments]:
        path = self.arguments.work / f"{family}-{seed}-{name}.pt"
        if path.exists():
            held = torch.load(path, weights_only=True)
            model = fresh(self.protocol, family, seed, self.protocol.head_dim)
            model.load_state_dict(held["model"])
            return model, held["moments"]
        model, moments = make(family, seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        torch.save({"model": model.state_dict(), "moments": moments}, part)
        part.rename(path)
        return model, moments

    def decayed_then_cut(
        self, family: str, seed: int, arm: str, strength: float, sizes: Sequence[int], windows: Tensor
    ) -> Iterator[Row]:
        """Rows of an arm that decays before it is cut; of L2 one training serves all sizes."""
        protocol = self.protocol
        at = protocol.shared + protocol.decayed
        model, held = None, {}
        for head_dim in sizes:
            if model is None or arm != "l2":
                model, moments = self.shared(family, seed)
                decays = decays_of(arm, strength, head_dim)
                held = train(model, moments, protocol, self.corpus, seed, range(protocol.shared, at), decays)
            yield self.cut_then_healed(model, held, family, seed, arm, head_dim, at, windows) | {"strength": strength}

    def cut_then_healed(
        self,
        model: nn.Module,
        moments: Moments,
        family: str,
        seed: int,
        arm: str,
        head_dim: int,
        at: int,
        windows: Tensor,
    ) -> Row:
        """The row of a model that is cut at a step of the schedule and trained for the rest of it."""
        whole = judged(model, windows)
        small = cut(model, head_dim, self.protocol, self.corpus, seed)
        made: Any = small.compression
        at_once, there = judged(small, windows), cache_bytes(small)
        train(small, moments, self.protocol, self.corpus, seed, range(at, self.protocol.steps))
        return {
            "family": family, "seed": seed, "arm": arm, "head_dim": head_dim, "whole": whole, "cut": at_once,
            "healed": judged(small, windows), "cache_bytes": there, "exact": made.exact, "kept": made.kept["all"],
        }  # fmt: skip


# --- stages ---


def tune(lab: Lab, family: str) -> None:
    """Choose a strength for each decay, on another seed and other windows, and freeze it."""
    frozen = lab.arguments.dir / f"tuned-{family}.json"
    if frozen.exists():
        raise SystemExit(f"{frozen} is frozen: the runs use it. Give another --dir to tune again.")
    stage = Stage(lab.arguments, "tune", ("family", "seed", "arm", "head_dim", "strength"))
    size = lab.protocol.sizes[0]
    for seed in lab.protocol.tune_seeds:
        for arm, strengths in GRIDS.items():
            for strength in strengths:
                if not stage.has(family=family, seed=seed, arm=arm, head_dim=size, strength=strength):
                    for row in lab.decayed_then_cut(family, seed, arm, strength, [size], lab.tuning):
                        stage.add(**row)
    found: dict[str, float] = {}
    for arm, strengths in GRIDS.items():
        rows = [row for row in stage.rows if (row["family"], row["arm"]) == (family, arm)]
        found[arm] = min(
            strengths, key=lambda s, rows=rows: statistics.fmean(r["healed"] for r in rows if r["strength"] == s)
        )
    record = {"protocol": dataclasses.asdict(lab.protocol), "strengths": found, "machine": describe_machine("cpu")}
    frozen.write_text(json.dumps(record | {"versions": versions(), "text_sha1": lab.corpus.sha1}, indent=1) + "\n")


def tuned(lab: Lab, family: str) -> dict[str, float]:
    path = lab.arguments.dir / f"tuned-{family}.json"
    if not path.exists():
        raise SystemExit(f"{path} is not there: run --stage tune --family {family} first, which freezes the strengths.")
    held = json.loads(path.read_text())
    if held["protocol"] != json.loads(json.dumps(dataclasses.asdict(lab.protocol))):
        raise SystemExit(f"{path} was tuned by another protocol: give another --dir, or the options it was made with.")
    return held["strengths"]


def train_all(lab: Lab, family: str) -> None:
    """Every arm on every seed."""
    strengths, protocol = tuned(lab, family), lab.protocol
    stage = Stage(lab.arguments, "train", ("family", "seed", "arm", "head_dim"))
    for seed in protocol.seeds:
        missing = {
            arm: [d for d in sizes if not stage.has(family=family, seed=seed, arm=arm, head_dim=d)]
            for arm, sizes in [(arm, [protocol.head_dim] if arm == "dense" else protocol.sizes) for arm in ARMS]
        }
        if missing["dense"]:
            model = lab.dense(family, seed)
            loss = judged(model, lab.reported)
            stage.add(
                family=family, seed=seed, arm="dense", head_dim=protocol.head_dim, healed=loss,
                cache_bytes=cache_bytes(model),
            )  # fmt: skip
        for head_dim in missing["cut"]:
            model, moments = lab.shared(family, seed)
            stage.add(
                **lab.cut_then_healed(
                    model, moments, family, seed, "cut", head_dim, protocol.shared, lab.reported
                )
            )  # fmt: skip
        for arm in ("planes", "l2", "low_rank"):
            for row in lab.decayed_then_cut(family, seed, arm, strengths[arm], missing[arm], lab.reported):
                stage.add(**row)
        for head_dim in missing["small"]:
            model = fresh(protocol, family, seed, head_dim)
            train(model, {}, protocol, lab.corpus, seed, range(protocol.steps))
            stage.add(
                family=family, seed=seed, arm="small", head_dim=head_dim, healed=judged(model, lab.reported),
                cache_bytes=cache_bytes(model),
            )  # fmt: skip


# --- rivals and predictions, on the dense models ---


METHODS = (
    "planes by loss", "planes by energy", "planes by Fisher", "pairs of each head by Fisher", "rows by magnitude",
    "SVD of W_K", "SVD of the scores, no positions",
)  # fmt: skip


def rivals(lab: Lab, family: str) -> None:
    """Loss of the dense models, keys alone or keys and values cut by each method, at equal bytes, before healing."""
    protocol, d = lab.protocol, lab.protocol.head_dim
    stage = Stage(lab.arguments, "rivals", ("family", "seed", "method", "head_dim"))
    for seed in protocol.seeds:
        if stage.has(family=family, seed=seed, method=METHODS[-1], head_dim=protocol.sizes[-1]):
            continue
        model = lab.dense(family, seed)
        whole = judged(model, lab.reported)
        data = text.random_windows(lab.corpus.training, protocol.context, protocol.calibration, seed, 10**6)[::2]
        importance = fisher(model, data, d)
        energy = original_of(model).scores(reader(model))[None].energy
        for head_dim in protocol.sizes:
            planes = head_dim // 2
            small: Any = cut(model, head_dim, protocol, lab.corpus, seed)
            by_loss = torch.zeros(d // 2, dtype=torch.bool)
            by_loss[small.compression.kept["all"]] = True
            alike = [torch.stack(importance).sum((0, 1))] * protocol.depth

            def shared(kept: Tensor) -> Callable[[list[Heads]], object]:
                return lambda layers: [heads.keep_planes(kept) for heads in layers]

            def own(scores: list[Tensor], planes: int = planes) -> Callable[[list[Heads]], object]:
                return lambda layers: (
                    [heads.keep_planes(largest(one, planes)) for heads, one in zip(layers, scores, strict=True)]
                )

            def each(change: Callable[[Heads, int], None], count: int = head_dim) -> Callable[[list[Heads]], object]:
                return lambda layers: [change(heads, count) for heads in layers]

            changes = (
                shared(by_loss),
                shared(largest(energy, planes)),
                own(alike),
                own(importance),
                each(rows_by_magnitude),
                each(keys_by_svd),
                each(scores_by_svd),
            )
            for method, change in zip(METHODS, changes, strict=True):
                if stage.has(family=family, seed=seed, method=method, head_dim=head_dim):
                    continue
                with changed(model, d) as layers:
                    change(layers)
                    if method.startswith("SVD of the scores"):
                        flat_gains(model)
                    keys = judged(model, lab.reported)
                    if method == "rows by magnitude":
                        for heads in layers:
                            values_by_magnitude(heads, head_dim)
                    else:
                        put_values(layers, [Heads(a, head_dim) for a in attentions(small)])
                    both = judged(model, lab.reported)
                stage.add(family=family, seed=seed, method=method, head_dim=head_dim, whole=whole, keys=keys, both=both)


def original_of(model: Any) -> Original:
    return Original(type(model), model.config)


def reader(model: nn.Module) -> Callable[[str], Tensor]:
    state = model.state_dict()
    return lambda name: state[name]


def predicted(lab: Lab, family: str) -> None:
    """Rows of a plane or a rank: its energy in the weights alone, beside the loss of leaving it out."""
    protocol, d = lab.protocol, lab.protocol.head_dim
    stage = Stage(lab.arguments, "predicted", ("family", "seed", "what", "number", "data"))
    for seed in protocol.seeds:
        if stage.has(family=family, seed=seed, what="rank", number=d // 8, data=True):
            continue
        model = lab.dense(family, seed)
        whole = judged(model, lab.reported)
        original, read_weights = original_of(model), reader(model)
        energy = original.scores(read_weights)[None].energy

        def rise(change: Callable[[list[Heads]], object], model: nn.Module = model, whole: float = whole) -> float:
            with changed(model, d) as layers:
                change(layers)
                return judged(model, lab.reported) - whole

        for plane in range(d // 2):
            others = torch.arange(d // 2) != plane
            lost = rise(lambda layers, others=others: [heads.keep_planes(others) for heads in layers])
            stage.add(
                family=family, seed=seed, what="plane", number=plane, data=False, share=float(energy[plane]), rise=lost
            )
        data = text.random_windows(lab.corpus.training, protocol.context, protocol.calibration, seed, 10**6)[::2, :-1]
        for moments in ([None] * protocol.depth, texts.moments(model, original.layers, data)):
            given = moments[0] is not None
            shares = [
                value_energies(layer, read_weights, own) for layer, own in zip(original.layers, moments, strict=True)
            ]
            for rank in range(d - d // 8, 0, -d // 8):
                share = torch.cat([one[:, rank:].sum(1) / one.sum(1) for one in shares]).mean()
                lost = rise(lambda layers, own=moments, rank=rank: values_at(layers, own, rank))
                stage.add(
                    family=family, seed=seed, what="rank", number=rank, data=given, share=float(share), rise=lost
                )  # fmt: skip


# --- decoding ---


def decoding(arguments: argparse.Namespace) -> None:
    """Tokens per second of decoding behind a full cache, beside the original in turns: of a small model, or --model."""
    stage = Stage(arguments, "decoding", ("model", "head_dim", "context", "batch_size"))
    if arguments.model is None:
        lab = Lab(arguments, TINY if arguments.tiny else Protocol())
        name, protocol = arguments.family, lab.protocol
        model: Any = lab.dense(name, protocol.seeds[0])
        sizes, context = protocol.sizes, 3 * protocol.context
    else:
        from transformers import AutoModelForCausalLM

        name, sizes, context = Path(arguments.model).name, arguments.head_dims, arguments.context
        model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    models: dict[int, Any] = {model.config.head_dim: model}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # which planes go makes no difference to the time
        models |= {size: compress(model, size) for size in sizes}
    time_decoding(stage, models, {"model": name, "context": context, "batch_size": arguments.batch_size})


@torch.no_grad()
def time_decoding(stage: Stage, models: Mapping[int, Any], common: Row, steps: int = 8, rounds: int = 5) -> None:
    """Time steps of one token behind a cache of random keys and values, which costs no pass over a prompt."""
    from transformers import DynamicCache

    batch_size, context = common["batch_size"], common["context"]
    times: dict[int, list[float]] = {size: [] for size in models}
    for _ in range(rounds + 1):  # the first warms up
        for size, model in models.items():
            model.eval()
            config, cache = model.config, DynamicCache()
            for layer in range(config.num_hidden_layers):
                shape = (batch_size, config.num_key_value_heads, context, size)
                cache.update(torch.randn(shape), torch.randn(shape), layer)
            token = torch.full((batch_size, 1), 65)
            with Clock("cpu") as clock:
                for _ in range(steps):
                    token = model(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
            times[size].append(clock.seconds)
    for size, spent in times.items():
        rates = [batch_size * steps / one for one in spent[1:]]
        stage.add(
            **common, head_dim=size, steps=steps, rounds=rounds, tokens_per_second=statistics.median(rates),
            best=max(rates), threads=torch.get_num_threads(), machine=describe_machine("cpu"),
            cache_bytes=cache_bytes(models[size]), parameters=sum(p.numel() for p in models[size].parameters()),
        )  # fmt: skip


# --- files ---


def files(arguments: argparse.Namespace, rounds: int = 5) -> None:
    """Seconds that six layers of a Llama of 7 B's width take, random, without a text, beside reading and writing them.

    In turns, each from files that the system has in memory, and from others.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    stage = Stage(arguments, "files", ("layers", "width", "in_memory"))
    layers, width, head_dim = (2, 64, 32) if arguments.tiny else (6, 4096, 128)
    folder, made = arguments.work / f"llama-{layers}x{width}", arguments.work / "smaller"
    if not folder.exists():
        config = LlamaConfig(hidden_size=width, intermediate_size=width * 43 // 16, num_hidden_layers=layers,
                             num_attention_heads=width // head_dim)  # fmt: skip
        LlamaForCausalLM(config).bfloat16().save_pretrained(folder, max_shard_size="2GB")
    shards = sorted(folder.glob("*.safetensors"))

    def smaller() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that planes are chosen without a text
            compress(folder, head_dim // 2, made)

    for in_memory in (True, False):
        times: dict[str, list[float]] = {"copied": [], "compressed": []}
        for _ in range(rounds + 1):  # the first imports what it needs
            for name, act in (("copied", lambda: copy_files(shards, made)), ("compressed", smaller)):
                put_in_memory(shards, in_memory)
                times[name].append(seconds_of(act))
                shutil.rmtree(made)
        stage.add(
            layers=layers, width=width, in_memory=in_memory, bytes=sum(path.stat().st_size for path in shards),
            rounds=rounds, **{name: statistics.median(spent[1:]) for name, spent in times.items()},
            threads=torch.get_num_threads(), machine=describe_machine("cpu"),
        )  # fmt: skip


def copy_files(paths: Sequence[Path], folder: Path) -> None:
    """Copy files, down to the disk, as the written checkpoint is."""
    folder.mkdir()
    for path in paths:
        with path.open("rb") as source, (folder / path.name).open("wb") as target:
            shutil.copyfileobj(source, target, 2**22)
            target.flush()
            os.fsync(target.fileno())


def put_in_memory(paths: Sequence[Path], wanted: bool) -> None:
    """Have the system hold files in memory, or hold none of them."""
    for path in paths:
        with path.open("rb") as file:
            if wanted:
                while file.read(2**22):
                    pass
            else:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def duration(lab: Lab, family: str) -> None:
    """Print how long the stages take here, from measured steps."""
    protocol = lab.protocol
    model = fresh(protocol, family, 0, protocol.head_dim)
    train(model, {}, protocol, lab.corpus, 0, range(5))
    seconds = seconds_of(lambda: train(model, {}, protocol, lab.corpus, 0, range(30))) / 30
    at, sizes = protocol.shared + protocol.decayed, len(protocol.sizes)
    left, healing = protocol.steps - protocol.shared, protocol.steps - at
    seed = protocol.steps + sizes * (3 * left + healing + protocol.steps) + protocol.decayed
    tuning = protocol.shared + left * sum(map(len, GRIDS.values()))
    print(f"{1e3 * seconds:.0f} ms a step on {describe_machine('cpu')}")
    for stage, steps in (("tune", len(protocol.tune_seeds) * tuning), ("train", len(protocol.seeds) * seed)):
        print(f"{stage}: {steps * seconds / 60:.0f} min")


# --- a real checkpoint ---


class Pretrained:
    """A real checkpoint, a text in windows that choose, heal and measure, and what the choice of planes needs."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        from transformers import AutoTokenizer

        self.arguments, path = arguments, arguments.model
        self.name = Path(path).name
        self.healing = example("compress_pretrained")
        self.given = opened(path)
        self.live = cast(Any, self.given.kind).from_pretrained(path, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(path)
        windows, validation = self.healing.windows_of_text(tokenizer, arguments.text, arguments.window)
        self.choosing, self.training = windows[: arguments.choosing], windows[arguments.choosing :]
        self.validation = validation[: arguments.measured]
        self.original = Original(self.given.kind, self.given.config)
        choice = self._choice()
        self.losses = choice["losses"]
        self.moments = [Inputs(one) for one in choice["moments"]]
        self.scores = with_losses(self.original.scores(self.given.read), {None: self.losses})

    def _choice(self) -> dict[str, Any]:
        """Inputs of attention and losses without each plane, computed once and kept in a file."""
        arguments, original = self.arguments, self.original
        held = arguments.work / f"{self.name}-choice-{arguments.choosing}x{arguments.window}.pt"
        if not held.exists():
            layers, keys = original.with_positions(original.layers)
            begun = time.monotonic()

            def say(what: str, done: int, of: int) -> None:
                print(f"{what}: {done} of {of}, {(time.monotonic() - begun) / 60:.1f} min", flush=True)

            found = texts.moments(self.live, original.layers, self.choosing)
            losses = texts.plane_losses(self.live, layers, keys, original.turned(), self.choosing, say)
            held.parent.mkdir(parents=True, exist_ok=True)
            torch.save({"moments": [one.matrix for one in found], "losses": losses[None]}, held)
        return torch.load(held, weights_only=True)

    def smaller(self, head_dim: int) -> nn.Module:
        """The model with a smaller head."""
        kept: dict[str | None, Tensor] = {None: self.scores[None].kept(head_dim // 2)}
        made = self.original.smaller(head_dim, kept, self.given.written)
        return made.model(self.given.read, self.moments, lambda done: None)

    def loss(self, model: nn.Module) -> float:
        """Loss on the windows that measure."""
        return self.healing.loss_on(model, self.validation)

    def add_planes(self, stage: Stage) -> None:
        """Store what the weights alone say of each plane, beside the loss without it."""
        if stage.has(family=self.name, seed=0, what="plane", number=0, data=False):
            return
        whole = self.healing.loss_on(self.live, self.choosing)
        for plane, (share, lost) in enumerate(zip(self.scores[None].energy, self.losses, strict=True)):
            stage.add(
                family=self.name, seed=0, what="plane", number=plane, data=False, share=float(share),
                rise=float(lost) - whole,
            )  # fmt: skip


def pretrained(arguments: argparse.Namespace) -> None:
    """A real checkpoint: all sizes by one ranking of its planes, healed, beside the original trained as long."""
    stage = Stage(arguments, "pretrained", ("model", "head_dim", "tokens", "teacher", "windows"))
    real, steps = Pretrained(arguments), arguments.steps
    tokens = steps * 2 * arguments.window
    real.add_planes(Stage(arguments, "predicted", ("family", "seed", "what", "number", "data")))
    before = real.loss(real.live)
    common = {
        "model": real.name, "teacher": arguments.teacher, "windows": arguments.choosing, "window": arguments.window,
        "measured_tokens": real.validation.numel(),
    }  # fmt: skip
    alone = common | {"teacher": False}  # what has no teacher is one row, whatever heals the others
    for head_dim in arguments.head_dims:
        if not stage.has(**alone, head_dim=head_dim, tokens=0):
            small = real.smaller(head_dim)
            stage.add(
                **alone, head_dim=head_dim, tokens=0, before=before, after=real.loss(small),
                cache_bytes=cache_bytes(small), kept=real.scores[None].kept(head_dim // 2).tolist(),
            )  # fmt: skip
    whole = real.original.head_dim
    for head_dim in (*arguments.head_dims, whole) if steps else ():
        control = head_dim == whole
        key = alone if control else common
        if stage.has(**key, head_dim=head_dim, tokens=tokens):
            continue
        model = copy.deepcopy(real.live) if control else real.smaller(head_dim)
        start = real.loss(model)
        teacher = real.live if arguments.teacher and not control else None
        real.healing.heal(model, real.training, arguments.work / "trainer", steps=steps, teacher=teacher)
        stage.add(
            **key, head_dim=head_dim, tokens=tokens, steps=steps, before=start, after=real.loss(model),
            cache_bytes=cache_bytes(model),
        )  # fmt: skip


def example(name: str) -> Any:
    """A module of examples/."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[1] / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stages = {"tune": tune, "train": train_all, "rivals": rivals, "predicted": predicted}
    parser.add_argument(
        "--stage", choices=(*stages, "pretrained", "decoding", "files", "time", "report"), required=True
    )
    parser.add_argument("--family", choices=FAMILIES, default="llama")
    parser.add_argument("--dir", type=Path, default=Path("docs/data/compress"))
    parser.add_argument("--work", type=Path, default=Path("runs/compress"), help="for weights that stages share")
    parser.add_argument("--tiny", action="store_true", help="a protocol of seconds, to try the command; needs a --dir")
    parser.add_argument("--batch-size", type=int, default=8, help="of --stage decoding")
    parser.add_argument("--context", type=int, default=1024, help="of --stage decoding with --model")
    pretrained_options = parser.add_argument_group("pretrained")
    pretrained_options.add_argument("--model", help="directory of a checkpoint with its tokenizer; of decoding too")
    pretrained_options.add_argument("--text", help="a text file; without, modules of Python's standard library")
    pretrained_options.add_argument("--head-dims", type=int, nargs="+", default=[48, 56])
    pretrained_options.add_argument("--window", type=int, default=256)
    pretrained_options.add_argument("--choosing", type=int, default=6, help="windows of the text that choose")
    pretrained_options.add_argument("--measured", type=int, default=16, help="windows of the text that measure")
    pretrained_options.add_argument("--steps", type=int, default=48, help="of healing, 2 windows each")
    pretrained_options.add_argument("--teacher", action="store_true")
    arguments = parser.parse_args()
    if arguments.tiny and arguments.dir == parser.get_default("dir"):
        parser.error("--tiny needs a --dir of its own: docs/data/compress is for the protocol itself")
    if arguments.stage not in ("decoding", "files"):
        torch.set_num_threads(1)
    if arguments.stage == "pretrained":
        if arguments.model is None:
            parser.error("--stage pretrained needs --model")
        return pretrained(arguments)
    if arguments.stage == "decoding":
        return decoding(arguments)
    if arguments.stage == "files":
        return files(arguments)
    if arguments.stage == "report":
        import compress_findings

        for table in compress_findings.TABLES:
            compress_findings.main([table, str(arguments.dir)])
        return None
    if arguments.stage == "time":
        return duration(Lab(arguments, Protocol()), arguments.family)
    stages[arguments.stage](Lab(arguments, TINY if arguments.tiny else Protocol()), arguments.family)
    return None


if __name__ == "__main__":
    main()
