"""Guidance: how the conditional and unconditional halves of a step are produced and mixed.

Classifier-free guidance evaluates both halves in one batch, conditional rows first:
output = uncond + scale (cond - uncond).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from difax.core.contracts import Guide, Row


def unguided() -> Guide:
    """No guidance: the conditional half alone; the scale is ignored."""

    def apply(denoise, x, cond, null, scale, row, state, memory):
        output, memory, trace = denoise(x, cond, row, memory, "cond")
        return output, state, memory, trace

    return Guide(plan=lambda rows: rows, halves=1, init=lambda x: (), apply=apply)


def cfg(channels: int | None = None, together: bool = True) -> Guide:
    """Classifier-free guidance at every evaluation.

    Args:
      channels: guide only the first so many output channels and leave the rest conditional (3 in the original
        DiT's sampler, "for exact reproducibility"); None guides all channels of the prediction. Variance channels
        are never guided.
      together: run both halves as one batch; False runs them one after the other, so that what is remembered, and
        what an online cache decides, is each half's own ("separate cfg").

    References: Ho & Salimans, Classifier-Free Diffusion Guidance, 2022, arXiv:2207.12598.
    """
    _check_channels(channels)

    def apply(denoise, x, cond, null, scale, row, state, memory):
        output, memory, trace = _both(denoise, x, cond, null, scale, row, memory, channels, together)
        return output, state, memory, trace

    return Guide(
        plan=lambda rows: rows._replace(guided=np.ones_like(rows.guided)),
        halves=2,
        init=lambda x: (),
        apply=apply,
        together=together,
    )


def interval(low: float = 0.0, high: float = 1.0, channels: int | None = None, together: bool = True) -> Guide:
    """Classifier-free guidance where low <= t <= high only; elsewhere the unconditional half is not evaluated.

    Args:
      low, high: bounds in process time, 0 <= low <= high <= 1 (the paper gives its bounds as noise levels).
      channels, together: as in `cfg`.

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

    def apply(denoise, x, cond, null, scale, row, state, memory):
        def on(memory):
            return _both(denoise, x, cond, null, scale, row, memory, channels, together)

        def off(memory):
            return denoise(x, cond, row, memory, "cond")

        output, memory, trace = jax.lax.cond(row.guided, on, off, memory)
        return output, state, memory, trace

    return Guide(plan=plan, halves=2, init=lambda x: (), apply=apply, together=together)


GUIDES = {"none": unguided, "cfg": cfg, "interval": interval}


def _both(denoise, x, cond, null, scale, row, memory, channels, together):
    if together:
        conds = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), cond, null)
        output, memory, trace = denoise(jnp.concatenate([x, x]), conds, row, memory, "both")
        on, off = jnp.split(output, 2)
    else:
        on, memory, first = denoise(x, cond, row, memory, "cond")
        off, memory, second = denoise(x, null, row, memory, "uncond")
        trace = jax.tree.map(jnp.add, first, second)
    return mix_halves(on, off, scale, x.shape[-1], channels), memory, trace


def mix_halves(on: jax.Array, off: jax.Array, scale: jax.Array, predicted: int, channels: int | None) -> jax.Array:
    """off + scale (on - off) in the guided channels, on in the others.

    Args:
      on, off: outputs of the conditional and the unconditional half [B, ..., C or more].
      predicted: channels of the prediction, behind which the variance stands.
      channels: how many of them are guided, None for all.
    """
    mixed = off + scale * (on - off)
    guided = predicted if channels is None else min(channels, predicted)
    if guided < on.shape[-1]:
        mixed = jnp.concatenate([mixed[..., :guided], on[..., guided:]], axis=-1)
    return mixed


def _check_channels(channels: int | None) -> None:
    if channels is not None and channels < 1:
        raise ValueError(f"guidance: channels={channels}; allowed: 1 or more, or None for all")
