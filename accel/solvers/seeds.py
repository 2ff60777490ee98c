"""SEEDS. Gonzalez, Fernandez, Tran, Gherbi, Hajri & Masmoudi, Exponential SDE Solvers, 2023, arXiv:2305.14267."""

from __future__ import annotations

import numpy as np

from difax.accel.solvers.bounds import bounded
from difax.accel.solvers.exponential import KINDS, checked_choice, gains, levels_at
from difax.accel.solvers.linear import Steps, linear
from difax.core.annotations import checked
from difax.core.contracts import Solver
from difax.core.process import Process


@checked
def seeds_1(
    prediction: str = "x0",
    clip: float | None = None,
    thresholding: float | None = None,
    sample_max_value: float | None = None,
) -> Solver:
    """SEEDS-1: the reverse SDE with its linear part and its noise exact, one evaluation a step.

    With h = lambda_t - lambda_s, m the prediction and z normal noise,

      "eps":  x_t = (alpha_t/alpha_s) x - 2 sigma_t (e^h - 1) m + sigma_t sqrt(e^{2h} - 1) z
      "x0":   x_t = (sigma_t/sigma_s) e^{-h} x + alpha_t (1 - e^{-2h}) m + sigma_t sqrt(1 - e^{-2h}) z

    The second is `ddim` with eta = 1. A step into sigma = 0 gives x0, which the authors leave out.

    Args:
      prediction: what is held over a step: "x0" (the authors for EDM), or "eps" (the paper's tables of VP), whose
        weights grow as e^h, so that it needs more steps, and times where alpha > 0.
      clip, thresholding, sample_max_value: bounds of the data prediction (`bounds.bounded`).

    Returns:
      A `Solver` without state but for the noise of a step.

    Raises:
      ValueError: unknown prediction; or, from `grid`, "eps" with a time where alpha = 0.

    References: Gonzalez et al. 2023, arXiv:2305.14267, section 4.
    """
    return _seeds("seeds_1", prediction, (), clip, thresholding, sample_max_value)


@checked
def seeds_2(
    prediction: str = "x0",
    c2: float = 0.5,
    clip: float | None = None,
    thresholding: float | None = None,
    sample_max_value: float | None = None,
) -> Solver:
    """SEEDS-2: `seeds_1` with a second evaluation at s2, where lambda is lambda_s + c2 h, of both parts one noise.

    x_2 is the step of `seeds_1` to s2, with m_2 there, and to that to t is added

      "eps":  -(sigma_t/c2) (e^h - 1) (m_2 - m)        "x0":  alpha_t (1 - e^{-2h})/(2 c2) (m_2 - m)

    The noise of x_t is that of x_2, carried on by the linear part, and what is drawn between s2 and t: exactly the
    integrals of one Brownian motion. (In the authors' code so for c2 = 1/2; for others the shares are exchanged.)

    Args:
      prediction, clip, thresholding, sample_max_value: as in `seeds_1`.
      c2: in (0, 1) (0.5).

    Returns:
      A `Solver` of 2n - 1 evaluations in n steps to sigma = 0: that step is of one.

    References: Gonzalez et al. 2023, arXiv:2305.14267, algorithm of SEEDS-2; Butcher type "2a" of the authors' code.
    """
    if not 0 < c2 < 1:
        raise ValueError(f"seeds_2: c2={c2}; allowed: between 0 and 1")
    return _seeds("seeds_2", prediction, (c2,), clip, thresholding, sample_max_value)


@checked
def seeds_3(
    prediction: str = "x0",
    c2: float = 1 / 3,
    clip: float | None = None,
    thresholding: float | None = None,
    sample_max_value: float | None = None,
) -> Solver:
    """SEEDS-3: three evaluations a step, at s, s2 and s3, where lambda is lambda_s + c2 h and lambda_s + (2/3) h.

    With the step of `seeds_1` to each of the points, E = 2h for "x0" and -h for "eps", scale = alpha for "x0" and
    2 sigma for "eps", and g2(E) = 1 - (1 - e^{-E})/E, there is added

      to x_3:  scale_3 (c3/c2) g2(c3 E) (m_2 - m)        to x_t:  scale_t g2(E) (m_3 - m)/c3,   c3 = 2/3

    All noises are the integrals of one Brownian motion, as in `seeds_2`. The authors' code differs from the paper's
    rule: for "eps" the noise of x_3 is scaled by sigma_t, and for "x0" g2 is taken of c2 in place of c3.

    Args:
      prediction, clip, thresholding, sample_max_value: as in `seeds_1`.
      c2: in (0, 2/3) (1/3).

    Returns:
      A `Solver` of 3n - 2 evaluations in n steps to sigma = 0: that step is of one.

    References: Gonzalez et al. 2023, arXiv:2305.14267, algorithm of SEEDS-3; Butcher type "3a" of the authors' code.
    """
    if not 0 < c2 < 2 / 3:
        raise ValueError(f"seeds_3: c2={c2}; allowed: between 0 and 2/3")
    return _seeds("seeds_3", prediction, (c2, 2 / 3), clip, thresholding, sample_max_value)


def _seeds(
    name: str,
    prediction: str,
    shares: tuple[float, ...],
    clip: float | None,
    thresholding: float | None,
    sample_max_value: float | None,
) -> Solver:
    """The family; shares: where in lambda the evaluations after the first are."""
    checked_choice(name, "prediction", prediction, KINDS)
    data = prediction == "x0"
    first = f"first_{prediction}"

    def lay(steps: Steps, process: Process, times: np.ndarray) -> None:
        half = levels_at(process, times).half
        if not data and not np.all(np.isfinite(half[:-1])):
            raise ValueError(
                f"{name}: prediction 'eps' divides by alpha, which is 0 at t={times[0]:g} of {process.name}; "
                "allowed: prediction 'x0', or a grid such as karras or log_snr"
            )
        for j in range(len(times) - 1):
            if not np.isfinite(half[j + 1]):
                steps.row(times[j], j, {"x0": float(levels_at(process, times[j + 1]).alpha)})
                continue
            inner = [] if half[j] == -np.inf else process.inverse(half[j] + np.array(shares) * (half[j + 1] - half[j]))
            t = np.array([times[j], *inner, times[j + 1]])
            _step(steps, j, t, *levels_at(process, t))

    def _step(steps: Steps, j: int, t: np.ndarray, alpha: np.ndarray, sigma: np.ndarray, half: np.ndarray) -> None:
        h = np.append(0.0, half[1:] - half[0])
        E = 2 * h if data else -h
        scale = alpha if data else 2 * sigma
        for k in range(len(t) - 1):
            decay = np.exp(-h[k + 1]) if data else 2 - np.exp(h[k + 1])
            names = ("x0", "eps") if k == 0 else ("first_x0", "first_eps")
            x = {names[0]: alpha[k + 1], names[1]: sigma[k + 1] * decay}
            if k:
                g1, g2, _ = gains(E[k + 1])
                last = len(shares) == 1  # of seeds_2, whose difference weighs half of g1
                c = scale[k + 1] * (g1 / 2 if last else g2) * h[k + 1] / h[k]
                x |= {prediction: c, first: x[first] - c}
            between = half[k + 1] - half[k]
            fresh = sigma[k + 1] * np.sqrt(-np.expm1(-2 * between) if data else np.expm1(2 * between))
            noise = {"z1": fresh}
            if k:
                noise["noise"] = alpha[k + 1] / alpha[k] * (np.exp(-2 * between) if data else 1.0)
            kept = {"noise": noise}
            if k == 0:
                kept |= {"first_x0": {"x0": 1.0}, "first_eps": {"eps": 1.0}}
            steps.row(t[k], j, x | noise, **(kept if len(t) > 2 else {}))

    slots = ("first_x0", "first_eps", "noise") if shares else ()
    return linear(lay, slots=slots, noises=1, bound=bounded(name, clip, thresholding, sample_max_value))
