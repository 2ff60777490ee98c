"""The midpoint method of k-diffusion, DPM2. Karras et al. 2022, arXiv:2206.00364; Lu et al. 2022, arXiv:2206.00927."""

from __future__ import annotations

import numpy as np

from difax.accel.solvers.ddim import width
from difax.accel.solvers.heun import check_space, coordinates, slope, straight
from difax.accel.solvers.linear import Steps, linear
from difax.core.annotations import checked
from difax.core.contracts import Level, Solver
from difax.core.process import Process


@checked
def kdpm2(eta: float = 0.0, space: str | None = None) -> Solver:
    """Midpoint steps in sigma: Euler to the middle, then the whole step with the slope there; 2n - 1 evaluations.

    In space "sigma", y = x/alpha and rho = sigma/alpha, the middle is sqrt(rho_t rho_down); rho_down is rho_s
    without noise (eta = 0). With noise the step goes to rho_down = sqrt(rho_s^2 - rho_up^2) and adds rho_up z, where
    rho_up = eta rho_s sqrt(1 - rho_s^2/rho_t^2): DPM2 ancestral. In "flow", y = x/(alpha + sigma), the middle is that
    of u = sigma/(alpha + sigma). A last step that ends at t = 0 is Euler's.

    Args:
      eta: stochasticity in [0, 1] (0 in DPM2, 1 in its ancestral form).
      space: "sigma", "flow", or None: the flow for the flow processes and for steps that are too long in sigma, as in
        `heun`.

    Returns:
      A `Solver` whose state is the start of the step.

    Raises:
      ValueError: eta out of range, unknown space; or, from `grid`, space "sigma" with a time where alpha = 0.

    References: Crowson, k-diffusion, `sample_dpm_2` and `sample_dpm_2_ancestral`; KDPM2DiscreteScheduler and
      KDPM2AncestralDiscreteScheduler of diffusers, which tell the network a time interpolated in log(rho) between the
      discrete steps where here it follows log(alpha).
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"kdpm2: eta={eta}; allowed: 0 ... 1")
    check_space("kdpm2", space)

    def lay(steps: Steps, process: Process, times: np.ndarray) -> None:
        flow = straight("kdpm2", space, process, times)
        for j in range(len(times) - 1):
            t, s = process.level(times[j]), process.level(times[j + 1])
            w = float(width(t, s, eta))
            down = Level(s.alpha, np.sqrt(max(s.sigma**2 - w**2, 0.0)), None, None)  # scaled as at s
            (u, before), (v, after) = coordinates(t, flow[j]), coordinates(down, flow[j])
            if s.sigma == 0:
                steps.row(times[j], j, x={"x": after / before, **slope(flow[j], after * (v - u))})
                continue
            half = (u + v) / 2 if flow[j] else np.sqrt(u * v)
            rho = half / (1 - half) if flow[j] else half
            between = float(process.inverse(-np.log(rho)))
            middle, scale = coordinates(process.level(np.float64(between)), flow[j])
            first = {"x": scale / before, **slope(flow[j], scale * (middle - u))}
            steps.row(times[j], j, x=first, start={"x": 1.0})
            steps.row(between, j, x={"start": after / before, **slope(flow[j], after * (v - u)), "z1": w})

    return linear(lay, ("start",), noises=1)
