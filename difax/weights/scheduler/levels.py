"""Scheduler files of k-diffusion and of EDM, whose schedulers step in sigma/alpha."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from difax.core.grids.plain import spaced
from difax.weights.scheduler.case import Case, Sections
from difax.weights.scheduler.common import (
    LEAST,
    NOISES,
    PREDICTIONS,
    UNSET,
    bounds,
    given_sections,
    grid_section,
    is_curved,
    table_of,
    vp_section,
)
from difax.weights.scheduler.multistep import dpm_solver


def levels(case: Case, solver: Sections, kinds: Mapping[str, str] = PREDICTIONS) -> Sections:
    """Schedulers of k-diffusion, whose first sample is noise times the largest sigma."""
    process = vp_section(case, LEAST, between="log_sigma")
    if case["timestep_spacing"] != "leading":
        most = float(table_of(process)[-1])
        if is_curved(case) and case.get("sigma_max") is not None:
            most = case["sigma_max"]
        process["prior_std"] = most / math.hypot(1.0, most)
    return given_sections(case, process, case.only("prediction_type", kinds), solver, grid_section(case))


def euler(case: Case) -> Sections:
    case.only("final_sigmas_type", ("zero",), "its sample would come out as x/alpha")
    case.only("interpolation_type", ("linear",), "its network would be told other steps than those of the levels")
    found = levels(case, {"name": "euler"}, PREDICTIONS | {"original_sample": "x0"})
    ends = {key: case[key] for key in ("sigma_min", "sigma_max") if is_curved(case) and case[key] is not None}
    found["grid"] |= ends
    if case["timestep_type"] == "discrete" or case["prediction_type"] != "v_prediction":
        table = table_of(found["process"])
        for key, value in ends.items():
            if not table[0] * (1 - 1e-6) <= value <= table[-1] * (1 + 1e-6):
                raise case.refuse(key, f"its betas have {table[0]:.4g} ... {table[-1]:.4g}; allowed: within, or "
                                  "timestep_type=continuous with v_prediction")  # fmt: skip
        return found
    if not is_curved(case):
        found["grid"]["timestep_type"] = "continuous"
        return found
    # the network is told log(sigma)/4 of any sigma: EDM's process for data of unit variance
    grid = found["grid"]
    table = table_of(found["process"])
    low, high = curve_ends(case, table)
    curve = next(key for key in UNSET if key.startswith("use_") and case.get(key))
    name = {"use_karras_sigmas": "karras", "use_exponential_sigmas": "exponential", "use_beta_sigmas": "beta"}[curve]
    grid = {"name": name} | ({"of": "sigma"} if name == "beta" else {})
    prior = found["process"].get("prior_std", 1.0)
    process = {"name": "edm", "sigma_min": low, "sigma_max": high, "sigma_data": 1.0, "prior_std": prior}
    return found | {"process": process, "grid": grid}


def curve_ends(case: Case, table: np.ndarray) -> tuple[float, float]:
    """The ends of a curve of sigmas of Euler's: as given, or of the steps that the spacing has."""
    k = spaced(case["timestep_spacing"], len(table), case.steps, int(case["steps_offset"]))
    high, low = np.interp(k[[0, -1]], np.arange(len(table)), table)
    given = case["sigma_min"], case["sigma_max"]
    low, high = (float(own if value is None else value) for value, own in zip(given, (low, high), strict=True))
    return low, high


def heun(case: Case) -> Sections:
    return levels(case, {"name": "heun", "space": "sigma", **bounds(case)})


def kdpm2(case: Case) -> Sections:
    eta = 1.0 if case.name == "KDPM2AncestralDiscreteScheduler" else 0.0
    return levels(case, {"name": "kdpm2", "eta": eta, "space": "sigma"}, NOISES)


def dpm_sde(case: Case) -> Sections:
    return levels(case, {"name": "dpmpp_sde", "eta": 1.0, "r": 0.5}, NOISES)


def edm(case: Case) -> Sections:
    case.only("final_sigmas_type", ("zero",), "its last step would go nowhere")
    kinds = {"epsilon": "edm", "v_prediction": "v"}
    low, high, data = (float(case[key]) for key in ("sigma_min", "sigma_max", "sigma_data"))
    process = {
        "name": "edm", "sigma_min": low, "sigma_max": high, "sigma_data": data,
        "prior_std": math.hypot(high, 1.0) / math.hypot(high, data),
    }  # fmt: skip
    name = case["sigma_schedule"]
    grid = {"name": name} | ({"rho": float(case["rho"])} if name == "karras" else {})
    if case.name == "EDMEulerScheduler":
        solver: Sections = {"name": "euler"}
    elif case.name == "EDMDPMSolverMultistepScheduler":
        solver = dpm_solver(case)
        if case["thresholding"] and data != 1.0:
            raise case.refuse("thresholding", f"with sigma_data={data:g}; allowed: false, or sigma_data=1")
        if solver["name"] == "dpmpp_3m_sde":
            raise case.refuse("solver_order", "it has no noise for sde-dpmsolver++ there; allowed: 1, 2")
    else:
        process["told"] = "atan"
        case.only("solver_order", (1, 2))
        solver = dpm_solver(case)
    return given_sections(case, process, case.only("prediction_type", kinds), solver, grid)
