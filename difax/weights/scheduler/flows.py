"""Scheduler files of flow matching."""

from __future__ import annotations

import math

from difax.core.annotations import choose
from difax.weights.scheduler.case import Case, Sections
from difax.weights.scheduler.common import UNSET, given_sections


def flow(case: Case) -> Sections:
    total, shift = int(case["num_train_timesteps"]), float(case["shift"])
    inverted = bool(case.get("invert_sigmas"))
    process: Sections = {"name": "flow", "shift": shift, "time_scale": float(total)}
    if inverted:
        process = {"name": "sit", "time_scale": float(total)}
    grid: Sections = {"name": "flow_match", "num_train_timesteps": total, "shift": shift}
    dynamic = bool(case.get("use_dynamic_shifting"))
    if dynamic:
        mu = mu_of(case) if case.mu is None else case.mu
        grid |= {"use_dynamic_shifting": True, "mu": mu, "time_shift_type": case["time_shift_type"]}
        if case["time_shift_type"] == "exponential" and not inverted:
            process["shift"] = math.exp(mu)
    if case.get("shift_terminal"):
        grid["shift_terminal"] = case["shift_terminal"]
    grid |= {key: True for key in UNSET if key.startswith("use_") and case.get(key)}
    if case.name == "FlowMatchHeunDiscreteScheduler" and not isinstance(case.sigmas, str | None):
        raise ValueError(f"scheduler {case.name}: a list of sigmas; allowed: of FlowMatchEulerDiscreteScheduler")
    if case.name != "FlowMatchHeunDiscreteScheduler":
        whose = case.sigmas or ("pipeline" if dynamic else "scheduler")
        grid["sigmas"] = choose("sigmas", whose, ("scheduler", "pipeline")) if isinstance(whose, str) else list(whose)
    solver: Sections = {"name": "euler"}
    if case.name == "FlowMatchLCMScheduler":
        case.only("scale_factors", (None,), "it would sample in growing sizes")
    if case.name == "FlowMatchLCMScheduler" or case.get("stochastic_sampling"):
        solver = {"name": "ddim", "gamma": 1.0}
        if inverted:
            raise case.refuse("invert_sigmas", "with noise at each step; allowed: false")
    if case.name == "FlowMatchHeunDiscreteScheduler":
        solver = {"name": "heun"}
    return given_sections(case, process, "velocity", solver, grid)


def mu_of(case: Case) -> float:
    """mu linear in the tokens of an image, between those of base_shift and of max_shift."""
    if case.shape is None or len(case.shape) < 3:
        raise case.refuse("use_dynamic_shifting", "needs the shape of the latents, or mu; allowed: these, or false")
    *frames, height, width, _ = case.shape
    tokens = math.prod(frames) * height * width if frames else height * width // 4
    low, high = case["base_image_seq_len"], case["max_image_seq_len"]
    if high == low:
        raise case.refuse("max_image_seq_len", f"equals base_image_seq_len={low}; allowed: another")
    return case["base_shift"] + (case["max_shift"] - case["base_shift"]) * (tokens - low) / (high - low)
