"""Codes of a byte with scales: of the matrix, of its rows, of groups of columns or of blocks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rankdecay.attention.quantised.stored import FLOAT, FLOAT8, Stored, Weight, present
from rankdecay.attention.tensors import Shape

EXPONENTS = (torch.uint8, getattr(torch, "float8_e8m0fnu", torch.uint8))  # scales that are powers of two (torch 2.7)
_POWERS = torch.tensor([2.0 ** (i - 127) for i in range(255)] + [math.nan])


class Grid(NamedTuple):
    """Cut of a matrix into blocks with one scale each: how many along rows and columns, and of which size."""

    cells: tuple[int, int]
    block: tuple[int, int]

    def apply(self, codes: Tensor, scale: Tensor, zero: Tensor | None = None, order: Tensor | None = None) -> Tensor:
        """Return (codes - zero) · scale; ``order`` is the group of each column, where they are not in sequence."""
        rows = torch.arange(codes.shape[0]) // self.block[0]
        columns = torch.arange(codes.shape[1]) // self.block[1] if order is None else order

        def each(cells: Tensor) -> Tensor:  # rows and columns that are not cut stay of size 1, and broadcast
            cells = cells if self.cells[0] == 1 else cells[rows]
            return cells if self.cells[1] == 1 else cells[:, columns]

        if zero is not None:
            codes.sub_(each(zero))
        return codes.mul_(each(scale))


def grid(stored: Stored, shape: Shape, scale: str, block: tuple[int | None, int | None] | None = None) -> Grid:
    """Return how the scales cut the matrix, by their shape and the block that the configuration states."""
    scale_shape = stored.shapes[scale]
    block = block or _stated_block(stored)
    if len(scale_shape) == 4 and scale_shape[1] == scale_shape[3] == 1:  # ModelOpt: (rows, 1, columns, 1)
        scale_shape = (scale_shape[0], scale_shape[2])
    if math.prod(scale_shape) == 1:
        return Grid((1, 1), (shape[0], shape[1]))
    if scale_shape == (shape[0],):
        scale_shape = (shape[0], 1)
    if len(scale_shape) != 2:
        raise stored.wrong(f"scales of shape {scale_shape} do not cut a matrix of shape {shape}")
    sizes = []
    for lines, cells, size in zip(shape, scale_shape, block, strict=True):
        exact = lines // cells if cells and lines % cells == 0 else None
        usual = 128 if -(-lines // 128) == cells else None  # the last block may be cut short
        if size is None and exact and usual and exact != usual and cells > 1:
            raise stored.wrong(
                f"scales of shape {scale_shape} fit blocks of {exact} and of {usual}; config.json must say which"
            )
        size = size or exact or usual
        if size is None or -(-lines // size) != cells:
            raise stored.wrong(f"scales of shape {scale_shape} do not cut a matrix of shape {shape}")
        sizes.append(size)
    return Grid((scale_shape[0], scale_shape[1]), (sizes[0], sizes[1]))


def _stated_block(stored: Stored) -> tuple[int | None, int | None]:
    """Return the size of a block, (rows, columns), as far as the configuration states one."""
    groups = arguments(stored)
    value = stored.settings.get("weight_block_size")
    if len(groups) == 1 and groups[0].get("strategy") == "block":
        value = groups[0].get("block_structure")
    elif len(groups) == 1 and groups[0].get("strategy") == "group":
        size = groups[0].get("group_size")
        return None, size if isinstance(size, int) and size > 0 else None
    if isinstance(value, (list, tuple)) and len(value) == 2 and all(isinstance(n, int) and n > 0 for n in value):
        return value[0], value[1]
    return None, None


def zero_point(stored: Stored) -> str | None:
    """Return the tensor of zero points, if there is one.

    Raises:
        Refused: If there is none, where the configuration says that the codes are not symmetric.
    """
    groups = arguments(stored)
    if len(groups) == 1 and groups[0].get("symmetric") is False:
        return stored.need("_zero_point")
    return stored.find("_zero_point")


def order_of(stored: Stored, name: str | None, cut: Grid, columns: int) -> Tensor | None:
    """Return the group of each of so many columns, where a tensor states it."""
    if name is None or cut.cells[1] == 1:
        return None
    order = stored.load(name).long().flatten()
    if bool((order == -1).all()):
        return None  # initialised by compressed-tensors, and not used
    if order.numel() != columns:
        raise stored.wrong(f"{name} has {order.numel()} numbers for {columns} columns")
    if order.numel() and (int(order.min()) < 0 or int(order.max()) >= cut.cells[1]):
        raise stored.wrong(f"{name} names group {int(order.max())} of {cut.cells[1]}")
    return order


def arguments(stored: Stored) -> list[Mapping[str, Any]]:
    """Return the ``weights`` of every group in a configuration of compressed-tensors."""
    groups = stored.settings.get("config_groups")
    groups = groups.values() if isinstance(groups, Mapping) else ()
    found = [group.get("weights") for group in groups if isinstance(group, Mapping)]
    return [args for args in found if isinstance(args, Mapping)]


def numbers_of(scale: Tensor) -> Tensor:
    """Return scales as float32; bytes are exponents of two (E8M0)."""
    return _POWERS[scale.long()] if scale.dtype == torch.uint8 else scale.float()


def read_scaled(stored: Stored, scale: str) -> Weight:
    """Read (codes - zero point) · scale."""
    shape = stored.shapes[stored.name]
    cut = grid(stored, shape, scale)
    zero, order = zero_point(stored), stored.find("_g_idx")
    if zero and stored.shapes[zero] != stored.shapes[scale]:
        raise stored.wrong(f"its zero points have shape {stored.shapes[zero]}, its scales {stored.shapes[scale]}")

    def read() -> Tensor:
        codes = stored.load(stored.name).float()
        zeros = stored.load(zero).float().reshape(cut.cells) if zero else None
        scales = numbers_of(stored.load(scale)).reshape(cut.cells)
        return cut.apply(codes, scales, zeros, order_of(stored, order, cut, shape[1]))

    return Weight(shape, read, present(stored.find(""), scale, zero, order))


def read_llm_int8(stored: Stored, statistics: str) -> Weight:
    """Read bitsandbytes' LLM.int8: codes · the largest magnitude of each row / 127."""
    shape, order = stored.shapes[stored.name], stored.find("weight_format")
    if math.prod(stored.shapes[statistics]) != shape[0]:
        raise stored.wrong(f"SCB has {math.prod(stored.shapes[statistics])} numbers for a matrix of shape {shape}")
    if order and math.prod(stored.shapes[order]) != 1:
        raise stored.wrong(f"{order} is not one number")

    def read() -> Tensor:
        if order and int(stored.load(order).flatten()[0]) != 0:
            raise stored.refused("LLM.int8 in the tiled order of an old bitsandbytes")
        return stored.load(stored.name).float() * (stored.load(statistics).float().view(-1, 1) / 127)

    return Weight(shape, read, present(statistics, order))


def read_quanto(stored: Stored) -> Weight:
    """Read quanto's 8-bit weights."""
    if stored.name.endswith("._data"):  # packed: weight._data._data
        raise stored.at(stored.name.removesuffix("._data")).refused("quanto of less than 8 bits")
    codes, scale = stored.need("._data"), stored.need("._scale")
    if stored.find("._shift") or stored.dtypes[codes] not in (torch.int8, *FLOAT8):
        raise stored.refused("quanto of less than 8 bits")
    shape = stored.shapes[codes]
    if len(shape) != 2 or stored.shapes[scale] not in ((), (1,), (shape[0], 1)):
        raise stored.wrong(f"scales of shape {stored.shapes[scale]} do not fit codes of shape {shape}")
    return Weight(shape, lambda: stored.load(codes).float() * stored.load(scale).float(), (codes, scale))


def read_float_beside_scale(stored: Stored) -> Weight | None:
    """Read a weight of an ordinary type that has a scale beside it: BitNet's unpacked ternary numbers, nothing else."""
    if stored.dtypes.get(stored.name) not in FLOAT or len(stored.shapes[stored.name]) != 2:
        return None
    scale = stored.need("_scale", "_scale_inv")
    if stored.method == "bitnet":
        return Weight(
            stored.shapes[stored.name],
            lambda: stored.load(stored.name).float() * stored.load(scale).float().reshape(1),
            (scale,),
        )
    if stored.method == "compressed-tensors":
        return None  # the scale of a quantisation that is still to be done
    raise stored.refused(f"{str(stored.dtypes[stored.name]).removeprefix('torch.')} numbers with {scale} beside them")
