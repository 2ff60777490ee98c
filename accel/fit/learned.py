"""Learned solvers: BNS, DDSS, LTSL and the ratios of DC-Solver, by descent through the sampler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from difax.accel.fit.descent import (
    FINE,
    Batch,
    Found,
    Progress,
    batches,
    descend,
    gaps_of,
    log_error,
    program,
    rows_of,
    shares,
    times_of,
)
from difax.accel.solvers.bns import bns
from difax.accel.solvers.dc_solver import dc_solver, table_of_ratios
from difax.accel.solvers.ddss import ddim_mix, mixed_slots, mixed_table
from difax.accel.solvers.learned import full_table, slots_of, table_of, unrolled
from difax.accel.solvers.linear import LinearTable, linear, tabulated
from difax.accel.solvers.ltsl import scaled_table
from difax.core.annotations import choose
from difax.core.contracts import Level, Row, Solver
from difax.core.grids import lay_rows


class Learnable(NamedTuple):
    """A table with its numbers as arguments.

    times: [n] of the start. solver: whose `grid` lays the start's rows. weights(theta, t, level) -> W of jax arrays,
    for theta = {"gaps": of `times_of`, ...}, times [n] and the levels there.
    """

    times: np.ndarray
    theta: dict[str, np.ndarray]
    solver: Solver
    weights: Callable[[Any, Any, Level], Any]

    def parts(self, sampler: Any) -> tuple[Solver, dict[str, np.ndarray], Callable[[Any], Row]]:
        """What `learn` learns: the solver, the numbers of the start, theta -> rows."""
        return self.solver, self.theta, self.rows(sampler)

    def rows(self, sampler: Any) -> Callable[[Any], Row]:
        """theta -> the rows of a run."""
        process = sampler.run.process
        rows = rows_of(sampler, self.solver, np.append(self.times, 0.0))

        def at(theta: Any) -> Row:
            t = times_of(theta["gaps"], float(self.times[0]))
            level = process.level(t, jnp)
            coefficients = rows.coefficients.replace(weights=self.weights(theta, t, level))
            return rows._replace(t=t, model_time=process.model_time(t), level=level, coefficients=coefficients)

        return at


def _learnable(times, theta, slots, noises, used: LinearTable, weights) -> Learnable:
    def grid(process, given):
        return lay_rows(process, times, np.arange(len(times)), used)

    solver = linear(lambda *_: None, slots, noises)._replace(grid=grid)
    return Learnable(times, {"gaps": gaps_of(times), **theta}, solver, weights)


def bns_table(rows: Row) -> Learnable:
    """Of the rows of a deterministic linear solver, whose times decrease."""
    (a, b), n = unrolled(rows), len(rows.t)
    weights = lambda theta, t, level: table_of(theta["a"], theta["b"], level, jnp)  # noqa: E731
    return _learnable(np.asarray(rows.t), {"a": a, "b": b}, slots_of(n), 0, full_table(n), weights)


def ddss_table(process: Any, times: np.ndarray, eta: float) -> Learnable:
    """Of DDIM's steps between times [n + 1]."""
    last, data, noise = ddim_mix(process, times, eta)
    n = len(last)
    used = tabulated(mixed_table(np.ones((n, n)), np.ones((n, n)), np.ones(n)) * 0.5)
    weights = lambda theta, t, level: mixed_table(theta["mu"], theta["nu"], theta["noise"], jnp)  # noqa: E731
    theta = {"mu": np.diag(last), "nu": np.diag(data), "noise": noise}
    return _learnable(times[:-1], theta, mixed_slots(n), 1, used, weights)


def ltsl_table(process: Any, times: np.ndarray) -> Learnable:
    """Of DDIM's steps between times [n + 1]."""
    n, clean = len(times) - 1, process.level(np.zeros(1))

    def weights(theta, t, level):
        # the levels at the ends of the steps: those of the next evaluations, and of t = 0, where sigma has no slope
        ends = jax.tree.map(lambda a, end: jnp.concatenate([a[1:], jnp.asarray(end, a.dtype)]), level, clean)
        return scaled_table(theta["data"], theta["noise"], ends, jnp)

    half = Level(*(np.full(n, 0.5),) * 4)
    used = tabulated(scaled_table(np.ones(n), np.ones(n), half))
    return _learnable(times[:-1], {"data": np.ones(n), "noise": np.ones(n)}, (), 0, used, weights)


def learn(
    sampler: Any,
    solver: Solver,
    theta: dict[str, Any],
    at: Callable[[Any], Row],
    loss: Callable[[jax.Array, Batch], jax.Array],
    samples: int,
    batch: int,
    progress: Progress,
    *,
    steps: int,
    iterations: int,
    rate: float,
    outer: Callable[[jax.Array, Batch], jax.Array] | None = None,
    optimiser: Callable[[Any], optax.GradientTransformation] = optax.adam,
) -> Found:
    """Learns a table's numbers by descent.

    Args:
      solver: the program's. theta: the numbers of the start. at(theta) -> the rows of a run, traced.
      loss(samples, batch) -> scalar, which every number descends on; with `outer`, all but the times.
      samples: three quarters are learned from, the others held out (`shares`). steps: of the fine samples, at least.
      outer(samples, batch) -> scalar, on which the times descend, the other numbers being held; it is then what is
        measured on the held-out samples.
    """
    _check(steps=steps, iterations=iterations, rate=rate)
    run, scale = program(sampler, solver, remat=True), sampler.scale()

    def drawn(theta: Any, params: Any, batch: Batch) -> jax.Array:
        return run(params, batch.x, batch.keys, batch.cond, at(theta), scale)[0]

    def inner_loss(theta: Any, params: Any, batch: Batch) -> jax.Array:
        return loss(drawn(theta, params, batch), batch)

    def both(theta: Any, params: Any, batch: Batch) -> jax.Array:
        still = jax.lax.stop_gradient
        assert outer is not None
        times = {**still(theta), "gaps": theta["gaps"]}
        others = {**theta, "gaps": still(theta["gaps"])}
        return outer(drawn(times, params, batch), batch) + inner_loss(others, params, batch)

    def judged(theta: Any, params: Any, batch: Batch) -> jax.Array:
        assert outer is not None
        return outer(drawn(theta, params, batch), batch)

    most, held = shares(samples, batch)
    train = batches(sampler, most, batch, 0, steps, progress)
    test = batches(sampler, held, batch, most, steps, progress)
    return descend(
        inner_loss if outer is None else both,
        theta,
        sampler.params,
        train,
        test,
        rate=rate,
        iterations=iterations,
        progress=progress,
        judged=None if outer is None else judged,
        optimiser=optimiser,
    )


def contents(name: str, table: Learnable, found: Found, **more: Any) -> dict[str, Any]:
    """What the file of a learned solver holds."""
    numbers = {key: value.tolist() for key, value in found.theta.items() if key != "gaps"}
    times = np.asarray(times_of(found.theta["gaps"], float(table.times[0])), np.float64)
    return {
        "solver": name,
        "steps": len(times),
        "times": times.tolist(),
        **numbers,
        **told(found),
        **more,
    }


def told(found: Found) -> dict[str, Any]:
    """What a file says of a descent: the loss on the held-out samples."""
    return {"before": found.before, "after": found.after, "history": found.history}


def fit_bns(
    sampler: Any,
    samples: int,
    batch: int,
    progress: Progress,
    *,
    start: str = "ab2",
    steps: int = FINE,
    iterations: int = 200,
    rate: float = 1e-2,
) -> dict[str, Any]:
    """Bespoke non-stationary solvers: the mean logarithm of the squared distance to the fine samples (PSNR).

    Args:
      start: of `difax.accel.solvers.bns`, or "run", the run's own solver, if it is linear and deterministic.
      steps: of the fine samples, at least. iterations, rate: of Adam.
    """
    choose("start of bns", start, ("euler", "midpoint", "ab2", "run"))
    solver = sampler.run.solver if start == "run" else bns(start=start)
    rows = solver.grid(sampler.run.process, np.asarray(sampler.run.times, np.float64))
    if not np.all(np.diff(rows.t) < 0):
        raise ValueError(f"--solver bns: start={start} evaluates twice at one time; allowed: euler, midpoint, ab2")
    table = bns_table(rows)
    loss = lambda got, batch: log_error(got, batch.wanted)  # noqa: E731
    options: dict[str, Any] = dict(steps=steps, iterations=iterations, rate=rate)
    found = learn(sampler, *table.parts(sampler), loss, samples, batch, progress, **options)
    return contents("bns", table, found, start=start)


def kernel_loss(
    features: Callable[[jax.Array], jax.Array],
) -> Callable[[jax.Array, Batch], jax.Array]:
    """loss(samples, batch) -> the unbiased squared discrepancy between features of samples and of the fine ones.

    The cubic kernel of `difax.study.metrics.kernel_distance`, over one batch. Half of the fine samples have the noise
    of none of the samples that they are compared with: samples of the first half of the batch are held against fine
    ones of the second, and the other way round.
    """

    def kernel(x, y):
        return (x @ y.T / x.shape[1] + 1) ** 3

    def within(x):
        k = kernel(x, x)
        return (k.sum() - jnp.trace(k)) / (len(x) * (len(x) - 1))

    def loss(got: jax.Array, batch: Batch) -> jax.Array:
        half = len(got) // 2
        ours, fine = features(got), features(batch.wanted)
        mean, std = fine.mean(0, keepdims=True), fine.std(0, keepdims=True) + 0.1 * fine.std() + 1e-6
        ours, fine = (ours - mean) / std, (fine - mean) / std
        pairs = ((ours[:half], fine[half:]), (ours[half:], fine[:half]))
        return jnp.mean(jnp.stack([within(a) + within(b) - 2 * kernel(a, b).mean() for a, b in pairs]))

    return loss


def fit_ddss(
    sampler: Any,
    samples: int,
    batch: int,
    progress: Progress,
    *,
    eta: float = 0.0,
    steps: int = FINE,
    iterations: int = 200,
    rate: float = 5e-4,
) -> dict[str, Any]:
    """Differentiable diffusion sampler search: the kernel distance of features to those of the fine samples.

    Args:
      eta: of the DDIM that it begins with. steps: of the fine samples, at least. iterations, rate: of Adam (5e-4 in the
        paper). The batch is what the distance is taken over.
    """
    check_batch(sampler, batch)
    if not 0 <= eta <= 1:
        raise ValueError(f"--solver ddss: eta={eta}; allowed: 0 ... 1")
    loss = kernel_loss(sampler.features())
    table = ddss_table(sampler.run.process, np.asarray(sampler.run.times, np.float64), eta)
    options: dict[str, Any] = dict(steps=steps, iterations=iterations, rate=rate)
    found = learn(sampler, *table.parts(sampler), loss, samples, batch, progress, **options)
    return contents("ddss", table, found, eta=eta)


def fit_ltsl(
    sampler: Any,
    samples: int,
    batch: int,
    progress: Progress,
    *,
    steps: int = FINE,
    iterations: int = 200,
    rate: float = 1e-2,
) -> dict[str, Any]:
    """Learned schedules: the times by the kernel distance of features, the scales by the distance to fine samples.

    Args:
      steps: of the fine samples, at least. iterations, rate: of Adam. The batch is what the distance is taken over.
    """
    check_batch(sampler, batch)
    outer = kernel_loss(sampler.features())
    table = ltsl_table(sampler.run.process, np.asarray(sampler.run.times, np.float64))
    inner = lambda got, batch: log_error(got, batch.wanted)  # noqa: E731
    options: dict[str, Any] = dict(steps=steps, iterations=iterations, rate=rate, outer=outer)
    found = learn(sampler, *table.parts(sampler), inner, samples, batch, progress, **options)
    return contents("ltsl", table, found)


def fit_dc(
    sampler: Any,
    samples: int,
    batch: int,
    progress: Progress,
    *,
    steps: int = FINE,
    iterations: int = 40,
    rate: float = 0.1,
) -> dict[str, Any]:
    """DC-Solver's ratios, one a step, by AdamW on the squared distance to the fine samples.

    Args:
      steps: of the fine samples, at least (the authors take DDIM of 999). iterations, rate: of AdamW (40 and 0.1 in the
        paper).
    """
    process, times = sampler.run.process, np.asarray(sampler.run.times, np.float64)
    n = len(times) - 1
    if n < 3:
        raise ValueError(f"--solver dc_solver: {n} steps, and the ratios of the first two are 1; allowed: 3 or more")
    rows = rows_of(sampler, dc_solver(), times)
    of = table_of_ratios(process, times)

    def at(theta: Any) -> Row:
        return rows._replace(coefficients=of(theta["ratios"]).coefficients)

    loss = lambda got, batch: jnp.mean((got - batch.wanted) ** 2)  # noqa: E731
    options: dict[str, Any] = dict(steps=steps, iterations=iterations, rate=rate, optimiser=optax.adamw)
    found = learn(sampler, dc_solver(), {"ratios": np.ones(n)}, at, loss, samples, batch, progress, **options)
    ratios = np.where(np.arange(n) < 2, 1.0, found.theta["ratios"])
    return {"solver": "dc_solver", "ratios": ratios.tolist(), **told(found)}


def _check(**values: float) -> None:
    for key, value in values.items():
        if key == "rate" and not 0 < value <= 10:
            raise ValueError(f"rate={value}; allowed: above 0, at most 10")
        if key != "rate" and not 1 <= value <= 1_000_000:
            raise ValueError(f"{key}={value}; allowed: 1 ... 1000000")


def check_batch(sampler: Any, batch: int) -> None:
    """Each half of a batch has every condition equally often, or it would be another distribution that is compared."""
    least = 2 * max(2, len(jax.tree.leaves(sampler.cond)[0]))
    if batch % least:
        raise ValueError(
            f"--batch={batch}; allowed: multiples of {least}, each half with every condition equally often"
        )
