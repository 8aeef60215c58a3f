"""Steps by sums of Gram matrices, on two processes, against the matrix in one piece."""

import torch
from torch import Tensor

import rankdecay as rd
from rankdecay.attention.layer import WHOLE
from rankdecay.decay.sharded.layout import Piece, local_piece
from rankdecay.decay.sharded.sums import decayed_pieces
from rankdecay.linalg import shrink
from tests.linalg.matrices import beside_the_largest, conditioned, low_rank
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


def left_of(dtype: torch.dtype, backend: str) -> list[tuple[Tensor, float, Tensor]]:
    """Whole matrices, thresholds beside their singular values, and this process's rows of what is left of them."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    found: list[tuple[Tensor, float, Tensor]] = []
    for kind in HARD:
        W = HARD[kind]().to(dtype)
        sigma = torch.linalg.svdvals(W.double())
        for tau in (
            float(sigma[5]) * (1 - 1e-15),
            float(sigma[5]),
            float(sigma[20]) * (1 + 1e-12),
            2 * float(sigma[0]),
        ):
            piece = local_piece(distribute_tensor(W, mesh, [Shard(0)]), WHOLE, False)
            assert piece is not None
            decay = rd.LowRank(1.0, scale="absolute")
            found.append((W, tau, decayed_pieces([piece], decay, tau, backend)[0]))  # pyright: ignore
    return found


HARD = {
    "decades": lambda: conditioned((300, 30), 1e12, torch.float64, 1),
    "low rank": lambda: low_rank(300, 30, 11, 2, torch.float64),
    "large": lambda: conditioned((300, 30), 1e3, torch.float64, 3) * 2.0**1015,
    "small": lambda: conditioned((300, 30), 1e3, torch.float64, 4) * 2.0**-1000,
}


def test_float64_leaves_as_little_below_the_threshold_as_a_whole_matrix_does():
    """At most two units in the last place of σ₁; Gram matrices would leave 1e5 of them where σ spans decades."""
    for backend in ("exact", "matmul"):
        for (W, tau, first), (_, _, second) in zip(*on_ranks(2, left_of, torch.float64, backend), strict=True):
            unit = W.abs().max()
            left, sigma = torch.cat([first, second]) / unit, torch.linalg.svdvals(W / unit)
            below = beside_the_largest(left, int((sigma * unit > tau).sum()))
            assert below <= 2 * 2.0**-52 * float(sigma[0])
            wanted = shrink(W, tau) / unit
            torch.testing.assert_close(left, wanted, rtol=0, atol=1e-13 * float(sigma[0]))


def test_nan_and_nothing_of_float64():
    first, second = on_ranks(2, spoiled)
    for rows in (first, second):
        assert rows["spoiled"].isnan().all()
        assert torch.equal(rows["kept"], rows["before"])


def spoiled() -> dict[str, Tensor]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    W = torch.randn(2, 40, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with_nan = W.clone()
    with_nan[0, 3, 1] = torch.nan
    decay = rd.LowRank(1.0, scale="absolute")
    pieces = [local_piece(distribute_tensor(each, mesh, [Shard(1)]), WHOLE, False) for each in (with_nan, W)]
    after, _ = decayed_pieces(pieces, decay, 0.3, "exact")  # pyright: ignore
    kept = decayed_pieces(pieces[1:], decay, 0.0, "exact")[0]  # pyright: ignore
    assert after[1].isfinite().all()
    return {"spoiled": after[0], "kept": kept, "before": pieces[1].value}  # pyright: ignore
