"""Writes solvers.npz: trajectories of diffusers' schedulers on the Gaussian mixture of tests/oracles.

The network of every run is the mixture's exact eps (or velocity), computed in float64 and rounded to float32, so that
the file holds what a scheduler alone does, as shipped and in float32. Per case: `t` [n + 1], the process times of the
levels in difax's convention; `path` [E + 1, 4, 8], x = alpha x0 + sigma eps before the first and after every
evaluation; and `noise` [E, 4, 8], every draw.

Needs torch 2.13 and diffusers 0.42.1, no accelerator:

  python -m tests.golden.make_solvers
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

SHAPE = (4, 8)
BETAS = dict(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear")


def vp_level(k) -> tuple[float, float]:
    """(alpha, sigma) of discrete step k; -1 is the clean sample."""
    abar = np.prod(1 - np.linspace(1e-4, 0.02, 1000)[: int(k) + 1])
    return float(np.sqrt(abar)), float(np.sqrt(1 - abar))


def ve_time(sigma: np.ndarray) -> np.ndarray:
    """t of sigma = 0.002 * 40000^t, and 0 for sigma = 0."""
    return np.where(sigma > 0, np.log(np.maximum(sigma, 1e-9) / 0.002) / np.log(40000.0), 0.0)


def main() -> None:
    import diffusers as D
    import torch
    from diffusers.schedulers import scheduling_ddpm

    from tests.oracles.mixture import Mixture

    mixture = Mixture()
    rng = np.random.default_rng(20240)
    files: dict[str, np.ndarray] = {}

    def tensor(a: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.asarray(a, np.float32))

    def record(name: str, t: np.ndarray, path: list[torch.Tensor], noise: list[np.ndarray] | None = None) -> None:
        files[f"{name}.t"] = np.asarray(t, np.float64)
        files[f"{name}.path"] = np.stack([np.asarray(x, np.float32) for x in path])
        if noise is not None:
            files[f"{name}.noise"] = np.stack(noise).astype(np.float32)

    def discrete(name: str, scheduler, n: int, noisy: bool = False, variance: bool = False, **step) -> None:
        scheduler.set_timesteps(n)
        k = scheduler.timesteps.numpy()
        draws: list[np.ndarray] = [rng.normal(size=SHAPE) for _ in k] if noisy else []
        x = tensor(rng.normal(size=SHAPE))
        path = [x]
        for i, now in enumerate(scheduler.timesteps):
            alpha, sigma = vp_level(now)
            x64 = x.double().numpy()
            output = mixture.eps(x64, alpha, sigma)
            if variance:
                output = np.concatenate([output, mixture.variance(x64)], axis=1)
            if noisy:
                scheduling_ddpm.randn_tensor = lambda *a, i=i, **b: tensor(draws[i])
                if "eta" in step:
                    step["variance_noise"] = tensor(draws[i])
            x = scheduler.step(tensor(output), now, x, **step).prev_sample
            path.append(x)
        record(name, np.append(k + 1, 0) / 1000, path, draws if noisy else None)

    plain = dict(BETAS, clip_sample=False, timestep_spacing="leading")
    for ours, theirs in {"small": "fixed_small", "large": "fixed_large", "learned": "learned_range"}.items():
        scheduler = D.DDPMScheduler(**plain, variance_type=theirs)
        discrete(f"ddpm_{ours}", scheduler, 10, noisy=True, variance=ours == "learned")
    discrete("ddim_eta0", D.DDIMScheduler(**plain), 10)
    discrete("ddim_eta0.7", D.DDIMScheduler(**plain), 10, noisy=True, eta=0.7)
    multistep = dict(BETAS, solver_order=2, algorithm_type="dpmsolver++", lower_order_final=True)
    for n in (10, 16):  # 10 is under diffusers' bound for a first-order last step, 16 is not
        discrete(f"dpmpp_2m_{n}", D.DPMSolverMultistepScheduler(**multistep, final_sigmas_type="zero"), n)

    # Heun of k-diffusion works on y = x / alpha
    scheduler = D.HeunDiscreteScheduler(**BETAS, timestep_spacing="trailing")
    scheduler.set_timesteps(10)
    k = scheduler.timesteps.numpy()
    alphas = [vp_level(now)[0] for now in k]
    y = tensor(rng.normal(size=SHAPE) / alphas[0])
    path = [y * alphas[0]]
    for i, now in enumerate(scheduler.timesteps):
        alpha, sigma = vp_level(now)
        eps = tensor(mixture.eps(y.double().numpy() * alpha, alpha, sigma))
        y = scheduler.step(eps, now, y).prev_sample
        path.append(y * (alphas[i + 1] if i + 1 < len(k) else 1.0))
    # the second evaluation of a step comes first in the list of the next one's: each time but the first is twice
    record("heun_vp", np.append(np.append(k[:1], k[1::2]) + 1, 0) / 1000, path)

    scheduler = D.EDMEulerScheduler(sigma_data=0.5)
    scheduler.set_timesteps(10)
    sigmas = scheduler.sigmas.double().numpy()
    x = tensor(sigmas[0] * rng.normal(size=SHAPE))
    path = [x]
    for now, sigma in zip(scheduler.timesteps, sigmas[:-1], strict=True):
        x64 = x.double().numpy()
        skip, out = 0.25 / (sigma**2 + 0.25), 0.5 * sigma / np.sqrt(sigma**2 + 0.25)
        scheduler.scale_model_input(x, now)
        x = scheduler.step(tensor((mixture.x0(x64, 1.0, sigma) - skip * x64) / out), now, x).prev_sample
        path.append(x)
    record("edm_euler", ve_time(sigmas), path)

    def flow(name: str, scheduler, levels: Callable[[], np.ndarray]) -> None:
        scheduler.set_timesteps(10)
        x = tensor(rng.normal(size=SHAPE))
        path = [x]
        for now in scheduler.timesteps:
            t, x64 = float(now) / 1000, x.double().numpy()
            eps = mixture.eps(x64, 1 - t, t)
            x = scheduler.step(tensor(eps - mixture.x0(x64, 1 - t, t)), now, x).prev_sample
            path.append(x)
        record(name, levels(), path)

    euler = D.FlowMatchEulerDiscreteScheduler(shift=3.0)
    flow("flow_euler", euler, lambda: euler.sigmas.double().numpy())
    heun = D.FlowMatchHeunDiscreteScheduler(shift=3.0)
    flow("flow_heun", heun, lambda: np.append(np.unique(heun.timesteps.double().numpy())[::-1] / 1000, 0.0))

    np.savez_compressed(Path(__file__).with_name("solvers.npz"), **files)
    print({name: a.shape for name, a in files.items()})


if __name__ == "__main__":
    main()
