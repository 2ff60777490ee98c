"""Samplers of critically damped Langevin diffusion. Dockhorn, Vahdat & Kreis, 2021, arXiv:2112.07068."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from difax.accel.solvers.linear import Steps, linear
from difax.core.contracts import Solver
from difax.core.langevin import Augmented
from difax.core.process import Process

V = np.diag([0.0, 1.0])  # the velocity's part


def sscs() -> Solver:
    """Symmetric splitting (SSCS) of the reverse diffusion of position and velocity; one evaluation a step.

    With b = B_t - B_s, s_v the score of the velocity, and A(b) the part whose solution is known, an Ornstein-Uhlenbeck
    process that keeps N(0, 1) and N(0, M): a half step of A, a whole one of the rest, a half of A,

      A(b): u <- exp(F' b) u + noise,    S(b): v <- v + 2 Gamma b (s_v + v/M).

    The network is evaluated between the halves, and is told the time at which the step began, as in the authors' code.
    Both halves between two evaluations are drawn as one, which is the same law, and the first, which keeps the prior as
    it is, is left out. A last step that ends at t = 0 goes to the data prediction; the authors' "denoising" there, an
    Euler step over t = 1e-3, is that to first order. Their steps even in sqrt(t) are the grid `quadratic`.

    Raises:
      ValueError: from `grid`, a process without velocities.

    References: Dockhorn et al. 2021, arXiv:2112.07068, algorithm 1 and appendix D.
    """

    def lay(steps: Steps, process: Process, times: np.ndarray) -> None:
        p = _augmented("sscs", process)
        n, clock, middle = len(times) - 1, p.clock(times), p.clock((times[:-1] + times[1:]) / 2)
        ends = times[-1] == 0
        sigma_v = p.root(times[:-1])[:, 1, 1]
        for j in range(n - ends):
            b = clock[j] - clock[j + 1]
            after = middle[j + 1] if j + 1 < n - ends else clock[j + 1]  # where the next one is evaluated
            motion = _backward(p.transition(middle[j] - after))
            step = np.eye(2) + 2 * p.friction * b / p.mass * V
            noise = np.linalg.cholesky(_backward(p.spread(middle[j] - after)))
            x = {"x": motion @ step, "eps": -2 * p.friction * b / sigma_v[j] * motion @ V, "z1": noise}
            steps.row(times[j], j, x)
        if ends:
            steps.row(times[n - 1], n - 1, {"x0": 1.0})

    return _ours(lay)


def cld_em() -> Solver:
    """Euler-Maruyama on the reverse diffusion of position and velocity, one evaluation a step.

    With b = B_t - B_s and s_v the score of the velocity,

      x <- x - v b/M,   v <- v + (x + Gamma v/M + 2 Gamma s_v) b + sqrt(2 Gamma b) z.

    A last step that ends at t = 0 goes to the data prediction, as `sscs`.

    Raises:
      ValueError: from `grid`, a process without velocities.

    References: Dockhorn et al. 2021, arXiv:2112.07068, section 3.3.
    """

    def lay(steps: Steps, process: Process, times: np.ndarray) -> None:
        p = _augmented("cld_em", process)
        n, clock = len(times) - 1, p.clock(times)
        drift = np.array([[0.0, 1 / p.mass], [-1.0, -p.friction / p.mass]])
        sigma_v = p.root(times[:-1])[:, 1, 1]
        for j in range(n):
            b = clock[j] - clock[j + 1]
            x = {
                "x": np.eye(2) - b * drift,
                "eps": -2 * p.friction * b / sigma_v[j] * V,
                "z1": np.sqrt(2 * p.friction * b) * V,
            }
            steps.row(times[j], j, {"x0": 1.0} if times[j + 1] == 0 else x)

    return _ours(lay)


def _ours(lay: Callable[..., None]) -> Solver:
    return linear(lay, noises=1, augmented=True)


def _augmented(name: str, process: Process) -> Augmented:
    if process.augmented is None:
        raise ValueError(f"{name}: process {process.name} has no velocities; allowed: cld")
    return process.augmented


def _backward(matrix: np.ndarray) -> np.ndarray:
    """Of the process with its velocities reversed, which runs the other way in time."""
    return matrix * np.array([[1.0, -1.0], [-1.0, 1.0]])
