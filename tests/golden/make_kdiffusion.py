"""Writes kdiffusion.npz: trajectories of diffusers' schedulers on the Gaussian mixture of tests/oracles.

As solvers.npz: the network is the mixture's exact eps (or velocity), in float64 and rounded to float32. Per case: `t`
[n + 1], the process times of the levels; `path` [E + 1, 4, 8], x = alpha x0 + sigma eps before the first and after
every evaluation; `noise` [E, 4, 8], the draw that follows each evaluation, zeros where there is none. Of the run with
churn, path and noise begin with what is drawn before the first evaluation, and the network is evaluated behind the
noise, as in the paper; diffusers' pipelines do it before.

Needs torch 2.13 and diffusers 0.42.1, no accelerator:

  python -m tests.golden.make_kdiffusion
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

SHAPE = (4, 8)
BETAS = dict(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
CHURN = dict(s_churn=6.0, s_tmin=0.05, s_tmax=50.0, s_noise=1.007)


def vp_alpha(rho: Any) -> float:
    """alpha of a variance-preserving level with sigma/alpha = rho."""
    return float(1 / np.sqrt(1 + float(rho) ** 2))


def ve_time(sigma: np.ndarray) -> np.ndarray:
    """t of sigma = 0.002 * 40000^t, and 0 for sigma = 0."""
    return np.where(sigma > 0, np.log(np.maximum(sigma, 1e-9) / 0.002) / np.log(40000.0), 0.0)


def main() -> None:
    import diffusers as D
    import torch
    from diffusers.schedulers import (
        scheduling_edm_euler,
        scheduling_euler_ancestral_discrete,
        scheduling_flow_match_euler_discrete,
        scheduling_flow_match_lcm,
        scheduling_k_dpm_2_ancestral_discrete,
        scheduling_lcm,
        scheduling_tcd,
    )

    from tests.oracles.mixture import Mixture

    mixture = Mixture()
    rng = np.random.default_rng(20241)
    files: dict[str, np.ndarray] = {}

    def tensor(a: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.asarray(a, np.float32))

    def record(name: str, t: np.ndarray, path: list[torch.Tensor], noise: list[np.ndarray]) -> None:
        files[f"{name}.t"] = np.asarray(t, np.float64)
        files[f"{name}.path"] = np.stack([np.asarray(x, np.float32) for x in path])
        files[f"{name}.noise"] = np.stack(noise).astype(np.float32)

    def drawing(module: Any, noise: list[np.ndarray]) -> None:
        """Makes a scheduler draw from here, and write down what it drew since it was last asked."""

        def randn_tensor(*args: Any, **more: Any) -> torch.Tensor:
            noise[-1] = rng.normal(size=SHAPE)
            return tensor(noise[-1])

        module.randn_tensor = randn_tensor

    def in_sigma(name: str, scheduler: Any, module: Any, levels: list[float], k: np.ndarray) -> None:
        """Schedulers of k-diffusion, which work on y = x/alpha; `levels`: rho of the evaluations, and the last."""
        noise: list[np.ndarray] = []
        if module is not None:
            drawing(module, noise)
        y = tensor(rng.normal(size=SHAPE) / vp_alpha(levels[0]))
        path = [y * vp_alpha(levels[0])]
        for i, now in enumerate(scheduler.timesteps):
            noise.append(np.zeros(SHAPE))
            alpha = vp_alpha(levels[i])
            eps = tensor(mixture.eps(y.double().numpy() * alpha, alpha, alpha * levels[i]))
            scheduler.scale_model_input(y, now)
            y = scheduler.step(eps, now, y).prev_sample
            path.append(y * vp_alpha(levels[i + 1]))
        record(name, np.append(k + 1, 0) / 1000, path, noise)

    for name, make, module in (
        ("kdpm2", D.KDPM2DiscreteScheduler, None),
        ("kdpm2_ancestral", D.KDPM2AncestralDiscreteScheduler, scheduling_k_dpm_2_ancestral_discrete),
    ):
        scheduler = make(**BETAS, timestep_spacing="trailing")
        scheduler.set_timesteps(10)
        rho = np.unique(scheduler.sigmas.double().numpy())[::-1]  # and 0
        low = rho[1:] if module is None else rho[1:] ** 2 / rho[:-1]  # without the noise of eta = 1
        middle = np.sqrt(rho[:-1] * low)
        levels = [*np.stack([rho[:-2], middle[:-1]], 1).ravel(), rho[-2], 0.0]
        in_sigma(name, scheduler, module, levels, np.round(1000 - 100 * np.arange(10)) - 1)

    scheduler = D.EulerAncestralDiscreteScheduler(**BETAS, timestep_spacing="trailing")
    scheduler.set_timesteps(10)
    levels = list(scheduler.sigmas.double().numpy())
    in_sigma(
        "euler_ancestral", scheduler, scheduling_euler_ancestral_discrete, levels, scheduler.timesteps.double().numpy()
    )

    # EDM's Euler with churn: `path` is x^, on which the network is evaluated
    scheduler = D.EDMEulerScheduler(sigma_data=0.5)
    scheduler.set_timesteps(10)
    sigmas = scheduler.sigmas.double().numpy()
    gamma = np.where((sigmas >= 0.05) & (sigmas <= 50), min(CHURN["s_churn"] / 10, np.sqrt(2) - 1), 0.0)
    hat = sigmas * (1 + gamma)
    draws = [rng.normal(size=SHAPE) for _ in range(10)]
    x = tensor(sigmas[0] * rng.normal(size=SHAPE))
    path, begun = [], x
    for i, now in enumerate(scheduler.timesteps):
        noised = x + tensor(draws[i]) * (CHURN["s_noise"] * float(np.sqrt(hat[i] ** 2 - sigmas[i] ** 2)))
        path.append(noised)
        x64 = noised.double().numpy()
        skip, out = 0.25 / (hat[i] ** 2 + 0.25), 0.5 * hat[i] / np.sqrt(hat[i] ** 2 + 0.25)
        scheduling_edm_euler.randn_tensor = lambda *a, i=i, **b: tensor(draws[i])
        scheduler.scale_model_input(x, now)
        x = scheduler.step(tensor((mixture.x0(x64, 1.0, hat[i]) - skip * x64) / out), now, x, **CHURN).prev_sample
    record("edm_churn", ve_time(sigmas), [begun, *path, x], [*draws, np.zeros(SHAPE)])

    for name, make, module, more in (
        ("lcm", D.LCMScheduler, scheduling_lcm, {}),
        ("tcd", D.TCDScheduler, scheduling_tcd, {"eta": 0.3}),
    ):
        scheduler = make(**BETAS, original_inference_steps=50, clip_sample=False)
        scheduler.set_timesteps(5)
        k = scheduler.timesteps.numpy()
        abar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
        noise: list[np.ndarray] = []
        drawing(module, noise)
        x = tensor(rng.normal(size=SHAPE))
        path = [x]
        for now in scheduler.timesteps:
            noise.append(np.zeros(SHAPE))
            alpha, sigma = np.sqrt(abar[now]), np.sqrt(1 - abar[now])
            x = scheduler.step(tensor(mixture.eps(x.double().numpy(), alpha, sigma)), now, x, **more).prev_sample
            path.append(x)
        record(name, np.append(k + 1, 0 if name == "lcm" else 1) / 1000, path, noise)  # TCD ends at step 0

    for name, scheduler, module in (
        ("flow_lcm", D.FlowMatchLCMScheduler(shift=3.0), scheduling_flow_match_lcm),
        (
            "flow_stochastic",
            D.FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True),
            scheduling_flow_match_euler_discrete,
        ),
    ):
        scheduler.set_timesteps(10)
        noise = []
        drawing(module, noise)
        x = tensor(rng.normal(size=SHAPE))
        path = [x]
        for now in scheduler.timesteps:
            noise.append(np.zeros(SHAPE))
            t, x64 = float(now) / 1000, x.double().numpy()
            x = scheduler.step(tensor(mixture.eps(x64, 1 - t, t) - mixture.x0(x64, 1 - t, t)), now, x).prev_sample
            path.append(x)
        record(name, scheduler.sigmas.double().numpy(), path, noise)

    np.savez_compressed(Path(__file__).with_name("kdiffusion.npz"), **files)
    print({name: a.shape for name, a in files.items()})


if __name__ == "__main__":
    main()
