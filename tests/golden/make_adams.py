"""Writes adams.npz: trajectories of diffusers' multistep schedulers on the Gaussian mixture of tests/oracles.

The network of every run is the mixture's exact prediction, computed in float64 at the scheduler's own noise level and
rounded to float32, so that the file holds what a scheduler alone does, as shipped and in float32. Per case: `t`
[n + 1], the process times of the levels in difax's convention; `path` [E + 1, 4, 8], x = alpha x0 + sigma eps before
the first and after every evaluation; and `noise` [E, 4, 8], every draw.

Needs torch 2.13 and diffusers 0.42.1, no accelerator:

  python -m tests.golden.make_adams
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.golden.make_solvers import BETAS, SHAPE, vp_level

STOP = {"final_sigmas_type": "sigma_min"}  # bh1 and the noise prediction are NaN at sigma = 0
# case -> class, settings, steps; VP, whose last level is the clean sample or that of step 0
MULTISTEP: dict[str, tuple[str, dict[str, Any], int]] = {
    "unipc_2": ("UniPCMultistepScheduler", {"solver_order": 2}, 10),
    "unipc_3_bh1": ("UniPCMultistepScheduler", {"solver_order": 3, "solver_type": "bh1", **STOP}, 10),
    "unipc_3_off": ("UniPCMultistepScheduler", {"solver_order": 3, "disable_corrector": [0, 1, 4]}, 10),
    "unipc_2_noise": ("UniPCMultistepScheduler", {"solver_order": 2, "predict_x0": False, **STOP}, 10),
    "unipc_2_full": ("UniPCMultistepScheduler", {"solver_order": 2, "lower_order_final": False, **STOP}, 10),
    "sa_default": ("SASolverScheduler", {}, 12),
    "sa_3_4": ("SASolverScheduler", {"predictor_order": 3, "corrector_order": 4, "tau_func": 1.0}, 12),
    "sa_1_2_ode": ("SASolverScheduler", {"predictor_order": 1, "corrector_order": 2, "tau_func": 0.0}, 12),
    "deis_2": ("DEISMultistepScheduler", {"solver_order": 2}, 10),
    "deis_3": ("DEISMultistepScheduler", {"solver_order": 3}, 16),
}
# spacing so that the halfway steps of prk are whole
PNDM = {"pndm_plms": True, "pndm_prk": False}


def main() -> None:
    import diffusers as D
    import torch
    from diffusers.schedulers import scheduling_sasolver

    from tests.oracles.mixture import Mixture

    mixture = Mixture()
    rng = np.random.default_rng(20250)
    files: dict[str, np.ndarray] = {}

    def tensor(a: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.asarray(a, np.float32))

    def record(name: str, t: np.ndarray, path: list[torch.Tensor], noise: list[np.ndarray] | None = None) -> None:
        files[f"{name}.t"] = np.asarray(t, np.float64)
        files[f"{name}.path"] = np.stack([np.asarray(x, np.float32) for x in path])
        if noise is not None:
            files[f"{name}.noise"] = np.stack(noise).astype(np.float32)

    def eps_at(k: Any, x: torch.Tensor) -> torch.Tensor:
        return tensor(mixture.eps(x.double().numpy(), *vp_level(k)))

    for name, (scheduler_name, settings, n) in MULTISTEP.items():
        noisy = scheduler_name.startswith("SA")
        if "tau_func" in settings:
            settings = dict(settings, tau_func=lambda t, tau=settings["tau_func"]: tau)
        scheduler = getattr(D, scheduler_name)(**BETAS, **settings)
        scheduler.set_timesteps(n)
        k = scheduler.timesteps.numpy()
        last = -1 if float(scheduler.sigmas[-1]) == 0 else 0
        draws = [rng.normal(size=SHAPE) for _ in k]
        x = tensor(rng.normal(size=SHAPE))
        path = [x]
        for i, now in enumerate(scheduler.timesteps):
            scheduling_sasolver.randn_tensor = lambda *a, z=draws[i], **b: tensor(z)
            x = scheduler.step(eps_at(now, x), now, x).prev_sample
            path.append(x)
        record(name, np.append(k + 1, last + 1) / 1000, path, draws if noisy else None)

    for name, skip in PNDM.items():
        scheduler = D.PNDMScheduler(
            **BETAS, skip_prk_steps=skip, set_alpha_to_one=True, timestep_spacing="leading", steps_offset=0
        )
        scheduler.set_timesteps(10)
        x = tensor(rng.normal(size=SHAPE))
        path = [x]
        for now in scheduler.timesteps:
            x = scheduler.step(eps_at(now, x), now, x).prev_sample
            path.append(x)
        record(name, (np.append(np.arange(10)[::-1] * 100, -1) + 1) / 1000, path)

    # works on y = x/alpha
    scheduler = D.LMSDiscreteScheduler(**BETAS, timestep_spacing="trailing")
    scheduler.set_timesteps(10)
    k = scheduler.timesteps.numpy()
    alphas = [vp_level(now)[0] for now in k] + [1.0]
    y = tensor(rng.normal(size=SHAPE) / alphas[0])
    path = [y * alphas[0]]
    for i, now in enumerate(scheduler.timesteps):
        scheduler.scale_model_input(y, now)
        y = scheduler.step(eps_at(now, y * alphas[i]), now, y).prev_sample
        path.append(y * alphas[i + 1])
    record("lms", np.append(k + 1, 0) / 1000, path)

    # a process of its own, whose sigmas can be given; predicts v = alpha eps - sigma x0
    k = np.arange(10)[::-1] * 100 + 50
    sigmas = np.array([vp_level(now)[1] for now in k] + [0.0])
    scheduler = D.IPNDMScheduler(trained_betas=sigmas)
    scheduler.set_timesteps(10)
    x = tensor(rng.normal(size=SHAPE))
    path = [x]
    for now, level in zip(scheduler.timesteps, k, strict=True):
        alpha, sigma = vp_level(level)
        x64 = x.double().numpy()
        v = alpha * mixture.eps(x64, alpha, sigma) - sigma * mixture.x0(x64, alpha, sigma)
        x = scheduler.step(tensor(v), now, x).prev_sample
        path.append(x)
    record("ipndm", np.append(k + 1, 0) / 1000, path)

    # as Wan has it; sigma is the time, and the network is asked at it, not at the whole step below
    scheduler = D.UniPCMultistepScheduler(use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction")
    scheduler.set_timesteps(10)
    x = tensor(rng.normal(size=SHAPE))
    path, sigmas = [x], scheduler.sigmas.double().numpy()
    for now, t in zip(scheduler.timesteps, sigmas[:-1], strict=True):
        x64 = x.double().numpy()
        x = scheduler.step(tensor(mixture.eps(x64, 1 - t, t) - mixture.x0(x64, 1 - t, t)), now, x).prev_sample
        path.append(x)
    record("unipc_flow", sigmas, path)

    np.savez_compressed(Path(__file__).with_name("adams.npz"), **files)
    print({name: a.shape for name, a in files.items()})


if __name__ == "__main__":
    main()
