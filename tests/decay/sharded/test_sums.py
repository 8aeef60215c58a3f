"""Steps by sums of Gram matrices, on two processes, against the matrix in one piece."""

import torch
from torch import Tensor

import rankdecay as rd
from rankdecay.attention.layer import WHOLE
from rankdecay.decay.sharded.layout import Piece, local_piece
from rankdecay.decay.sharded.sums import decayed_pieces
from rankdecay.linalg import shrink
from tests.ranks import on_ranks

AMOUNT = 0.4
SHAPES = {"rows": (64, 6), "columns": (6, 64), "stack": (3, 64, 6)}


def drawn(name: str) -> Tensor:
    seed = list(SHAPES).index(name)
    return torch.randn(SHAPES[name], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def stepped(scale: str, amount: float | Tensor, backend: str) -> dict[str, Tensor]:
    """This process's pieces after one step for all three, which travel together."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    dims = {"rows": 0, "columns": 1, "stack": 1}
    pieces: list[Piece] = []
    for name, dim in dims.items():
        piece = local_piece(distribute_tensor(drawn(name), mesh, [Shard(dim)]), WHOLE, False)
        assert piece is not None
        assert piece.cut.gram == 6
        pieces.append(piece)
    values = decayed_pieces(pieces, rd.LowRank(1.0, scale=scale), amount, backend)  # pyright: ignore
    return dict(zip(dims, values, strict=True))


def expected(name: str, scale: str) -> Tensor:
    weight = drawn(name)
    rms = weight.norm(dim=(-2, -1)) / 6**0.5
    return shrink(weight, AMOUNT * (rms if scale == "relative" else torch.ones_like(rms)))


def test_both_sides_stacks_and_scales():
    for scale, amount, backend in [
        ("relative", AMOUNT, "exact"),
        ("absolute", AMOUNT, "exact"),
        ("relative", torch.tensor(AMOUNT, dtype=torch.float64), "matmul"),
    ]:
        first, second = on_ranks(2, stepped, scale, amount, backend)
        for name, dim in (("rows", 0), ("columns", 1), ("stack", 1)):
            got = torch.cat([first[name], second[name]], dim)
            torch.testing.assert_close(got, expected(name, scale), rtol=0, atol=1e-8 if backend == "exact" else 1e-6)
