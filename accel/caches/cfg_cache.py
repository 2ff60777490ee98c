"""A cache of guidance: the unconditional half is estimated from the conditional one by what they last differed in.

FasterCache's CFG cache. Lv et al., FasterCache: Training-Free Video Diffusion Model Acceleration with High Quality,
2024, arXiv:2410.19355.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from difax.core.contracts import Guide, Row, State

RADIUS = 5  # the low band is a disc of this fraction of the smaller side


class Table(NamedTuple):
    """Leaves [E]: is the unconditional half estimated, and by how much the bands of the difference have grown; the
    table of the guide that is wrapped."""

    skip: Any
    low: Any
    high: Any
    inner: Any = ()


def estimating(name: str, wanted: Callable[[Row], Table]) -> Callable[[Guide], Guide]:
    """The level `guide` of an accelerator that estimates the unconditional half: cond + l low + h high.

    low + high is the difference uncond - cond when both were last evaluated, by spatial frequency (low: a disc of
    min(H, W) // 5). l and h are 1 there, and grow at every estimate.

    Args:
      name: of the technique.
      wanted: rows -> where an estimate may stand, and the factors by which l and h grow if it does; where there is no
        guidance, or something remembered is undefined, none does.

    Returns:
      guide -> guide, which remembers two images per sample; it raises ValueError for one without such a half.
    """

    def guide(inner: Guide) -> Guide:
        if inner.halves == 1:
            raise ValueError(
                f"{name}: cfg=True with a guide that evaluates no unconditional half; allowed: cfg=False, or the "
                "guides cfg and interval"
            )

        def plan(rows: Row) -> Row:
            rows, (skip, *growths, _) = inner.plan(rows), wanted(rows)
            skip = skip & np.asarray(rows.guided, bool) & ~np.asarray(rows.fresh, bool)
            grown = [np.ones(len(skip)) for _ in growths]
            for e in np.flatnonzero(skip):
                for band, growth in zip(grown, growths, strict=True):
                    band[e] = band[e - 1] * growth[e]
            return rows._replace(guided=rows.guided & ~skip, guide=Table(skip, *grown, inner=rows.guide))

        return inner._replace(
            plan=plan,
            init=lambda x: (inner.init(x), jnp.zeros((2, *x.shape), x.dtype)),
            apply=lambda *arguments: _apply(inner, *arguments),
        )

    return guide


def _apply(
    inner: Guide, denoise: Any, x: Any, cond: Any, null: Any, scale: Any, row: Row, state: State, memory: State
) -> Any:
    """The inner guide with the network, or with an estimate of its unconditional half."""
    own, bands = state
    table: Table = row.guide
    row = row._replace(guide=table.inner)
    channels = x.shape[-1]  # behind them the variance, which is never guided

    def evaluated(memory: State) -> Any:
        # what is seen travels with the memory, since a guide may call the network inside of a conditional
        def watched(x_in: Any, cond_in: Any, row: Row, carried: Any, half: str) -> Any:
            memory, bands, on = carried
            output, memory, trace = denoise(x_in, cond_in, row, memory, half)
            seen = output[..., :channels].astype(bands.dtype)
            if half == "both":
                on, off = jnp.split(seen, 2)
                bands = bands_of(off - on)
            elif half == "cond":
                on = seen
            else:
                bands = bands_of(seen - on)
            return output, (memory, bands, on), trace

        carried = (memory, bands, jnp.zeros_like(bands[0]))
        output, new, (memory, seen, _), trace = inner.apply(watched, x, cond, null, scale, row, own, carried)
        return output, (new, seen), memory, trace

    def estimated(memory: State) -> Any:
        seen: list[Any] = []
        difference = (table.low * bands[0] + table.high * bands[1]).astype(bands.dtype)

        def guessed(x_in: Any, cond_in: Any, row: Row, memory: State, half: str) -> Any:
            if half == "uncond":
                on, trace = seen
                return estimate(on), memory, jax.tree.map(jnp.zeros_like, trace)
            on, memory, trace = denoise(x, cond, row, memory, "cond")
            seen[:] = [on, trace]
            return jnp.concatenate([on, estimate(on)]) if half == "both" else on, memory, trace

        def estimate(on: jax.Array) -> jax.Array:
            return jnp.concatenate([on[..., :channels] + difference.astype(on.dtype), on[..., channels:]], axis=-1)

        guided = row._replace(guided=jnp.ones_like(row.guided))
        output, new, memory, trace = inner.apply(guessed, x, cond, null, scale, guided, own, memory)
        return output, (new, bands), memory, trace

    return jax.lax.cond(table.skip, estimated, evaluated, memory)


def bands_of(difference: jax.Array) -> jax.Array:
    """The low and the high frequencies of images or videos [B, ..., H, W, C]: [2, B, ..., H, W, C]."""
    h, w = difference.shape[-3:-1]
    y, x = (np.fft.fftfreq(n) * n for n in (h, w))
    disc = y[:, None] ** 2 + x[None] ** 2 <= (min(h, w) // RADIUS) ** 2
    spectrum = jnp.fft.fft2(difference, axes=(-3, -2))
    low = jnp.fft.ifft2(spectrum * disc.reshape(*(1,) * (difference.ndim - 3), h, w, 1), axes=(-3, -2)).real
    low = low.astype(difference.dtype)
    return jnp.stack([low, difference - low])
