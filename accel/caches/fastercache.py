"""FasterCache. Lv et al., FasterCache: Training-Free Video Diffusion Model Acceleration with High Quality, 2024."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from difax.accel.caches.fill import damped
from difax.accel.caches.planned import Schedule, everywhere, planned
from difax.contracts import Accelerator, Guide, Row, Stage, State

STEPS, RAMP = 30, 20  # of the run that the windows are given for; steps in which the slope grows to its weight
RADIUS = 5  # the low band is a disc of this fraction of the smaller side


class Table(NamedTuple):
    """Leaves [E]: is the unconditional half estimated, and by how much the bands of the difference have grown."""

    skip: Any
    low: Any
    high: Any


def fastercache(
    interval: int = 2,
    *,
    start: int = 7,
    weight: float = 0.9,
    cfg: bool = True,
    cfg_interval: int = 5,
    cfg_start: int = 11,
    low_end: int = 25,
    high_start: int = 20,
    growth: float = 1.15,
    branches: tuple[str, ...] = ("attn",),
    dtype: str | None = None,
) -> Accelerator:
    """Extrapolates every second attention output, and estimates the unconditional half from the conditional one.

    With c = i + 1 counted from the noise, c' = 30 c / E: attention is computed iff c' <= start or c mod interval = 1;
    else it is A_1 + (A_1 - A_0) weight (c' - start) / 20, of the last two computed outputs, before the gate. The
    unconditional half is evaluated iff c' <= cfg_start or c mod cfg_interval = 0, and behind an estimate attention with
    it; else it is cond + l low + h high, low + high the difference uncond - cond when it was last evaluated, by spatial
    frequency (low: a disc of min(H, W) // 5); at each estimate l grows by `growth` iff c' <= low_end, h iff
    c' >= high_start.

    Args:
      interval, start, weight: of attention (2, 7, 0.9); interval 1 computes all.
      cfg: estimate the unconditional half (True); it needs a guide that has one.
      cfg_interval, cfg_start, low_end, high_start, growth: of that (5, 11, 25, 20, 1.15); cfg_interval 1 evaluates it
        always. All windows are counters of a run of 30 evaluations; intervals are not scaled.
      branches: that are extrapolated; others are computed (("attn",)).
      dtype: of the held outputs; None is the model's.

    Returns:
      An `Accelerator` that remembers two outputs per layer of these branches, and two images per sample.

    References: Lv et al. 2024, arXiv:2410.19355, with the numbers of the authors' Open-Sora script (commit 02d05ef),
      whose bands were compared; the rest is checked against plain Python. Where guidance is evaluated among estimates,
      attention is computed, as in their Latte script (their Open-Sora script then broadcasts the conditional half's).
      As the transform is linear, estimates are made without one. diffusers has other numbers.
    """
    for name, value in (("interval", interval), ("cfg_interval", cfg_interval)):
        if value < 1:
            raise ValueError(f"fastercache: {name}={value}; allowed: 1 or more")
    if start < 1 or cfg_start < 1:
        raise ValueError(f"fastercache: start={start}, cfg_start={cfg_start}; allowed: 1 or more")

    def counters(rows: Row) -> tuple[np.ndarray, np.ndarray]:
        c = np.arange(1, len(rows.i) + 1)
        return c, STEPS * c / len(c)

    def skipped(rows: Row) -> np.ndarray:
        """Where the unconditional half would be estimated, if it were wanted."""
        c, scaled = counters(rows)
        return (scaled > cfg_start) & (c % cfg_interval != 0) & (np.arange(len(c)) > 0)

    def schedule(rows: Row, stages: tuple[Stage, ...]) -> Schedule:
        c, scaled = counters(rows)
        computed = (scaled <= start) | (c % interval == 1 % interval)
        if cfg:
            skip = np.asarray(rows.guide.skip, bool)
            computed |= ~skip & np.append(False, skip[:-1])
        try:
            return everywhere(computed, stages, branches)
        except ValueError as error:
            raise ValueError(f"fastercache: {error}") from None

    def plan(rows: Row, stages: tuple[Stage, ...]) -> Any:
        fill = damped(lambda now: weight * (STEPS * (now + 1) / len(rows.i) - start) / RAMP)
        return planned("fastercache", schedule, fill).plan(rows, stages)

    def guide(inner: Guide) -> Guide:
        if inner.halves == 1:
            raise ValueError(
                "fastercache: cfg=True with a guide that evaluates no unconditional half; allowed: cfg=False, or the "
                "guides cfg and interval"
            )

        def table(rows: Row) -> Row:
            rows = inner.plan(rows)
            skip = skipped(rows) & np.asarray(rows.guided, bool) & ~np.asarray(rows.fresh, bool)
            _, scaled = counters(rows)
            low, high = np.ones(len(skip)), np.ones(len(skip))
            for e in np.flatnonzero(skip):
                low[e] = low[e - 1] * (growth if scaled[e] <= low_end else 1.0)
                high[e] = high[e - 1] * (growth if scaled[e] >= high_start else 1.0)
            return rows._replace(guided=rows.guided & ~skip, guide=Table(skip, low, high))

        return inner._replace(
            plan=table,
            init=lambda x: (inner.init(x), jnp.zeros((2, *x.shape), x.dtype)),
            apply=lambda *arguments: _apply(inner, *arguments),
        )

    base = planned("fastercache", schedule, damped(lambda now: 1.0), branches=branches, dtype=dtype)
    return base._replace(plan=plan, guide=guide if cfg else None)


def _apply(
    inner: Guide, denoise: Any, x: Any, cond: Any, null: Any, scale: Any, row: Row, state: State, memory: State
) -> Any:
    """The inner guide with the network, or with an estimate of its unconditional half."""
    own, bands = state
    table: Table = row.guide
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
