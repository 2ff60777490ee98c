"""The corrections of IIA: least squares, step by step, against the base on finer times (arXiv:2304.11328)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from difax.accel.fit.descent import FINE, Batch, Progress, batches, log_error, program, rows_of, shares
from difax.accel.solvers.iia import BASES, improved, slots_of
from difax.accel.solvers.linear import LinearTable, Steps, linear, tabulated
from difax.core.annotations import choose
from difax.core.grids import lay_rows
from difax.core.process import Process

Rows = tuple[np.ndarray, np.ndarray]  # times [E] and weights [E, outputs, inputs]


def fit_iia(
    sampler: Any,
    samples: int,
    batch: int,
    progress: Progress,
    *,
    base: str = "ddim",
    order: int = 2,
    parts: int = 10,
    steps: int = FINE,
) -> dict[str, Any]:
    """The coefficients of the last differences, by least squares at every step.

    At step i, from the x that the steps before it made with what was found for them: the base makes x_s, and the base
    on `parts` even parts of the step makes what x_s should have been; gamma_i is what the differences are multiplied by
    for the least squared distance, over all samples that are learned from.

    The file says by how much (root mean square, held-out samples) each step misses, "steps before" and "steps after",
    and what becomes of the whole run, "before" and "after" (mean logarithm of the squared distance to fine samples):
    a step that is nearer to its own finer one need not bring the end nearer.

    Args:
      base: "ddim", "dpmpp_2m" or "edm". order: how many differences a step has, 1 to 8. parts: 2 to 100. steps: of the
        fine samples, at least, on which the held-out error is measured.
    """
    choose("base of iia", base, BASES)
    for key, value, most in (("order", order, 8), ("parts", parts, 100), ("steps", steps, 1_000_000)):
        if not (1 if key != "parts" else 2) <= value <= most:
            raise ValueError(f"{key}={value}; allowed: {1 if key != 'parts' else 2} ... {most}")
    process, times = sampler.run.process, np.asarray(sampler.run.times, np.float64)
    fitting = _Fitting(sampler, base, order, parts, times)
    most, held = shares(samples, batch)
    train, rest = batches(sampler, most, batch, 0, 1, progress), []
    test = batches(sampler, held, batch, most, steps, progress)
    gamma = np.zeros((len(_laid(base, np.zeros((0, 0)), order, process, times)[0]), order))
    for step, k in enumerate(fitting.ends):
        if k:
            products, moments = np.zeros((order, order)), np.zeros(order)
            for one in train:
                differences, missing = fitting.at(one, gamma, step, k)
                products += differences @ differences.T
                moments += differences @ missing
            known = min(order, k)
            ridge = 1e-9 * np.trace(products[:known, :known]) * np.eye(known)
            gamma[k, :known] = np.linalg.solve(products[:known, :known] + ridge, moments[:known])
        misses = np.zeros(2)
        for one in test:
            differences, missing = fitting.at(one, gamma, step, k)
            misses += np.mean(missing**2), np.mean((missing - gamma[k] @ differences) ** 2)
        rest.append(np.sqrt(misses / len(test)))
        told = f"misses {rest[-1][0]:.4g} without and {rest[-1][1]:.4g} with it"
        progress(f"step {step + 1} of {len(times) - 1}: gamma {np.array2string(gamma[k], precision=4)}, {told}")
    before, after = (_error(sampler, base, g, order, times, test) for g in (0 * gamma, gamma))
    found = {"base": base, "times": times[:-1].tolist(), "gamma": gamma.tolist(), "before": before, "after": after}
    steps_before, steps_after = np.transpose(rest).tolist()
    missed = {"steps before": steps_before, "steps after": steps_after}
    return {"solver": "iia", "steps": len(gamma), **found, **missed}


def _laid(base: str, gamma: np.ndarray, order: int, process: Process, times: np.ndarray) -> Rows:
    steps = Steps(slots_of(order))
    improved(base, gamma)(steps, process, times)
    return np.asarray(steps.t), np.stack(steps.weights)


def _error(sampler: Any, base: str, gamma: np.ndarray, order: int, times: np.ndarray, test: list[Batch]) -> float:
    """The mean logarithm of the squared distance of samples to the fine ones."""
    solver = linear(improved(base, gamma), slots_of(order))
    run, rows = program(sampler, solver), rows_of(sampler, solver, times)
    scale, params = sampler.scale(), sampler.params
    drawn = lambda b: run(params, jnp.array(b.x), b.keys, b.cond, rows, scale)[0]  # noqa: E731
    return float(np.mean([log_error(drawn(b), b.wanted) for b in test]))


class _Fitting:
    """Reads linear combinations out of the sampler: a run whose last row makes one in place of the next x.

    Rows that a run does not need leave x as it is, so that two programs serve all steps: short ones, and long ones with
    the finer times.
    """

    def __init__(self, sampler: Any, base: str, order: int, parts: int, times: np.ndarray):
        self.sampler, self.base, self.order, self.parts, self.times = sampler, base, order, parts, times
        self.process = sampler.run.process
        _, weights = _laid(base, np.zeros((0, 0)), order, self.process, times)
        step = rows_of(sampler, linear(improved(base, np.zeros((0, 0))), slots_of(order)), times).step
        self.ends = [int(np.flatnonzero(step == s)[-1]) for s in range(len(times) - 1)]
        self.begins = [int(np.flatnonzero(step == s)[0]) for s in range(len(times) - 1)]
        self.short = len(weights)
        self.long = len(weights) + parts * (2 if base == "edm" else 1)
        self.programs: dict[int, Callable[..., Any]] = {}

    def at(self, batch: Batch, gamma: np.ndarray, step: int, k: int) -> tuple[np.ndarray, np.ndarray]:
        """At evaluation k, which ends a step: the differences [order, N], and by how much the base misses [N]."""
        t, w = _laid(self.base, gamma, self.order, self.process, self.times)
        _, plain = _laid(self.base, np.zeros((0, 0)), self.order, self.process, self.times)
        outputs = [self.run(batch, t[: k + 1], np.concatenate([w[:k], plain[k : k + 1]]), self.short)]
        output, inputs = BASES[self.base][0], Steps(slots_of(self.order)).inputs
        for j in range(min(self.order, k)):
            reads = w[k : k + 1].copy()
            reads[0, 0] = 0.0
            reads[0, 0, inputs.index(output if j == 0 else f"g{j}")] = 1.0
            reads[0, 0, inputs.index(f"g{j + 1}")] = -1.0
            outputs.append(self.run(batch, t[: k + 1], np.concatenate([w[:k], reads]), self.short))
        part = np.linspace(self.times[step], self.times[step + 1], self.parts + 1)
        fine_t, fine_w = _laid(self.base, np.zeros((0, 0)), self.order, self.process, part)
        first = self.begins[step]
        wanted = self.run(batch, np.r_[t[:first], fine_t], np.concatenate([w[:first], fine_w]), self.long)
        differences = np.zeros((self.order, wanted.size))
        for j, found in enumerate(outputs[1:]):
            differences[j] = found.ravel()
        return differences, (wanted - outputs[0]).ravel()

    def run(self, batch: Batch, t: np.ndarray, w: np.ndarray, length: int) -> np.ndarray:
        """What a run of these rows gives, in float64."""
        more = length - len(t)
        stay = np.zeros((more, *w.shape[1:]))
        stay[:, 0, 0] = 1.0
        t, w = np.r_[t, np.full(more, t[-1])], np.concatenate([w, stay])
        every = tabulated(np.full_like(w, 0.5)).used
        solver = linear(lambda *_: None, slots_of(self.order))
        solver = solver._replace(
            grid=lambda process, times: lay_rows(process, t, np.arange(len(t)), LinearTable(w, every))
        )
        if length not in self.programs:
            self.programs[length] = program(self.sampler, solver)
        rows, scale = rows_of(self.sampler, solver, self.times), self.sampler.scale()
        x = jnp.array(batch.x)
        found, _ = self.programs[length](self.sampler.params, x, batch.keys, batch.cond, rows, scale)
        return np.asarray(jax.device_get(found), np.float64)
