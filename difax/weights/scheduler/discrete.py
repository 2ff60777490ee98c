"""Scheduler files of ancestral, implicit and distilled sampling, and PNDM."""

from __future__ import annotations

from difax.weights.scheduler.case import Case, Sections
from difax.weights.scheduler.common import PREDICTIONS, bounds, given_sections, grid_section, strides, vp_section
from difax.weights.scheduler.multistep import sde

STAYS = "with steps_offset=0 its last step stays where it is"


def ddim(case: Case) -> Sections:
    end = {} if case["set_alpha_to_one"] else {"final_sigmas_type": "sigma_min"}
    solver: Sections = {"name": "ddim", **bounds(case)}
    if not strides(case)[1]:
        solver["equal_steps"] = True
    if end and case["steps_offset"] == 0 and bounds(case):
        raise case.refuse("set_alpha_to_one", f"{STAYS}; allowed: true, steps_offset=1, or no bounds of the samples")
    kind = case.only("prediction_type", PREDICTIONS)
    return given_sections(case, vp_section(case), kind, solver, grid_section(case, **end))


def cogvideox(case: Case) -> Sections:
    process = vp_section(case, snr_shift=case["snr_shift_scale"])
    end = {} if case["set_alpha_to_one"] else {"final_sigmas_type": "sigma_min"}
    even = strides(case)[1]
    kind = case.only("prediction_type", PREDICTIONS)
    grid = grid_section(case, scheduler="DDIMScheduler", **end)
    if case.name == "CogVideoXDDIMScheduler":
        return given_sections(case, process, kind, {"name": "ddim"} | ({} if even else {"equal_steps": True}), grid)
    if not even or end:
        why = f"with steps={case.steps} it ends short of the clean sample"
        raise case.refuse("timestep_spacing", f"{why}; allowed: trailing, steps that divide num_train_timesteps")
    return given_sections(case, process, kind, sde(2, 0, "midpoint"), grid)


def ddpm(case: Case) -> Sections:
    variances = {"fixed_small": "small", "fixed_small_log": "small", "fixed_large": "large", "learned_range": "learned"}
    if case.name == "UnCLIPScheduler":
        variances = {"fixed_small_log": "small", "learned_range": "learned"}
    variance = case.only("variance_type", variances)
    solver: Sections = {"name": "ddpm", "variance": variance, **bounds(case)}
    kinds = {"epsilon": "eps", "sample": "x0"} if case.name == "UnCLIPScheduler" else PREDICTIONS
    if case.name == "UnCLIPScheduler":
        return given_sections(case, vp_section(case), case.only("prediction_type", kinds), solver, {"name": "uniform"})
    if variance != "small" and (case["steps_offset"] > 0 or case["timestep_spacing"] == "trailing"):
        solver["end_noise"] = True
    return given_sections(case, vp_section(case), case.only("prediction_type", kinds), solver, grid_section(case))


def pndm(case: Case) -> Sections:
    kind = case.only("prediction_type", {"epsilon": "eps"}, "it mixes v before it is converted at another time")
    stride, even = strides(case)
    if not even:
        why = "its steps of T // n are not those between its times"
        raise case.refuse("timestep_spacing", f"{why}; allowed: leading, or trailing with steps that divide T")
    start = "plms" if case["skip_prk_steps"] else "prk"
    if start == "prk" and stride % 2:
        why = f"T // n = {stride} is odd, and half of it is rounded"
        raise case.refuse("skip_prk_steps", f"{why}; allowed: true, or steps whose T // n is even")
    end = {} if case["set_alpha_to_one"] else {"final_sigmas_type": "sigma_min"}
    if end and case["steps_offset"] == 0:
        raise case.refuse("set_alpha_to_one", f"{STAYS}; allowed: true, or steps_offset=1")
    solver = {"name": "pndm", "order": 4, "start": start}
    return given_sections(case, vp_section(case), kind, solver, grid_section(case, **end))


def ipndm(case: Case) -> Sections:
    case.only("trained_betas", (None,), "they are no betas there")
    return given_sections(case, {"name": "trig"}, "v", {"name": "ipndm", "zero_at_noise": True}, {"name": "ipndm"})


def distilled(case: Case) -> Sections:
    grid: Sections = {"name": "lcm", "original_inference_steps": int(case["original_inference_steps"])}
    kind = case.only("prediction_type", PREDICTIONS)
    if case.name == "TCDScheduler":
        solver: Sections = {"name": "ddim", "gamma": 0.3}
        return given_sections(case, vp_section(case), kind, solver, grid | {"last": "sigma_min"})
    solver = {"name": "ddim", "gamma": 1.0, "boundary": float(case["timestep_scaling"]), **bounds(case)}
    return given_sections(case, vp_section(case), kind, solver, grid)
