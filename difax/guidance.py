"""Guidance: how the conditional and unconditional halves of a step are produced and mixed.

Classifier-free guidance evaluates both halves in one batch, conditional rows first:
output = uncond + scale (cond - uncond).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from difax.contracts import Guide, Row


def unguided() -> Guide:
    """No guidance: the conditional half alone; the scale is ignored."""

    def apply(denoise, x, cond, null, scale, row, state, accelerator_state):
        output, accelerator_state, computed = denoise(x, cond, row, accelerator_state, "cond")
        return output, state, accelerator_state, computed

    return Guide(plan=lambda rows: rows, halves=1, init=lambda x: (), apply=apply)


def cfg(channels: int | None = None) -> Guide:
    """Classifier-free guidance at every evaluation.

    Args:
      channels: guide only the first so many output channels and leave the rest conditional (3 in the original
        DiT's sampler, "for exact reproducibility"); None guides all channels of the prediction. Variance channels
        are never guided.

    References: Ho & Salimans, Classifier-Free Diffusion Guidance, 2022, arXiv:2207.12598.
    """
    _check_channels(channels)

    def apply(denoise, x, cond, null, scale, row, state, accelerator_state):
        output, accelerator_state, computed = _both(denoise, x, cond, null, scale, row, accelerator_state, channels)
        return output, state, accelerator_state, computed

    return Guide(
        plan=lambda rows: rows._replace(guided=np.ones_like(rows.guided)),
        halves=2,
        init=lambda x: (),
        apply=apply,
    )


def interval(low: float = 0.0, high: float = 1.0, channels: int | None = None) -> Guide:
    """Classifier-free guidance where low <= t <= high only; elsewhere the unconditional half is not evaluated.

    Args:
      low, high: bounds in process time, 0 <= low <= high <= 1 (the paper gives its bounds as noise levels).
      channels: as in `cfg`.

    References: Kynkaanniemi et al., Applying Guidance in a Limited Interval, 2024, arXiv:2404.07724.
    """
    _check_channels(channels)
    if not 0 <= low <= high <= 1:
        raise ValueError(f"interval: low={low}, high={high}; need 0 <= low <= high <= 1")

    def plan(rows: Row) -> Row:
        guided = (rows.t >= low) & (rows.t <= high)
        # where guidance begins, nothing is remembered of the unconditional half
        begins = guided & ~np.concatenate([[False], guided[:-1]])
        return rows._replace(guided=guided, fresh=rows.fresh | begins)

    def apply(denoise, x, cond, null, scale, row, state, accelerator_state):
        def on(accelerator_state):
            return _both(denoise, x, cond, null, scale, row, accelerator_state, channels)

        def off(accelerator_state):
            return denoise(x, cond, row, accelerator_state, "cond")

        output, accelerator_state, computed = jax.lax.cond(row.guided, on, off, accelerator_state)
        return output, state, accelerator_state, computed

    return Guide(plan=plan, halves=2, init=lambda x: (), apply=apply)


GUIDES = {"none": unguided, "cfg": cfg, "interval": interval}


def _both(denoise, x, cond, null, scale, row, accelerator_state, channels):
    doubled = jnp.concatenate([x, x])
    conds = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), cond, null)
    output, accelerator_state, computed = denoise(doubled, conds, row, accelerator_state, "both")
    on, off = jnp.split(output, 2)
    mixed = off + scale * (on - off)
    # beyond the guided channels (the rest of the prediction, and the variance) the conditional half stands
    guided = x.shape[-1] if channels is None else min(channels, x.shape[-1])
    if guided < output.shape[-1]:
        mixed = jnp.concatenate([mixed[..., :guided], on[..., guided:]], axis=-1)
    return mixed, accelerator_state, computed


def _check_channels(channels: int | None) -> None:
    if channels is not None and channels < 1:
        raise ValueError(f"guidance: channels={channels}; allowed: 1 or more, or None for all")
