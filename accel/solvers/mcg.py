"""Manifold-constrained gradients. Chung, Sim, Ryu & Ye, Improving Diffusion Models for Inverse Problems, 2022."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from difax.accel.solvers.nested import inner
from difax.core import noise
from difax.core.annotations import brief, checked
from difax.core.contracts import Array, Row, Solver
from difax.core.drive import per_sample
from difax.core.process import Process

OWN = 1000  # folded into the keys of an evaluation: noise that no solver inside draws


class MCGTable(NamedTuple):
    """The solver's table, and the level of the x that its step makes."""

    solver: Any
    alpha: Array
    sigma: Array


@checked
def mcg(
    measurement: float | np.ndarray | jax.Array,
    mask: float | np.ndarray | jax.Array = 1.0,
    operator: Callable[..., Any] | None = None,
    pseudo_inverse: Callable[..., Any] | None = None,
    weight: float = 0.1,
    solver: str | Solver = "euler_ancestral",
) -> Solver:
    """Samples that agree with a linear measurement y = A x0, by any solver and the gradient through the network.

    Behind each evaluation the solver's x' is made

      x <- x'' + A^+ (alpha_s y + sigma_s z - A x''), x'' = x' - weight d/dx |A^+ (y - A x0(x))|,

    of which the first keeps to the data's manifold what the second, a projection, enforces: at the end A x = y. x0(x)
    is the prediction at the x before the step; alpha_s, sigma_s the level behind it, z fresh noise. The gradient of the
    norm is that of |...|^2 with the weight 0.1/|...| of the paper, but for a factor of 2.

    Args:
      measurement: y, of the shape of what A gives for a batch, or broadcast to it.
      mask: for inpainting: 1 where x is known, 0 elsewhere, in the shape of a sample; A = A^+ = mask.
      operator: A in place of a mask: batch -> measurements, linear, each sample by itself.
      pseudo_inverse: A^+: measurements -> batch; None: the transpose of `operator`, which it is where A A^T = 1.
      weight: of the gradient, 0 (the projection alone) ... 1000 (0.1 in the paper for inpainting).
      solver: a name, with its own defaults, or a ready solver (ancestral in the paper).

    Returns:
      A `Solver` that asks for derivatives; its state is the inner one's.

    References: Chung et al. 2022, arXiv:2206.00941, equations 14 to 16; https://github.com/HJ-harry/MCG_diffusion.
      Norms are of each sample, the authors' code takes that of the batch; its colourisation compares x0 with the
      noisy measurement, here as in the paper it is the clean one.
    """
    if not 0 <= weight <= 1000:
        raise ValueError(f"mcg: weight={weight}; allowed: 0 ... 1000")
    if operator is None and pseudo_inverse is not None:
        raise ValueError("mcg: pseudo_inverse without operator; allowed: both, or a mask")
    known = np.asarray(mask)
    if not np.all((known == 0) | (known == 1)):
        raise ValueError(f"mcg: mask={brief(mask)}; allowed: 0 and 1")
    if operator is not None and not np.all(known == 1):
        raise ValueError("mcg: operator and mask both say what is measured; allowed: one of them")
    within = inner("mcg: solver", solver)

    def grid(process: Process, times: np.ndarray) -> Row:
        rows = within.grid(process, times)
        end = process.level(times[-1:])
        after = [np.append(here[1:], last) for here, last in zip(rows.level[:2], end[:2], strict=True)]
        return rows._replace(coefficients=MCGTable(rows.coefficients, *after))

    def maps(x: jax.Array) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """A and A^+ for a batch like x."""
        if operator is None:
            on = jnp.broadcast_to(jnp.asarray(known, x.dtype), x.shape)
            return (lambda a: on * a), (lambda b: on * b)
        if pseudo_inverse is not None:
            return operator, pseudo_inverse
        transpose = jax.linear_transpose(operator, x)
        return operator, lambda b: transpose(b)[0]

    def step(prediction, x, state, row, keys):
        c = row.coefficients
        measure, back = maps(x)
        moved, state = within.step(prediction, x, state, row._replace(coefficients=c.solver), keys)
        measured = jax.eval_shape(measure, x)
        y = jnp.broadcast_to(jnp.asarray(measurement, measured.dtype), measured.shape)
        residual, pull = jax.vjp(lambda x0: back(y - measure(x0)), prediction.x0)
        size = jnp.sqrt(jnp.sum(residual**2, axis=tuple(range(1, residual.ndim))))
        unit = residual / per_sample(jnp.maximum(size, jnp.finfo(x.dtype).tiny), residual.ndim)
        assert prediction.vjp is not None
        gradient = prediction.vjp(pull(unit)[0], jnp.zeros_like(x))
        z = noise.normal(noise.fold(keys, OWN), measured.shape[1:], measured.dtype)
        moved = moved - weight * gradient
        return moved + back(c.alpha * y + c.sigma * z - measure(moved)), state

    begin = within.start

    def start(x, row, keys):
        assert begin is not None
        return begin(x, row._replace(coefficients=row.coefficients.solver), keys)

    return within._replace(grid=grid, step=step, start=begin and start, derivatives=True)
