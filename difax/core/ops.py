"""The few operations that every model shares and that techniques replace: `dot`, `attend`, the float32 norm.

Shape letters: B batch, T query tokens, S key tokens, H heads, K head width, M = product of leading axes.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from difax.core import placement
from difax.core.contracts import BlockList, BlockScales, Scales, Segments
from difax.core.qtensor import QTensor, quantized_dot

MASKED = -1e30  # the logit of a pair that does not attend: finite, so that a row of nothing else stays finite


def narrowed(tree: Any, dtype: Any) -> Any:
    """A tree as a run in the precision of its samples takes it: float64 as `dtype`, int64 as int32, else as it is.

    Where jax has 64 bits, what the host or a program around hands in has them; the run's types are its samples'.
    """
    to = {"float64": jnp.dtype(dtype), "int64": jnp.dtype("int32")}
    return jax.tree.map(lambda a: jnp.asarray(a, to.get(str(jnp.result_type(a)))), tree)


def weight_gradients(x_MK: jax.Array, dy_MN: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x^T dy and the sum of dy over rows, as JAX differentiates x w + b."""
    return x_MK.T @ dy_MN, dy_MN.sum(0)


def weight_gradients_padded(x_MK: jax.Array, dy_MN: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x^T dy and the sum of dy over rows, with the narrower operand copied into transposed order first."""
    # XLA's CPU backend has no bfloat16 kernel for a product that contracts the leading axes, and folds a bare
    # transpose back into one. The pad keeps the transposed copy; its rows of ones are the bias gradient.
    if x_MK.shape[1] <= dy_MN.shape[1]:
        both = jnp.pad(x_MK.T, ((0, 8), (0, 0)), constant_values=1) @ dy_MN
        return both[:-8], both[-1]
    ones = jnp.ones((8, dy_MN.shape[0]), dy_MN.dtype)
    return (jnp.pad(dy_MN.T, ((0, 8), (0, 0))) @ x_MK)[:-8].T, (ones @ dy_MN)[0]


def _weight_gradients_cpu(x_MK: jax.Array, dy_MN: jax.Array) -> tuple[jax.Array, jax.Array]:
    # 4 times faster in bfloat16 on jax 0.12, slower in float32: experiments/results/cpu_products
    padded = x_MK.dtype == jnp.bfloat16
    return weight_gradients_padded(x_MK, dy_MN) if padded else weight_gradients(x_MK, dy_MN)


@jax.custom_vjp
def _affine(x_MK: jax.Array, w_KN: jax.Array, bias_N: jax.Array) -> jax.Array:
    return x_MK @ w_KN + bias_N[None]


def _affine_forward(x_MK: jax.Array, w_KN: jax.Array, bias_N: jax.Array):
    return _affine(x_MK, w_KN, bias_N), (x_MK, w_KN)


def _affine_backward(residuals: tuple[jax.Array, jax.Array], dy_MN: jax.Array):
    x_MK, w_KN = residuals
    dw_KN, db_N = jax.lax.platform_dependent(x_MK, dy_MN, cpu=_weight_gradients_cpu, default=weight_gradients)
    return dy_MN @ w_KN.T, dw_KN, db_N


_affine.defvjp(_affine_forward, _affine_backward)


def _row_product_cpu(x_1K: jax.Array, w_KN: jax.Array) -> jax.Array:
    # XLA's CPU backend converts the whole bfloat16 weight to float32 for a product of one row, not of two
    return (jnp.pad(x_1K, ((0, 1), (0, 0))) @ w_KN)[:1]


class Trainable(NamedTuple):
    """A weight under training: the same product, with a rule of its own for the weight's gradient.

    The rule made bfloat16 training of the shipped model about 1.6 times as fast on CPU, but a function with it can
    only be differentiated backwards; so it is a type of weight that a loss opts into (`trainable`), and plain arrays
    keep every transformation.
    """

    array: jax.Array


def trainable(params: Any) -> Any:
    """Wraps every leaf named "kernel" of a tree of parameters in `Trainable`."""

    def wrap(path: tuple[Any, ...], leaf: jax.Array) -> Any:
        return Trainable(leaf) if getattr(path[-1], "key", None) == "kernel" else leaf

    return jax.tree_util.tree_map_with_path(wrap, params)


def dot(x: jax.Array, w: jax.Array | Trainable | QTensor, bias: jax.Array) -> jax.Array:
    """x @ w + bias over the last axis of x, as one two-dimensional product.

    Weight and bias are read in the activation's dtype. Leading axes are folded first, so that every kind of weight
    sees one plain product and bias gradients are sums over one axis.

    Args:
      x: [..., K] activations.
      w: [K, N] weight, an array, `Trainable` or `QTensor`.
      bias: [N].

    Returns:
      [..., N] in the dtype of x.
    """
    *lead, k = x.shape
    if len(lead) == 2 and placement.cuts_tokens() and not isinstance(w, Trainable):
        # samples and tokens that are both cut, or tokens alone, do not fold into one axis that is
        return jax.vmap(dot, (0, None, None))(x, w, bias)
    x_MK, b_N = x.reshape(-1, k), bias.astype(x.dtype)
    if isinstance(w, Trainable):
        y_MN = _affine(x_MK, w.array.astype(x.dtype), b_N)
    elif isinstance(w, QTensor):
        y_MN = quantized_dot(x_MK, w, b_N)
    else:
        product = jnp.matmul
        if x_MK.shape[0] == 1 and x.dtype == jnp.bfloat16:
            product = partial(jax.lax.platform_dependent, cpu=_row_product_cpu, default=jnp.matmul)
        y_MN = product(x_MK, w.astype(x.dtype)) + b_N[None]
    return y_MN.reshape(*lead, y_MN.shape[-1])


def attend(
    q_BTHK: jax.Array,
    k_BSHK: jax.Array,
    v_BSHK: jax.Array,
    segments: Segments | None = None,
    blocks: BlockList | None = None,
    scales: Scales | BlockScales | None = None,
    with_lse: bool = False,
) -> Any:
    """Reference attention: o = softmax(q k^T / sqrt(K)) v with the softmax in float32, every option included.

    Args:
      q_BTHK: [B, T, H, K] queries.
      k_BSHK, v_BSHK: [B, S, H, K] keys and values.
      segments: pairs with unequal ids do not attend. A query without any key gets the mean of all values.
      blocks: only the listed blocks attend; here they are expanded to a mask [T, S], which saves nothing.
      scales: of quantised q, k, v, per element or per block.
      with_lse: also return the log-sum-exp of the scaled logits.

    Returns:
      o [B, T, H, K] in the dtype of q (float32 for quantised q), and with `with_lse` lse [B, H, T] float32.
    """
    if scales is not None:
        q_BTHK, k_BSHK, v_BSHK = (
            a.astype(jnp.float32) * s
            for a, s in zip(
                (q_BTHK, k_BSHK, v_BSHK), per_element(scales, q_BTHK.shape[1], k_BSHK.shape[1]), strict=True
            )
        )
    v_BSHK = attended_values(v_BSHK, segments)
    q_BHTK = jnp.swapaxes(q_BTHK, 1, 2) * q_BTHK.shape[-1] ** -0.5
    k_BHSK = jnp.swapaxes(k_BSHK, 1, 2)
    v_BHSK = jnp.swapaxes(v_BSHK, 1, 2)
    logits_BHTS = jnp.einsum("bhtk,bhsk->bhts", q_BHTK, k_BHSK, preferred_element_type=jnp.float32)
    if segments is not None:
        equal_B1TS = segments.q[:, None, :, None] == segments.k[:, None, None, :]
        logits_BHTS = jnp.where(equal_B1TS, logits_BHTS, MASKED)
    if blocks is not None:
        logits_BHTS = jnp.where(block_mask(blocks, *logits_BHTS.shape[-2:]), logits_BHTS, MASKED)
    # normalised after the second product: the division runs over [T, K] and not over [T, S]
    top_BHT1 = jax.lax.stop_gradient(logits_BHTS.max(-1, keepdims=True))
    p_BHTS = jnp.exp(logits_BHTS - top_BHT1)
    total_BHT1 = p_BHTS.sum(-1, keepdims=True)
    o_BHTK = jnp.einsum("bhts,bhsk->bhtk", p_BHTS.astype(v_BHSK.dtype), v_BHSK, preferred_element_type=jnp.float32)
    o_BTHK = jnp.swapaxes((o_BHTK / total_BHT1).astype(q_BTHK.dtype), 1, 2)
    return (o_BTHK, (top_BHT1 + jnp.log(total_BHT1))[..., 0]) if with_lse else o_BTHK


def attend_by_rows(
    q_BTHK: jax.Array, k_BSHK: jax.Array, v_BSHK: jax.Array, segments: Segments | None = None, rows: int = 1024
) -> jax.Array:
    """`attend` for so many queries at a time: of its logits [B, H, T, S] a part [B, H, rows, S] is there at once.

    Args:
      q_BTHK, k_BSHK, v_BSHK, segments: as of `attend`.
      rows: queries at a time, 1 or more (1024).
    """
    b, t, *rest = q_BTHK.shape
    if t <= rows:
        return attend(q_BTHK, k_BSHK, v_BSHK, segments)
    n = -(-t // rows)

    def parts(a: jax.Array) -> jax.Array:
        a = jnp.pad(a, ((0, 0), (0, n * rows - t), *((0, 0),) * (a.ndim - 2)))
        return a.reshape(b, n, rows, *a.shape[2:]).swapaxes(0, 1)

    def some(part: tuple[jax.Array, jax.Array | None]) -> jax.Array:
        q, ids = part
        return attend(q, k_BSHK, v_BSHK, None if segments is None or ids is None else Segments(ids, segments.k))

    ids = None if segments is None else parts(jnp.broadcast_to(segments.q, (b, t)))
    o = jax.lax.map(some, (parts(q_BTHK), ids))
    return o.swapaxes(0, 1).reshape(b, n * rows, *rest)[:, :t]


def per_element(scales: Scales | BlockScales, queries: int, keys: int) -> Scales:
    """Scales that broadcast to q [B, T, H, K] and to k and v [B, S, H, K], whichever form they have."""
    if isinstance(scales, Scales):
        return scales

    def spread(s_BHn: jax.Array, block: int, length: int) -> jax.Array:
        return jnp.swapaxes(jnp.repeat(s_BHn, block, -1)[..., :length], 1, 2)[..., None]

    v = jnp.ones((1, 1, 1, 1), jnp.float32) if scales.v is None else scales.v[:, None]
    return Scales(spread(scales.q, scales.block_q, queries), spread(scales.k, scales.block_k, keys), v)


def attended_values(v_BSHK: jax.Array, segments: Segments | None) -> jax.Array:
    """Values with 0 in place of inf and NaN where no query attends: such a key's weight is 0, and 0 times inf is NaN.

    Finite values are as they are, so that a query without any key still gets their mean.
    """
    if segments is None:
        return v_BSHK
    seen_BS = (segments.q[:, :, None] == segments.k[:, None]).any(1)
    return jnp.where(seen_BS[..., None, None] | jnp.isfinite(v_BSHK), v_BSHK, jnp.zeros((), v_BSHK.dtype))


def softmax(logits: jax.Array) -> jax.Array:
    """exp(x - max x) / sum exp(x - max x) over the last axis; JAX's own begins its max with an infinity."""
    p = jnp.exp(logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True)))
    return p / p.sum(-1, keepdims=True)


def block_mask(blocks: BlockList, queries: int, keys: int) -> jax.Array:
    """The mask bool [B or 1, H or 1, T, S] that a list of blocks stands for."""
    n = blocks.indices.shape[-1]
    listed = jnp.arange(n)[None, None, None] < blocks.counts[..., None]
    hit = jax.nn.one_hot(blocks.indices, -(-keys // blocks.block_k), dtype=bool) & listed[..., None]
    tiles = hit.any(-2)  # [B or 1, H or 1, T / block_q, S / block_k]
    mask = jnp.repeat(jnp.repeat(tiles, blocks.block_q, -2), blocks.block_k, -1)
    return mask[..., :queries, :keys]


def layer_norm(x: jax.Array, eps: float = 1e-6) -> jax.Array:
    """(x - mean)/sqrt(var + eps) over the last axis, without affine parameters, computed and returned in float32."""
    x = x.astype(jnp.float32)
    mean = x.mean(-1, keepdims=True)
    centred = x - mean
    return centred * jax.lax.rsqrt((centred * centred).mean(-1, keepdims=True) + eps)
