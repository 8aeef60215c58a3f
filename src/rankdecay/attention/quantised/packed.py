"""Codes of less than a byte, several to a word."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rankdecay.attention.quantised.scales import EXPONENTS, Grid, arguments, grid, numbers_of, order_of, zero_point
from rankdecay.attention.quantised.stored import FLOAT, FLOAT8, Stored, Weight, present


def _unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """Return the codes in rows of 32-bit words: code i has the bits i·bits and on, the least significant first.

    Args:
        words: (rows, words), of a 32-bit integer type.
        bits: of a code, 1 to 8.
        count: codes per row.

    Returns:
        Of uint8, (rows, count).
    """
    groups = -(-count // 32)  # 32 codes fill whole words
    words = words.view(torch.int32).long() & 0xFFFFFFFF
    words = nn.functional.pad(words, (0, groups * bits - words.shape[1])).unflatten(1, (groups, bits))
    codes = torch.empty(*words.shape[:2], 32, dtype=torch.uint8)
    for i in range(32):
        word, shift = divmod(i * bits, 32)
        code = words[..., word] >> shift
        if shift + bits > 32:
            code = code | words[..., word + 1] << (32 - shift)
        codes[..., i] = code & (2**bits - 1)
    return codes.flatten(1)[:, :count]


def _fill(count: int, bits: int) -> int:
    """Return the number of 32-bit words that hold so many codes."""
    return -(-count * bits // 32)


def _bits(stored: Stored, stated: int | None, fits: Callable[[int], bool], choices: tuple[int, ...]) -> int:
    """Return the bits of a code: those the configuration states, if the shapes allow them; else what the shapes say."""
    possible = [bits for bits in choices if fits(bits)]
    if stated in possible:
        return stated
    if stated is None and len(possible) == 1:
        return possible[0]
    statement = f"the configuration states {stated} bits" if stated else "the configuration does not state the bits"
    raise stored.wrong(f"{statement}, and the shapes of its tensors allow {possible or 'none'}")


def read_gptq_or_awq(stored: Stored) -> Weight | None:
    """Read GPTQ or AWQ, which store the same tensors in different orders, by the configuration."""
    codes, scales = stored.need("qweight"), stored.need("scales")
    if len(stored.shapes[codes]) != 2 or len(stored.shapes[scales]) != 2 or not math.prod(stored.shapes[scales]):
        raise stored.wrong(f"qweight has shape {stored.shapes[codes]} and scales {stored.shapes[scales]}")
    if any(stored.dtypes[name] != torch.int32 for name in (codes, stored.need("qzeros"))):
        raise stored.refused(f"{stored.method or 'GPTQ or AWQ'} with codes that are not packed into int32")
    packing = str(stored.settings.get("packing_format", ""))
    method = stored.method + packing
    layout = str(stored.settings.get("checkpoint_format") or "").lower()
    if stored.method == "auto-round" and packing not in ("auto_round:auto_gptq", "auto_round:auto_awq"):
        raise stored.refused(f"auto-round in packing_format={packing!r}")
    if "awq" in method or (not stored.method and stored.shapes[codes][1] != stored.shapes[scales][1]):
        layout = layout or str(stored.settings.get("version") or "").lower()
        if layout not in ("", "gemm"):
            raise stored.refused(f"AWQ in the order {layout!r}")
        return _awq(stored, codes, scales)
    if stored.method and "gptq" not in method:
        raise stored.unknown()
    if layout not in ("", "gptq", "gptq_v2"):
        raise stored.refused(f"GPTQ in the format {layout!r}")
    return _gptq(stored, codes, scales, one=0 if layout == "gptq_v2" else 1)


def _gptq(stored: Stored, codes: str, scales: str, one: int) -> Weight:
    """Read GPTQ: packed along the inputs, (inputs · bits / 32, outputs); version 1 stores each zero less one."""
    zeros, order = stored.need("qzeros"), stored.find("g_idx")
    (words, out), (groups, columns), zeros_shape = stored.shapes[codes], stored.shapes[scales], stored.shapes[zeros]
    order = order if order and stored.shapes[order] != (0,) else None
    inside = stored.shapes[order][0] if order else None

    def inputs(bits: int) -> int:
        return inside or words * 32 // bits

    bits = _bits(
        stored,
        None if stored.settings.get("dynamic") else stored.number("bits"),
        lambda bits: zeros_shape == (groups, _fill(out, bits)) and words == _fill(inputs(bits), bits),
        (2, 3, 4, 8),
    )
    if columns != out:
        raise stored.wrong(f"its scales have {columns} columns for {out} outputs")
    shape = (out, inputs(bits))
    size = stored.number("group_size") or max(shape[1] // groups, 1)
    if order is None and -(-shape[1] // size) != groups:
        raise stored.wrong(f"{groups} groups of {size} do not make {shape[1]} inputs")
    cut = Grid((out, groups), (1, size))

    def read() -> Tensor:
        numbers = _unpack(stored.load(codes).t().contiguous(), bits, shape[1]).float()
        zero = (_unpack(stored.load(zeros), bits, out).long() + one) & (2**bits - 1)
        return cut.apply(
            numbers, stored.load(scales).float().t(), zero.float().t(), order_of(stored, order, cut, shape[1])
        )

    return Weight(shape, read, present(codes, scales, zeros, order))


def _awq(stored: Stored, codes: str, scales: str) -> Weight:
    """Read AWQ's GEMM order: packed along the outputs, (inputs, outputs / 8), the eight of a word interleaved."""
    zeros = stored.need("qzeros")
    (inside, words), (groups, out) = stored.shapes[codes], stored.shapes[scales]
    size = stored.number("group_size") or stored.number("q_group_size") or inside // groups
    if (stored.number("bits") or stored.number("w_bit") or 4) != 4:
        raise stored.refused("AWQ of other than 4 bits")
    if words * 8 != out or stored.shapes[zeros] != (groups, words) or inside != groups * size:
        raise stored.wrong(
            f"qweight of shape {stored.shapes[codes]}, qzeros of {stored.shapes[zeros]} and scales of "
            f"{stored.shapes[scales]} in groups of {size} do not belong together"
        )
    cut = Grid((out, groups), (1, size))

    def columns(name: str) -> Tensor:
        packed = _unpack(stored.load(name), 4, out).unflatten(1, (words, 8))
        return packed[..., [0, 4, 1, 5, 2, 6, 3, 7]].flatten(1).t().float().contiguous()

    def read() -> Tensor:
        return cut.apply(columns(codes), stored.load(scales).float().t(), columns(zeros))

    return Weight((out, inside), read, (codes, scales, zeros))


def read_packed(stored: Stored) -> Weight:
    """Read compressed-tensors' packed integers, or its 4-bit floats."""
    codes, scale = stored.need("_packed"), stored.need("_scale")
    if len(stored.shapes[codes]) != 2:
        raise stored.refused(f"packed numbers of shape {stored.shapes[codes]}")
    if stored.dtypes[codes] == torch.uint8:
        return read_float4(stored, codes, scale)
    if stored.dtypes[codes] != torch.int32:
        raise stored.unknown()
    stated = stored.need("_shape")
    shape = _stated_shape(stored, stated)
    rows, words = stored.shapes[codes]
    if shape[0] != rows:
        raise stored.wrong(f"{stated} says {shape}, where weight_packed has {rows} rows")
    stated_bits = {args["num_bits"] for args in arguments(stored) if isinstance(args.get("num_bits"), int)}
    bits = _bits(
        stored,
        stated_bits.pop() if len(stated_bits) == 1 else None,
        lambda bits: words == _fill(shape[1], bits),
        (1, 2, 3, 4, 5, 6, 7, 8),
    )
    cut = grid(stored, shape, scale)
    zero, order = zero_point(stored), stored.find("_g_idx")
    middle = 2 ** (bits - 1)
    packed_zero = zero is not None and stored.dtypes[zero] == torch.int32
    if zero and stored.shapes[zero] != ((_fill(rows, bits), cut.cells[1]) if packed_zero else stored.shapes[scale]):
        raise stored.wrong(f"its zero points have shape {stored.shapes[zero]}, its scales {stored.shapes[scale]}")

    def zeros() -> Tensor | None:
        if zero is None:
            return None
        packed = stored.load(zero)
        if packed_zero:
            return _unpack(packed.t().contiguous(), bits, rows).t().float() - middle
        return packed.float().reshape(cut.cells)

    def read() -> Tensor:
        numbers = _unpack(stored.load(codes), bits, shape[1]).float() - middle
        scales = numbers_of(stored.load(scale)).reshape(cut.cells)
        return cut.apply(numbers, scales, zeros(), order_of(stored, order, cut, shape[1]))

    return Weight(shape, read, present(codes, scale, stated, zero, order))


_E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def read_float4(stored: Stored, codes: str, scale: str) -> Weight:
    """Read NVFP4 (groups of 16, a scale of the tensor) or MXFP4 (groups of 32, powers of two): two numbers a byte."""
    if len(stored.shapes[codes]) != 2:
        raise stored.refused(f"4-bit floats of shape {stored.shapes[codes]}")
    shape = (stored.shapes[codes][0], 2 * stored.shapes[codes][1])
    exponents = stored.dtypes[scale] in EXPONENTS
    group = 32 if exponents else 16
    typed = exponents or stored.dtypes[scale] in FLOAT8
    if not typed or stored.shapes[scale] != (shape[0], shape[1] // group):
        raise stored.refused(f"codes of shape {stored.shapes[codes]} with scales of shape {stored.shapes[scale]}")
    divisor, factor = stored.find("_global_scale"), stored.find("_scale_2")
    if any(math.prod(stored.shapes[name]) != 1 for name in (divisor, factor) if name):
        raise stored.wrong("its scale of the whole matrix is not one number")
    if not (exponents or divisor or factor):
        raise stored.wrong("its weight_global_scale or weight_scale_2 is missing")

    def read() -> Tensor:
        packed = stored.load(codes).view(torch.uint8)
        numbers = torch.stack([packed & 15, packed >> 4], -1).flatten(1).long()
        values = torch.cat([_E2M1, -_E2M1])[numbers]
        scales = numbers_of(stored.load(scale))
        if divisor:
            scales = scales / stored.load(divisor).float().reshape(1)
        elif factor:
            scales = scales * stored.load(factor).float().reshape(1)
        return Grid((shape[0], shape[1] // group), (1, group)).apply(values, scales)

    return Weight(shape, read, present(stored.find("", "_packed"), scale, divisor, factor))


def read_affine(stored: Stored) -> Weight:
    """Read MLX: codes · scale + bias, packed along the inputs."""
    scale, bias = stored.need("scales"), stored.need("biases", "qbiases")
    rows, words = stored.shapes[stored.name]
    settings = stored.settings.get(stored.name.removesuffix(".weight"))
    settings = stored.settings if not isinstance(settings, Mapping) else settings
    size, bits, kind = settings.get("group_size"), settings.get("bits"), settings.get("mode", "affine")
    scale_shape = stored.shapes[scale]
    if not (isinstance(size, int) and isinstance(bits, int) and size > 0 and 0 < bits <= 8 and kind == "affine"):
        raise stored.refused(f"MLX with group_size={size!r}, bits={bits!r}, mode={kind!r}")
    if (
        len(scale_shape) != 2
        or scale_shape[0] != rows
        or stored.shapes[bias] != scale_shape
        or _fill(scale_shape[1] * size, bits) != words
    ):
        raise stored.wrong(f"{words} words a row do not hold {scale_shape} groups of {size} numbers of {bits} bits")
    shape = (rows, scale_shape[1] * size)

    def read() -> Tensor:
        numbers = _unpack(stored.load(stored.name), bits, shape[1]).float().unflatten(1, (-1, size))
        return (numbers * stored.load(scale).float()[..., None] + stored.load(bias).float()[..., None]).flatten(1)

    return Weight(shape, read, (scale, bias))


def read_ternary(stored: Stored, scale: str) -> Weight:
    """Read BitNet: rows i, i + n, i + 2n, i + 3n share a byte; ``autobitlinear`` multiplies, ``bitlinear`` divides."""
    rows, columns = stored.shapes[stored.name]
    if math.prod(stored.shapes[scale]) != 1:
        raise stored.wrong(f"its scale has shape {stored.shapes[scale]}, not one number")

    def read() -> Tensor:
        codes = stored.load(stored.name).view(torch.uint8)
        numbers = torch.cat([(codes >> shift & 3).float() - 1 for shift in (0, 2, 4, 6)])
        factor = stored.load(scale).float().reshape(1)
        return numbers * factor if stored.settings.get("linear_class") == "autobitlinear" else numbers / factor

    return Weight((4 * rows, columns), read, (scale,))


def read_bitsandbytes4(stored: Stored) -> Weight:
    """Read bitsandbytes' nf4 and fp4: a table of 16 numbers, a scale for each block of consecutive numbers.

    With nested statistics the scales are codes themselves: of a table of 256, scaled by block, about an offset.
    """
    kinds = (".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4")
    state, absmax, table = stored.need(*kinds), stored.need(".absmax"), stored.need(".quant_map")
    codes, nested, nested_table = stored.need(""), stored.find(".nested_absmax"), stored.find(".nested_quant_map")
    quant_state = _json(stored, state)
    shape, size, inner = quant_state.get("shape"), quant_state.get("blocksize"), quant_state.get("nested_blocksize")
    if not (isinstance(shape, list) and len(shape) == 2 and all(isinstance(n, int) and n > 0 for n in shape)):
        raise stored.wrong(f"its quant_state states the shape {shape!r}")
    count, blocks = math.prod(shape), math.prod(stored.shapes[absmax])
    padding = 2 * stored.dtypes[codes].itemsize
    numbers = math.prod(stored.shapes[codes]) * padding
    if not isinstance(size, int) or size < 1 or -(-count // size) != blocks or not 0 <= numbers - count < padding:
        raise stored.wrong(f"{numbers} codes and {blocks} blocks of {size!r} do not make the shape {tuple(shape)}")
    if math.prod(stored.shapes[table]) != 16:
        raise stored.wrong(f"its quant_map has {math.prod(stored.shapes[table])} numbers, not 16")
    parts = present(absmax, table, state, nested, nested_table)
    if nested:
        cells = math.prod(stored.shapes[nested])
        offset = quant_state.get("nested_offset")
        if not isinstance(inner, int) or inner < 1 or -(-blocks // inner) != cells:
            raise stored.wrong(f"{cells} nested blocks of {inner!r} do not make {blocks} scales")
        if not isinstance(offset, (int, float)) or math.prod(stored.shapes[stored.need(".nested_quant_map")]) != 256:
            raise stored.wrong("its nested statistics are incomplete")
    elif stored.dtypes[absmax] not in FLOAT:
        raise stored.wrong("its absmax holds codes, and nested_absmax is missing")

    def scales() -> Tensor:
        statistics = stored.load(absmax).flatten()
        if not nested:
            return statistics.float()
        values = stored.load(stored.need(".nested_quant_map")).float().flatten()[statistics.view(torch.uint8).long()]
        return (
            values * stored.load(nested).float().flatten().repeat_interleave(int(inner or 1))[:blocks]
            + quant_state["nested_offset"]
        )

    def read() -> Tensor:
        packed = stored.load(codes).contiguous().view(torch.uint8).flatten()
        values = (
            stored.load(table).float().flatten()[torch.stack([packed >> 4, packed & 15], -1).flatten().long()[:count]]
        )
        values = nn.functional.pad(values, (0, blocks * size - count)).unflatten(0, (blocks, size))
        return (values * scales()[:, None]).flatten()[:count].reshape(shape)

    return Weight(tuple(shape), read, parts)


def _stated_shape(stored: Stored, name: str) -> tuple[int, int]:
    """Return the shape that a tensor states."""
    if stored.shapes[name] != (2,) or stored.dtypes[name] not in (torch.int32, torch.int64):
        raise stored.wrong(f"{name} is not a shape")
    rows, columns = (int(n) for n in stored.load(name).tolist())
    if rows < 1 or columns < 1:
        raise stored.wrong(f"{name} states the shape {rows, columns}")
    return rows, columns


def _json(stored: Stored, name: str) -> dict[str, Any]:
    """Return the JSON object in a tensor of bytes."""
    if stored.dtypes[name] != torch.uint8 or math.prod(stored.shapes[name]) > 2**16:
        raise stored.wrong(f"{name} is not a description")
    try:
        content = json.loads(bytes(stored.load(name).flatten().tolist()))
    except (ValueError, RecursionError) as error:
        raise stored.wrong(f"{name} is not JSON ({error})") from None
    if not isinstance(content, dict):
        raise stored.wrong(f"{name} is not a JSON object")
    return content


def read_hqq(stored: Stored) -> Weight | None:
    """Read HQQ: codes of 8, 4, 2 or 1 bits, the first rows in the highest bits, in groups along one axis.

    A floating-point W_q is a projection that is called so.
    """
    if stored.dtypes[stored.need("W_q")] in FLOAT:
        return None
    codes, scale, zero, stated = (stored.need(part) for part in ("W_q", "scale", "zero", "shape"))
    if stored.dtypes[codes] != torch.uint8 or len(stored.shapes[codes]) != 2:
        raise stored.refused("HQQ with codes that are not bytes")
    if any(stored.dtypes[name] not in FLOAT for name in (scale, zero)):
        raise stored.refused("HQQ with quantised scales")
    shape = _stated_shape(stored, stated)
    count, rows, columns = math.prod(shape), *stored.shapes[codes]
    bits = next((bits for bits in (8, 4, 2, 1) if rows * columns * 8 // bits == count), None)
    if bits is None:
        raise stored.refused(f"HQQ with codes of shape {stored.shapes[codes]} for a matrix of shape {shape}")
    per = 8 // bits
    if stored.shapes[scale] not in ((rows * per, 1), (1, columns)) or stored.shapes[zero] != stored.shapes[scale]:
        raise stored.wrong(f"scales of shape {stored.shapes[scale]} do not fit codes of shape {stored.shapes[codes]}")

    def read() -> Tensor:
        packed = stored.load(codes)
        numbers = torch.cat([packed >> 8 - bits * (i + 1) & 2**bits - 1 for i in range(per)]).float()
        return ((numbers - stored.load(zero).float()) * stored.load(scale).float()).reshape(shape)

    return Weight(shape, read, (codes, scale, zero, stated))
