"""Attention to listed blocks of keys on TPUs, in Pallas, with one head's keys and values resident in VMEM.

With the running softmax of FlashAttention over the blocks that a row of the list names, in groups of `at_once`:

  x = scale q k^T,   top <- max(top', rowmax x),   p = exp(x - top),   shrink = exp(top' - top)
  total <- shrink total + rowsum p,   o <- shrink o + p v,         at the end o / total, lse = top + log total.

A block of 128 queries does 128 operations for each byte of a key block that it reads from HBM, and a v5e needs some
240, a v6e 560, before the read is hidden; so all keys and values of a head are copied to VMEM once, beside the
previous head's work, and the list picks from there. A head that does not fit is read block by block, the next group
being copied while one is computed. Bundles of the TPU compiler's own schedule for a block of 128 x 128 (v5e / v6e):
127 / 95 resident with four blocks a product, 269 / 221 with one, 296 / 279 copied one by one.

Dao et al., FlashAttention, 2022, arXiv:2205.14135; Dao 2023, FlashAttention-2, arXiv:2307.08691. Lists vary at run
time, which the static masks of jax's splash attention do not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from difax.core.contracts import BlockScales, Segments
from difax.core.ops import MASKED
from difax.core.target import Target, target

LANES = 128
MIB = 2**20
# VMEM of a core, MiB; what is not here has the least that any TPU has
VMEM = {
    "TPU v5 lite": 128, "TPU v5e": 128, "TPU v6 lite": 128, "TPU v6e": 128, "TPU v5": 64, "TPU v5p": 64, "TPU7x": 64,
}  # fmt: skip
LEAST_VMEM = 16
NO_INT8 = ("TPU v2", "TPU v3", "TPU v4")  # whose compiler refuses: "Unsupported matmul RHS type"


class Sizes(NamedTuple):
    """What the kernel is compiled for; `rows` list rows a grid step, `at_once` listed blocks a product."""

    block_q: int
    block_k: int
    keys: int
    listed: int
    at_once: int
    rows: int
    scale: float
    quantised: bool
    scaled_v: bool
    segmented: bool
    resident: bool


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
    at_once: int = 4,
    resident: bool | None = None,
) -> tuple[jax.Array, jax.Array]:
    """softmax(softmax_scale q k^T) v over the listed blocks, on a TPU (`difax.core.target`) or interpreted.

    Int8 q and k are multiplied in int8. Values of 8 bits are widened to bfloat16 before the kernel: no TPU up to v6e
    multiplies fp8 faster, so they save memory of the caller alone. Heads of 64 are filled up to the 128 lanes that
    VMEM gives them anyhow.

    Args:
      q_BTHK: [B, T, H, K], K 64 or 128, bfloat16, float32, or int8 with `scales`.
      k_BSHK, v_BSHK: [B, S, H, K]; k in the type of q, v bfloat16 or float32, or of 8 bits with scales.v.
      indices: int32 [B or 1, H or 1, ceil(T / block_q), n]; those past the count may name any block there is.
      counts: int32 [B or 1, H or 1, ceil(T / block_q)], 1 to n.
      block_q, block_k: multiples of 64.
      softmax_scale: of the logits.
      segments: pairs with unequal ids do not attend; a query without any key gets the mean of its listed values.
      scales: of int8 q and k and 8-bit v, in the list's block sizes.
      interpret: True or Pallas' parameters: run the kernel's operations one by one, on any platform.
      at_once: listed blocks in one product, 1 or more (4).
      resident: hold a head in VMEM (True), copy block by block (False), or the former if it fits the target (None).

    Returns:
      o [B, T, H, K] in the type of q (bfloat16 for int8) and lse [B, H, T] float32.

    Raises:
      NotImplementedError: what the kernel or the target cannot do.
    """
    what = target()
    _check(q_BTHK, k_BSHK, v_BSHK, block_q, block_k, scales, what, bool(interpret))
    b, t, h, width = q_BTHK.shape
    n_q, n_k, n = -(-t // block_q), -(-k_BSHK.shape[1] // block_k), indices.shape[-1]
    rows = LANES // math.gcd(LANES, block_q)  # a block of the log-sum-exp is a row of full lanes
    if v_BSHK.dtype.itemsize == 1:
        v_BSHK = v_BSHK.astype(jnp.bfloat16)
    out = q_BTHK.dtype if scales is None else jnp.dtype(jnp.bfloat16)
    sizes = Sizes(
        block_q,
        block_k,
        k_BSHK.shape[1],
        n,
        max(1, min(at_once, n)),
        rows,
        softmax_scale,
        scales is not None,
        scales is not None and scales.v is not None,
        segments is not None,
        True,
    )
    bytes_for = lambda held: _vmem_bytes(sizes, held, n_k, k_BSHK.dtype, v_BSHK.dtype) * 9 // 8  # noqa: E731
    capacity = VMEM.get(what.kind, LEAST_VMEM) * MIB
    sizes = sizes._replace(resident=bytes_for(n_k) <= capacity if resident is None else resident)
    needed = bytes_for(n_k if sizes.resident else sizes.at_once)

    steps = -(-n_q // rows)
    q_BHTK = _laid_out(q_BTHK, steps * rows * block_q)
    k_BHSK, v_BHSK = (_laid_out(a, n_k * block_k) for a in (k_BSHK, v_BSHK))

    def by_step(a: jax.Array, fill: float, last: int = 1) -> jax.Array:
        """[B, H, n_q, ...] -> [B, H, steps, rows, last]: a block of SMEM spans the last two axes."""
        pads = [(0, last - a.shape[3])] if a.ndim > 3 else []
        a = jnp.pad(a, [(0, 0), (0, 0), (0, steps * rows - n_q), *pads], constant_values=fill)
        return a.reshape(*a.shape[:2], steps, rows, last)

    shared = lambda a: lambda b, h: (b if a.shape[0] > 1 else 0, h if a.shape[1] > 1 else 0)  # noqa: E731

    def smem(a: jax.Array, whole: bool = False) -> pl.BlockSpec:
        own = shared(a)
        at = lambda b, h, i: (*own(b, h), 0 if whole else i, 0, 0)  # noqa: E731
        return pl.BlockSpec((None, None, None, *a.shape[3:]), at, memory_space=pltpu.SMEM)

    listed = -(-n // sizes.at_once) * sizes.at_once
    arguments = [by_step(indices.astype(jnp.int32), 0, listed), by_step(counts.astype(jnp.int32), 1)]
    specs = [smem(a) for a in arguments]
    if scales is not None:
        arguments += [by_step(scales.q, 1.0), scales.k[:, :, None, None]]
        specs += [smem(arguments[-2]), smem(arguments[-1], whole=True)]
        if scales.v is not None:
            arguments.append(jnp.pad(scales.v, ((0, 0), (0, 0), (0, LANES - width)))[:, :, None])
            specs.append(pl.BlockSpec((None, None, 1, LANES), lambda b, h, i: (b, h, 0, 0)))
    tile = pl.BlockSpec((None, None, rows * block_q, LANES), lambda b, h, i: (b, h, i, 0))
    if sizes.resident:
        keys = pl.BlockSpec((None, None, n_k * block_k, LANES), lambda b, h, i: (b, h, 0, 0))
    else:
        keys = pl.BlockSpec(memory_space=pl.ANY)
    arguments, specs = [*arguments, q_BHTK, k_BHSK, v_BHSK], [*specs, tile, keys, keys]
    if segments is not None:
        ids_q = jnp.pad(segments.q, ((0, 0), (0, q_BHTK.shape[2] - t)))[:, :, None]
        ids_k = jnp.pad(segments.k, ((0, 0), (0, n_k * block_k - sizes.keys))).reshape(b, n_k, block_k)
        arguments += [ids_q, ids_k]
        specs.append(pl.BlockSpec((None, rows * block_q, 1), lambda b, h, i: (b, i, 0)))
        specs.append(pl.BlockSpec((None, n_k, block_k), lambda b, h, i: (b, 0, 0)))
    shapes = _varying(arguments, (q_BHTK.shape, out), ((b, h, 1, q_BHTK.shape[2]), jnp.float32))
    group = (2, sizes.at_once * block_k, LANES)
    copies = [pltpu.VMEM(group, k_BHSK.dtype), pltpu.VMEM(group, v_BHSK.dtype)]
    copies = [] if sizes.resident else [*copies, pltpu.SemaphoreType.DMA((2, 2, sizes.at_once))]
    o_BHTK, lse_BH1T = pl.pallas_call(
        lambda *refs: _kernel(sizes, refs),
        grid=(b, h, steps),
        in_specs=specs,
        out_specs=[tile, pl.BlockSpec((None, None, 1, rows * block_q), lambda b, h, i: (b, h, 0, i))],
        out_shape=shapes,
        scratch_shapes=copies,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=min(max(needed, LEAST_VMEM * MIB), capacity),
        ),
        interpret=interpret,
    )(*arguments)
    return jnp.swapaxes(o_BHTK[:, :, :t, :width], 1, 2), lse_BH1T[:, :, 0, :t]


def _check(q: Any, k: Any, v: Any, block_q: int, block_k: int, scales: Any, what: Target, interpreted: bool) -> None:
    if what.platform != "tpu" and not interpreted:
        raise NotImplementedError(f"the platform {what.platform}; it needs a TPU")
    if q.shape[-1] not in (64, LANES) or v.shape[-1] != q.shape[-1]:
        raise NotImplementedError(f"head widths {q.shape[-1]} and {v.shape[-1]}; it takes 64 or 128 of both")
    if block_q % 64 or block_k % 64:
        raise NotImplementedError(f"a list of blocks of {block_q} x {block_k}; it takes multiples of 64")
    kinds = ("int8",) if scales is not None else ("bfloat16", "float32")
    if {str(q.dtype), str(k.dtype)} - set(kinds) or q.dtype != k.dtype:
        raise NotImplementedError(f"queries and keys in {q.dtype} and {k.dtype}; it takes {' or '.join(kinds)} here")
    scaled = scales is not None and scales.v is not None
    if not (v.dtype.itemsize == 1 if scaled else str(v.dtype) in ("bfloat16", "float32")):
        raise NotImplementedError(f"values in {v.dtype}{' with scales' if scaled else ''}")
    if scales is not None and what.kind in NO_INT8:
        raise NotImplementedError(f"int8 on a {what.kind}; it needs v5e, v5p, v6e or later")


def _vmem_bytes(sizes: Sizes, held: int, n_k: int, k_type: Any, v_type: Any) -> int:
    """VMEM that a step takes which holds so many blocks of keys, and as many of those that come next."""
    bytes_of = lambda dtype: jnp.dtype(dtype).itemsize  # noqa: E731
    keys = 2 * held * sizes.block_k * LANES * (bytes_of(k_type) + bytes_of(v_type))
    queries = 2 * sizes.rows * sizes.block_q * LANES * (2 * 4 + 4)
    ids = 2 * n_k * max(sizes.block_k, LANES) * 4 if sizes.segmented else 0
    group = sizes.at_once * sizes.block_k
    work = 4 * (4 * sizes.block_q * group + 4 * group * LANES + 4 * sizes.block_q * LANES)
    return keys + queries + ids + work


def _laid_out(a_BTHK: jax.Array, tokens: int) -> jax.Array:
    """[B, H, tokens, 128], with zeros for what is not there."""
    pads = ((0, 0), (0, tokens - a_BTHK.shape[1]), (0, 0), (0, LANES - a_BTHK.shape[3]))
    return jnp.swapaxes(jnp.pad(a_BTHK, pads), 1, 2)


def _varying(arguments: Sequence[jax.Array], *outputs: tuple[Any, Any]) -> list[jax.ShapeDtypeStruct]:
    """Shapes of outputs that differ over all mesh axes over which an argument does (inside of `jax.shard_map`)."""
    axes = frozenset().union(*(jax.typeof(a).mat.varying for a in arguments))
    how = jax.sharding.ManualAxisType(varying=axes) if axes else None
    return [jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=how) for shape, dtype in outputs]


def _kernel(sizes: Sizes, refs: Sequence[Any]) -> None:
    """One grid step: `rows` rows of the list of one head."""
    at = list(refs)
    indices, counts = at.pop(0), at.pop(0)
    scale_q, scale_k = (at.pop(0), at.pop(0)) if sizes.quantised else (None, None)
    scale_v = at.pop(0) if sizes.scaled_v else None
    q, k, v = (at.pop(0) for _ in range(3))
    ids_q, ids_k = (at.pop(0), at.pop(0)) if sizes.segmented else (None, None)
    o, lse, *copied = at
    block_q, block_k, group = sizes.block_q, sizes.block_k, sizes.at_once * sizes.block_k
    column = jax.lax.broadcasted_iota(jnp.int32, (1, group), 1)

    def by_block(values: Sequence[Any]) -> jax.Array:
        """A row that holds one scalar over each block of the group."""
        row = jnp.broadcast_to(values[0], (1, group))
        for i, value in enumerate(values[1:], 1):
            row = jnp.where(column >= i * block_k, value, row)
        return row

    for r in range(sizes.rows):
        mine, count = pl.ds(r * block_q, block_q), counts[r, 0]

        def listed(j: Any, r: int = r, count: Any = count) -> list[Any]:
            """The blocks of a group; in the place of those past the count, whose values may be anything, the first."""
            entries = [j * sizes.at_once + i for i in range(sizes.at_once)]
            return [jnp.where(entry < count, indices[r, entry], indices[r, 0]) for entry in entries]

        fetch = _resident(sizes, k, v) if sizes.resident else _copied(sizes, k, v, copied, listed, count)
        x_q = q[mine]

        def add(j: Any, carry: Any, r: int = r, count: Any = count, mine: Any = mine, x_q: Any = x_q,
                listed: Any = listed, fetch: Any = fetch) -> Any:  # fmt: skip
            top, total, acc = carry
            blocks = listed(j)
            x_k, x_v = fetch(j, blocks)
            x = _product(x_q, x_k, 1)
            if sizes.quantised:
                assert scale_q is not None and scale_k is not None
                x = x * (by_block([scale_k[0, block] for block in blocks]) * (sizes.scale * scale_q[r, 0]))
            else:
                x = x * sizes.scale
            if sizes.segmented:
                assert ids_q is not None and ids_k is not None
                ids = jnp.concatenate([ids_k[pl.ds(block, 1)] for block in blocks], 1)
                x = jnp.where(ids_q[mine] == ids, x, MASKED)
            if sizes.keys % block_k:
                ends = [jnp.minimum(sizes.keys - block * block_k, block_k) for block in blocks]
                there = [jnp.where(j * sizes.at_once + i < count, end, 0) for i, end in enumerate(ends)]
                exists = column < by_block([i * block_k + end for i, end in enumerate(there)])
            else:
                exists = column < (count - j * sizes.at_once) * block_k
            x = jnp.where(exists, x, -jnp.inf)
            new = jnp.maximum(top, x.max(1, keepdims=True))
            shrink, p = jnp.exp(top - new), jnp.exp(x - new)
            total = shrink * total + p.sum(1, keepdims=True)
            return new, total, shrink * acc + _product(p.astype(x_v.dtype), x_v, 0)

        full = lambda shape, value: jnp.full(shape, value, jnp.float32)  # noqa: E731
        start = full((block_q, 1), -jnp.inf), full((block_q, 1), 0), full((block_q, LANES), 0)
        top, total, acc = jax.lax.fori_loop(0, pl.cdiv(count, sizes.at_once), add, start)
        value = acc / total
        o[mine] = (value if scale_v is None else value * scale_v[...]).astype(o.dtype)
        lse[:, mine] = jnp.broadcast_to(top + jnp.log(total), (block_q, LANES)).T[:1]  # a column to a row


def _product(a: jax.Array, b: jax.Array, contracted: int) -> jax.Array:
    kind = jnp.int32 if a.dtype == jnp.int8 else jnp.float32
    exact = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    numbers = (((1,), (contracted,)), ((), ()))
    return jax.lax.dot_general(a, b, numbers, precision=exact, preferred_element_type=kind).astype(jnp.float32)


def _resident(sizes: Sizes, k: Any, v: Any) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """Blocks of keys and values that lie in VMEM."""

    def fetch(j: Any, blocks: Sequence[Any]) -> tuple[jax.Array, jax.Array]:
        places = [pl.ds(pl.multiple_of(block * sizes.block_k, sizes.block_k), sizes.block_k) for block in blocks]
        return jnp.concatenate([k[p] for p in places]), jnp.concatenate([v[p] for p in places])

    return fetch


def _copied(
    sizes: Sizes, k: Any, v: Any, copied: Sequence[Any], listed: Callable[..., Any], count: Any
) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """Blocks that are copied from HBM, those of the next group while one is computed; begins with the first."""
    k_vmem, v_vmem, done = copied
    b, h = pl.program_id(0), pl.program_id(1)

    def copies(blocks: Sequence[Any], slot: Any) -> list[Any]:
        out = []
        for i, block in enumerate(blocks):
            source = pl.ds(pl.multiple_of(block * sizes.block_k, sizes.block_k), sizes.block_k)
            place = pl.ds(i * sizes.block_k, sizes.block_k)
            for c, (all_, here) in enumerate(((k, k_vmem), (v, v_vmem))):
                out.append(pltpu.make_async_copy(all_.at[b, h, source], here.at[slot, place], done.at[c, slot, i]))
        return out

    for copy in copies(listed(0), 0):
        copy.start()

    def fetch(j: Any, blocks: Sequence[Any]) -> tuple[jax.Array, jax.Array]:
        slot = jax.lax.rem(j, 2)

        @pl.when((j + 1) * sizes.at_once < count)
        def _() -> None:
            for copy in copies(listed(j + 1), 1 - slot):
                copy.start()

        for copy in copies(blocks, slot):
            copy.wait()
        return k_vmem[slot], v_vmem[slot]

    return fetch
