"""Block-sparse flash attention in Triton, for NVIDIA GPUs from sm_80 on.

One program has a tile of queries of one head, and goes through the blocks of keys that its row of the list names. Its
softmax is online, in base 2 and float32:

  top' = max(top, max_j x_j);   total <- 2^(top - top') total + sum_j 2^(x_j - top')
  o   <- 2^(top - top') o + 2^(x_j - top') v_j,                at the end o / total, lse = (top + log2 total) ln 2.

Low-bit products as in SageAttention: int8 q and k with a scale per block, summed in int32; 2^(x - top') in fp8 times
448, the largest of e4m3, which cancels in o / total; v in fp8 with a scale per channel.

Milakov & Gimelshein 2018, arXiv:1805.02867; Dao, FlashAttention-2, 2023, arXiv:2307.08691; Zhang et al.,
SageAttention, 2024, arXiv:2410.02367; SageAttention2, 2024, arXiv:2411.10958 (which sums fp8 products in two levels;
here the tensor cores' own sum is used).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from difax.accel.kernels.triton_launch import capability, jit, launch, tl
from difax.core.contracts import BlockScales, Segments
from difax.core.ops import MASKED

HALVES = ("bfloat16", "float16")
FP8 = "float8_e4m3fn"
LOG2E = 1.4426950408889634


class Tuning(NamedTuple):
    """How the blocks of a list are run: programs per block of queries, steps per block of keys, stages of the
    pipeline that loads keys and values, warps of a program."""

    split: int
    split_k: int
    stages: int
    warps: int


@jit
def kernel(
    q, k, v, indices, counts, scales_q, scales_k, scales_v, ids_q, ids_k, o, lse,
    T: tl.constexpr, S: tl.constexpr, H: tl.constexpr, K: tl.constexpr, N: tl.constexpr,
    BQ: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr, SPLIT_K: tl.constexpr,
    INDEX_B: tl.constexpr, INDEX_H: tl.constexpr, COUNT_B: tl.constexpr, COUNT_H: tl.constexpr,
    VB: tl.constexpr, VH: tl.constexpr, VS: tl.constexpr, VK: tl.constexpr,
    SCALE: tl.constexpr, MASK: tl.constexpr, SCALED: tl.constexpr, SCALED_V: tl.constexpr, SEG: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One tile of queries; INDEX_*, COUNT_*: rows of the list from one sample or head to the next, 0 where shared;
    V*: elements from one value to the next along an axis; SCALE, MASK: in base 2."""
    M: tl.constexpr = BQ // SPLIT
    STEP: tl.constexpr = BK // SPLIT_K
    LOW: tl.constexpr = v.dtype.element_ty == tl.float8e4nv
    INT: tl.constexpr = q.dtype.element_ty == tl.int8
    SUM: tl.constexpr = tl.int32 if INT else tl.float32  # pyright: ignore[reportAssignmentType]
    RAGGED_Q: tl.constexpr = T % BQ != 0  # not M: with SPLIT a whole tile may lie behind the end
    RAGGED_K: tl.constexpr = S % BK != 0
    N_Q: tl.constexpr = (T + BQ - 1) // BQ
    N_K: tl.constexpr = (S + BK - 1) // BK
    UP: tl.constexpr = 8.807354922057604 if LOW else 0.0  # pyright: ignore[reportAssignmentType] # log2(448)

    i = tl.program_id(0)
    h, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)  # offsets of whole arrays pass 2^31
    row, first, head = i // SPLIT, i * M, b * H + h
    r, c, s = tl.arange(0, M), tl.arange(0, K), tl.arange(0, STEP)
    exists_q = first + r < T

    at_q = q + (b * T + first) * (H * K) + h * K + r[:, None] * (H * K) + c[None, :]
    if RAGGED_Q:
        x_q = tl.load(at_q, mask=exists_q[:, None], other=0)
    else:
        x_q = tl.load(at_q)
    if SEG:
        id_q = tl.load(ids_q + b * T + first + r, mask=exists_q, other=0)
    else:
        id_q = r
    scale = SCALE
    if SCALED:
        scale *= tl.load(scales_q + head * N_Q + row)
    listed = indices + (b * INDEX_B + h * INDEX_H + row) * N
    count = tl.load(counts + b * COUNT_B + h * COUNT_H + row)

    top = tl.full([M], -float("inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, K], tl.float32)
    for j in tl.range(0, count * SPLIT_K, num_stages=STAGES):
        block = tl.load(listed + j // SPLIT_K)
        start = block * BK + (j % SPLIT_K) * STEP
        exists_k = start + s < S
        at_k = k + (b * S + start) * (H * K) + h * K + s[None, :] * (H * K) + c[:, None]
        at_v = v + b * VB + h * VH + start.to(tl.int64) * VS + s[:, None] * VS + c[None, :] * VK
        if RAGGED_K:
            x_k = tl.load(at_k, mask=exists_k[None, :], other=0)
        else:
            x_k = tl.load(at_k)
        if RAGGED_K and not LOW:  # fp8 values are padded
            x_v = tl.load(at_v, mask=exists_k[:, None], other=0)
        else:
            x_v = tl.load(at_v)
        x = tl.dot(x_q, x_k, out_dtype=SUM).to(tl.float32)
        by = scale
        if SCALED:
            by *= tl.load(scales_k + head * N_K + block)
        if SEG or RAGGED_K:
            x *= by
            if SEG:
                id_k = tl.load(ids_k + b * S + start + s, mask=exists_k, other=0)
                x = tl.where(id_q[:, None] == id_k[None, :], x, MASK)
            if RAGGED_K:  # below MASK; a block's first step has one key at least, so that top is finite
                x = tl.where(exists_k[None, :], x, -float("inf"))
            new = tl.maximum(top, tl.max(x, 1))
            p = tl.exp2(x - (new - UP)[:, None])
        else:  # the scale is 0 or more: one product and difference in place of two
            new = tl.maximum(top, tl.max(x, 1) * by)
            p = tl.exp2(x * by - (new - UP)[:, None])
        shrink = tl.exp2(top - new)
        total = total * shrink + tl.sum(p, 1)
        acc = tl.dot(p.to(x_v.dtype), x_v, acc * shrink[:, None])
        top = new

    some = total > 0
    out = acc / tl.where(some, total, 1.0)[:, None]
    if SCALED_V:
        out *= tl.load(scales_v + head * K + c)[None, :]
    at_o = o + (b * T + first) * (H * K) + h * K + r[:, None] * (H * K) + c[None, :]
    sums = tl.where(some, (top + (tl.log2(tl.where(some, total, 1.0)) - UP)), MASK) * 0.6931471805599453
    if RAGGED_Q:
        tl.store(at_o, out.to(o.dtype.element_ty), mask=exists_q[:, None])
        tl.store(lse + head * T + first + r, sums, mask=exists_q)
    else:
        tl.store(at_o, out.to(o.dtype.element_ty))
        tl.store(lse + head * T + first + r, sums)


def block_sparse(
    q_BTHK: jax.Array,
    k_BSHK: jax.Array,
    v_BSHK: jax.Array,
    indices: jax.Array,
    counts: jax.Array,
    *,
    block_q: int,
    block_k: int,
    softmax_scale: float,
    segments: Segments | None = None,
    scales: BlockScales | None = None,
    interpret: bool = False,
    split: int | None = None,
    split_k: int | None = None,
    stages: int | None = None,
    warps: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Attention over the listed blocks of keys alone: o = softmax(softmax_scale q k^T) v.

    A query all of whose keys have other segment ids gets the mean of the values of its listed blocks, as from
    `difax.core.ops.attend`, and the log-sum-exp MASKED + log of their number. Values that are inf or NaN where no query
    attends must be taken out before (`difax.core.ops.attended_values`): their weight is 0, and 0 times inf is NaN. The
    weights are rounded to the type of v before the second product.

    Args:
      q_BTHK: [B, T, H, K] queries in bfloat16, float16, or int8 with `scales`; K is 64 or 128.
      k_BSHK: [B, S, H, K] keys, of the type of q.
      v_BSHK: [B, S, H, K] values in bfloat16, float16, or float8_e4m3fn with `scales.v`.
      indices: int32 [B or 1, H or 1, ceil(T / block_q), n], blocks of keys from 0 to ceil(S / block_k) - 1, distinct in
        the first `counts` of a row. Out of range they are read out of bounds.
      counts: int32 [B or 1, H or 1, ceil(T / block_q)], 0 to n; a row of 0 gives o = 0 and the log-sum-exp MASKED,
        which has no weight where partial results are merged.
      block_q, block_k: size of a block, powers of two; a program needs 16 queries and a step 16 keys, 32 of 8 bits.
      softmax_scale: above 0, mostly K ** -0.5 (of the width before it was padded).
      segments: int32 ids; pairs with unequal ids do not attend.
      scales: of the list's blocks, 0 or more.
      interpret: refused (`difax.accel.kernels.triton_launch.launch`).
      split: programs that a block of queries is divided among. split_k: steps that a block of keys is read in.
      stages: of the pipeline of loads. warps: of a program. None: `tuned`.

    Returns:
      o [B, T, H, K] in the type of q (bfloat16 for int8), lse [B, H, T] float32.

    Raises:
      NotImplementedError: other types, widths or block sizes, fp8 before sm_89, another device, no jax-triton.
      ValueError: a list or scales that do not fit the lengths.
    """
    (B, T, H, K), S = q_BTHK.shape, k_BSHK.shape[1]
    gpu = capability()
    _check_types(q_BTHK, k_BSHK, v_BSHK, scales, gpu)
    n_q, n_k = -(-T // block_q), -(-S // block_k)
    for name, shape in (("indices", indices.shape[:3]), ("counts", counts.shape)):
        if len(shape) != 3 or shape[0] not in (1, B) or shape[1] not in (1, H) or shape[2] != n_q:
            raise ValueError(f"{name} of {list(shape)} rows; allowed: [{B} or 1, {H} or 1, {n_q}]")
    if softmax_scale <= 0:
        raise ValueError(f"softmax_scale={softmax_scale}; allowed: above 0")
    none = jnp.zeros((1,), jnp.float32)
    by_q, by_k, by_v = none, none, none
    if scales is not None:
        if (scales.block_q, scales.block_k) != (block_q, block_k):
            made = f"{scales.block_q} x {scales.block_k}"
            raise NotImplementedError(f"scales of blocks of {made} and a list of {block_q} x {block_k}")
        if scales.q.shape != (B, H, n_q) or scales.k.shape != (B, H, n_k):
            raise ValueError(
                f"scales of {scales.q.shape} and {scales.k.shape}; allowed: {(B, H, n_q)} and {(B, H, n_k)}"
            )
        by_q, by_k, by_v = scales.q, scales.k, none if scales.v is None else scales.v
    low = v_BSHK.dtype == FP8
    best = tuned(gpu, block_q, block_k)
    run = Tuning(*(b if a is None else a for a, b in zip((split, split_k, stages, warps), best, strict=True)))
    _check_blocks(block_q, block_k, run, 32 if low or q_BTHK.dtype == jnp.int8 else 16)
    if low:  # tensor cores read 8-bit operands along the axis that they sum over
        length = n_k * block_k
        v_BSHK = jnp.pad(v_BSHK, ((0, 0), (0, length - S), (0, 0), (0, 0))).transpose(0, 2, 3, 1)
        strides = H * K * length, K * length, 1, length
    else:
        strides = S * H * K, K, H * K, 1
    ids = jnp.zeros((1,), jnp.int32)
    o = jax.ShapeDtypeStruct((B, T, H, K), jnp.bfloat16 if q_BTHK.dtype == jnp.int8 else q_BTHK.dtype)
    return launch(
        kernel, q_BTHK, k_BSHK, v_BSHK, indices, counts, by_q, by_k, by_v,
        *((ids, ids) if segments is None else (segments.q, segments.k)),
        out=(o, jax.ShapeDtypeStruct((B, H, T), jnp.float32)), grid=(n_q * run.split, H, B),
        warps=run.warps, stages=run.stages, interpret=interpret,
        T=T, S=S, H=H, K=K, N=indices.shape[-1], BQ=block_q, BK=block_k, SPLIT=run.split, SPLIT_K=run.split_k,
        **_rows("INDEX", indices, n_q), **_rows("COUNT", counts, n_q),
        **dict(zip(("VB", "VH", "VS", "VK"), strides, strict=True)),
        SCALE=float(softmax_scale) * LOG2E, MASK=MASKED * LOG2E, SCALED=scales is not None,
        SCALED_V=scales is not None and scales.v is not None, SEG=segments is not None, STAGES=run.stages,
    )  # fmt: skip


def tuned(gpu: int, block_q: int, block_k: int) -> Tuning:
    """Settings with which every type compiles without spilled registers, within the GPU's shared memory.

    Args:
      gpu: compute capability, 90 for Hopper.
      block_q, block_k: of the list.

    Returns:
      For Hopper what was the fastest on an H100 (128 x 128 blocks: 2 stages, 8 warps); nothing else has been timed.
      Steps of 64 keys leave what has 99 KiB of shared memory (sm_86, sm_89, sm_120) room for 3 stages.
    """
    large = 90 <= gpu < 120  # 227 KiB
    rows, step = min(block_q, 128), min(block_k, 128 if large else 64)
    return Tuning(block_q // rows, block_k // step, 2 if large else 3, 8 if rows == 128 else 4)


def _check_types(q: jax.Array, k: jax.Array, v: jax.Array, scales: BlockScales | None, gpu: int) -> None:
    if q.dtype != k.dtype or str(q.dtype) not in (*HALVES, "int8"):
        raise NotImplementedError(f"q and k in {q.dtype} and {k.dtype}; one of {', '.join(HALVES)}, int8")
    if str(v.dtype) not in (*HALVES, FP8):
        raise NotImplementedError(f"v in {v.dtype}; {', '.join(HALVES)} or {FP8}")
    if q.dtype == jnp.int8 and scales is None:
        raise NotImplementedError("int8 without scales")
    if v.dtype == FP8 and (scales is None or scales.v is None):
        raise NotImplementedError(f"{FP8} without scales of v")
    if v.dtype == FP8 and gpu < 89:
        raise NotImplementedError(f"{FP8} on compute capability {gpu // 10}.{gpu % 10}; from 8.9 on")
    if q.shape[-1] not in (64, 128) or k.shape[-1] != q.shape[-1] or v.shape != k.shape:
        raise NotImplementedError(f"heads of {q.shape[-1]}, {k.shape[-1]} and {v.shape[-1]}; 64 or 128, all equal")


def _check_blocks(block_q: int, block_k: int, run: Tuning, fewest: int) -> None:
    for name, size, parts, least in (("block_q", block_q, run.split, 16), ("block_k", block_k, run.split_k, fewest)):
        if size & (size - 1) or parts & (parts - 1) or size // parts < least:
            raise NotImplementedError(f"{name}={size} in {parts} parts; powers of two, of {least} or more each")


def _rows(name: str, array: jax.Array, n_q: int) -> dict[str, int]:
    """Rows of a list from one sample, and from one head, to the next."""
    b, h = array.shape[:2]
    return {f"{name}_B": h * n_q if b > 1 else 0, f"{name}_H": n_q if h > 1 else 0}
