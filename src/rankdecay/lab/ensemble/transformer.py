"""The scale-invariant transformer, written with a leading member axis: many networks of one shape at once.

Pre-norm blocks: x ← x + O·attention(norm(x)), x ← x + D·silu(U·norm(x)), RMSNorm everywhere, no biases, no mask, the
answer read at the last position. With QK-norm the loss does not depend on the scale of W_Q and W_K (the norm's only
guard is a floor of 1e-12 under ‖x‖), so ⟨∇L, W_Q⟩ = 0; W_V and the rest have no such property.

Every tensor carries the member axis first, and a linear map is one batched product. Two savings are exact:

* The last block computes queries, output and MLP for the last position only, because nothing else is read.
* The first block sees only vocabulary × positions distinct inputs. When that is fewer rows than the batch has, its
  norm and projections are computed once per distinct input and gathered.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from rankdecay.lab.ensemble.accelerators import stable_logits
from rankdecay.lab.tasks.base import random_generator

QKNorm = Literal["head", "width", "none"]
EPS = 1e-12
FEW_PAIRS = 9  # (query, key) pairs up to which attention is multiplied out

Parameters = dict[str, Tensor]


@dataclass(frozen=True)
class TransformerConfig:
    """Shape of the network.

    Attributes:
        vocabulary: input tokens.
        length: positions of a sequence.
        outputs: classes of the answer.
        width, depth, heads, mlp_width: as usual; ``heads`` divides ``width``.
        qk_norm: RMSNorm of queries and keys per ``"head"``, over the full ``"width"`` before the head split, or
            ``"none"``.
        gains: learnable gains in every norm (QK-norm too), as the published prototypes have.
        position_scale: standard deviation of the initial position embedding.
    """

    vocabulary: int
    length: int
    outputs: int
    width: int = 128
    depth: int = 2
    heads: int = 4
    mlp_width: int = 512
    qk_norm: QKNorm = "head"
    gains: bool = False
    position_scale: float = 0.3

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"heads={self.heads} must divide width={self.width}")
        if self.qk_norm not in get_args(QKNorm):
            raise ValueError(f"qk_norm must be one of {get_args(QKNorm)}, got {self.qk_norm!r}")

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.width // self.heads

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter of one member, by name, in the order they are stored.

        Queries and keys come first, so that they are one contiguous block: (query, key) of layer 0, of layer 1, …
        Matrices are (out, in), as in ``nn.Linear``; heads are row blocks of W_Q, W_K, W_V.
        """
        d, h = self.width, self.mlp_width
        layers = range(self.depth)
        shapes: dict[str, tuple[int, ...]] = {f"{role}.{i}": (d, d) for i in layers for role in ("query", "key")}
        for i in layers:
            shapes |= {f"value.{i}": (d, d), f"output.{i}": (d, d), f"mlp_in.{i}": (h, d), f"mlp_out.{i}": (d, h)}
        shapes |= {"embedding": (self.vocabulary, d), "position": (self.length, d), "unembedding": (self.outputs, d)}
        if self.gains:
            shapes["norm_final"] = (d,)
            qk = {"head": self.head_dim, "width": d}.get(self.qk_norm)
            for i in layers:
                shapes |= {f"norm_attention.{i}": (d,), f"norm_mlp.{i}": (d,)}
                shapes |= {f"norm_query.{i}": (qk,), f"norm_key.{i}": (qk,)} if qk else {}
        return shapes


def initial_parameters(config: TransformerConfig, seed: int, scale: float = 1.0) -> dict[str, Tensor]:
    """One member's initial parameters in float64, drawn from its seed alone.

    Matrices are uniform on ±1/√fan_in (the default of ``nn.Linear``), embeddings standard normal, gains one.

    Args:
        config: shape of the network.
        seed: decides every draw.
        scale: multiplies the initial matrices.
    """
    generator = random_generator(seed, "initial")
    parameters = {}
    for name, shape in config.shapes().items():
        if name.startswith("norm"):
            value = torch.ones(shape, dtype=torch.float64)
        elif name in ("embedding", "position"):
            deviation = 1.0 if name == "embedding" else config.position_scale
            value = torch.from_numpy(generator.standard_normal(shape)) * deviation
        else:
            bound = scale / math.sqrt(shape[-1])
            value = torch.from_numpy(generator.uniform(-bound, bound, shape))
        parameters[name] = value
    return parameters


class _UnitRMS(torch.autograd.Function):
    """Divides by the root mean square over the last dimension, with its derivative written out.

    Sums are taken in float32 or better; reading and writing other dtypes is part of the same pass over memory.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=_accumulate(x.dtype))
        scale = math.sqrt(x.shape[-1]) / norm.clamp_min(EPS)
        ctx.save_for_backward(x, scale)
        return torch.mul(x, scale, out=torch.empty_like(x, dtype=dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = grads
        x, scale = ctx.saved_tensors
        scaled = grad * scale  # in the dtype of the sums, whatever that of grad
        along = (scaled * x).sum(-1, keepdim=True) * scale.pow(2) / x.shape[-1]
        return scaled.addcmul_(x, along, value=-1).to(x.dtype), None


class _Gather(torch.autograd.Function):
    """Rows of a table, in the table's dtype; their gradients are summed in float32 or better."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, row: Tensor) -> Tensor:
        ctx.save_for_backward(row)
        ctx.rows = table.shape[0]
        return F.embedding(row, table)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = grads
        (row,) = ctx.saved_tensors
        wide = grad.to(_accumulate(grad.dtype))
        summed = torch.ops.aten.embedding_dense_backward(wide, row, ctx.rows, -1, False)
        return summed.to(grad.dtype), None


def rms_norm(x: Tensor, gain: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Divide ``x`` by its root mean square over the last dimension; ``gain`` is (members, width)."""
    if gain is None:
        return _UnitRMS.apply(x, dtype)  # type: ignore[return-value]
    normed = _UnitRMS.apply(x, gain.dtype)
    return (normed * gain.view(gain.shape[0], *([1] * (x.ndim - 2)), gain.shape[-1])).to(dtype)


class _Product(torch.autograd.Function):
    """X Wᵀ per member. The gradient of W comes in the layout of W, which the optimizer reads without a copy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.bmm(x, weight.mT)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (grad,) = grads
        x, weight = ctx.saved_tensors
        return torch.bmm(grad, weight), torch.bmm(grad.mT, x)


def linear(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """X Wᵀ per member, in ``dtype``. ``x`` (members, ..., in), ``weight`` (members, out, in)."""
    members, width = x.shape[0], x.shape[-1]
    out: Tensor = _Product.apply(x.reshape(members, -1, width).to(dtype), weight.to(dtype))  # type: ignore[assignment]
    return out.view(*x.shape[:-1], weight.shape[1])


def _qk_normalised(x: Tensor, gain: Tensor | None, config: TransformerConfig) -> Tensor:
    if config.qk_norm == "none":
        return x
    if config.qk_norm == "width":
        return rms_norm(x, gain, x.dtype)
    return rms_norm(x.unflatten(-1, (config.heads, config.head_dim)), gain, x.dtype).flatten(-2)


def _accumulate(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and norms: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def _project(
    normed: Tensor, parameters: Parameters, layer: int, config: TransformerConfig, dtype: torch.dtype, last: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalised queries, normalised keys and values of one layer; queries of the last position only if ``last``."""
    asked = normed[..., -1:, :] if last else normed
    query = linear(asked, parameters[f"query.{layer}"], dtype)
    key = linear(normed, parameters[f"key.{layer}"], dtype)
    value = linear(normed, parameters[f"value.{layer}"], dtype)
    query = _qk_normalised(query, parameters.get(f"norm_query.{layer}"), config)
    key = _qk_normalised(key, parameters.get(f"norm_key.{layer}"), config)
    return query, key, value


def _attend(
    query: Tensor, key: Tensor, value: Tensor, config: TransformerConfig, sharpness: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Softmax attention over sequences of three to six positions, where fused kernels have nothing to gain.

    A few (query, key) pairs are multiplied out and summed, which a compiler fuses and which needs no transposed copy;
    more pairs go through batched products.

    Returns:
        The mixed values ``(members, batch, queries, width)`` and what the last position attends to,
        ``(members, batch, heads, keys)``, at least float32.
    """
    q, k, v = (x.unflatten(-1, (config.heads, config.head_dim)) for x in (query, key, value))
    scale = config.head_dim**-0.5
    if sharpness is not None:
        q = q * sharpness.to(q.dtype).view(-1, 1, 1, 1, 1)
    if q.shape[2] * k.shape[2] <= FEW_PAIRS:
        scores = (q[:, :, :, None] * k[:, :, None]).sum(-1, dtype=_accumulate(q.dtype))  # (m, b, queries, keys, heads)
        weights = (scores * scale).softmax(3)
        mixed = (weights.to(v.dtype)[..., None] * v[:, :, None]).sum(3)
        return mixed.flatten(-2), weights[:, :, -1].mT
    q, k, v = (x.transpose(2, 3).flatten(0, 2) for x in (q, k, v))  # (members·batch·heads, positions, head_dim)
    weights = (torch.bmm(q, k.mT).to(_accumulate(q.dtype)) * scale).softmax(-1)
    mixed = torch.bmm(weights.to(v.dtype), v)
    members, batch = query.shape[:2]
    mixed = mixed.view(members, batch, config.heads, -1, config.head_dim).transpose(2, 3).flatten(-2)
    return mixed, weights.view(members, batch, config.heads, *weights.shape[1:])[..., -1, :]


def forward(
    parameters: Parameters,
    tokens: Tensor,
    config: TransformerConfig,
    dtype: torch.dtype,
    attention: list[Tensor] | None = None,
    sharpness: Tensor | None = None,
) -> Tensor:
    """Logits of the answer at the last position.

    Args:
        parameters: by name, each ``(members, *shape)``.
        tokens: ``(members, batch, length)``, int64.
        config: shape of the network.
        dtype: of the matrix products; norms, softmax and the residual stream stay in the parameters' dtype.
        attention: if a list, each layer appends what the last position attends to: (members, batch, heads, keys).
        sharpness: multiplies the scores of each member's attention, (members,); 1 where there is none.

    Returns:
        ``(members, batch, outputs)`` in the parameters' dtype.
    """
    members, batch, length = tokens.shape
    vocabulary = config.vocabulary
    one_layer = config.depth == 1
    embedded = parameters["embedding"][:, None] + parameters["position"][:, :, None]  # (members, length, vocab, width)
    stream_dtype = embedded.dtype
    row = tokens + torch.arange(length, device=tokens.device) * vocabulary
    row = row + (torch.arange(members, device=tokens.device) * (length * vocabulary))[:, None, None]

    def gathered(table: Tensor) -> Tensor:  # (members, length, vocab, k) -> (members, batch, length, k)
        return _Gather.apply(table.reshape(members * length * vocabulary, -1), row)  # type: ignore[return-value]

    if vocabulary < batch:
        normed = rms_norm(embedded, parameters.get("norm_attention.0"), dtype)
        projected = _project(normed, parameters, 0, config, dtype, last=False)
        x, query, key, value = (gathered(table) for table in (embedded, *projected))
        query = query[:, :, -1:] if one_layer else query
    else:
        x = gathered(embedded)
        normed = rms_norm(x, parameters.get("norm_attention.0"), dtype)
        query, key, value = _project(normed, parameters, 0, config, dtype, last=one_layer)

    for layer in range(config.depth):
        last = layer == config.depth - 1
        if layer:
            normed = rms_norm(x, parameters.get(f"norm_attention.{layer}"), dtype)
            query, key, value = _project(normed, parameters, layer, config, dtype, last)
        mixed, weights = _attend(query, key, value, config, sharpness)
        if attention is not None:
            attention.append(weights)
        if last:
            x = x[:, :, -1:]
        x = x + linear(mixed, parameters[f"output.{layer}"], dtype)  # the stream keeps its own, wider dtype
        normed = rms_norm(x, parameters.get(f"norm_mlp.{layer}"), dtype)
        hidden = F.silu(linear(normed, parameters[f"mlp_in.{layer}"], dtype))
        x = x + linear(hidden, parameters[f"mlp_out.{layer}"], dtype)

    x = rms_norm(x[:, :, -1], parameters.get("norm_final"), dtype)
    return linear(x, parameters["unembedding"], dtype).to(stream_dtype)


def loss(
    parameters: Parameters,
    tokens: Tensor,
    targets: Tensor,
    config: TransformerConfig,
    dtype: torch.dtype,
    sharpness: Tensor | None = None,
    stable: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of each member, ``(members,)``; where ``stable`` (members,) says so, that of StableMax.

    ``targets`` is ``(members, batch)``, and all else as in `forward`.
    """
    logits = forward(parameters, tokens, config, dtype, sharpness=sharpness)
    if stable is not None:
        logits = torch.where(stable.view(-1, 1, 1), stable_logits(logits), logits)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape).mean(1)
