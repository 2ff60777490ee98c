"""UniPC. Zhao, Bai, Rao, Zhou & Lu, UniPC: A Unified Predictor-Corrector Framework, 2023, arXiv:2302.04867."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from difax.accel.solvers.adams import (
    OUTPUTS,
    Ladder,
    Update,
    exponential,
    ladder,
    lay_adams,
    order_at,
    slots_of,
)
from difax.accel.solvers.bounds import bounded
from difax.accel.solvers.linear import Steps, linear
from difax.core.annotations import checked
from difax.core.contracts import Solver
from difax.core.process import Process


@checked
def unipc(
    order: int = 2,
    variant: Literal["bh1", "bh2"] = "bh2",
    prediction: Literal["data", "noise"] = "data",
    corrector: bool = True,
    corrector_off: Sequence[int] = (),
    lower_order_final: bool = True,
    thresholding: float | None = None,
    sample_max_value: float | None = None,
) -> Solver:
    """UniPC-p: the predictor UniP of order p and the corrector UniC, which lifts it to p + 1 at no evaluation more.

    With hh = -h (data) or h (noise), c = alpha_s or sigma_s, ratio = sigma_s/sigma_t or alpha_s/alpha_t, and
    D_k = (m_{j-k} - m_j)/r_k, r_k = (lambda_{j-k} - lambda_j)/h, and D_c = m_{j+1} - m_j,

      x_s = ratio x - c (e^hh - 1) m_j - c B(hh) (sum_{k<p} rho_k D_k + rho_c D_c),     rho_c = 0 in the predictor,

    where rho makes the sum exact for polynomials, so that it does not depend on B: the outputs are weighed by
    `exponential_lagrange`. B = hh (bh1) or e^hh - 1 (bh2) matters where rho is set to 1/2 instead, in the predictor of
    order 2 and the corrector of order 1, as in the paper and both implementations. The last step is not corrected.
    Order p at step j needs p outputs, so the first steps are of order 1, 2, ...; a step to sigma = 0 is of order 1.
    The corrector is left out of a step out of alpha = 0 in bh1 and for the noise prediction, where B is infinite.

    Args:
      order: p, 1 ... 3 (2 with guidance, 3 without).
      variant: "bh1" or "bh2" (bh2, the better one with guidance and few steps).
      prediction: what is interpolated, "data" or "noise" (data).
      corrector: False is UniP-p.
      corrector_off: indices of steps whose end is not corrected (diffusers' `disable_corrector`).
      lower_order_final: the last steps are of order ..., 2, 1 (true).
      thresholding, sample_max_value: dynamic thresholding of the data prediction (`bounds.bounded`).

    Returns:
      A `Solver` whose state is the past outputs and the corrected start of the step.

    References: Zhao et al. 2023, arXiv:2302.04867, algorithms 1 to 4 and appendix F. The authors' `vary_coeff`
      variant, whose corrector weighs D_c by an index left from another loop, is not here.
    """
    check_unipc("unipc", order, corrector_off)

    def lay(steps: Steps, process: Process, times: np.ndarray) -> None:
        lay_unipc(steps, process, times, order, variant, prediction, corrector, corrector_off, lower_order_final)

    bound = bounded("unipc", None, thresholding, sample_max_value)
    return linear(lay, slots_of(order - 1 + corrector, corrector), bound=bound)


def lay_unipc(
    steps: Steps,
    process: Process,
    times: np.ndarray,
    order: int,
    variant: str,
    prediction: str,
    corrector: bool,
    corrector_off: Sequence[int],
    lower_order_final: bool,
    blend: Callable[[int], np.ndarray | None] | None = None,
) -> None:
    """Lays UniPC's rows; the arguments are those of `unipc`, `blend` of `lay_adams`."""
    levels, n = ladder(process, times), len(times) - 1
    order_of = [order_at(order, j, n, levels, lower_order_final) for j in range(n)]

    def predict(j: int) -> Update:
        return unipc_step(levels, j, np.arange(j, j - order_of[j], -1), variant, prediction)

    def correct(j: int) -> Update | None:
        unbounded = not np.isfinite(levels.half[j - 1]) and (variant == "bh1" or prediction == "noise")
        if j - 1 in corrector_off or unbounded:
            return None
        return unipc_step(levels, j - 1, np.arange(j, j - 1 - order_of[j - 1], -1), variant, prediction)

    lay_adams(steps, times, levels, OUTPUTS[prediction], predict, correct if corrector else None, blend)


def unipc_step(levels: Ladder, j: int, nodes: np.ndarray, variant: str, prediction: str) -> Update:
    """From times[j] to times[j + 1] by the outputs at `nodes`, newest first; two of them have rho = 1/2."""
    if len(nodes) != 2:
        return exponential(levels, j, nodes, prediction)
    first = exponential(levels, j, np.array([j]), prediction)
    h = levels.half[j + 1] - levels.half[j]
    hh, scale = (-h, levels.level.alpha) if prediction == "data" else (h, levels.level.sigma)
    b = hh if variant == "bh1" else np.expm1(hh)
    other = nodes[nodes != j][0]
    r = (levels.half[other] - levels.half[j]) / h if other < j else 1.0
    change = -scale[j + 1] * b / (2 * r)  # of m_other - m_j
    return Update(first.x, np.where(nodes == j, first.outputs[0] - change, change))


def check_unipc(solver: str, order: int, corrector_off: Sequence[int]) -> None:
    """Refuses settings that UniPC does not have."""
    if not 1 <= order <= 3:
        raise ValueError(f"{solver}: order={order}; allowed: 1, 2, 3")
    if any(step < 0 for step in corrector_off):
        raise ValueError(f"{solver}: corrector_off={list(corrector_off)}; allowed: indices of steps, 0 or more")
