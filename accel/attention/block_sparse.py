"""Attention to listed blocks, by the kernel that is written for the device that is compiled for.

  o_i = sum_j p_ij v_j,   p_ij = softmax_j(q_i k_j / sqrt(K)) over the keys j of the blocks that are listed for query i

What all lowerings share is here: heads are filled up to a width of 64 or 128 (the logits do not change, the output is
cut), scales by block are brought to the blocks of the list, values that no query sees are made finite, a call without
a list lists every block, and gradients recompute the listed logits in plain lax (`listed`).

Dao et al., FlashAttention, 2022, arXiv:2205.14135 (section 3.3: block-sparse).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from difax.accel.attention.chunked import chunked
from difax.accel.attention.listed import check_rows, differentiable
from difax.core.annotations import checked, choose
from difax.core.contracts import Attention, AttentionSpec, BlockList, BlockScales, Scales, Segments
from difax.core.ops import attended_values
from difax.core.target import Target, target
from difax.core.trunk import stateless

# lowering -> the extra that brings what its file imports
KERNELS = {"mosaic": "cuda", "triton": "triton", "tpu": "tpu"}
CHOICES = ("auto", *KERNELS, "blocked")
WIDTHS = (64, 128)
BLOCK = 128  # of a list that is made here


@checked
def block_sparse(kernel: str = "auto", interpret: bool = False) -> Callable[..., Any]:
    """Exact attention to the blocks of a list, or to all, by the kernel for the device that is compiled for.

    On an H100 at 4,608 tokens and 24 heads of 128 a list of every block takes 1.2 times cuDNN's dense time by the
    Mosaic kernel and 1.5 times by the Triton kernel, one of a quarter of the blocks 0.38 and 0.47 times.

    Args:
      kernel: "auto": on a Hopper GPU "mosaic", and where that declines "triton"; on other NVIDIA GPUs from compute
        capability 8.0 on "triton"; on a TPU "tpu"; on a CPU "blocked", the loops of `chunked`. Or one of these.
      interpret: run the kernel in its interpreter, on whatever device there is: slow, for tests (False).

    Returns:
      The function. It takes every option; kernels decline scales by element, scales of blocks that do not cover the
      list's, float32 (but on a TPU), heads above 128, block sizes that they are not made for, a device that is not
      theirs, and packages that are not installed. Calls with scales have a gradient on the CPU alone.

    Raises:
      ValueError: an unknown kernel (with the nearest match).
    """
    return _serving(choose("kernel of block_sparse", kernel, CHOICES), interpret, {})


@checked
def block_sparse_attention(kernel: str = "auto", interpret: bool = False) -> Attention:
    """Exact attention to the blocks of a list, or to all, by the kernel for the device that is compiled for.

    Args:
      kernel, interpret: of `block_sparse`.

    Returns:
      An `Attention` that remembers nothing; its `chosen` says which kernel serves each shape of call.

    Raises:
      ValueError: as `block_sparse`.
    """
    served: dict[tuple[Target, str], str] = {}
    attend = _serving(choose("kernel of block_sparse", kernel, CHOICES), interpret, served)
    chosen = lambda: {call: name for (what, call), name in served.items() if what == target()}  # noqa: E731
    return stateless(attend)._replace(chosen=chosen)


def kernels_for(what: Target) -> tuple[str, ...]:
    """The lowerings that serve a target, in order of preference.

    Raises:
      NotImplementedError: none does.
    """
    if what.platform == "cpu":
        return ("blocked",)
    if what.platform == "tpu":
        return ("tpu",)
    if what.platform != "gpu":
        raise NotImplementedError(f"the platform {what.platform}; there is a kernel for NVIDIA GPUs, TPUs and CPUs")
    if what.capability < (8, 0):
        known = "unknown" if what.capability == (0, 0) else "{}.{}".format(*what.capability)
        raise NotImplementedError(f"a GPU of compute capability {known}; kernels are for 8.0 and later")
    return ("mosaic", "triton") if what.capability == (9, 0) else ("triton",)


def every_block(queries: int, keys: int, block_q: int = BLOCK, block_k: int = BLOCK) -> BlockList:
    """The list of all blocks, shared by samples and heads: dense attention."""
    n_q, n_k = -(-queries // block_q), -(-keys // block_k)
    indices = jnp.broadcast_to(jnp.arange(n_k, dtype=jnp.int32), (1, 1, n_q, n_k))
    return BlockList(indices, jnp.full((1, 1, n_q), n_k, jnp.int32), block_q, block_k)


def _serving(kernel: str, interpret: bool, served: dict[tuple[Target, str], str]) -> Callable[..., Any]:
    blocked = chunked()

    def attend(
        q_BTHK: jax.Array,
        k_BSHK: jax.Array,
        v_BSHK: jax.Array,
        segments: Segments | None = None,
        blocks: BlockList | None = None,
        scales: Scales | BlockScales | None = None,
        with_lse: bool = False,
    ) -> Any:
        call = AttentionSpec(q_BTHK, k_BSHK, v_BSHK, segments).in_words()
        reasons = []
        for name in kernels_for(target()) if kernel == "auto" else (kernel,):
            try:
                if name == "blocked":
                    out = blocked(q_BTHK, k_BSHK, v_BSHK, segments, blocks, scales, with_lse=True)
                else:
                    out = _by_kernel(name, interpret, q_BTHK, k_BSHK, v_BSHK, segments, blocks, scales)
            except NotImplementedError as reason:
                reasons.append(f"{name}: {reason}")
                continue
            served[target(), call] = f"block_sparse ({name})"
            return out if with_lse else out[0]
        raise NotImplementedError("; ".join(reasons))

    return attend


def _by_kernel(
    name: str,
    interpret: bool,
    q_BTHK: jax.Array,
    k_BSHK: jax.Array,
    v_BSHK: jax.Array,
    segments: Segments | None,
    blocks: BlockList | None,
    scales: Scales | BlockScales | None,
) -> tuple[jax.Array, jax.Array]:
    if isinstance(scales, Scales):
        raise NotImplementedError("scales by element; kernels take them by block (BlockScales)")
    queries, keys, width = q_BTHK.shape[1], k_BSHK.shape[1], q_BTHK.shape[-1]
    if width > WIDTHS[-1] or v_BSHK.shape[-1] > WIDTHS[-1]:
        raise NotImplementedError(f"heads of {width}; kernels are for up to {WIDTHS[-1]}")
    try:
        lowering = importlib.import_module(f"difax.accel.kernels.{name}_attention").block_sparse
    except ImportError as error:
        raise NotImplementedError(f"{error}; pip install 'difax[{KERNELS[name]}]'") from None
    if blocks is None:
        blocks = every_block(queries, keys, *((BLOCK, BLOCK) if scales is None else (scales.block_q, scales.block_k)))
    check_rows(blocks, queries)
    scales = None if scales is None else _of_blocks(scales, blocks, queries, keys)
    wide = next(w for w in WIDTHS if w >= max(width, v_BSHK.shape[-1]))
    filled = lambda a: jnp.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, wide - a.shape[-1])])  # noqa: E731
    if scales is not None and scales.v is not None:
        scales = BlockScales(scales.q, scales.k, filled(scales.v), scales.block_q, scales.block_k)

    def forward(
        q: jax.Array, k: jax.Array, v: jax.Array, segments: Segments | None, blocks: BlockList, scales: Any
    ) -> tuple[jax.Array, jax.Array]:
        o_BTHK, lse_BHT = lowering(
            *map(filled, (q, k, v)),
            blocks.indices,
            blocks.counts,
            block_q=blocks.block_q,
            block_k=blocks.block_k,
            softmax_scale=width**-0.5,
            segments=segments,
            scales=scales,
            interpret=interpret,
        )
        return o_BTHK[..., : v.shape[-1]], lse_BHT

    if scales is None:
        plain = differentiable(lambda q, k, v, segments, blocks: forward(q, k, v, segments, blocks, None))
        return plain(q_BTHK, k_BSHK, v_BSHK, segments, blocks)
    o_BTHK, lse_BHT = _without_gradient(forward)(
        q_BTHK, k_BSHK, attended_values(v_BSHK, segments), segments, blocks, scales
    )
    return o_BTHK.astype(jnp.float32), lse_BHT


def _without_gradient(forward: Callable[..., Any]) -> Callable[..., Any]:
    def refuse(*arguments: Any) -> Any:
        raise NotImplementedError("block_sparse: a gradient through scales; differentiate with q, k, v unquantised")

    function = jax.custom_vjp(forward)
    function.defvjp(refuse, refuse)
    return function


def _of_blocks(scales: BlockScales, blocks: BlockList, queries: int, keys: int) -> BlockScales:
    """Scales of blocks that are multiples of the list's, in the list's."""

    def spread(s_BHn: jax.Array, has: int, wants: int, length: int) -> jax.Array:
        if has % wants:
            made, listed = (f"{a.block_q} x {a.block_k}" for a in (scales, blocks))
            raise NotImplementedError(f"scales of blocks of {made}, which are not some whole ones of {listed}")
        return jnp.repeat(s_BHn, has // wants, -1)[..., : -(-length // wants)]

    q = spread(scales.q, scales.block_q, blocks.block_q, queries)
    k = spread(scales.k, scales.block_k, blocks.block_k, keys)
    return BlockScales(q, k, scales.v, blocks.block_q, blocks.block_k)
