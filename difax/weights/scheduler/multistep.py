"""Scheduler files of DPM-Solver, UniPC, DEIS and SA-Solver, on a schedule of betas or on a flow."""

from __future__ import annotations

from typing import Any

from difax.core.annotations import choose
from difax.weights.scheduler.case import Case, Sections
from difax.weights.scheduler.common import (
    ALWAYS,
    FREELY,
    LEAST,
    PREDICTIONS,
    UNSET,
    bounds,
    given_sections,
    grid_section,
    is_curved,
    table_of,
    vp_section,
)


def multistep_rules(case: Case) -> Sections:
    last = ALWAYS if case["lower_order_final"] else 0
    return {"lower_order_final": last, "stretch": FREELY}


def sde(order: int, last: int, kind: str) -> Sections:
    return {
        "name": f"dpmpp_{order}m_sde", "eta": 1.0, "lower_order_final": last, "stretch": FREELY, "solver_type": kind,
    }  # fmt: skip


def dpm_solver(case: Case) -> Sections:
    """The solver of DPMSolverMultistep and of its likes."""
    order = case.only("solver_order", (1, 2, 3))
    algorithm = case.get("algorithm_type", "sde-dpmsolver++")
    kinds = {"midpoint": "midpoint", "heun": "heun", "logrho": "midpoint", "bh1": "midpoint", "bh2": "midpoint"}
    kind, rules = case.only("solver_type", kinds), multistep_rules(case)
    if algorithm == "deis":  # which diffusers reads so
        algorithm = "dpmsolver++"
    if algorithm not in ("dpmsolver", "dpmsolver++", "sde-dpmsolver++"):
        raise case.refuse("algorithm_type", "allowed: dpmsolver++, sde-dpmsolver++, dpmsolver")
    if order == 1:
        if bounds(case):
            raise case.refuse("thresholding", "with solver_order=1; allowed: false, or solver_order 2 or 3")
        return {"name": "ddim", "eta": 1.0 if algorithm == "sde-dpmsolver++" else 0.0}
    lowered = case["lower_order_final"] and case.steps < ALWAYS
    if case["euler_at_final"] and case["final_sigmas_type"] != "zero" and not lowered:
        rules["euler_at_final"] = True
    names = {"dpmsolver++": "dpmpp_{}m", "dpmsolver": "dpm_solver_{}m", "sde-dpmsolver++": "dpmpp_{}m_sde"}
    return {"name": names[algorithm].format(order), "solver_type": kind, **rules, **bounds(case)}


def dpm(case: Case) -> Sections:
    algorithm = case["algorithm_type"]
    if algorithm in ("dpmsolver", "sde-dpmsolver") and case["final_sigmas_type"] == "zero":
        raise case.refuse("final_sigmas_type", f"{algorithm} has no step to sigma = 0; allowed: sigma_min")
    if is_curved(case) and case["final_sigmas_type"] == "sigma_min":
        raise case.refuse("final_sigmas_type", "a curve of sigmas ends there already, and its last step goes nowhere; "
                          "allowed: zero, or no curve")  # fmt: skip
    return discrete_or_flow(case, dpm_solver(case), final_sigmas_type=case["final_sigmas_type"])


def discrete_or_flow(case: Case, solver: Sections, **grid: Any) -> Sections:
    """Multistep schedulers, whose network is one of a discrete schedule or of a flow."""
    case.only("variance_type", (None, "learned", "learned_range")) if "variance_type" in case.keys else None
    if not case["use_flow_sigmas"]:
        kind = case.only("prediction_type", PREDICTIONS, "flow_prediction is of use_flow_sigmas=true")
        process = vp_section(case, LEAST, between="log_sigma")
        if case.get("beta_schedule") == "squaredcos_cap_v2" and case.name == "DPMSolverMultistepScheduler":
            grid["round_karras"] = False
        return given_sections(case, process, kind, solver, grid_section(case, **grid))
    if any(case.get(key) for key in ("use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")):
        raise case.refuse("use_flow_sigmas", "with a curve of the betas' sigmas, which are above 1; allowed: without")
    kinds = {"flow_prediction": "velocity", "epsilon": "eps", "sample": "x0"}
    kind = case.only("prediction_type", kinds, "of a flow")
    table = table_of(vp_section(case, LEAST))
    total, shift = int(case["num_train_timesteps"]), float(case["flow_shift"])
    section: Sections = {"name": "diffusers_flow", "scheduler": case.name, "num_train_timesteps": total}
    section |= {key: grid[key] for key in ("final_sigmas_type",) if key in grid}
    if case.get("use_dynamic_shifting"):
        if case.mu is None:
            raise case.refuse("use_dynamic_shifting", "its pipeline gives mu; allowed: mu too, or false")
        section |= {"use_dynamic_shifting": True, "mu": case.mu, "time_shift_type": case["time_shift_type"]}
    else:
        section["flow_shift"] = shift
    if case.get("shift_terminal"):
        section["shift_terminal"] = case["shift_terminal"]
    if case["use_karras_sigmas"]:
        section["use_karras_sigmas"] = True
    whose = case.sigmas or ("pipeline" if case.get("use_dynamic_shifting") else "scheduler")
    if (
        isinstance(whose, str)
        and choose("sigmas", whose, ("scheduler", "pipeline")) == "pipeline"
        and case.name == "UniPCMultistepScheduler"
    ):
        section["sigmas"] = whose
    section["table"] = [float(table[0]), float(table[-1])]
    process = {"name": "flow", "shift": shift, "time_scale": float(total)}
    return given_sections(case, process, kind, solver, section)


def singlestep(case: Case) -> Sections:
    order, n = case.only("solver_order", (1, 2, 3)), case.steps
    algorithm = case.only(
        "algorithm_type", {"dpmsolver++": "dpmpp", "dpmsolver": "dpm_solver", "deis": "dpmpp"}, "of single steps"
    )
    kinds = {"midpoint": "midpoint", "heun": "heun", "logrho": "midpoint", "bh1": "midpoint", "bh2": "midpoint"}
    kind, zero = case.only("solver_type", kinds), case["final_sigmas_type"] == "zero"
    lowered = case["lower_order_final"] or n % order != 0 or zero
    if algorithm == "dpm_solver" and zero:
        raise case.refuse("final_sigmas_type", "dpmsolver has no step to sigma = 0; allowed: sigma_min")
    if not zero and ((order == 2 and n % 2 == 0 and lowered) or (order == 3 and n % 3 == 0 and not lowered)):
        raise case.refuse("lower_order_final", f"with {n} steps to sigma_min; allowed: {str(not lowered).lower()}")
    if is_curved(case) and not zero:
        raise case.refuse("final_sigmas_type", "a curve of sigmas ends there already; allowed: zero, or no curve")
    if order == 1:
        solver: Sections = {"name": "ddim"}
        if bounds(case):
            raise case.refuse("thresholding", "with solver_order=1; allowed: false, or solver_order 2 or 3")
    else:
        solver = {"name": f"{algorithm}_{order}s", "solver_type": kind, **bounds(case)}
        if order == 3:
            solver["stage"] = "midpoint" if kind == "midpoint" else "exponential"
    return discrete_or_flow(case, solver, final_sigmas_type=case["final_sigmas_type"])


def unipc(case: Case) -> Sections:
    case.only("solver_p", (None,), "another scheduler as predictor")
    variants = {"bh1": "bh1", "bh2": "bh2", "midpoint": "bh2", "heun": "bh2", "logrho": "bh2"}
    solver = {
        "name": "unipc",
        "order": case.only("solver_order", (1, 2, 3)),
        "variant": case.only("solver_type", variants),
        "prediction": "data" if case["predict_x0"] else "noise",
        "corrector_off": [int(step) for step in case["disable_corrector"]],
        "lower_order_final": case["lower_order_final"],
        **bounds(case),
    }
    zero = case["final_sigmas_type"] == "zero"
    if zero and (solver["variant"] == "bh1" or not case["lower_order_final"] or not case["predict_x0"]):
        why = "diffusers' own samples are no numbers there"
        raise case.refuse("final_sigmas_type", f"{why}; allowed: sigma_min, or bh2, lower_order_final and predict_x0")
    if not zero and (is_curved(case) or case["use_flow_sigmas"]):
        raise case.refuse("final_sigmas_type", "the sigmas end there already, and its last step goes nowhere; "
                          "allowed: zero")  # fmt: skip
    found = discrete_or_flow(case, solver, final_sigmas_type=case["final_sigmas_type"])
    if is_curved(case) and (case["sigma_min"] is not None or case["sigma_max"] is not None):
        found["grid"] |= {k: case[k] for k in ("sigma_min", "sigma_max") if case[k] is not None}
    return found


def endless(case: Case) -> None:
    """DEIS and SA-Solver never step to sigma = 0."""
    if is_curved(case) or case["use_flow_sigmas"]:
        key = next(k for k in (*UNSET, "use_flow_sigmas") if k.startswith("use_") and case.get(k))
        raise case.refuse(key, "its sigmas end in the same one twice, and its last step goes nowhere; allowed: false")


def deis(case: Case) -> Sections:
    endless(case)
    case.only("algorithm_type", ("deis", "dpmsolver", "dpmsolver++"))  # all of which diffusers reads as deis
    case.only("solver_type", ("logrho", "midpoint", "heun", "bh1", "bh2"))
    last = ALWAYS if case["lower_order_final"] else 0
    order = case.only("solver_order", (1, 2, 3))
    solver = {"name": "deis", "kind": "logrho", "order": order, "lower_order_final": last, **bounds(case)}
    return discrete_or_flow(case, solver)


def sa(case: Case) -> Sections:
    endless(case)
    case.only("tau_func", (None,))
    case.only("algorithm_type", ("data_prediction",), "difax has its data prediction alone")
    orders = {key: case.only(key, (1, 2, 3)) for key in ("predictor_order", "corrector_order")}
    solver = {
        "name": "sa_solver", "tau": 1.0, "interval": [0.2, 0.8], **orders, "few_steps": True,
        "lower_order_final": case["lower_order_final"], **bounds(case),
    }  # fmt: skip
    return discrete_or_flow(case, solver)
