"""A scheduler file of diffusers (scheduler_config.json) as sections of a configuration: process, prediction, solver, grid.

Plain data alone is made here; the registry makes objects of it. Every key of the classes in `scheduler_keys.CLASSES` is
read or known to change nothing; others are refused by name, and so are values that difax has no equal for.

References: https://github.com/huggingface/diffusers, 0.42.1, `__init__`, `set_timesteps` and `step` of each class.
"""

from __future__ import annotations

import math
import os
import pathlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from difax.core.annotations import brief, choose
from difax.core.files import parse_json, read_text
from difax.core.process import log_snr, vp
from difax.weights.scheduler_keys import CLASSES, INERT, LISTS, REFUSED, STORED, TEXTS, Keys

Sections = dict[str, Any]
FILE = "scheduler_config.json"
ALWAYS = 15  # below so many steps diffusers lowers the order of the last ones
FREELY = 1e9  # of the solvers' `stretch`: diffusers never lowers the order of a longer step
LEAST = 2.0**-24  # alpha^2 that diffusers puts where it would be 0


def read_scheduler(path: str | os.PathLike) -> dict[str, Any]:
    """A scheduler file: itself, its folder, or a pipeline's folder with scheduler/scheduler_config.json.

    Raises:
      ValueError: no such file, or what is no JSON object.
    """
    place = pathlib.Path(path)
    tried = [place / "scheduler" / FILE, place / FILE] if place.is_dir() else [place]
    found = next((p for p in tried if p.is_file()), None)
    if found is None:
        raise ValueError(f"scheduler {brief(os.fspath(path))}: no such file; allowed: a {FILE}, or a folder with one")
    config = parse_json(read_text(found), f"scheduler {found}", "a JSON object of keys", finite=False)
    if not isinstance(config, dict):
        raise ValueError(f"scheduler {found}: {brief(config)}; allowed: a JSON object of keys")
    return config


def scheduler_sections(
    config: Mapping[str, Any],
    *,
    steps: int,
    shape: Sequence[int] | None = None,
    mu: float | None = None,
    sigmas: str | None = None,
) -> Sections:
    """The sections process, prediction, solver and grid that sample as a scheduler of diffusers does.

    Args:
      config: what its file says, `_class_name` included.
      steps: `num_inference_steps`, of which some rules depend.
      shape: (height, width, channels) of the latents, or (frames, height, width, channels), from which a flow with
        use_dynamic_shifting has its shift: the tokens are H W / 4, or F H W.
      mu: that shift's logarithm, as a pipeline gives it.
      sigmas: of a flow before its shift, "scheduler" or "pipeline" (1 ... 1/n, as FLUX's, Qwen's and Wan's pipelines give
        them); None: the pipeline's with use_dynamic_shifting, else the scheduler's.

    Raises:
      ValueError: a class, key or value that is unknown, or that difax has no equal for; one line, with the reason.
    """
    name, keys = scheduler_keys(config)
    return MAPPINGS[name](Case(name, keys, steps, None if shape is None else tuple(shape), mu, sigmas))


class Case:
    """One scheduler file: its class, all keys of that class, and what a pipeline adds."""

    def __init__(
        self,
        name: str,
        keys: Keys,
        steps: int,
        shape: tuple[int, ...] | None = None,
        mu: float | None = None,
        sigmas: str | None = None,
    ):
        self.name, self.keys, self.steps, self.shape, self.mu, self.sigmas = name, keys, steps, shape, mu, sigmas

    def __getitem__(self, key: str) -> Any:
        return self.keys[key]

    def get(self, key: str, otherwise: Any = None) -> Any:
        return self.keys.get(key, otherwise)

    def refuse(self, key: str, why: str) -> ValueError:
        return ValueError(f"scheduler {self.name}: {key}={brief(self.keys[key])}; {why}")

    def only(self, key: str, values: Mapping[Any, Any] | Collection[Any], why: str = "") -> Any:
        """The value of a key, or what `values` maps it to; refused with what is allowed where it is none of them."""
        if self.keys[key] not in values:
            allowed = ", ".join(map(str, values))
            raise self.refuse(key, (why and f"{why}; ") + f"allowed: {allowed}")
        return values[self.keys[key]] if isinstance(values, Mapping) else self.keys[key]


def scheduler_keys(config: Mapping[str, Any]) -> tuple[str, Keys]:
    """The class of a scheduler file and all of its keys, those that the file leaves out at diffusers' default.

    Keys of other classes of diffusers are passed over, as diffusers does: files carry them from conversions.

    Raises:
      ValueError: an unknown class or one that is not taken, an unknown key, a value of another type.
    """
    name = config.get("_class_name")
    if not isinstance(name, str):
        raise ValueError(f"scheduler: _class_name={brief(name)}; allowed: {', '.join(CLASSES)}")
    if name in REFUSED:
        raise ValueError(f"scheduler {name} is not taken: {REFUSED[name]}; allowed: {', '.join(CLASSES)}")
    own = CLASSES[choose("scheduler class", name, CLASSES)]
    known = dict.fromkeys((*own, *STORED, *(key for keys in CLASSES.values() for key in keys)))
    for key, value in config.items():
        choose(f"key of scheduler {name}", key, known)
        if key in own and key not in INERT.get(name, ()):
            _check(name, key, value, own[key])
    return name, {**own, **{key: value for key, value in config.items() if key in own}}


def _check(name: str, key: str, value: Any, default: Any) -> None:
    """Refuses a value of another type than diffusers' own."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    finite = number and (math.isfinite(value) or default in (math.inf, -math.inf))
    if key in TEXTS:
        good, allowed = value in TEXTS[key], ", ".join(TEXTS[key])
    elif key in LISTS:
        numbers = isinstance(value, list) and all(type(v) in (int, float) and math.isfinite(v) for v in value)
        good, allowed = numbers or value is default is None, "a list of numbers"
    elif isinstance(default, bool):
        good, allowed = isinstance(value, bool), "true or false"
    elif isinstance(default, int):
        good, allowed = number and value == int(value) and abs(value) < 2**31, "a whole number"
    elif isinstance(default, float):
        good, allowed = finite, "a number"
    elif isinstance(default, str):
        good, allowed = isinstance(value, str), "a text"
    else:  # None by default: a number, a text, or what only None is taken of
        good, allowed = value is None or finite or isinstance(value, str), "a number, a text or null"
    if not good:
        raise ValueError(f"scheduler {name}: {key}={brief(value)}; allowed: {allowed}")


PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
NOISES = {"epsilon": "eps", "v_prediction": "v"}
SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")


def _vp(case: Case, terminal: float = 0.0, **more: Any) -> Sections:
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


def _table(process: Sections) -> np.ndarray:
    """sigma/alpha of the discrete steps of a section's process."""
    made = vp(**{key: value for key, value in process.items() if key != "name"})
    assert made.steps is not None
    return np.exp(-0.5 * log_snr(made, (np.arange(made.steps) + 1) / made.steps))


def _bounds(case: Case) -> Sections:
    """What a solver makes of the data prediction."""
    if case.get("thresholding"):
        return {"thresholding": case["dynamic_thresholding_ratio"], "sample_max_value": case["sample_max_value"]}
    return {"clip": case["clip_sample_range"]} if case.get("clip_sample") else {}


def _grid(case: Case, **more: Any) -> Sections:
    """The grid of a class of discrete steps, with the keys of that class that it reads."""
    read = ("timestep_spacing", "steps_offset", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas",
            "use_lu_lambdas", "lambda_min_clipped")  # fmt: skip
    found = {key: case[key] for key in read if key in case.keys and case[key] != _UNSET.get(key)}
    if _curved(case):
        found["float32"] = True
    return {"name": "diffusers", "scheduler": case.name.replace("Parallel", "")} | found | more


_UNSET = {
    "steps_offset": 0, "use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False,
    "use_lu_lambdas": False, "lambda_min_clipped": -math.inf,
}  # fmt: skip


def _curved(case: Case) -> bool:
    return any(case.get(key) for key in _UNSET if key.startswith("use_"))


def _all_given(case: Case, process: Sections, prediction: str, solver: Sections, grid: Sections) -> Sections:
    curves = [key for key in _UNSET if key.startswith("use_") and case.get(key)]
    if len(curves) > 1:
        raise ValueError(f"scheduler {case.name}: {' and '.join(curves)}; allowed: one of them")
    return {"process": process, "prediction": prediction, "solver": solver, "grid": grid}


def _strides(case: Case) -> tuple[int, bool]:
    """T // n, and whether steps of that size are those between the times of the grid."""
    steps = len(case["trained_betas"]) if case.get("trained_betas") else int(case["num_train_timesteps"])
    spacing = case["timestep_spacing"]
    stride = steps // max(case.steps, 1)
    even = spacing == "leading" or (spacing == "trailing" and steps % case.steps == 0)
    return stride, even


def _ddim(case: Case) -> Sections:
    end = {} if case["set_alpha_to_one"] else {"final_sigmas_type": "sigma_min"}
    solver: Sections = {"name": "ddim", **_bounds(case)}
    if not _strides(case)[1]:
        solver["equal_steps"] = True
    if end and case["steps_offset"] == 0 and "clip" in str(solver) + str(_bounds(case)):
        raise case.refuse("set_alpha_to_one", "with clipping and steps_offset=0 its last step stays where it is; "
                          "allowed: true, clip_sample=false, or steps_offset=1")  # fmt: skip
    return _all_given(case, _vp(case), case.only("prediction_type", PREDICTIONS), solver, _grid(case, **end))


def _cogvideox(case: Case) -> Sections:
    process = _vp(case, snr_shift=case["snr_shift_scale"])
    end = {} if case["set_alpha_to_one"] else {"final_sigmas_type": "sigma_min"}
    even = _strides(case)[1]
    kind = case.only("prediction_type", PREDICTIONS)
    grid = _grid(case, scheduler="DDIMScheduler", **end)
    if case.name == "CogVideoXDDIMScheduler":
        return _all_given(case, process, kind, {"name": "ddim"} | ({} if even else {"equal_steps": True}), grid)
    if not even or end:
        raise case.refuse("timestep_spacing", f"steps={case.steps} leaves its last step short of the clean sample; "
                          "allowed: steps that divide num_train_timesteps, trailing, set_alpha_to_one=true")  # fmt: skip
    return _all_given(case, process, kind, _sde(2, 0, "midpoint"), grid)


def _ddpm(case: Case) -> Sections:
    variances = {"fixed_small": "small", "fixed_small_log": "small", "fixed_large": "large", "learned_range": "learned"}
    if case.name == "UnCLIPScheduler":
        variances = {"fixed_small_log": "small", "learned_range": "learned"}
    variance = case.only("variance_type", variances)
    solver: Sections = {"name": "ddpm", "variance": variance, **_bounds(case)}
    kinds = {"epsilon": "eps", "sample": "x0"} if case.name == "UnCLIPScheduler" else PREDICTIONS
    if case.name == "UnCLIPScheduler":
        return _all_given(case, _vp(case), case.only("prediction_type", kinds), solver, {"name": "uniform"})
    if variance != "small" and (case["steps_offset"] > 0 or case["timestep_spacing"] == "trailing"):
        solver["end_noise"] = True
    return _all_given(case, _vp(case), case.only("prediction_type", kinds), solver, _grid(case))


def _pndm(case: Case) -> Sections:
    kind = case.only("prediction_type", {"epsilon": "eps"}, "it mixes v before it is converted at another time")
    stride, even = _strides(case)
    if not even:
        raise case.refuse("timestep_spacing", "its steps of T // n are then not those between its times; allowed: leading, "
                          "or trailing with steps that divide num_train_timesteps")  # fmt: skip
    start = "plms" if case["skip_prk_steps"] else "prk"
    if start == "prk" and stride % 2:
        raise case.refuse("skip_prk_steps", f"T // n = {stride} is odd, and half of it is rounded; allowed: true, or "
                          "steps whose T // n is even")  # fmt: skip
    end = {} if case["set_alpha_to_one"] else {"final_sigmas_type": "sigma_min"}
    if end and case["steps_offset"] == 0:
        raise case.refuse("set_alpha_to_one", "with steps_offset=0 its last step stays where it is; allowed: true, or "
                          "steps_offset=1")  # fmt: skip
    return _all_given(case, _vp(case), kind, {"name": "pndm", "order": 4, "start": start}, _grid(case, **end))


def _ipndm(case: Case) -> Sections:
    case.only("trained_betas", (None,), "they are no betas there")
    return _all_given(case, {"name": "trig"}, "v", {"name": "ipndm", "from_noise": True}, {"name": "ipndm"})


def _levels(case: Case, solver: Sections, kinds: Mapping[str, str] = PREDICTIONS) -> Sections:
    """Schedulers of k-diffusion, whose first sample is noise times the largest sigma."""
    process = _vp(case, LEAST, between="log_sigma")
    if case["timestep_spacing"] != "leading":
        most = float(_table(process)[-1])
        if _curved(case) and case.get("sigma_max") is not None:
            most = case["sigma_max"]
        process["prior_std"] = most / math.hypot(1.0, most)
    return _all_given(case, process, case.only("prediction_type", kinds), solver, _grid(case))


def _euler(case: Case) -> Sections:
    case.only("final_sigmas_type", ("zero",), "its sample would come out as x/alpha")
    case.only("interpolation_type", ("linear",), "its network would be told other steps than those of the levels")
    found = _levels(case, {"name": "euler"}, PREDICTIONS | {"original_sample": "x0"})
    ends = {key: case[key] for key in ("sigma_min", "sigma_max") if _curved(case) and case[key] is not None}
    found["grid"] |= ends
    if case["timestep_type"] == "discrete" or case["prediction_type"] != "v_prediction":
        table = _table(found["process"])
        for key, value in ends.items():
            if not table[0] * (1 - 1e-6) <= value <= table[-1] * (1 + 1e-6):
                raise case.refuse(key, f"its betas have {table[0]:.4g} ... {table[-1]:.4g}; allowed: within, or "
                                  "timestep_type=continuous with v_prediction")  # fmt: skip
        return found
    if not _curved(case):
        found["grid"]["timestep_type"] = "continuous"
        return found
    # the network is told log(sigma)/4 of any sigma: EDM's process for data of unit variance
    grid = found["grid"]
    table = _table(found["process"])
    low, high = _ends(case, table)
    curve = next(key for key in _UNSET if key.startswith("use_") and case.get(key))
    name = {"use_karras_sigmas": "karras", "use_exponential_sigmas": "exponential", "use_beta_sigmas": "beta"}[curve]
    grid = {"name": name} | ({"of": "sigma"} if name == "beta" else {})
    prior = found["process"].get("prior_std", 1.0)
    process = {"name": "edm", "sigma_min": low, "sigma_max": high, "sigma_data": 1.0, "prior_std": prior}
    return found | {"process": process, "grid": grid}


def _ends(case: Case, table: np.ndarray) -> tuple[float, float]:
    """The ends of a curve of sigmas of Euler's: as given, or of the steps that the spacing has."""
    from difax.core.grids.plain import spaced

    k = spaced(case["timestep_spacing"], len(table), case.steps, int(case["steps_offset"]))
    high, low = np.interp(k[[0, -1]], np.arange(len(table)), table)
    given = case["sigma_min"], case["sigma_max"]
    return tuple(float(own if value is None else value) for value, own in zip(given, (low, high), strict=True))


def _heun(case: Case) -> Sections:
    return _levels(case, {"name": "heun", "space": "sigma", **_bounds(case)})


def _kdpm2(case: Case) -> Sections:
    eta = 1.0 if case.name == "KDPM2AncestralDiscreteScheduler" else 0.0
    return _levels(case, {"name": "kdpm2", "eta": eta, "space": "sigma"}, NOISES)


def _multistep_rules(case: Case) -> Sections:
    last = ALWAYS if case["lower_order_final"] else 0
    return {"lower_order_final": last, "stretch": FREELY}


def _sde(order: int, last: int, kind: str) -> Sections:
    return {
        "name": f"dpmpp_{order}m_sde", "eta": 1.0, "lower_order_final": last, "stretch": FREELY, "solver_type": kind,
    }  # fmt: skip


def _dpm_solver(case: Case) -> Sections:
    """The solver of DPMSolverMultistep and of its likes."""
    order = case.only("solver_order", (1, 2, 3))
    algorithm = case.get("algorithm_type", "sde-dpmsolver++")
    kinds = {"midpoint": "midpoint", "heun": "heun", "logrho": "midpoint", "bh1": "midpoint", "bh2": "midpoint"}
    kind, rules = case.only("solver_type", kinds), _multistep_rules(case)
    if algorithm == "deis":  # which diffusers reads so
        algorithm = "dpmsolver++"
    if algorithm not in ("dpmsolver", "dpmsolver++", "sde-dpmsolver++"):
        raise case.refuse("algorithm_type", "allowed: dpmsolver++, sde-dpmsolver++, dpmsolver")
    if order == 1:
        if _bounds(case):
            raise case.refuse("thresholding", "with solver_order=1; allowed: false, or solver_order 2 or 3")
        return {"name": "ddim", "eta": 1.0 if algorithm == "sde-dpmsolver++" else 0.0}
    lowered = case["lower_order_final"] and case.steps < ALWAYS
    if case["euler_at_final"] and case["final_sigmas_type"] != "zero" and not lowered:
        rules["euler_at_final"] = True
    names = {"dpmsolver++": "dpmpp_{}m", "dpmsolver": "dpm_solver_{}m", "sde-dpmsolver++": "dpmpp_{}m_sde"}
    return {"name": names[algorithm].format(order), "solver_type": kind, **rules, **_bounds(case)}


def _dpm(case: Case) -> Sections:
    algorithm = case["algorithm_type"]
    if algorithm in ("dpmsolver", "sde-dpmsolver") and case["final_sigmas_type"] == "zero":
        raise case.refuse("final_sigmas_type", f"{algorithm} has no step to sigma = 0; allowed: sigma_min")
    if _curved(case) and case["final_sigmas_type"] == "sigma_min":
        raise case.refuse("final_sigmas_type", "a curve of sigmas ends there already, and its last step goes nowhere; "
                          "allowed: zero, or no curve")  # fmt: skip
    return _discrete_or_flow(case, _dpm_solver(case), final_sigmas_type=case["final_sigmas_type"])


def _discrete_or_flow(case: Case, solver: Sections, **grid: Any) -> Sections:
    """Multistep schedulers, whose network is one of a discrete schedule or of a flow."""
    case.only("variance_type", (None, "learned", "learned_range")) if "variance_type" in case.keys else None
    if not case["use_flow_sigmas"]:
        kind = case.only("prediction_type", PREDICTIONS, "flow_prediction is of use_flow_sigmas=true")
        process = _vp(case, LEAST, between="log_sigma")
        if case.get("beta_schedule") == "squaredcos_cap_v2" and case.name == "DPMSolverMultistepScheduler":
            grid["round_karras"] = False
        return _all_given(case, process, kind, solver, _grid(case, **grid))
    if any(case.get(key) for key in ("use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")):
        raise case.refuse("use_flow_sigmas", "with a curve of the betas' sigmas, which are above 1; allowed: without")
    kinds = {"flow_prediction": "velocity", "epsilon": "eps", "sample": "x0"}
    kind = case.only("prediction_type", kinds, "of a flow")
    table = _table(_vp(case, LEAST))
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
    if choose("sigmas", whose, ("scheduler", "pipeline")) == "pipeline" and case.name == "UniPCMultistepScheduler":
        section["sigmas"] = whose
    section["table"] = [float(table[0]), float(table[-1])]
    process = {"name": "flow", "shift": shift, "time_scale": float(total)}
    return _all_given(case, process, kind, solver, section)


def _singlestep(case: Case) -> Sections:
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
    if _curved(case) and not zero:
        raise case.refuse("final_sigmas_type", "a curve of sigmas ends there already; allowed: zero, or no curve")
    if order == 1:
        solver: Sections = {"name": "ddim"}
        if _bounds(case):
            raise case.refuse("thresholding", "with solver_order=1; allowed: false, or solver_order 2 or 3")
    else:
        solver = {"name": f"{algorithm}_{order}s", "solver_type": kind, **_bounds(case)}
        if order == 3:
            solver["stage"] = "midpoint" if kind == "midpoint" else "exponential"
    return _discrete_or_flow(case, solver, final_sigmas_type=case["final_sigmas_type"])


def _dpm_sde(case: Case) -> Sections:
    return _levels(case, {"name": "dpmpp_sde", "eta": 1.0, "r": 0.5}, NOISES)


def _unipc(case: Case) -> Sections:
    case.only("solver_p", (None,), "another scheduler as predictor")
    variants = {"bh1": "bh1", "bh2": "bh2", "midpoint": "bh2", "heun": "bh2", "logrho": "bh2"}
    solver = {
        "name": "unipc",
        "order": case.only("solver_order", (1, 2, 3)),
        "variant": case.only("solver_type", variants),
        "prediction": "data" if case["predict_x0"] else "noise",
        "corrector_off": [int(step) for step in case["disable_corrector"]],
        "lower_order_final": case["lower_order_final"],
        **_bounds(case),
    }
    zero = case["final_sigmas_type"] == "zero"
    if zero and (solver["variant"] == "bh1" or not case["lower_order_final"] or not case["predict_x0"]):
        raise case.refuse("final_sigmas_type", "diffusers' own samples are no numbers there; allowed: sigma_min, or bh2 "
                          "with lower_order_final and predict_x0")  # fmt: skip
    if not zero and (_curved(case) or case["use_flow_sigmas"]):
        raise case.refuse("final_sigmas_type", "the sigmas end there already, and its last step goes nowhere; "
                          "allowed: zero")  # fmt: skip
    found = _discrete_or_flow(case, solver, final_sigmas_type=case["final_sigmas_type"])
    if _curved(case) and (case["sigma_min"] is not None or case["sigma_max"] is not None):
        found["grid"] |= {k: case[k] for k in ("sigma_min", "sigma_max") if case[k] is not None}
    return found


def _endless(case: Case) -> None:
    """DEIS and SA-Solver never step to sigma = 0."""
    if _curved(case) or case["use_flow_sigmas"]:
        key = next(k for k in (*_UNSET, "use_flow_sigmas") if k.startswith("use_") and case.get(k))
        raise case.refuse(key, "its sigmas end in the same one twice, and its last step goes nowhere; allowed: false")


def _deis(case: Case) -> Sections:
    _endless(case)
    case.only("algorithm_type", ("deis", "dpmsolver", "dpmsolver++"))  # all of which diffusers reads as deis
    case.only("solver_type", ("logrho", "midpoint", "heun", "bh1", "bh2"))
    last = ALWAYS if case["lower_order_final"] else 0
    order = case.only("solver_order", (1, 2, 3))
    solver = {"name": "deis", "kind": "logrho", "order": order, "lower_order_final": last, **_bounds(case)}
    return _discrete_or_flow(case, solver)


def _sa(case: Case) -> Sections:
    _endless(case)
    case.only("tau_func", (None,))
    case.only("algorithm_type", ("data_prediction",), "difax has its data prediction alone")
    orders = {key: case.only(key, (1, 2, 3)) for key in ("predictor_order", "corrector_order")}
    solver = {
        "name": "sa_solver", "tau": 1.0, "interval": [0.2, 0.8], **orders, "few_steps": True,
        "lower_order_final": case["lower_order_final"], **_bounds(case),
    }  # fmt: skip
    return _discrete_or_flow(case, solver)


def _edm(case: Case) -> Sections:
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
        solver = _dpm_solver(case)
        if case["thresholding"] and data != 1.0:
            raise case.refuse("thresholding", f"with sigma_data={data:g}; allowed: false, or sigma_data=1")
        if solver["name"] == "dpmpp_3m_sde":
            raise case.refuse("solver_order", "it has no noise for sde-dpmsolver++ there; allowed: 1, 2")
    else:
        process["told"] = "atan"
        case.only("solver_order", (1, 2))
        solver = _dpm_solver(case)
    return _all_given(case, process, case.only("prediction_type", kinds), solver, grid)


def _flow(case: Case) -> Sections:
    total, shift = int(case["num_train_timesteps"]), float(case["shift"])
    inverted = bool(case.get("invert_sigmas"))
    process: Sections = {"name": "flow", "shift": shift, "time_scale": float(total)}
    if inverted:
        process = {"name": "sit", "time_scale": float(total)}
    grid: Sections = {"name": "flow_match", "num_train_timesteps": total, "shift": shift}
    dynamic = bool(case.get("use_dynamic_shifting"))
    if dynamic:
        mu = _mu(case) if case.mu is None else case.mu
        grid |= {"use_dynamic_shifting": True, "mu": mu, "time_shift_type": case["time_shift_type"]}
        if case["time_shift_type"] == "exponential" and not inverted:
            process["shift"] = math.exp(mu)
    if case.get("shift_terminal"):
        grid["shift_terminal"] = case["shift_terminal"]
    grid |= {key: True for key in _UNSET if key.startswith("use_") and case.get(key)}
    if case.name != "FlowMatchHeunDiscreteScheduler":
        whose = case.sigmas or ("pipeline" if dynamic else "scheduler")
        grid["sigmas"] = choose("sigmas", whose, ("scheduler", "pipeline"))
    solver: Sections = {"name": "euler"}
    if case.name == "FlowMatchLCMScheduler":
        case.only("scale_factors", (None,), "it would sample in growing sizes")
    if case.name == "FlowMatchLCMScheduler" or case.get("stochastic_sampling"):
        solver = {"name": "ddim", "gamma": 1.0}
        if inverted:
            raise case.refuse("invert_sigmas", "with noise at each step; allowed: false")
    if case.name == "FlowMatchHeunDiscreteScheduler":
        solver = {"name": "heun"}
    return _all_given(case, process, "velocity", solver, grid)


def _mu(case: Case) -> float:
    """mu linear in the tokens of an image, between those of base_shift and of max_shift."""
    if case.shape is None or len(case.shape) < 3:
        raise case.refuse("use_dynamic_shifting", "needs the shape of the latents, or mu; allowed: these, or false")
    *frames, height, width, _ = case.shape
    tokens = math.prod(frames) * height * width if frames else height * width // 4
    low, high = case["base_image_seq_len"], case["max_image_seq_len"]
    if high == low:
        raise case.refuse("max_image_seq_len", f"equals base_image_seq_len={low}; allowed: another")
    return case["base_shift"] + (case["max_shift"] - case["base_shift"]) * (tokens - low) / (high - low)


def _distilled(case: Case) -> Sections:
    grid: Sections = {"name": "lcm", "original_inference_steps": int(case["original_inference_steps"])}
    kind = case.only("prediction_type", PREDICTIONS)
    if case.name == "TCDScheduler":
        return _all_given(case, _vp(case), kind, {"name": "ddim", "gamma": 0.3}, grid | {"last": "sigma_min"})
    solver = {"name": "ddim", "gamma": 1.0, "boundary": float(case["timestep_scaling"]), **_bounds(case)}
    return _all_given(case, _vp(case), kind, solver, grid)


MAPPINGS: dict[str, Callable[[Case], Sections]] = {
    "DDPMScheduler": _ddpm,
    "DDPMParallelScheduler": _ddpm,
    "DDIMScheduler": _ddim,
    "DDIMParallelScheduler": _ddim,
    "CogVideoXDDIMScheduler": _cogvideox,
    "CogVideoXDPMScheduler": _cogvideox,
    "UnCLIPScheduler": _ddpm,
    "PNDMScheduler": _pndm,
    "IPNDMScheduler": _ipndm,
    "LMSDiscreteScheduler": lambda case: _levels(case, {"name": "lms", "order": 4}),
    "DPMSolverMultistepScheduler": _dpm,
    "DPMSolverSinglestepScheduler": _singlestep,
    "DPMSolverSDEScheduler": _dpm_sde,
    "UniPCMultistepScheduler": _unipc,
    "DEISMultistepScheduler": _deis,
    "SASolverScheduler": _sa,
    "KDPM2DiscreteScheduler": _kdpm2,
    "KDPM2AncestralDiscreteScheduler": _kdpm2,
    "HeunDiscreteScheduler": _heun,
    "EulerDiscreteScheduler": _euler,
    "EulerAncestralDiscreteScheduler": lambda case: _levels(case, {"name": "euler_ancestral"}, NOISES),
    "EDMEulerScheduler": _edm,
    "EDMDPMSolverMultistepScheduler": _edm,
    "CosineDPMSolverMultistepScheduler": _edm,
    "FlowMatchEulerDiscreteScheduler": _flow,
    "FlowMatchHeunDiscreteScheduler": _flow,
    "FlowMatchLCMScheduler": _flow,
    "LCMScheduler": _distilled,
    "TCDScheduler": _distilled,
}
