"""The statistics of DPM-Solver-v3. Zheng, Lu, Chen & Zhu, 2023, arXiv:2310.13268."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from difax.core import noise
from difax.core.arrays import save_arrays
from difax.core.contracts import Accelerator, Row
from difax.core.drive import per_sample
from difax.core.process import Process, predict
from difax.core.sample import make_rows
from difax.core.trunk import forward

Noise = Callable[..., jax.Array]
SLOPE = 1e-4  # in log-SNR, over which dt/d lambda is measured


def log_snrs(process: Process, steps: int, low: float | None = None, high: float | None = None) -> np.ndarray:
    """Half log-SNRs [steps + 1], even, of the times from `high` (t_max) to `low` (t_min) of a process."""
    times = np.array([process.t_max if high is None else high, process.t_min if low is None else low])
    level = process.level(times)
    if not np.all(level.alpha > 0):
        raise ValueError(f"dpm_solver_v3: alpha is 0 at t={times[0]:g} of {process.name}; allowed: times below it")
    first, last = np.log(level.alpha) - np.log(level.sigma)
    return np.linspace(first, last, steps + 1)


def statistics(
    eps: Noise,
    process: Process,
    half: np.ndarray,
    batches: Callable[[], Iterable[tuple[Any, ...]]],
    over: Sequence[int] = (),
) -> dict[str, np.ndarray]:
    """l, s and b of a network at each log-SNR, by derivatives along random and along the trajectory's directions.

    With x = alpha x0 + sigma z, f = (sigma eps - l x)/alpha, and f' its derivative along the probability flow,

      l = E v (sigma d eps/dx v),  v = +-1      the diagonal of the Jacobian
      f' = e^{-lambda} ((l - 1) eps + eps') - l' x/alpha,   eps' = d eps/dx dx/d lambda + d eps/dt dt/d lambda
      s = cov(f, f')/var(f),  b = E f' - s E f  the best linear guess of f' by f

    for each place in a sample. l' is the difference of l over neighbouring log-SNRs, so l must be known first: the data
    are gone through twice.

    Args:
      eps(x [B, ...], t [B], *given) -> the noise prediction, with guidance, if there is some; differentiable.
      half: [K], rising (`log_snrs`).
      batches() -> tuples (x0 [B, ...], keys [B], *given), the same at every call.
      over: axes of a sample that share a number, 0 the first; all places on their own needs many samples (the authors:
        4096 of CIFAR-10, 1024 of larger ones).

    Returns:
      {"lambda": [K], "l", "s", "b": [K, *d]} in float64, d the shape of a sample with 1 for the axes in `over`.

    References: Zheng et al. 2023, arXiv:2310.13268, section 3.2 and algorithm 1.
    """
    times, drift, dt = _along(process, half)
    axes = (0, *(axis + 1 for axis in over))

    def mean(values: jax.Array) -> jax.Array:
        return values.mean(axes, keepdims=True)[0]

    def noised(x0: jax.Array, keys: jax.Array, index: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """x at a log-SNR, its direction v, and the time."""
        keys = noise.fold(keys, index)
        z, v = (noise.normal_like(noise.fold(keys, k), x0) for k in range(2))
        level = process.level(jnp.asarray(times)[index], jnp)
        t = jnp.full(len(x0), jnp.asarray(times)[index], x0.dtype)
        return (level.alpha * x0 + level.sigma * z).astype(x0.dtype), jnp.where(v > 0, 1, -1).astype(x0.dtype), t

    @jax.jit
    def diagonal(x0, keys, index, *given):
        x, v, t = noised(x0, keys, index)
        _, change = jax.jvp(lambda x: eps(x, t, *given), (x,), (v,))
        return mean(process.level(t[0], jnp).sigma * v * change)

    @jax.jit
    def moments(x0, keys, index, l, slope, *given):  # noqa: E741
        x, _, t = noised(x0, keys, index)
        level = process.level(t[0], jnp)
        ratio = level.sigma / level.alpha
        e = eps(x, t, *given)
        dx = jnp.asarray(drift, x.dtype)[index] * x - level.sigma * e
        e, change = jax.jvp(
            lambda x, t: eps(x, t, *given),
            (x, t),
            (dx.astype(x.dtype), jnp.full_like(t, jnp.asarray(dt, t.dtype)[index])),
        )
        f = ratio * e - l[None] * x / level.alpha
        df = ratio * ((l[None] - 1) * e + change) - slope[None] * x / level.alpha
        return jnp.stack([mean(f), mean(df), mean(f * f), mean(f * df)])

    l = _averaged(batches, lambda x0, keys, k, *given: diagonal(x0, keys, k, *given), len(half))  # noqa: E741
    slope = np.gradient(l, half, axis=0)

    def at(x0, keys, k, *given):
        return moments(x0, keys, k, jnp.asarray(l[k], x0.dtype), jnp.asarray(slope[k], x0.dtype), *given)

    found = _averaged(batches, at, len(half))
    f, df, square, product = np.moveaxis(found, 1, 0)
    variance = square - f**2
    # where f does not vary nothing can be said of what it does: s = 0 leaves it to b
    safe = variance > 1e-12 * np.maximum(square, 1e-30)
    s = np.where(safe, (product - f * df) / np.where(safe, variance, 1.0), 0.0)
    return {"lambda": np.asarray(half, np.float64), "l": l, "s": s, "b": df - s * f}


def fit_statistics(
    sampler: Any,
    samples: int,
    batch: int,
    progress: Callable[[str], None],
    *,
    pieces: int = 120,
    low: float | None = None,
    high: float | None = None,
    pooled: bool = True,
) -> dict[str, np.ndarray]:
    """The statistics of a run's network, on its own samples and with its guidance.

    Args:
      sampler: as in `difax.study.calibrate`, of the run. samples, batch: to measure on, and at a time.
      pieces: between the log-SNRs (120; 1200 in the paper).
      low, high: times of the last and the first log-SNR; None takes the process's t_min and t_max.
      pooled: one number for all places of a channel; False is one of each, as in the paper, which takes thousands of
        samples.

    Returns:
      As `statistics`.

    Raises:
      ValueError: guidance at some times only; pieces or times out of range.
    """
    run = sampler.run
    if not 2 <= pieces <= 10_000:
        raise ValueError(f"pieces={pieces}; allowed: 2 ... 10000")
    for key, time in (("low", low), ("high", high)):
        if time is not None and not run.process.t_min <= time <= run.process.t_max:
            raise ValueError(f"{key}={time}; allowed: {run.process.t_min:g} ... {run.process.t_max:g}")
    half = log_snrs(run.process, pieces, low, high)
    if len(half) < 2 or not half[0] < half[-1]:
        raise ValueError(f"low={low}, high={high}; allowed: low < high")
    rows = make_rows(run.solver, run.guide, run.process, run.times, None, run.model.stages)
    if rows.guided.any() != rows.guided.all():
        raise ValueError("dpm_solver_v3: guidance at some times only; allowed: guide cfg, none")
    draw = run._replace(accelerator=Accelerator()).sampler()
    made = []
    for start in range(0, max(batch, samples - samples % batch), batch):
        x, keys, cond = sampler.inputs(start, batch)
        x0, _ = draw(sampler.params, jnp.array(x), keys, cond, jax.tree.map(jnp.asarray, rows), sampler.scale())
        made.append((x0, noise.fold(keys, len(rows.i) + 2), cond, sampler.params, sampler.scale()))
        progress(f"{start + batch} samples")
    found = statistics(
        noise_of(run, rows), run.process, half, lambda: made, tuple(range(made[0][0].ndim - 2)) if pooled else ()
    )
    progress(f"l between {found['l'].min():.3f} and {found['l'].max():.3f}")
    return found


def noise_of(run: Any, rows: Row) -> Noise:
    """eps(x, t, cond, params, scale) of a setup's network, guided at every time as at the first of its rows."""
    first = jax.tree.map(lambda a: a[0], rows)

    def eps(x, t, cond, params, scale):
        level = jax.tree.map(lambda a: per_sample(a, x.ndim), run.process.level(t, jnp))
        row = first._replace(t=t, model_time=run.process.model_time(t), level=level)

        def denoise(x, cond, row, memory, half):
            time = jnp.tile(row.model_time, len(x) // len(t))
            output = forward(run.model, params, x, time, cond)
            return output.astype(jnp.promote_types(output.dtype, jnp.float32)), memory, ()

        null, state = run.model.null(cond), run.guide.init(x)
        output, *_ = run.guide.apply(denoise, x, cond, null, scale, row, state, ())
        return predict(output, run.prediction, run.model.learn_sigma, x, level).eps

    return eps


def save_statistics(path: str | os.PathLike, found: Mapping[str, np.ndarray], says: Mapping[str, Any] | None) -> None:
    """Writes what `dpm_solver_v3` reads, in float32 but for lambda, with what it says of itself (`measured.record`)."""
    arrays = {name: a if name == "lambda" else np.float32(a) for name, a in found.items()}
    save_arrays(path, arrays, comment=json.dumps(dict(says)) if says else "")


def _along(process: Process, half: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Times [K] of log-SNRs, d log(alpha)/d lambda and dt/d lambda there, float64."""
    times = np.clip(process.inverse(half), process.t_min, process.t_max)
    level = process.level(times)
    drift = level.alpha_dot / level.alpha
    drift = drift / (drift - level.sigma_dot / level.sigma)
    ends = np.clip(process.inverse(np.stack([half - SLOPE, half + SLOPE])), process.t_min, process.t_max)
    level = process.level(ends)
    change = np.diff(np.log(level.alpha) - np.log(level.sigma), axis=0)[0]
    return times, drift, np.diff(ends, axis=0)[0] / change


def _averaged(batches: Callable[[], Iterable[tuple[Any, ...]]], of: Callable[..., jax.Array], count: int) -> np.ndarray:
    """[count, ...], of(x0, keys, k, *given) averaged over all samples, in float64."""
    total, samples = 0.0, 0
    for x0, keys, *given in batches():
        x0 = jnp.asarray(x0)
        found = [np.asarray(of(x0, keys, jnp.int32(k), *given), np.float64) for k in range(count)]
        total, samples = total + len(x0) * np.stack(found), samples + len(x0)
    if not samples:
        raise ValueError("dpm_solver_v3: no samples to measure on; allowed: one or more")
    return np.asarray(total / samples)
