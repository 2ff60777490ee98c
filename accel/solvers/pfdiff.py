"""PFDiff. Wang, Cai, Li, Peng & Su, Combining Past and Future Scores, 2024, arXiv:2408.08822."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from difax.accel.solvers.bounds import bounded
from difax.accel.solvers.exponential import checked_choice, levels_at
from difax.accel.solvers.linear import Steps, linear
from difax.core.annotations import checked
from difax.core.contracts import Solver
from difax.core.process import Process

OUTPUTS = {"eps": {"eps": 1.0}, "x0": {"x0": 1.0}, "velocity": {"eps": 1.0, "x0": -1.0}}


@checked
def pfdiff(
    k: int = 1,
    l: int = 1,  # noqa: E741
    output: str = "eps",
    clip: float | None = None,
    thresholding: float | None = None,
    sample_max_value: float | None = None,
) -> Solver:
    """PFDiff-k_l on a first-order ODE solver: k + 1 steps of the grid with one evaluation.

    With phi(m, x_i, i -> j) a first-order step by the output m, and m_past the output of the evaluation before,

      x = phi(m_past, x_i, i -> i + l)  (the springboard),  m = network(x, t_{i+l}),
      x_{i+k+1} = phi(m, x_i, i -> i + k + 1).

    The past output leads to the springboard at no cost; its own, the future one, carries the whole step from x_i. The
    first step is a plain one to t_1, for its output. Where fewer than k + 1 steps are left, k and l are as large as
    these allow, and a single one left is a plain step, as in the authors' code (which takes l = 1 in that place for
    PFDiff-3_2). n steps of the grid are 1 + ceil((n - 1)/(k + 1)) evaluations.

    Where the springboard is half way, l = (k + 1)/2 as in 1_1 and 3_2, this is a midpoint rule and measures order 2;
    the others measure order 1.

    Args:
      k: steps that are left out, 1 ... 3 in the paper, here 1 ... 10.
      l: where the springboard is, 1 ... k.
      output: what is held: "eps" (DDIM, as in the paper), "x0" (the first order of DPM-Solver++), or "velocity",
        eps - x0 of the straight path (the authors' Euler for FLUX).
      clip, thresholding, sample_max_value: bounds of the data prediction, which eps follows (`bounds.bounded`).

    Returns:
      A `Solver` whose state is x_i.

    References: Wang et al. 2024, arXiv:2408.08822, algorithm 1; the authors' code.
    """
    checked_choice("pfdiff", "output", output, tuple(OUTPUTS))
    if not 1 <= k <= 10:
        raise ValueError(f"pfdiff: k={k}; allowed: 1 ... 10")
    if not 1 <= l <= k:
        raise ValueError(f"pfdiff: l={l}; allowed: 1 ... k={k}")
    held = OUTPUTS[output]

    def lay(steps: Steps, process: Process, times: np.ndarray) -> None:
        n = len(times) - 1
        at = levels_at(process, times)

        def phi(x: Mapping[str, float], i: int, j: int) -> dict[str, float]:
            """A first-order step of x, a mix, from t_i to t_j by this evaluation's output."""
            if output == "eps":
                keep, gain = at.alpha[j] / at.alpha[i], at.sigma[j] - at.alpha[j] * at.sigma[i] / at.alpha[i]
            elif output == "x0":
                keep, gain = at.sigma[j] / at.sigma[i], at.alpha[j] - at.sigma[j] * at.alpha[i] / at.sigma[i]
            else:
                scale = at.alpha + at.sigma
                keep, gain = scale[j] / scale[i], scale[j] * (at.sigma[j] / scale[j] - at.sigma[i] / scale[i])
            return added({key: keep * w for key, w in x.items()}, {key: gain * w for key, w in held.items()})

        i, spring, step = 0, 0, 0
        while i < n:
            if spring == 0:  # evaluated at x_i itself
                to = i + 1
                reached = {"x0": at.alpha[to], "eps": at.sigma[to]}
            else:
                to = i + min(k, n - i - 1) + 1
                reached = phi({"anchor": 1.0}, i, to)
            evaluated, i = times[i + spring], to
            spring = min(l, k, n - i - 1) if i < n else 0
            x = phi(reached, i, i + spring) if spring else reached
            steps.row(evaluated, step, x, anchor=reached)
            step += 1

    return linear(lay, slots=("anchor",), bound=bounded("pfdiff", clip, thresholding, sample_max_value))


def added(a: Mapping[str, float], b: Mapping[str, float]) -> dict[str, float]:
    """The sum of two mixes."""
    return {key: a.get(key, 0.0) + b.get(key, 0.0) for key in {**a, **b}}
