"""Writes exponential.npz: trajectories of diffusers' DPM-Solver schedulers on the Gaussian mixture of tests/oracles.

The network of every run is the mixture's exact eps, computed in float64 and rounded to float32. Per case: `t` [n + 1],
the process times of the levels in difax's convention; `path` [E + 1, 4, 8], x before the first and after every
evaluation; `noise`, every draw, of one Brownian motion for `dpmpp_sde`: [steps, 2, 4, 8], to the middle and to the end
of each step, normalised.

Needs torch 2.13, torchsde and diffusers 0.42.1, no accelerator:

  python -m tests.golden.make_exponential
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

SHAPE = (4, 8)
BETAS = dict(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear")


def vp_level(k) -> tuple[float, float]:
    """(alpha, sigma) of discrete step k."""
    abar = np.prod(1 - np.linspace(1e-4, 0.02, 1000)[: int(k) + 1])
    return float(np.sqrt(abar)), float(np.sqrt(1 - abar))


def main() -> None:
    import diffusers as D
    import torch
    from diffusers.schedulers import scheduling_dpmsolver_multistep, scheduling_dpmsolver_sde

    from tests.oracles.mixture import Mixture

    mixture = Mixture()
    rng = np.random.default_rng(20260)
    files: dict[str, np.ndarray] = {}

    def tensor(a: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.asarray(a, np.float32))

    def record(name: str, t: np.ndarray, path: list[torch.Tensor], noise: np.ndarray | None = None) -> None:
        files[f"{name}.t"] = np.asarray(t, np.float64)
        files[f"{name}.path"] = np.stack([np.asarray(x, np.float32) for x in path])
        if noise is not None:
            files[f"{name}.noise"] = np.asarray(noise, np.float32)

    def discrete(name: str, scheduler, n: int, noisy: bool = False, end: int = -1) -> None:
        """end: the discrete step whose level the run ends at, -1 the clean sample."""
        scheduler.set_timesteps(n)
        k = scheduler.timesteps.numpy()
        draws = [rng.normal(size=SHAPE) for _ in k] if noisy else []
        x = tensor(rng.normal(size=SHAPE))
        path = [x]
        for i, now in enumerate(scheduler.timesteps):
            alpha, sigma = vp_level(now)
            if noisy:
                scheduling_dpmsolver_multistep.randn_tensor = lambda *a, i=i, **b: tensor(draws[i])[..., None]
            eps = tensor(mixture.eps(x.double().numpy(), alpha, sigma))
            # its thresholding reads [batch, channels, ...]
            x = scheduler.step(eps[..., None], now, x[..., None]).prev_sample[..., 0]
            path.append(x)
        record(name, (np.append(k, end) + 1) / 1000, path, np.stack(draws) if noisy else None)

    zero, least = dict(final_sigmas_type="zero"), dict(final_sigmas_type="sigma_min")
    for kind in ("midpoint", "heun"):
        data = dict(BETAS, algorithm_type="dpmsolver++", solver_type=kind, **zero)
        for order, n in ((2, 16), (3, 10), (3, 16)):
            discrete(f"dpmpp_{order}m-{kind}-{n}", D.DPMSolverMultistepScheduler(**data, solver_order=order), n)
        for order, n in ((2, 9), (2, 10), (3, 9), (3, 10), (3, 11)):
            discrete(f"dpmpp_{order}s-{kind}-{n}", D.DPMSolverSinglestepScheduler(**data, solver_order=order), n)
        # of noise predictions it refuses to end at sigma = 0: these end at the level of step 0
        eps = dict(BETAS, algorithm_type="dpmsolver", solver_type=kind, **least)
        for order in (2, 3):
            scheduler = D.DPMSolverMultistepScheduler(**eps, solver_order=order)
            discrete(f"dpm_solver_{order}m-{kind}-16", scheduler, 16, end=0)
        for order, n in ((2, 9), (3, 10), (3, 11)):
            scheduler = D.DPMSolverSinglestepScheduler(**eps, solver_order=order)
            discrete(f"dpm_solver_{order}s-{kind}-{n}", scheduler, n, end=0)
        sde = dict(BETAS, algorithm_type="sde-dpmsolver++", solver_type=kind, **zero)
        for order in (2, 3):
            scheduler = D.DPMSolverMultistepScheduler(**sde, solver_order=order)
            discrete(f"dpmpp_{order}m_sde-{kind}-16", scheduler, 16, noisy=True)
    threshold = dict(thresholding=True, dynamic_thresholding_ratio=0.6, sample_max_value=1.2)
    scheduler = D.DPMSolverMultistepScheduler(**BETAS, **zero, **threshold, solver_order=2)
    discrete("dpmpp_2m-thresholding-10", scheduler, 10)

    # k-diffusion's: y = x/alpha, two evaluations a step, noise of a Brownian tree
    scheduler = D.DPMSolverSDEScheduler(**BETAS, noise_sampler_seed=7, timestep_spacing="trailing")
    scheduler.set_timesteps(8)
    sigmas, n = scheduler.sigmas.double().numpy(), 8
    outer = np.append(sigmas[0], sigmas[1:-1:2])
    alpha = lambda rho: 1 / np.sqrt(1 + rho**2)  # noqa: E731
    y = tensor(rng.normal(size=SHAPE) / alpha(outer[0]))
    path, noise = [y * alpha(outer[0])], []
    sampled = scheduling_dpmsolver_sde.BrownianTreeNoiseSampler.__call__

    def recorded(self, *sigmas):
        noise.append(np.asarray(sampled(self, *sigmas), np.float32))
        return tensor(noise[-1])

    scheduling_dpmsolver_sde.BrownianTreeNoiseSampler.__call__ = recorded
    for e, now in enumerate(scheduler.timesteps):
        j, middle = divmod(e, 2)
        rho = np.exp((np.log(outer[j]) + np.log(outer[j + 1])) / 2) if middle else outer[j]
        a = alpha(rho)
        eps = tensor(mixture.eps(y.double().numpy() * a, a, rho * a))
        y = scheduler.step(eps, now, y).prev_sample
        if j + 1 < n:
            end = outer[j + 1] if middle else np.exp((np.log(outer[j]) + np.log(outer[j + 1])) / 2)
            path.append(y * alpha(end))
        else:
            path.append(y)
    record("dpmpp_sde", np.append(outer_times(outer), 0.0), path, np.stack(noise).reshape(n - 1, 2, *SHAPE))

    np.savez_compressed(Path(__file__).with_name("exponential.npz"), **files)
    print({name: a.shape for name, a in files.items() if name.endswith("path")})


def outer_times(rho: np.ndarray) -> np.ndarray:
    """Times of levels of sigma/alpha on the discrete process: log alpha is linear between its steps."""
    log_alpha = np.append(0.0, 0.5 * np.cumsum(np.log1p(-np.linspace(1e-4, 0.02, 1000))))
    return np.interp(0.5 * np.log1p(rho**2), -log_alpha, np.arange(1001) / 1000)


if __name__ == "__main__":
    main()
