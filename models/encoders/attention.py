"""Attention of text encoders: the one function that each of them is given, and the masks that it takes.

Encoders add a bias to the logits (T5), cap them (Gemma-2), or share keys and values among heads (Llama), which the
denoisers' `difax.core.ops.attend` does not; whatever replaces this function takes the same arguments.

Shape letters: B batch, T query tokens, S key tokens, H heads of queries, G heads of keys and values, K head width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from difax.core.ops import MASKED


def attend(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    *,
    scale: float,
    seen: jax.Array,
    bias: jax.Array | None = None,
    cap: float | None = None,
) -> jax.Array:
    """o = softmax(c tanh(scale q k^T / c) + bias) v over the keys that are seen, with logits and softmax in float32.

    A query that sees no key (left padding under a causal mask) gets 0, as torch's scaled_dot_product_attention has it.

    Args:
      q_BTHK: [B, T, H, K] queries.
      k_BSGK, v_BSGK: [B, S, G, K] keys and values; head h of the queries goes with head h G // H.
      scale: of the logits, before they are capped.
      seen: bool [B, 1, T or 1, S], which keys a query attends to.
      bias: float32 [1, H, T, S], added to the logits.
      cap: c, or None: the logits are not capped.

    Returns:
      [B, T, H, K] in the dtype of q.
    """
    b, t, h, k = q_BTHK.shape
    g = k_BSGK.shape[2]
    q_BTGRK = q_BTHK.reshape(b, t, g, h // g, k)
    logits_BGRTS = jnp.einsum("btgrk,bsgk->bgrts", q_BTGRK, k_BSGK, preferred_element_type=jnp.float32) * scale
    if cap is not None:
        logits_BGRTS = cap * jnp.tanh(logits_BGRTS / cap)
    if bias is not None:
        logits_BGRTS = logits_BGRTS + bias.astype(jnp.float32).reshape(-1, g, h // g, *bias.shape[2:])
    seen_B11TS = seen[:, :, None]
    logits_BGRTS = jnp.where(seen_B11TS, logits_BGRTS, MASKED)
    p_BGRTS = jnp.where(seen_B11TS, jnp.exp(logits_BGRTS - logits_BGRTS.max(-1, keepdims=True)), 0.0)
    o_BGRTK = jnp.einsum("bgrts,bsgk->bgrtk", p_BGRTS.astype(v_BSGK.dtype), v_BSGK, preferred_element_type=jnp.float32)
    # normalised behind the second product, as the library's own kernels do; 0 of no key stays 0
    o_BGRTK = o_BGRTK / jnp.maximum(p_BGRTS.sum(-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
    return jnp.moveaxis(o_BGRTK, 3, 1).reshape(b, t, h, k).astype(q_BTHK.dtype)


def seen_keys(mask_BS: jax.Array, causal: bool = False, window: int | None = None) -> jax.Array:
    """Which keys a query attends to: the ones that are no padding, with `causal` none behind it.

    The query of a padded row sees what the others see, so under a causal mask and right padding not itself.

    Args:
      mask_BS: [B, S], 0 for padding.
      causal: do queries see the keys at and before their own place only.
      window: so many of them, its own place included; None: all.

    Returns:
      bool [B, 1, T, S], T = S where it is causal and 1 elsewhere.
    """
    seen = (mask_BS != 0)[:, None, None]
    if not causal:
        return seen
    behind = jnp.arange(mask_BS.shape[1])[:, None] - jnp.arange(mask_BS.shape[1])[None]  # of the query
    inside = (behind >= 0) & (behind < (mask_BS.shape[1] if window is None else window))
    return seen & inside[None, None]
