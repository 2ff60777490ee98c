"""Block-sparse flash attention for Hopper, in Pallas Mosaic GPU."""

from __future__ import annotations

import functools
import inspect
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from difax.core.contracts import BlockScales, Segments
from difax.core.ops import MASKED
from difax.core.target import target

LOG2E = math.log2(math.e)
HALVES = 2  # computing warpgroups, between which the queries of a block are split
LIFT = math.log2(448.0)  # of float8 weights: 1 is written as the largest float8_e4m3fn
TILE = 8  # rows of a tile of shared memory, which Mosaic wants the rows of a copied array to be a multiple of
SHARED_MEMORY = 232448  # bytes that one block of threads can have on Hopper

Sums = plgpu.WGMMAAccumulatorRef
# jax 0.10 wants an index beside the reference, jax 0.12 takes none
INDEXED = getattr(inspect.signature(plgpu.load).parameters.get("idx"), "default", None) is inspect.Parameter.empty

FLOATS = ("bfloat16", "float16")
WIDTHS = (64, 128)
BLOCKS = ((128, 128), (128, 64))


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
    interpret: Any = False,
    depth: int = 2,
    turns: bool = True,
) -> tuple[jax.Array, jax.Array]:
    """o_i = sum_j softmax_j(softmax_scale q_i k_j) v_j over the keys of the blocks that the list names for query i.

    One warpgroup copies listed blocks of keys and values into a ring in shared memory; two others have 64 queries of
    the row each, and while one takes its softmax the products of the other run. The softmax is in float32, its weights
    are rounded to the dtype of the values for the second product. Lengths need not be multiples of a block: copies
    fill with zeros past the end of an array and write nothing there, and keys past the end have a logit of -infinity.
    Lengths that are no multiple of 8, the rows of a copied tile, are padded to one in memory here, which is a pass over
    the array. What has no mask (no segments, S a multiple of block_k) is compiled without one.

    Args:
      q_BTHK, k_BSHK: bfloat16, float16, or int8 with `scales`; head width K 64 or 128.
      v_BSHK: bfloat16, float16, or with int8 keys float8_e4m3fn with `scales.v`, which is transposed here to
        [B, H, K, S], padded to whole blocks: 8-bit products read along the keys.
      indices: int32 [B or 1, H or 1, ceil(T / block_q), n], blocks of keys in any order, each at most once a row.
      counts: int32 [B or 1, H or 1, ceil(T / block_q)], 1 to n: how many of a row hold. The others are not read.
      block_q, block_k: queries of a row and keys of an entry: 128 x 128 or 128 x 64.
      softmax_scale: static.
      segments: pairs with unequal ids do not attend. A query whose listed keys all have other ids gets the mean of
        their values. Ids are padded to whole blocks here.
      scales: of int8 q and k by the same blocks as the list, and of float8 values by channel.
      interpret: `jax.experimental.pallas.mosaic_gpu.InterpretGPUParams` runs it on a CPU (from jax 0.11.2 on).
      depth: blocks in the ring, 1 or more, as far as shared memory goes (227 KiB).
      turns: do the two warpgroups take turns; False leaves it to the hardware.

    Returns:
      o [B, T, H, K] in the dtype of q (bfloat16 for int8), and the log-sum-exp [B, H, T] float32 of the logits.

    Raises:
      NotImplementedError: with the reason, what is compiled for is no Hopper GPU, or another width, dtype, block.
      ValueError: a list or scales whose shapes do not fit.

    References: Dao et al. 2022, arXiv:2205.14135; Shah et al. 2024, FlashAttention-3, arXiv:2407.08608, whose two
      warpgroups in turns these are; Zhang et al. 2024, SageAttention, arXiv:2410.02367, for int8 logits and
      arXiv:2411.10958 for float8 values (weights are scaled to 448 there as here, values by channel).
    """
    _check(q_BTHK, k_BSHK, v_BSHK, indices, counts, block_q, block_k, scales, interpret)
    (batch, queries, heads, width), keys = q_BTHK.shape, k_BSHK.shape[1]
    quantised, fp8 = scales is not None, scales is not None and scales.v is not None
    rows_of, blocks_of = -(-queries // block_q), -(-keys // block_k)
    rows, ragged = block_q // HALVES, keys % block_k > 0
    dtype, kept = v_BSHK.dtype, jnp.dtype(jnp.bfloat16) if quantised else q_BTHK.dtype

    v = jnp.transpose(_padded(v_BSHK, blocks_of * block_k), (0, 2, 3, 1)) if fp8 else _padded(v_BSHK)
    operands: dict[str, jax.Array] = {"q": _padded(q_BTHK), "k": _padded(k_BSHK), "v": v}
    operands |= {"indices": indices.astype(jnp.int32), "counts": counts.astype(jnp.int32)}
    if scales is not None:
        operands |= {"scale_q": jnp.broadcast_to(scales.q, (batch, heads, rows_of))}
        operands |= {"scale_k": jnp.broadcast_to(scales.k, (batch, heads, blocks_of))}
        if scales.v is not None:
            operands |= {"scale_v": jnp.broadcast_to(scales.v, (batch, heads, width))}
    if segments is not None:
        operands |= {"ids_q": _padded(segments.q.astype(jnp.int32), rows_of * block_q)}
        operands |= {"ids_k": _padded(segments.k.astype(jnp.int32), blocks_of * block_k)}

    rings: dict[str, tuple[tuple[int, ...], Any]] = {
        "q": ((HALVES, rows, width), q_BTHK.dtype),
        "k": ((depth, block_k, width), k_BSHK.dtype),
        "v": ((depth, width, block_k) if fp8 else (depth, block_k, width), dtype),
        "o": ((HALVES, rows, width), kept),
    }
    if fp8:  # its products read the weights from shared memory, not from registers
        rings["p"] = ((HALVES, rows, block_k), dtype)
    lists = {"lse": ((HALVES, rows), jnp.float32)}
    if segments is not None:
        lists["ids_k"] = ((depth, block_k), jnp.int32)
    _check_depth(depth, [*rings.values(), *lists.values()])
    scratch = {f"{name}_smem": _tiled(shape, kind) for name, (shape, kind) in rings.items()}
    scratch |= {f"{name}_smem": plgpu.SMEM(shape, kind) for name, (shape, kind) in lists.items()}
    scratch |= {
        "q_full": plgpu.Barrier(num_barriers=HALVES),
        "k_full": plgpu.Barrier(num_arrivals=1 + (segments is not None), num_barriers=depth),
        "v_full": plgpu.Barrier(num_barriers=depth),
        "k_free": plgpu.Barrier(num_arrivals=HALVES, num_barriers=depth),
        "v_free": plgpu.Barrier(num_arrivals=HALVES, num_barriers=depth),
        "turn": plgpu.Barrier(num_arrivals=HALVES),
    }

    def kernel(*refs: Any) -> None:
        (*given, o_ref, lse_ref) = refs
        ref = dict(zip(operands, given, strict=True))
        batch_i, head_i, row_i, warpgroup = (lax.axis_index(name) for name in ("b", "h", "i", "wg"))

        def listed(name: str, *place: Any) -> Any:  # a list may be shared by all samples or heads
            sizes = operands[name].shape[:2]
            ours = (i if size > 1 else 0 for i, size in zip((batch_i, head_i), sizes, strict=True))
            return ref[name][(*ours, row_i, *place)]

        count, block = listed("counts"), functools.partial(listed, "indices")

        def copies(k_smem, v_smem, k_full, v_full, k_free, v_free, ids_k_smem=None, **_: Any) -> None:
            plgpu.set_max_registers(40, action="decrease")

            def fetch(j: Any, slot: Any) -> None:
                span = pl.ds(block(j) * block_k, block_k)
                place = (batch_i, span, head_i)
                plgpu.copy_gmem_to_smem(ref["k"].at[place], k_smem.at[slot], k_full.at[slot])
                if ids_k_smem is not None:
                    plgpu.copy_gmem_to_smem(ref["ids_k"].at[batch_i, span], ids_k_smem.at[slot], k_full.at[slot])
                values = (batch_i, head_i, slice(None), span) if fp8 else place
                plgpu.copy_gmem_to_smem(ref["v"].at[values], v_smem.at[slot], v_full.at[slot])

            def until_free(slot: Any) -> None:
                plgpu.barrier_wait(k_free.at[slot])
                plgpu.barrier_wait(v_free.at[slot])

            for slot in range(depth):
                pl.when(slot < count)(lambda slot=slot: fetch(jnp.int32(slot), slot))

            @pl.loop(depth, jnp.maximum(count, depth))
            def _(j: Any) -> None:
                slot = lax.rem(j, jnp.int32(depth))
                until_free(slot)
                fetch(j, slot)

            for slot in range(depth):  # every phase of a barrier is seen before the block ends
                pl.when(slot < count)(lambda slot=slot: until_free(slot))

        def computes(
            q_smem, k_smem, v_smem, o_smem, lse_smem, q_full, k_full, v_full, k_free, v_free, turn,
            p_smem=None, ids_k_smem=None,
        ) -> None:  # fmt: skip
            plgpu.set_max_registers(232, action="increase")
            by_row, by_column = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)
            first = row_i * block_q + warpgroup * rows
            mine = (batch_i, pl.ds(first, rows), head_i)
            plgpu.copy_gmem_to_smem(ref["q"].at[mine], q_smem.at[warpgroup], q_full.at[warpgroup])
            scale = jnp.float32(softmax_scale * LOG2E)
            if quantised:
                scale = scale * ref["scale_q"][batch_i, head_i, row_i]
            ids_q = None
            if segments is not None:
                ids_q = _vector(ref["ids_q"].at[batch_i, pl.ds(first, rows)], by_row)
            plgpu.barrier_wait(q_full.at[warpgroup])

            def pass_on() -> None:  # the other warpgroup's products run while this one takes its softmax
                if turns:
                    plgpu.barrier_arrive(turn)
                    plgpu.barrier_wait(turn)

            def existing(x: Any, j: Any) -> Any:
                first_key = block(j) * block_k

                def past_the_end(x: Any) -> Any:
                    at = plgpu.broadcasted_iota(jnp.int32, x.shape, 1, layout=plgpu.Layout.WGMMA)
                    return jnp.where(at < keys - first_key, x, -jnp.inf)

                return lax.cond(first_key + block_k > keys, past_the_end, lambda x: x, x) if ragged else x

            def step(j: Any, carry: Any) -> Any:
                acc, top, total = carry
                slot = lax.rem(j, jnp.int32(depth))
                plgpu.barrier_wait(k_full.at[slot])

                def logits(acc_ref: Any) -> Any:
                    plgpu.wgmma(acc_ref, q_smem.at[warpgroup], k_smem.at[slot].transpose((1, 0)))
                    pass_on()
                    return acc_ref[...]

                x = pl.run_scoped(logits, Sums((rows, block_k), jnp.int32 if quantised else jnp.float32))
                ids_k = None
                if ids_k_smem is not None:
                    ids_k = _vector(ids_k_smem.at[slot], by_column)
                plgpu.barrier_arrive(k_free.at[slot])
                s = scale * ref["scale_k"][batch_i, head_i, block(j)] if quantised else scale
                x = x.astype(jnp.float32)
                if ids_k is None or ids_q is None:  # the scale last: it is then part of the exponent's multiply-add
                    x = existing(x, j) * s
                else:
                    alike = lax.broadcast_in_dim(ids_q, x.shape, [0]) == lax.broadcast_in_dim(ids_k, x.shape, [1])
                    x = existing(jnp.where(alike, x * s, jnp.float32(MASKED * LOG2E)), j)
                new = jnp.maximum(top, x.max(axis=1))
                shrink = jnp.exp2(top - new)
                p = jnp.exp2(x - lax.broadcast_in_dim(new - LIFT if fp8 else new, x.shape, [0]))
                total = total * shrink + p.sum(axis=1)
                acc = acc * lax.broadcast_in_dim(shrink, acc.shape, [0])
                # the barriers keep the softmax before the turn is passed on
                if p_smem is not None:
                    p_smem[warpgroup] = p.astype(dtype)
                    plgpu.commit_smem()
                    acc, total, new = lax.optimization_barrier((acc, total, new))
                else:
                    acc, total, new, p = lax.optimization_barrier((acc, total, new, p.astype(dtype)))
                pass_on()
                plgpu.barrier_wait(v_full.at[slot])

                def add(acc_ref: Any) -> None:
                    if p_smem is not None:
                        plgpu.wgmma(acc_ref, p_smem.at[warpgroup], v_smem.at[slot].transpose((1, 0)))
                    else:
                        plgpu.wgmma(acc_ref, p, v_smem.at[slot])

                if not interpret:
                    acc = pl.run_state(add)(Sums.init(acc))
                elif p_smem is not None:  # the interpreter has no run_state, and no wgmma of registers
                    acc = acc + pl.run_scoped(lambda r: (add(r), r[...])[1], Sums(acc.shape, jnp.float32))
                else:
                    acc = acc + jnp.dot(p, v_smem[slot], preferred_element_type=jnp.float32)
                    plgpu.commit_smem()
                plgpu.barrier_arrive(v_free.at[slot])
                return acc, new, total

            def row(value: float) -> Any:
                return plgpu.layout_cast(jnp.full((rows,), value, jnp.float32), by_row)

            nothing = plgpu.layout_cast(jnp.zeros((rows, width), jnp.float32), plgpu.Layout.WGMMA)
            pl.when(warpgroup == 1)(pass_on)
            acc, top, total = lax.fori_loop(0, count, step, (nothing, row(-jnp.inf), row(0.0)))
            pl.when(warpgroup == 0)(pass_on)
            acc = acc * lax.broadcast_in_dim(1.0 / total, acc.shape, [0])
            if fp8:
                by_channel = _vector(ref["scale_v"].at[batch_i, head_i], by_column)
                acc = acc * lax.broadcast_in_dim(by_channel, acc.shape, [1])
            o_smem[warpgroup] = acc.astype(kept)
            lse_smem[warpgroup] = (top - LIFT if fp8 else top) / LOG2E + jnp.log(total)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(o_smem.at[warpgroup], o_ref.at[mine])
            plgpu.copy_smem_to_gmem(lse_smem.at[warpgroup], lse_ref.at[batch_i, head_i, pl.ds(first, rows)])
            plgpu.wait_smem_to_gmem(0)

        def body(**shared: Any) -> None:
            pl.when(warpgroup == HALVES)(lambda: copies(**shared))
            pl.when(warpgroup < HALVES)(lambda: computes(**shared))

        pl.run_scoped(body, collective_axes="wg", **scratch)

    run = plgpu.kernel(
        kernel,
        # whole rows of blocks: a row of T float32 need not be the multiple of 16 bytes that a copy wants
        out_type=(
            jax.ShapeDtypeStruct(operands["q"].shape, kept),
            jax.ShapeDtypeStruct((batch, heads, rows_of * block_q), jnp.float32),
        ),
        grid=(rows_of, heads, batch),
        grid_names=("i", "h", "b"),
        num_threads=HALVES + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )
    o_BTHK, lse_BHT = run(*operands.values())
    return o_BTHK[:, :queries], lse_BHT[..., :queries]


def _vector(ref: Any, layout: Any) -> Any:
    """A row vector in registers, for which there is no optimised load."""
    given = {"idx": ()} if INDEXED else {}
    return plgpu.load(ref, layout=layout, optimized=False, **given)  # pyright: ignore[reportCallIssue]


def _tiled(shape: tuple[int, ...], dtype: Any) -> Any:
    """Shared memory in the widest swizzle that a wgmma reads, 128 bytes at most."""
    size = jnp.dtype(dtype).itemsize
    swizzle = min(128, shape[-1] * size)
    transforms = plgpu.TilingTransform((TILE, swizzle // size)), plgpu.SwizzleTransform(swizzle)
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def _padded(x_BT: jax.Array, length: int | None = None) -> jax.Array:
    """x [B, T, ...] with zeros up to a length, by default the next multiple of `TILE`."""
    more = -x_BT.shape[1] % TILE if length is None else length - x_BT.shape[1]
    return jnp.pad(x_BT, ((0, 0), (0, more), *((0, 0),) * (x_BT.ndim - 2))) if more else x_BT


def _check_depth(depth: int, buffers: list[tuple[tuple[int, ...], Any]]) -> None:
    need = sum(math.prod(shape) * jnp.dtype(dtype).itemsize for shape, dtype in buffers) + 1024  # with barriers
    if depth < 1 or need > SHARED_MEMORY:
        raise NotImplementedError(
            f"depth={depth}, {need / 1024:.0f} KiB of shared memory; 1 or more, within {SHARED_MEMORY // 1024} KiB"
        )


def _check(
    q: Any, k: Any, v: Any, indices: Any, counts: Any, block_q: int, block_k: int, scales: Any, interpret: Any
) -> None:
    (batch, queries, heads, width), device = q.shape, target()
    if not interpret and device.platform != "gpu":
        raise NotImplementedError(f"the platform {device.platform}; it needs an NVIDIA Hopper GPU")
    if not interpret and device.capability != (9, 0):
        known = "unknown" if device.capability == (0, 0) else "{}.{}".format(*device.capability)
        raise NotImplementedError(f"compute capability {known}; it needs 9.0, Hopper, whose wgmma it uses")
    if width not in WIDTHS or v.shape[-1] != width:
        raise NotImplementedError(f"head width {width}, values {v.shape[-1]}; both 64 or both 128")
    if (block_q, block_k) not in BLOCKS:
        allowed = " or ".join(f"{a} x {b}" for a, b in BLOCKS)
        raise NotImplementedError(
            f"blocks of {block_q} x {block_k}; {allowed}: two warpgroups of 64 queries, whose logits stay in registers"
        )
    kinds = tuple(str(a.dtype) for a in (q, k, v))
    if scales is None and not (kinds[0] in FLOATS and len(set(kinds)) == 1):
        raise NotImplementedError(f"{', '.join(kinds)} without scales; q, k and v all bfloat16 or all float16")
    if scales is not None:
        values = FLOATS if scales.v is None else ("float8_e4m3fn",)
        if kinds[:2] != ("int8", "int8") or kinds[2] not in values:
            raise NotImplementedError(f"{', '.join(kinds)} with scales; q and k int8, v {' or '.join(values)}")
        if (scales.block_q, scales.block_k) != (block_q, block_k):
            raise NotImplementedError(
                f"scales by {scales.block_q} x {scales.block_k} for a list of {block_q} x {block_k}; the same blocks"
            )
    rows = -(-queries // block_q)
    for name, shape in (("indices", indices.shape[:-1]), ("counts", counts.shape)):
        if len(shape) != 3 or shape[0] not in (1, batch) or shape[1] not in (1, heads) or shape[2] != rows:
            raise ValueError(f"{name} {list(shape)}; allowed: [{batch} or 1, {heads} or 1, {rows}]")
