"""What the mappings of scheduler files share: the process of a schedule of betas, its grid, bounds of the data."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from difax.core.process import log_snr, vp
from difax.weights.scheduler.case import Case, Sections

ALWAYS = 15  # below so many steps diffusers lowers the order of the last ones
FREELY = 1e9  # of the solvers' `stretch`: diffusers never lowers the order of a longer step
LEAST = 2.0**-24  # alpha^2 that diffusers puts where it would be 0
PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
NOISES = {"epsilon": "eps", "v_prediction": "v"}
SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")


def vp_section(case: Case, terminal: float = 0.0, **more: Any) -> Sections:
    """The process of a discrete schedule; `terminal` is alpha^2 at the end where it is rescaled."""
    section: Sections = {"name": "vp"}
    if case.get("trained_betas") is not None:
        section["trained"] = case["trained_betas"]
    else:
        section["schedule"] = case.only(
            "beta_schedule", (*SCHEDULES, "sigmoid", "laplace") if case.name.startswith("DDPM") else SCHEDULES
        )
        section["steps"] = int(case["num_train_timesteps"])
        if "beta_start" in case.keys:
            section |= {"beta_start": case["beta_start"], "beta_end": case["beta_end"]}
    if case.get("rescale_betas_zero_snr"):
        section["terminal"] = terminal
    if not case.name.startswith("CogVideoX"):  # which alone keeps its table in float64
        section["precision"] = "float32"
    return section | more


def table_of(process: Sections) -> np.ndarray:
    """sigma/alpha of the discrete steps of a section's process."""
    made = vp(**{key: value for key, value in process.items() if key != "name"})
    assert made.steps is not None
    return np.exp(-0.5 * log_snr(made, (np.arange(made.steps) + 1) / made.steps))


def bounds(case: Case) -> Sections:
    """What a solver makes of the data prediction."""
    if case.get("thresholding"):
        return {"thresholding": case["dynamic_thresholding_ratio"], "sample_max_value": case["sample_max_value"]}
    return {"clip": case["clip_sample_range"]} if case.get("clip_sample") else {}


def grid_section(case: Case, **more: Any) -> Sections:
    """The grid of a class of discrete steps, with the keys of that class that it reads."""
    read = ("timestep_spacing", "steps_offset", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas",
            "use_lu_lambdas", "lambda_min_clipped")  # fmt: skip
    found = {key: case[key] for key in read if key in case.keys and case[key] != UNSET.get(key)}
    if is_curved(case):
        found["float32"] = True
    return {"name": "diffusers", "scheduler": case.name.replace("Parallel", "")} | found | more


UNSET = {
    "steps_offset": 0, "use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False,
    "use_lu_lambdas": False, "lambda_min_clipped": -math.inf,
}  # fmt: skip


def is_curved(case: Case) -> bool:
    return any(case.get(key) for key in UNSET if key.startswith("use_"))


def given_sections(case: Case, process: Sections, prediction: str, solver: Sections, grid: Sections) -> Sections:
    curves = [key for key in UNSET if key.startswith("use_") and case.get(key)]
    if len(curves) > 1:
        raise ValueError(f"scheduler {case.name}: {' and '.join(curves)}; allowed: one of them")
    return {"process": process, "prediction": prediction, "solver": solver, "grid": grid}


def strides(case: Case) -> tuple[int, bool]:
    """T // n, and whether steps of that size are those between the times of the grid."""
    steps = len(case["trained_betas"]) if case.get("trained_betas") else int(case["num_train_timesteps"])
    spacing = case["timestep_spacing"]
    stride = steps // max(case.steps, 1)
    even = spacing == "leading" or (spacing == "trailing" and steps % case.steps == 0)
    return stride, even
