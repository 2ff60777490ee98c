"""Rotary position embeddings over several axes: the angles of FLUX (text, row, column) and Wan (frame, row, column).

Every head's features are cut into one section an axis, of widths d_1, d_2, ... that sum to the head width K. In the
section of axis a, the pair (x_2j, x_2j+1) is rotated by the angle position_a theta^(-2j/d_a).

Shape letters: B batch, T tokens, H heads, K head width.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


def rotary_angles(positions: np.ndarray, axes_dim: Sequence[int], theta: float = 10_000.0) -> np.ndarray:
    """Angles of every token's feature pairs, float64 on the host: position_a theta^(-2j/d_a), the axes in turn.

    Args:
      positions: [T, axes] coordinates of each token.
      axes_dim: widths d_a of the sections, even, one an axis; FLUX has (16, 56, 56) for a head width of 128.
      theta: base of the frequencies (10000).

    Returns:
      [T, sum(axes_dim)/2] float64; `rotary_table` takes cosines and sines.

    Raises:
      ValueError: a width that is odd or below 2, positions of another number of axes, or theta not above 0.

    References: Su et al. (RoFormer), 2021, arXiv:2104.09864.
    """
    positions = np.asarray(positions, np.float64)
    if any(d < 2 or d % 2 for d in axes_dim):
        raise ValueError(f"rotary: axes_dim={tuple(axes_dim)}; allowed: even widths, 2 or more")
    if positions.ndim != 2 or positions.shape[1] != len(axes_dim):
        raise ValueError(f"rotary: positions of shape {positions.shape}; expected [T, {len(axes_dim)}]")
    if not theta > 0:
        raise ValueError(f"rotary: theta={theta}; allowed: > 0")
    sections = [
        positions[:, axis, None] * theta ** (-np.arange(0, d, 2, dtype=np.float64) / d)
        for axis, d in enumerate(axes_dim)
    ]
    return np.concatenate(sections, axis=1)


def rotary_table(
    positions: np.ndarray, axes_dim: Sequence[int], theta: float = 10_000.0
) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines [T, K/2] of `rotary_angles`, rounded to float32 once."""
    angles = rotary_angles(positions, axes_dim, theta)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def apply_rotary(x_BTHK: jax.Array, cos_TK2: jax.Array, sin_TK2: jax.Array) -> jax.Array:
    """Rotates the pairs (x_0, x_1), (x_2, x_3), ... of every head in float32.

    (a, b) -> (a cos - b sin, b cos + a sin).

    Args:
      x_BTHK: [B, T, H, K] queries or keys.
      cos_TK2, sin_TK2: [T, K/2], from `rotary_table`, or [B, T, K/2], of every sample.

    Returns:
      [B, T, H, K] in the dtype of x.
    """
    pairs = x_BTHK.astype(jnp.float32).reshape(*x_BTHK.shape[:-1], -1, 2)
    a, b = pairs[..., 0], pairs[..., 1]
    # [B or 1, T, 1, K/2]
    cos, sin = (t.reshape(-1, x_BTHK.shape[1], 1, t.shape[-1]) for t in map(jnp.asarray, (cos_TK2, sin_TK2)))
    rotated = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1)
    return rotated.reshape(x_BTHK.shape).astype(x_BTHK.dtype)
