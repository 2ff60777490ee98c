"""The exact network of the Gaussian mixture as a scheduler file of diffusers would call it, by the time it is told."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tests.oracles.mixture import Mixture

MIXTURE = Mixture()
DEFAULTS = dict(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
K_DIFFUSION = dict(beta_start=0.00085, beta_end=0.012)
OWN: dict[str, dict[str, Any]] = {
    "HeunDiscreteScheduler": K_DIFFUSION,
    "KDPM2DiscreteScheduler": K_DIFFUSION,
    "KDPM2AncestralDiscreteScheduler": K_DIFFUSION,
    "DPMSolverSDEScheduler": K_DIFFUSION,
    "LCMScheduler": dict(K_DIFFUSION, beta_schedule="scaled_linear"),
    "TCDScheduler": dict(K_DIFFUSION, beta_schedule="scaled_linear"),
    "CogVideoXDDIMScheduler": dict(K_DIFFUSION, beta_schedule="scaled_linear", snr_shift_scale=3.0),
    "CogVideoXDPMScheduler": dict(K_DIFFUSION, beta_schedule="scaled_linear", snr_shift_scale=3.0),
    "UnCLIPScheduler": dict(beta_schedule="squaredcos_cap_v2"),
    "EDMEulerScheduler": dict(sigma_data=0.5),
    "EDMDPMSolverMultistepScheduler": dict(sigma_data=0.5),
    "CosineDPMSolverMultistepScheduler": dict(sigma_data=1.0, prediction_type="v_prediction"),
    "CMStochasticIterativeScheduler": dict(sigma_data=0.5),
}


def alphas_cumprod(config: dict[str, Any]) -> np.ndarray:
    """alpha^2 of the discrete steps, in float64, from the schedule's own formula."""
    steps, start, end = config["num_train_timesteps"], config["beta_start"], config["beta_end"]
    schedule = config["beta_schedule"]
    if config.get("trained_betas") is not None:
        betas = np.asarray(config["trained_betas"], np.float64)
    elif schedule == "linear":
        betas = np.linspace(start, end, steps)
    elif schedule == "scaled_linear":
        betas = np.linspace(start**0.5, end**0.5, steps) ** 2
    elif schedule == "sigmoid":
        betas = (end - start) / (1 + np.exp(-np.linspace(-6, 6, steps))) + start
    else:
        bar = [_alpha_bar(schedule, k / steps) for k in range(steps + 1)]
        betas = np.array([min(1 - b / a, 0.999) for a, b in zip(bar[:-1], bar[1:], strict=True)])
    a2 = np.cumprod(1 - betas)
    if "snr_shift_scale" in config:
        r = config["snr_shift_scale"]
        a2 = a2 / (r + (1 - r) * a2)
    if config.get("rescale_betas_zero_snr"):
        root = np.sqrt(a2)
        a2 = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return a2


def _alpha_bar(schedule: str, t: float) -> float:
    if schedule == "squaredcos_cap_v2":
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
    assert schedule == "laplace"
    half = -0.5 * math.copysign(1, 0.5 - t) * math.log(1 - 2 * abs(0.5 - t) + 1e-6)
    return math.sqrt(math.exp(half) / (1 + math.exp(half)))


def network(cls: str, given: dict[str, Any], x: np.ndarray, told: float) -> np.ndarray:
    """What the perfect network returns for its input x and the time that it is told.

    Between two discrete steps log(alpha) is linear in the step.
    """
    config: dict[str, Any] = DEFAULTS | OWN.get(cls, {}) | given
    kind = config.get("prediction_type", "epsilon")
    if "sigma_data" in config:
        data = config["sigma_data"]
        if cls.startswith("Cosine"):
            sigma = math.tan(told * math.pi / 2)
        else:
            sigma = math.exp(4 * told / (1000 if cls.startswith("CM") else 1))
        norm = math.sqrt(sigma**2 + data**2)
        x0 = MIXTURE.x0(x * norm, 1.0, sigma)
        sign = -1 if kind == "v_prediction" else 1
        return sign * (x0 - data**2 / norm * x) / (sigma * data / norm)
    if cls.startswith("Flow") or config.get("use_flow_sigmas"):
        sigma = told / config["num_train_timesteps"]
        if config.get("invert_sigmas"):  # told the share of the data, and returns the slope towards it
            return -network(cls, {**given, "invert_sigmas": False}, x, config["num_train_timesteps"] - told)
        alpha = 1 - sigma
        return MIXTURE.eps(x, alpha, sigma) - MIXTURE.x0(x, alpha, sigma)
    if cls == "IPNDMScheduler":
        alpha, sigma = math.cos(told * math.pi / 2), math.sin(told * math.pi / 2)
        kind = "v_prediction"
    elif config.get("timestep_type") == "continuous":
        ratio = math.exp(4 * told)
        alpha, sigma = 1 / math.sqrt(1 + ratio**2), ratio / math.sqrt(1 + ratio**2)
    else:
        a2 = alphas_cumprod(config)
        floor = np.log(np.maximum(a2, 1e-30))
        alpha = math.sqrt(math.exp(np.interp(told, np.arange(len(a2)), floor)))
        sigma = math.sqrt(1 - alpha**2)
    x0, eps = MIXTURE.x0(x, alpha, sigma), MIXTURE.eps(x, alpha, sigma)
    if config.get("variance_type") == "learned_range":
        return np.concatenate([eps, MIXTURE.variance(x)], axis=1)
    return {"epsilon": eps, "sample": x0, "v_prediction": alpha * eps - sigma * x0}[kind]
