"""Noise levels and timesteps that diffusers' schedulers lay out, as tests/golden/grids.npz.

python tests/golden/make_grids.py    needs torch, scipy and diffusers 0.42.1

The schedulers get tables of their noise levels in float64 (their own are float32), so that what is compared is the
rule; "shipped" are the same without that.
"""

import itertools
import json
import pathlib

import diffusers
import numpy as np
import torch

CURVES = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
MULTISTEP = ("DPMSolverMultistepScheduler", "DEISMultistepScheduler", "UniPCMultistepScheduler", "SASolverScheduler")
LEVELS = ("EulerDiscreteScheduler", "HeunDiscreteScheduler", "LMSDiscreteScheduler", "KDPM2DiscreteScheduler")
PLAIN = ("DDIMScheduler", "DDPMScheduler", "EulerAncestralDiscreteScheduler")
SPACINGS = ("linspace", "leading", "trailing")


def cases():
    """(class, configuration, arguments of set_timesteps beside n, n)"""
    for name, spacing, n in itertools.product(PLAIN + LEVELS + MULTISTEP, SPACINGS, (7, 10)):
        yield name, {"timestep_spacing": spacing}, {}, n
        yield name, {"timestep_spacing": spacing, "steps_offset": 1}, {}, n
    for name, curve, spacing in itertools.product(LEVELS, CURVES, SPACINGS):
        yield name, {"timestep_spacing": spacing, curve: True}, {}, 8
    for name, curve in itertools.product(MULTISTEP, CURVES):
        yield name, {curve: True}, {}, 9
    yield "DPMSolverMultistepScheduler", {"use_lu_lambdas": True}, {}, 9
    yield "DPMSolverMultistepScheduler", {"final_sigmas_type": "sigma_min"}, {}, 9
    yield "DPMSolverMultistepScheduler", {"lambda_min_clipped": -5.1}, {}, 9
    for spacing in SPACINGS:
        yield "DPMSolverMultistepScheduler", {"lambda_min_clipped": -3.0, "timestep_spacing": spacing}, {}, 9
    yield "DPMSolverMultistepScheduler", {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min"}, {}, 9
    for curve in CURVES:
        yield "DPMSolverSinglestepScheduler", {curve: True}, {}, 9
        yield "EulerDiscreteScheduler", {curve: True, "sigma_min": 0.05, "sigma_max": 90.0}, {}, 9
    yield "DPMSolverSinglestepScheduler", {"lambda_min_clipped": -3.0}, {}, 9
    yield "EulerDiscreteScheduler", {"final_sigmas_type": "sigma_min"}, {}, 9
    yield "EulerDiscreteScheduler", {"interpolation_type": "log_linear"}, {}, 9
    continuous = {"timestep_type": "continuous", "prediction_type": "v_prediction", "use_karras_sigmas": True}
    yield "EulerDiscreteScheduler", continuous, {}, 9
    flows = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    for name, shift in itertools.product((*MULTISTEP, "DPMSolverSinglestepScheduler"), (1.0, 3.0)):
        yield name, {**flows, "flow_shift": shift}, {}, 8
    yield "UniPCMultistepScheduler", {**flows, "use_karras_sigmas": True}, {}, 8
    yield "UniPCMultistepScheduler", {**flows, "flow_shift": 2.0, "shift_terminal": 0.1}, {}, 8
    for kind in ("exponential", "linear"):
        dynamic = {"use_dynamic_shifting": True, "time_shift_type": kind}
        yield "UniPCMultistepScheduler", {**flows, **dynamic}, {"mu": 0.8}, 8
        yield "FlowMatchEulerDiscreteScheduler", dynamic, {"mu": 0.8}, 8
    for config in (
        {}, {"shift": 3.0}, {"shift": 3.0, "shift_terminal": 0.1}, {"invert_sigmas": True},
        *({"shift": 3.0, curve: True} for curve in CURVES),
    ):  # fmt: skip
        yield "FlowMatchEulerDiscreteScheduler", config, {}, 8
    yield "FlowMatchHeunDiscreteScheduler", {"shift": 3.0}, {}, 8
    for name in ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"):
        for schedule in ("karras", "exponential"):
            yield name, {"sigma_schedule": schedule}, {}, 9
    for name in ("LCMScheduler", "TCDScheduler"):
        yield name, {}, {}, 4
        yield name, {"original_inference_steps": 40}, {}, 7


def exact(made) -> None:
    """Gives a scheduler its table in float64."""
    if (
        hasattr(made, "alphas_cumprod") and made.config.beta_schedule == "linear"
    ):  # LCM's and TCD's steps have no levels
        of = made.config
        betas = torch.linspace(of.beta_start, of.beta_end, of.num_train_timesteps, dtype=torch.float64)
        made.alphas_cumprod = torch.cumprod(1 - betas, 0)
        made.lambda_t = -0.5 * torch.log((1 - made.alphas_cumprod) / made.alphas_cumprod)


def laid(made, n: int):
    """The levels with where the run ends, and the timesteps, one an evaluation of the grid."""
    sigmas, told = getattr(made, "sigmas", None), made.timesteps
    if sigmas is None or "LCM" in type(made).__name__ or "TCD" in type(made).__name__:
        return np.zeros(0), told.double().numpy()
    if "Heun" in type(made).__name__:
        sigmas, told = torch.cat([sigmas[:1], sigmas[1::2]]), torch.cat([told[:1], told[1::2]])
    if "KDPM2" in type(made).__name__:
        sigmas, told = torch.cat([sigmas[:1], sigmas[1::2]])[: n + 1], told[::2]
    return sigmas.double().numpy(), told.double().numpy()


def main() -> None:
    found, rows = {"sigmas": [], "told": [], "shipped_sigmas": [], "shipped_told": []}, []
    for name, config, more, n in cases():
        ends = {"final_sigmas_type": "zero"} if name == "DPMSolverSinglestepScheduler" else {}
        made = getattr(diffusers, name)(**{**ends, **config})
        made.set_timesteps(n, **more)
        shipped = laid(made, n)
        exact(made)
        made.set_timesteps(n, **more)
        for key, array in zip(found, (*laid(made, n), *shipped), strict=True):
            found[key].append(array)
        betas = [made.config.get(f"beta_{key}") for key in ("schedule", "start", "end")]
        sizes = [len(found["sigmas"][-1]), len(found["told"][-1])]
        rows.append({"class": name, "config": config, "more": more, "n": n, "betas": betas, "sizes": sizes})
    arrays = {key: np.concatenate(parts) for key, parts in found.items()}
    arrays["cases"] = np.frombuffer(json.dumps(rows).encode(), np.uint8)
    np.savez_compressed(pathlib.Path(__file__).with_name("grids.npz"), **arrays)
    print(len(rows), "cases, diffusers", diffusers.__version__)


if __name__ == "__main__":
    main()
