"""What solvers may make of the data prediction before they step: clipping, and the dynamic thresholding of Imagen."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

Bound = Callable[[jax.Array], jax.Array]


def bounded(
    solver: str, clip: float | None = None, thresholding: float | None = None, sample_max_value: float | None = None
) -> Bound | None:
    """x0 -> x0 within its range, each sample by itself; eps follows it in the solver.

    clip c:          x0 clipped to [-c, c].
    thresholding p:  s = quantile_p(|x0|) of a sample, at least 1 and at most sample_max_value; x0 clipped to [-s, s]
                     and divided by s, so that it stays within [-1, 1].

    Args:
      solver: whose settings these are, for messages.
      clip: c, above 0; None: not clipped.
      thresholding: p, in (0, 1) (0.995 in Imagen, in DPM-Solver++ and in diffusers); None: none.
      sample_max_value: the largest s, 1 or more; None: as large as it comes, as in Imagen and in the authors' code. In
        diffusers it is 1 unless it is set, which clips to [-1, 1] and does no more.

    Returns:
      The function, or None where nothing is bounded.

    Raises:
      ValueError: a number out of range, both at once, or sample_max_value without thresholding.

    References: Saharia et al., Imagen, 2022, arXiv:2205.11487, section 2.3; Ho et al. 2020, arXiv:2006.11239 (clip).
    """
    if clip is not None and thresholding is not None:
        raise ValueError(f"{solver}: clip={clip} and thresholding={thresholding}; allowed: one of them")
    if clip is not None and not clip > 0:
        raise ValueError(f"{solver}: clip={clip}; allowed: > 0")
    if thresholding is not None and not 0 < thresholding < 1:
        raise ValueError(f"{solver}: thresholding={thresholding}; allowed: between 0 and 1, such as 0.995")
    if sample_max_value is not None and thresholding is None:
        raise ValueError(f"{solver}: sample_max_value={sample_max_value} without thresholding; allowed: none, or both")
    if sample_max_value is not None and not sample_max_value >= 1:
        raise ValueError(f"{solver}: sample_max_value={sample_max_value}; allowed: 1 or more")
    if clip is not None:
        return lambda x0: jnp.clip(x0, -clip, clip)
    if thresholding is None:
        return None

    def threshold(x0: jax.Array) -> jax.Array:
        size = jnp.abs(x0).reshape(len(x0), -1)
        s = jnp.clip(jnp.quantile(size, thresholding, axis=1), 1.0, sample_max_value)
        s = s.reshape(-1, *(1,) * (x0.ndim - 1))
        return jnp.clip(x0, -s, s) / s

    return threshold
