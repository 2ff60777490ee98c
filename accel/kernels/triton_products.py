"""y = s_x scale (x_q . w_q) + t up + bias: a product of 8-bit numbers with all of its epilogue in one Triton kernel.

XLA writes the sums [M, N] to memory and reads them again for scales, bias and low-rank branch; here they stay in
registers. Hopper's matrix instructions read 8-bit operands along K alone, so weights lie as [N, K].

Shape letters: M rows of activations, K inputs, N outputs, G groups of inputs, R rank.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from difax.accel.kernels.triton_launch import jit, launch, tl

DTYPES = ("bfloat16", "float16")
TILES = (128, 64, 32)  # inputs of a tile; one matrix instruction takes 32
SHARED = 180 * 1024  # bytes that a program loads ahead; an H100 has 227 KiB a program


@jit
def kernel(
    x, w, sx, sw, t, up, bias, y,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    GROUPS: tl.constexpr, RANK: tl.constexpr, WIDE: tl.constexpr, BIAS: tl.constexpr, PACKED: tl.constexpr,
    STAGES: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """One tile [BM, BN] of y. K is the row stride of x and, halved where PACKED, of w; WIDE is RANK's power of two."""
    integer: tl.constexpr = x.dtype.element_ty == tl.int8
    kind: tl.constexpr = tl.int32 if integer else tl.float32
    halves: tl.constexpr = 2 if PACKED else 1
    stride: tl.constexpr = K // halves
    group: tl.constexpr = K // GROUPS
    ragged: tl.constexpr = stride % BK != 0
    grid_m, grid_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    tile = tl.program_id(0)
    band = tile // (BAND * grid_n)  # BAND row tiles at a time share the columns of w in L2
    tall = min(grid_m - band * BAND, BAND)
    i = band * BAND + (tile % (BAND * grid_n)) % tall
    j = (tile % (BAND * grid_n)) // tall
    r, c, d = i * BM + tl.arange(0, BM), j * BN + tl.arange(0, BN), tl.arange(0, BK)
    # reads past the last row or column wrap around, and what they make is not stored
    rows, columns = r % M, c % N
    x_at = x + rows.to(tl.int64)[:, None] * K + d[None, :]
    w_at = w + columns.to(tl.int64)[None, :] * stride + d[:, None]
    total = tl.zeros([BM, BN], tl.float32)
    sums = tl.zeros([BM, BN], kind)
    for k in tl.range(0, stride, BK, num_stages=STAGES):
        inside = d < stride - k
        if ragged:
            a = tl.load(x_at + k, mask=inside[None, :], other=0.0)
            b = tl.load(w_at + k, mask=inside[:, None], other=0.0)
        else:
            a, b = tl.load(x_at + k), tl.load(w_at + k)
        if PACKED:
            low, high = ((b << 4).to(tl.int8) >> 4).to(tl.int8), (b >> 4).to(tl.int8)
            if ragged:
                a_high = tl.load(x_at + k + stride, mask=inside[None, :], other=0.0)
            else:
                a_high = tl.load(x_at + k + stride)
            if GROUPS > 1:
                s_low = tl.load(sw + (k // group) * N + columns)[None, :]
                s_high = tl.load(sw + ((k + stride) // group) * N + columns)[None, :]
                total += tl.dot(a, low, out_dtype=kind).to(tl.float32) * s_low
                total += tl.dot(a_high, high, out_dtype=kind).to(tl.float32) * s_high
            else:
                sums = tl.dot(a, low, sums, out_dtype=kind)
                sums = tl.dot(a_high, high, sums, out_dtype=kind)
        elif GROUPS > 1:  # a tile of BK inputs lies in one group
            s_tile = tl.load(sw + (k // group) * N + columns)[None, :]
            total += tl.dot(a, b, out_dtype=kind).to(tl.float32) * s_tile
        else:
            sums = tl.dot(a, b, sums, out_dtype=kind)
    if GROUPS == 1:
        total = sums.to(tl.float32) * tl.load(sw + columns)[None, :]
    total *= tl.load(sx + rows)[:, None]
    if RANK:
        e = tl.arange(0, WIDE)
        t_tile = tl.load(t + rows[:, None] * RANK + e[None, :], mask=e[None, :] < RANK, other=0.0)
        up_tile = tl.load(up + e[:, None] * N + columns[None, :], mask=e[:, None] < RANK, other=0.0)
        total = tl.dot(t_tile, up_tile, total)
    if BIAS:
        total += tl.load(bias + columns).to(tl.float32)[None, :]
    y_at = y + r.to(tl.int64)[:, None] * N + c[None, :]
    tl.store(y_at, total.to(y.dtype.element_ty), mask=(r[:, None] < M) & (c[None, :] < N))


class Tiles(NamedTuple):
    """How a product is divided: number of programs, constants of `kernel`, warps of a program, stages of its loads."""

    grid: tuple[int]
    constants: dict[str, Any]
    warps: int
    stages: int


def tiles(
    m: int,
    n: int,
    k: int,
    groups: int = 1,
    rank: int = 0,
    bias: bool = False,
    packed: bool = False,
    block: tuple[int, int, int] | None = None,
    warps: int = 8,
    stages: int | None = None,
    band: int = 8,
) -> Tiles:
    """Tiles of a product [M, K] x [N, K].

    The defaults are of an H100 80GB HBM3, M 4608, K 3072, N 12288, int8, one scale a column: 128 x 128 x 128 with four
    stages took 399 us and 128 x 256 x 128 with three 391; K 12288, N 3072: 472 and 461; fp8: 360 and 332, 405 and 390.
    Groups and a low-rank branch without packing await measurement; their tiles are those that spill no registers.

    Args:
      m, n, k: sizes; k is the number of columns of x, and twice that of w where it is packed.
      groups: that k divides into; a tile takes 32, 64 or 128 inputs of one group.
      rank: of the low-rank branch, 0 for none; bias: is there one; packed: int4 values, unpacked in the kernel.
      block: rows, columns and inputs of a tile. None: 128 x 256 x 128; 128 columns where more than the sums stays in
        registers or N is no more than 128; 64 where int4 values are unpacked in groups, or rows are not of 16 bytes,
        which are not copied ahead.
      warps: of a program. stages: of its loads (None: as many as shared memory holds, up to 4).
      band: row tiles that go together.

    Raises:
      NotImplementedError: groups of which no tile is a part.
    """
    if block is None:
        wide = n > TILES[0] and groups == 1 and not rank and not packed
        narrow = packed and groups > 1
        block = (128, 256 if wide else 64 if narrow else 128, _inputs(k, groups, packed))
        block = block if k % 16 == 0 else (128, 64, min(64, block[2]))
    bm, bn, bk = block
    loaded = (bm * (2 if packed else 1) + bn) * bk
    stages = stages or max(2, min(4, SHARED // loaded))
    return Tiles(
        grid=(-(-m // bm) * -(-n // bn),),
        constants={
            "M": m, "N": n, "K": k, "BM": bm, "BN": bn, "BK": bk, "GROUPS": groups, "RANK": rank,
            "WIDE": max(16, 1 << (rank - 1).bit_length()), "BIAS": bias, "PACKED": packed, "STAGES": stages,
            "BAND": band,
        },
        warps=warps,
        stages=stages,
    )  # fmt: skip


def _inputs(k: int, groups: int, packed: bool) -> int:
    """Inputs of a tile, all in one group; NotImplementedError where there is no such number."""
    if groups == 1:
        return TILES[0]
    group = k // groups
    fits = [tile for tile in TILES if group % tile == 0 and not (packed and (k // 2) % tile)]
    if not fits:
        raise NotImplementedError(f"groups of {group} inputs; it takes multiples of {TILES[-1]}")
    return fits[0]


def product(
    xq_MK: jax.Array,
    w_NK: jax.Array,
    sx_M: jax.Array,
    scale_GN: jax.Array,
    t_MR: jax.Array | None = None,
    up_RN: jax.Array | None = None,
    bias_N: jax.Array | None = None,
    *,
    dtype: Any = jnp.bfloat16,
    **tuning: Any,
) -> jax.Array:
    """s_x scale (x_q . w_q) + t up + bias, rounded once, on the GPU that is compiled for (`difax.core.target`).

    int8 is summed in int32, exactly; fp8 by Hopper's matrix instruction, whose float32 sums keep about 14 bits.

    Args:
      xq_MK: [M, K] int8 or fp8 activations. w_NK: [N, K] of the same kind, or int8 [N, K/2] of two int4 values a byte
        (column k in the low and k + K/2 in the high half), which the kernel then unpacks.
      sx_M: [M] float32, of the rows of x. scale_GN: [G, N] float32, of G groups of K/G inputs.
      t_MR, up_RN: [M, R] and [R, N] of `dtype`, the low-rank branch x down and up; or None.
      bias_N: [N], or None.
      dtype: of y, one of `DTYPES`.
      tuning: block, warps, stages, band of `tiles`.

    Returns:
      y [M, N] of `dtype`.

    Raises:
      NotImplementedError: a GPU before Hopper or none, another dtype, groups of other sizes, jax-triton is missing.

    References: Tillet et al. (Triton), 2019, doi 10.1145/3315508.3329973; Li et al. (SVDQuant), 2024, arXiv:2411.05007,
    who compute the branch beside a 4-bit product, which Hopper does not have.
    """
    if jnp.dtype(dtype).name not in DTYPES:
        raise NotImplementedError(f"{jnp.dtype(dtype).name}; it computes {' and '.join(DTYPES)}")
    (m, k), n = xq_MK.shape, w_NK.shape[0]
    rank = 0 if t_MR is None else t_MR.shape[1]
    how = tiles(m, n, k, scale_GN.shape[0], rank, bias_N is not None, w_NK.shape[1] < k, **tuning)
    none = jnp.zeros((16,), dtype)  # stands for what there is not, and is not read
    more = (none if a is None else a for a in (t_MR, up_RN, bias_N))
    return launch(
        kernel,
        *(xq_MK, w_NK, sx_M, scale_GN, *more),
        out=jax.ShapeDtypeStruct((m, n), dtype),
        grid=how.grid,
        warps=how.warps,
        stages=how.stages,
        lowest=90,
        **how.constants,
    )
