"""Guidance: how the conditional and unconditional halves of a step are produced and mixed.

Classifier-free guidance evaluates both halves in one batch, conditional rows first:
g = uncond + scale (cond - uncond), so that a scale of 1 is unguided. Where it is written cond + s (cond - uncond), the
scale here is 1 + s.

What then becomes of g, with c the conditional half, is a setting of the guide:

  rescale   phi g std(c)/std(g) + (1 - phi) g, over a whole sample (Lin et al. 2023, arXiv:2305.08891, equation 16)
  norm      g |c|/|g|, or g min(1, limit |c|/|g|): over the channels of a 2 x 2 patch ("patch", Qwen-Image), a row of a
            channel ("row", Lumina-Image 2.0), or a whole sample ("sample", Z-Image with limit 1)
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from difax.core.contracts import Guide, Row

Norm = Literal["patch", "row", "sample"]
PATCH = 2
MOST = 1e4  # the largest scale


class Mixing(NamedTuple):
    """How halves are mixed: a guide's own table, leaves [E], which an evaluation sees without that axis. None: not.

    below: bool, is the scale `scale_below` and not the run's; first: of the first frame; rescale: phi; limit: of the
    norm, None where |g| is made |c| whatever it was.
    """

    below: Any = None
    scale_below: Any = None
    first: Any = None
    rescale: Any = None
    limit: Any = None


def unguided() -> Guide:
    """No guidance: the conditional half alone; the scale is ignored."""

    def apply(denoise, x, cond, null, scale, row, state, memory):
        output, memory, trace = denoise(x, cond, row, memory, "cond")
        return output, state, memory, trace

    return Guide(plan=lambda rows: rows, halves=1, init=lambda x: (), apply=apply)


def cfg(
    channels: int | None = None,
    together: bool = True,
    rescale: float = 0.0,
    norm: Norm | None = None,
    norm_limit: float | None = None,
    boundary: float | None = None,
    scale_below: float | None = None,
    first_frame: float | None = None,
) -> Guide:
    """Classifier-free guidance at every evaluation.

    Args:
      channels: guide only the first so many output channels and leave the rest conditional (3 in the original
        DiT's sampler, "for exact reproducibility"; diffusers guides all 4); None guides all channels of the
        prediction. Variance channels are never guided.
      together: run both halves as one batch; False runs them one after the other, so that what is remembered, and
        what an online cache decides, is each half's own ("separate cfg").
      rescale: phi, the share of the guided prediction that is brought to the standard deviation of the conditional
        one, 0 ... 1 (0). diffusers' `guidance_rescale`.
      norm: over what the norm of the guided prediction is made that of the conditional one; None keeps it. Not with
        rescale.
      norm_limit: if given, the norm is only bounded, by so many times that of the conditional one, above 0, up to 1e4
        (None; Z-Image's `cfg_normalization` is norm="sample" with this limit).
      boundary, scale_below: where t < boundary, 0 ... 1, the scale is scale_below and not the run's (None: it is the
        run's everywhere). Wan 2.2's `boundary_ratio` and `guidance_scale_2`.
      first_frame: of videos, the scale of the first frame; it goes linearly to the run's at the last one (None: every
        frame has the run's). 1 in Stable Video Diffusion.

    References: Ho & Salimans, Classifier-Free Diffusion Guidance, 2022, arXiv:2207.12598; Lin et al. 2023,
      arXiv:2305.08891; diffusers 0.42.1, QwenImagePipeline, Lumina2Pipeline, ZImagePipeline, WanPipeline.
    """
    plan, init, mixed = _mixing(channels, rescale, norm, norm_limit, boundary, scale_below, first_frame)

    def apply(denoise, x, cond, null, scale, row, state, memory):
        output, memory, trace = _both(denoise, x, cond, null, scale, row, memory, mixed, together)
        return output, state, memory, trace

    return Guide(
        plan=lambda rows: plan(rows)._replace(guided=np.ones_like(rows.guided)),
        halves=2,
        init=init,
        apply=apply,
        together=together,
    )


def interval(
    low: float = 0.0,
    high: float = 1.0,
    channels: int | None = None,
    together: bool = True,
    rescale: float = 0.0,
    norm: Norm | None = None,
    norm_limit: float | None = None,
    boundary: float | None = None,
    scale_below: float | None = None,
    first_frame: float | None = None,
) -> Guide:
    """Classifier-free guidance where low <= t <= high only; elsewhere the unconditional half is not evaluated.

    Args:
      low, high: bounds in process time, 0 <= low <= high <= 1 (the paper gives its bounds as noise levels; Z-Image's
        `cfg_truncation` r is low = 1 - r).
      channels, together, rescale, norm, norm_limit, boundary, scale_below, first_frame: as in `cfg`.

    References: Kynkaanniemi et al., Applying Guidance in a Limited Interval, 2024, arXiv:2404.07724.
    """
    lay, init, mixed = _mixing(channels, rescale, norm, norm_limit, boundary, scale_below, first_frame)
    if not 0 <= low <= high <= 1:
        raise ValueError(f"interval: low={low}, high={high}; need 0 <= low <= high <= 1")

    def plan(rows: Row) -> Row:
        guided = (rows.t >= low) & (rows.t <= high)
        # where guidance begins, nothing is remembered of the unconditional half
        begins = guided & ~np.concatenate([[False], guided[:-1]])
        return lay(rows)._replace(guided=guided, fresh=rows.fresh | begins)

    def apply(denoise, x, cond, null, scale, row, state, memory):
        def on(memory):
            return _both(denoise, x, cond, null, scale, row, memory, mixed, together)

        def off(memory):
            return denoise(x, cond, row, memory, "cond")

        output, memory, trace = jax.lax.cond(row.guided, on, off, memory)
        return output, state, memory, trace

    return Guide(plan=plan, halves=2, init=init, apply=apply, together=together)


GUIDES = {"none": unguided, "cfg": cfg, "interval": interval}


def _both(denoise, x, cond, null, scale, row, memory, mixed, together):
    if together:
        conds = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), cond, null)
        output, memory, trace = denoise(jnp.concatenate([x, x]), conds, row, memory, "both")
        on, off = jnp.split(output, 2)
    else:
        on, memory, first = denoise(x, cond, row, memory, "cond")
        off, memory, second = denoise(x, null, row, memory, "uncond")
        trace = jax.tree.map(jnp.add, first, second)
    return mixed(on, off, scale, x.shape[-1], row), memory, trace


def mix_halves(on: jax.Array, off: jax.Array, scale: jax.Array, predicted: int, channels: int | None) -> jax.Array:
    """off + scale (on - off) in the guided channels, on in the others.

    Args:
      on, off: outputs of the conditional and the unconditional half [B, ..., C or more].
      scale: a scalar, or an array of as many axes.
      predicted: channels of the prediction, behind which the variance stands.
      channels: how many of them are guided, None for all.
    """
    mixed = off + scale * (on - off)
    guided = predicted if channels is None else min(channels, predicted)
    if guided < on.shape[-1]:
        mixed = jnp.concatenate([mixed[..., :guided], on[..., guided:]], axis=-1)
    return mixed


def rescaled(mixed: jax.Array, on: jax.Array, share: jax.Array) -> jax.Array:
    """share mixed std(on)/std(mixed) + (1 - share) mixed, of every sample [B, ...] for itself.

    References: Lin et al., Common Diffusion Noise Schedules and Sample Steps are Flawed, 2023, arXiv:2305.08891.
    """
    axes = tuple(range(1, on.ndim))
    std = (jnp.std(a, axes, keepdims=True) for a in (on, mixed))
    return share * mixed * _ratio(*std) + (1 - share) * mixed


def renormed(mixed: jax.Array, on: jax.Array, over: Norm, limit: Any = None) -> jax.Array:
    """mixed |on|/|mixed|, or with a limit mixed min(1, limit |on|/|mixed|).

    Args:
      mixed, on: [B, ..., H, W, C].
      over: "patch", the channels of 2 x 2 places; "row", the places of a row, each channel for itself; "sample".
    """
    if over == "patch":
        shape = on.shape
        cells = (*shape[:-3], shape[-3] // PATCH, PATCH, shape[-2] // PATCH, PATCH, shape[-1])
        found = _ratio(*(_norm(a.reshape(cells), (-4, -2, -1)) for a in (on, mixed)))
        ratio = jnp.broadcast_to(found, (*cells[:-1], 1)).reshape(*shape[:-1], 1)
    else:
        axes = (-2,) if over == "row" else tuple(range(1, on.ndim))
        ratio = _ratio(_norm(on, axes), _norm(mixed, axes))
    return mixed * (ratio if limit is None else jnp.minimum(1, limit * ratio))


def _norm(a: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    return jnp.sqrt((a * a).sum(axes, keepdims=True))


def _ratio(a: jax.Array, b: jax.Array) -> jax.Array:
    """a / b, and 1 where b is 0: what has no size keeps it."""
    return jnp.where(b > 0, a / jnp.where(b > 0, b, 1), 1)


def _mixing(
    channels: int | None,
    rescale: float,
    norm: Norm | None,
    limit: float | None,
    boundary: float | None,
    scale_below: float | None,
    first: float | None,
) -> tuple[Any, Any, Any]:
    """What both guides make of their settings: (rows -> rows with their table, init of the guide, (on, off, scale,
    predicted channels, row) -> output)."""
    if channels is not None and channels < 1:
        raise ValueError(f"guidance: channels={channels}; allowed: 1 or more, or None for all")
    if not 0 <= rescale <= 1:
        raise ValueError(f"guidance: rescale={rescale}; allowed: 0 ... 1")
    if norm not in (None, "patch", "row", "sample"):
        raise ValueError(f"guidance: norm={norm!r}; allowed: patch, row, sample, or none")
    if norm is not None and rescale:
        raise ValueError(f"guidance: rescale={rescale} with norm={norm!r}; allowed: one of the two")
    if limit is not None and (norm is None or not 0 < limit <= MOST):
        raise ValueError(f"guidance: norm_limit={limit}, norm={norm}; allowed: > 0, up to {MOST:g}, of a norm")
    if (boundary is None) != (scale_below is None):
        raise ValueError(f"guidance: boundary={boundary}, scale_below={scale_below}; allowed: both, or none")
    if boundary is not None and not 0 <= boundary <= 1:
        raise ValueError(f"guidance: boundary={boundary}; allowed: 0 ... 1, a process time")
    for name, value in (("scale_below", scale_below), ("first_frame", first)):
        if value is not None and not abs(value) <= MOST:
            raise ValueError(f"guidance: {name}={value}; allowed: -{MOST:g} ... {MOST:g}")
    plain = not rescale and norm is None and boundary is None and first is None

    def plan(rows: Row) -> Row:
        if plain:
            return rows
        every = lambda value: np.full(len(rows.i), float(value))  # noqa: E731
        table = Mixing(
            below=None if boundary is None else np.asarray(rows.t) < boundary,
            scale_below=None if scale_below is None else every(scale_below),
            first=None if first is None else every(first),
            rescale=every(rescale) if rescale else None,
            limit=None if limit is None else every(limit),
        )
        return rows._replace(guide=table)

    def init(x: jax.Array) -> tuple[()]:
        if first is not None and x.ndim != 5:
            raise ValueError(f"guidance: first_frame={first} for samples {x.shape[1:]}; allowed: of videos")
        if norm == "patch" and any(n % PATCH for n in x.shape[-3:-1]):
            raise ValueError(f"guidance: norm='patch' for samples {x.shape[1:]}; allowed: of even height and width")
        return ()

    def mixed(on: jax.Array, off: jax.Array, scale: jax.Array, predicted: int, row: Row) -> jax.Array:
        if plain:
            return mix_halves(on, off, scale, predicted, channels)
        table: Mixing = row.guide
        if table.below is not None:
            scale = jnp.where(table.below, table.scale_below, scale)
        if table.first is not None:
            frames = on.shape[1]
            along = (jnp.arange(frames) / max(frames - 1, 1)).astype(on.dtype)
            scale = (table.first + along * (scale - table.first)).reshape(1, -1, 1, 1, 1)
        whole = mix_halves(on, off, scale, predicted, channels)
        own, c = whole[..., :predicted], on[..., :predicted]
        if table.rescale is not None:
            own = rescaled(own, c, table.rescale)
        if norm is not None:
            own = renormed(own, c, norm, table.limit)
        return jnp.concatenate([own, whole[..., predicted:]], axis=-1)

    return plan, init, mixed
