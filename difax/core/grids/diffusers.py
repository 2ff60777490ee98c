"""The time grids of diffusers' schedulers, by the names of its classes and keys, number for number.

Its schedulers of discrete VP processes all lay times in three moves: steps are spaced (`timestep_spacing`), their noise
levels sigma/alpha may be replaced by a curve between the same ends (`use_karras_sigmas`, ...), and what the network is
told is looked up in the table of noise levels, rounded or not. The classes differ in each of them, as `VP` says.

References: https://github.com/huggingface/diffusers, 0.42.1, `set_timesteps` of each class.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from difax.core.annotations import OrInfinite, brief, checked, choose
from difax.core.grids.levels import beta_quantiles, geometric, level_range, powers
from difax.core.grids.plain import Spacing, logit_shift, shift_time, spaced
from difax.core.grids.times import Grid, Times, ratios, times_of_ratios
from difax.core.process import Process


class Rule(NamedTuple):
    """How a class of diffusers lays times.

    spacing: its default. more: are n + 1 steps spaced, the lowest left out. whole: are steps rounded, and what the
    network is told cut off to a whole number. table: do curves run between the ends of the table, not of the spacing.
    nearest: curves of which what is told is rounded first.
    """

    spacing: str
    more: bool
    whole: bool
    table: bool
    nearest: tuple[str, ...] = ()


CURVES = ("karras", "exponential", "beta")
_PLAIN = Rule("leading", False, True, False)
_LEVELS = Rule("linspace", False, False, False)
_MULTISTEP = Rule("linspace", True, True, True, ("karras",))
VP: dict[str, Rule] = {
    "DDIMScheduler": _PLAIN,
    "DDIMParallelScheduler": _PLAIN,
    "DDPMScheduler": _PLAIN,
    "DDPMParallelScheduler": _PLAIN,
    "PNDMScheduler": _PLAIN,
    "EulerDiscreteScheduler": _LEVELS,
    "EulerAncestralDiscreteScheduler": _LEVELS,
    "HeunDiscreteScheduler": _LEVELS,
    "LMSDiscreteScheduler": _LEVELS,
    "DPMSolverSDEScheduler": _LEVELS,
    "KDPM2DiscreteScheduler": _LEVELS._replace(nearest=("karras",)),
    "KDPM2AncestralDiscreteScheduler": _LEVELS._replace(nearest=("karras",)),
    "DPMSolverMultistepScheduler": _MULTISTEP._replace(nearest=("karras", "lu")),
    "DPMSolverSinglestepScheduler": _MULTISTEP,
    "DEISMultistepScheduler": _MULTISTEP,
    "UniPCMultistepScheduler": _MULTISTEP,
    "SASolverScheduler": _MULTISTEP,
}
ENDLESS = ("DEISMultistepScheduler", "SASolverScheduler")  # never step to the clean sample


@checked
def diffusers(
    scheduler: str = "EulerDiscreteScheduler",
    timestep_spacing: Spacing | None = None,
    steps_offset: int = 0,
    use_karras_sigmas: bool = False,
    use_exponential_sigmas: bool = False,
    use_beta_sigmas: bool = False,
    use_lu_lambdas: bool = False,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    interpolation_type: Literal["linear", "log_linear"] = "linear",
    timestep_type: Literal["discrete", "continuous"] = "discrete",
    final_sigmas_type: Literal["zero", "sigma_min"] | None = None,
    lambda_min_clipped: OrInfinite = -math.inf,
    round_karras: bool = True,
    float32: bool = False,
) -> Grid:
    """The grid of a scheduler of diffusers, on the discrete VP process that its betas are.

    Where diffusers departs from what its steps assume, so does this: what is told is rounded while the noise level is
    not, and with "log_linear" the steps told are not those of the levels. Its tables of noise levels are float32, of
    which 1 - 0.9999 has three digits, so that its smallest sigma is 3e-4 off: process vp's `precision`, and `float32`
    here. Not taken over: a "trailing" that rounding makes one step too long. That DDIM steps to k - T // n whatever the
    spacing was is solver ddim's `equal_steps`. A last step from sigma_min to sigma_min, as after a curve, changes
    nothing and is left out, with its evaluation.

    Args:
      scheduler: the class (`VP`). timestep_spacing: None is the default of the class.
      steps_offset: of "leading", 0 or more.
      use_*: the curve, one at most; use_lu_lambdas is exponential, told to whole steps.
      sigma_min, sigma_max: of the curve (keys of Euler's alone), within the table; None are the ends that the class
        takes.
      interpolation_type, timestep_type: of Euler; "continuous" tells log(sigma)/4, as it does for v-prediction alone.
      final_sigmas_type: where the run ends, None is "zero", but "sigma_min" for DEIS and SA-Solver, which do not ask.
        DDIM's and PNDM's set_alpha_to_one=False is "sigma_min".
      lambda_min_clipped: cuts off the steps whose log(alpha/sigma) is below.
      float32: are steps looked up in logarithms of float32, as diffusers does, where the rounding of the last digit
        decides which step is told when it is cut off. For processes whose levels are in float32 too (vp's `precision`).
      round_karras: False where beta_schedule is "squaredcos_cap_v2", for which DPMSolverMultistep does not round.

    References: Lin et al. 2023, arXiv:2305.08891 (spacings); Karras et al. 2022, arXiv:2206.00364; Lee et al. 2024,
    arXiv:2407.12173 (beta); https://github.com/huggingface/diffusers.
    """
    rule = VP[choose("scheduler of diffusers", scheduler, VP)]
    spacing = rule.spacing if timestep_spacing is None else timestep_spacing
    given = {
        "karras": use_karras_sigmas,
        "exponential": use_exponential_sigmas,
        "beta": use_beta_sigmas,
        "lu": use_lu_lambdas,
    }
    curves = [name for name, used in given.items() if used]
    if len(curves) > 1:
        raise ValueError(f"diffusers: {', '.join(curves)} are all used; allowed: one curve")
    curve = curves[0] if curves else None
    if curve and rule is _PLAIN:
        raise ValueError(f"diffusers: scheduler={scheduler!r} has no curve {curve}; allowed: none")
    if steps_offset < 0:
        raise ValueError(f"diffusers: steps_offset={steps_offset}; allowed: 0 or more")
    if interpolation_type == "log_linear" and scheduler != "EulerDiscreteScheduler":
        raise ValueError(f"diffusers: scheduler={scheduler!r} interpolates linearly; allowed: linear")
    final = final_sigmas_type or ("sigma_min" if scheduler in ENDLESS else "zero")
    if scheduler in ENDLESS and final == "zero":
        raise ValueError(f"diffusers: scheduler={scheduler!r} ends at sigma_min; allowed: final_sigmas_type=sigma_min")

    def grid(process: Process, n: int) -> Times:
        if process.steps is None:
            raise ValueError(f"grid diffusers needs a process of discrete steps; {process.name} is continuous")
        steps = process.steps
        table = _table(process, float32)
        kept = steps - int(np.sum(-np.log(table) < lambda_min_clipped))
        if kept < n:
            raise ValueError(f"diffusers: lambda_min_clipped={lambda_min_clipped:g} leaves {kept} steps; allowed: {n}")
        k = spaced(spacing, steps, n, steps_offset, rule.more, kept)
        k = np.round(k) if rule.whole else k
        sigma, told, end = np.interp(k, np.arange(steps), table), k, (table[0] if final == "sigma_min" else 0.0)
        times = (k + 1) / steps
        if curve:
            level_range("diffusers", process, sigma_min, sigma_max)
            low, high = (table[0], table[-1]) if rule.table else (sigma[-1], sigma[0])
            sigma = _curve(curve, low if sigma_min is None else sigma_min, high if sigma_max is None else sigma_max, n)
            told = _steps_of(sigma, table, float32)
            told = np.round(told) if curve in rule.nearest and (round_karras or rule.more is False) else told
        elif interpolation_type == "log_linear":
            *sigma, end = geometric(table[0], table[-1], n + 1)
        if curve or interpolation_type == "log_linear" or not rule.whole:
            times = times_of_ratios(process, np.asarray(sigma))
        if timestep_type == "continuous":
            told = 0.25 * np.log(sigma)
        elif rule.whole:
            told = np.trunc(told)
        return ending(times, told, float(times_of_ratios(process, np.array(end))))

    return grid


@checked
def diffusers_flow(
    scheduler: Literal[
        "UniPCMultistepScheduler",
        "DPMSolverMultistepScheduler",
        "DPMSolverSinglestepScheduler",
        "DEISMultistepScheduler",
        "SASolverScheduler",
    ] = "UniPCMultistepScheduler",
    num_train_timesteps: int = 1000,
    flow_shift: float = 1.0,
    use_dynamic_shifting: bool = False,
    mu: float | None = None,
    time_shift_type: Literal["exponential", "linear"] = "exponential",
    shift_terminal: float | None = None,
    use_karras_sigmas: bool = False,
    final_sigmas_type: Literal["zero", "sigma_min"] | None = None,
    table: tuple[float, float] | None = None,
    sigmas: Literal["scheduler", "pipeline"] = "scheduler",
) -> Grid:
    """`use_flow_sigmas` of diffusers' multistep schedulers, on a flow: the steps told are cut off to whole numbers.

    Args:
      scheduler: the class. num_train_timesteps: T, 1 or more.
      flow_shift, use_dynamic_shifting, mu, time_shift_type, shift_terminal: as of `flow_match`; UniPC shifts by mu, the
        others set flow_shift to e^mu.
      use_karras_sigmas: UniPC's: s/(1 + s) of Karras' curve over `table`, unshifted.
      final_sigmas_type: "zero" or "sigma_min"; None is "zero", but for DEIS and SA-Solver.
      table: the smallest and largest sigma/alpha of the betas in the same configuration, which UniPC's curve runs
        between, and of which DPMSolver's "sigma_min" is the smallest.
      sigmas: UniPC's, before the shift; "pipeline" are even from 1 to 1/n.

    References: Esser et al. (SD3), 2024, arXiv:2403.03206; https://github.com/huggingface/diffusers.
    """
    _check_flow("diffusers_flow", num_train_timesteps, flow_shift, use_dynamic_shifting, mu, shift_terminal)
    _check_linear("diffusers_flow", use_dynamic_shifting, time_shift_type, mu)
    unipc, final = scheduler == "UniPCMultistepScheduler", final_sigmas_type
    final = final or ("sigma_min" if scheduler in ENDLESS else "zero")
    if use_karras_sigmas and not unipc:
        raise ValueError(f"diffusers_flow: use_karras_sigmas with {scheduler} is no flow there; allowed: without")
    if table is not None and not 0 < table[0] < table[1]:
        raise ValueError(f"diffusers_flow: table={table}; allowed: two numbers above 0, the smaller first")
    if table is None and (use_karras_sigmas or ("DPM" in scheduler and final == "sigma_min")):
        raise ValueError(
            f"diffusers_flow: table is missing for use_karras_sigmas={use_karras_sigmas}, final_sigmas_type={final}; "
            "allowed: the smallest and largest sigma/alpha of the betas"
        )

    def grid(process: Process, n: int) -> Times:
        only_flows("diffusers_flow", process)
        total, end = num_train_timesteps, 0.0
        if use_karras_sigmas and table is not None:
            sigma = powers(*table, n, 7.0)
            sigma = sigma / (1 + sigma)
        elif unipc:
            sigma = np.linspace(1, 1 / n, n) if sigmas == "pipeline" else np.linspace(1, 1 / total, n + 1)[:-1]
            sigma = _shifted(sigma, flow_shift, use_dynamic_shifting, mu, time_shift_type)
            sigma = sigma if shift_terminal is None else stretched(sigma, shift_terminal)
            sigma[0] -= 1e-6 if abs(sigma[0] - 1) < 1e-6 else 0.0
        else:
            shift = math.exp(mu) if use_dynamic_shifting and mu is not None else flow_shift
            sigma = shift_time(1 - np.linspace(1, 1 / total, n + 1), shift)[::-1][:-1]
        if final == "sigma_min":
            end = table[0] if table is not None and "DPM" in scheduler else float(sigma[-1])
        return ending(sigma, np.trunc(sigma * total), end)

    return grid


@checked
def flow_match(
    num_train_timesteps: int = 1000,
    shift: float | None = None,
    use_dynamic_shifting: bool = False,
    mu: float | None = None,
    time_shift_type: Literal["exponential", "linear"] = "exponential",
    shift_terminal: float | None = None,
    use_karras_sigmas: bool = False,
    use_exponential_sigmas: bool = False,
    use_beta_sigmas: bool = False,
    invert_sigmas: bool = False,
    sigmas: Literal["scheduler", "pipeline"] | Sequence[float] = "scheduler",
) -> Grid:
    """The grid of diffusers' FlowMatchEuler, FlowMatchHeun and FlowMatchLCM schedulers, on a flow.

    The scheduler's own sigmas run evenly from 1 to what 1/T is after the shift, and are shifted then: the smallest one
    is shifted twice. Pipelines such as FLUX's give sigmas of their own, even from 1 to 1/n, which are shifted once:
    that is `shifted`.

    Args:
      num_train_timesteps: T, 1 or more.
      shift: s t/(1 + (s - 1) t), 0.001 ... 1000; None takes the process's own.
      use_dynamic_shifting: shifts by mu instead. mu: None takes the process's own shift (FLUX's and Wan's, by size).
      time_shift_type: e^mu/(e^mu + 1/t - 1), or mu/(mu + 1/t - 1).
      shift_terminal: stretches so that the last one is this, in (0, 1) (0.1 in LTX-Video).
      use_*: the curve between the ends of the sigmas, one at most.
      invert_sigmas: tells (1 - sigma) T (Mochi's).
      sigmas: whose they are, before the shift; or a list of them, falling, in (0, 1], one for each step.

    References: Esser et al. (SD3), 2024, arXiv:2403.03206; https://github.com/huggingface/diffusers.
    """
    _check_flow("flow_match", num_train_timesteps, shift, False, mu, shift_terminal)
    _check_linear("flow_match", use_dynamic_shifting, time_shift_type, mu)
    curves = [
        c for c, used in zip(CURVES, (use_karras_sigmas, use_exponential_sigmas, use_beta_sigmas), strict=True) if used
    ]
    if len(curves) > 1:
        raise ValueError(f"flow_match: {', '.join(curves)} are all used; allowed: one curve")

    given = None if isinstance(sigmas, str) else np.asarray(sigmas, np.float64)
    if given is not None and (not len(given) or not np.all((given > 0) & (given <= 1)) or np.any(np.diff(given) >= 0)):
        raise ValueError(f"flow_match: sigmas={brief([float(s) for s in given])}; allowed: falling numbers in (0, 1]")

    def laid(process: Process, n: int, dtype: type) -> np.ndarray:
        by, total = process.shift if shift is None else shift, num_train_timesteps
        if given is not None:
            sigma = given.astype(dtype)
        elif sigmas == "pipeline":
            sigma = np.linspace(1, 1 / n, n).astype(dtype)
        else:
            sigma = np.linspace(1, 1 / total if use_dynamic_shifting else shift_time(1 / total, by), n)
        moved = mu
        if moved is None:
            moved = math.log(process.shift) if time_shift_type == "exponential" else process.shift
        sigma = _shifted(sigma, by, use_dynamic_shifting, moved, time_shift_type)
        sigma = sigma if shift_terminal is None else stretched(sigma, shift_terminal)
        return (_curve(curves[0], sigma[-1], sigma[0], n) if curves else sigma).astype(dtype)

    def grid(process: Process, n: int) -> np.ndarray | Times:
        only_flows("flow_match", process)
        if given is not None and len(given) != n:
            raise ValueError(f"flow_match: {len(given)} sigmas; allowed: the {n} of steps={n}")
        # rounded as there, since a network tells 1000 t from its neighbour in float32; not where two would be one
        sigma = laid(process, n, np.float32)
        sigma = sigma if np.all(np.diff(sigma) < 0) else laid(process, n, np.float64)
        times = np.append(sigma.astype(np.float64), 0.0)
        return Times(times, (1 - sigma) * num_train_timesteps) if invert_sigmas else times

    return grid


@checked
def lcm(original_inference_steps: int = 50, last: Literal["zero", "sigma_min"] = "zero") -> Grid:
    """The steps on which LCM and TCD were distilled, every (T // m)-th less one, and evenly n of these.

    Args:
      original_inference_steps: m, of the distillation, 1 ... T (50); more than n.
      last: "zero" ends at the clean sample, "sigma_min" at the first discrete step, as diffusers' TCD.

    References: Luo et al. (LCM), 2023, arXiv:2310.04378; Zheng et al. (TCD), 2024, arXiv:2402.19159.
    """
    if original_inference_steps < 1:
        raise ValueError(f"lcm: original_inference_steps={original_inference_steps}; allowed: 1 or more")

    def grid(process: Process, n: int) -> np.ndarray:
        m, steps = original_inference_steps, process.steps
        if steps is None:
            raise ValueError(f"grid lcm needs a process of discrete steps; {process.name} is continuous")
        if not n <= m <= steps:
            raise ValueError(f"lcm: original_inference_steps={m}; allowed: {n} ... {steps} for {n} steps")
        distilled = (np.arange(1, m + 1) * (steps // m) - 1)[::-1]
        k = distilled[np.floor(np.linspace(0, m, n, endpoint=False)).astype(int)]
        return np.append((k + 1) / steps, 1 / steps if last == "sigma_min" else 0.0)

    return grid


def ipndm() -> Grid:
    """The times of diffusers' IPNDMScheduler, sin(pi t/2) = sin(pi s/2)^2 for even s in [0, 1], there on `trig`.

    References: https://github.com/huggingface/diffusers, 0.42.1, after Crowson's v-diffusion.
    """

    def grid(process: Process, n: int) -> np.ndarray:
        return 2 / math.pi * np.arcsin(np.sin(np.linspace(1, 0, n + 1) * (math.pi / 2)) ** 2)

    return grid


def ending(times: np.ndarray, told: np.ndarray, end: float) -> Times:
    """Times and what is told, with the end behind them; a step to the very same time is left out."""
    repeated = len(times) > 1 and bool(np.isclose(times[-1], end, rtol=1e-9, atol=0))
    return Times(times, told[:-1]) if repeated else Times(np.append(times, end), told)


def stretched(sigma: np.ndarray, terminal: float) -> np.ndarray:
    """Sigmas with 1 - sigma scaled so that the last one is `terminal`."""
    return 1 - (1 - sigma) * (1 - terminal) / (1 - sigma[-1])


def _shifted(sigma: np.ndarray, shift: float, dynamic: bool, mu: float | None, kind: str) -> np.ndarray:
    if not dynamic:
        return shift_time(sigma, shift)
    assert mu is not None
    return logit_shift(sigma, math.exp(mu) if kind == "exponential" else mu)


def _curve(name: str, low: float, high: float, n: int) -> np.ndarray:
    if name == "karras":
        return powers(low, high, n, 7.0)
    if name == "beta":
        return low + beta_quantiles(1 - np.linspace(0, 1, n), 0.6, 0.6) * (high - low)
    return geometric(low, high, n)


def _table(process: Process, float32: bool) -> np.ndarray:
    """sigma/alpha of the discrete steps, in float64, or as float32 has it of alpha^2 in float32."""
    assert process.steps is not None
    k = (np.arange(process.steps) + 1) / process.steps
    if not float32:
        return ratios(process, k)
    square = np.asarray(process.level(k).alpha ** 2, np.float32)
    return np.sqrt((1 - square) / square).astype(np.float64)


def _steps_of(sigma: np.ndarray, table: np.ndarray, float32: bool = False) -> np.ndarray:
    """The steps at which a table has these noise levels, between two of them linear in log(sigma)."""
    if not float32:
        return np.interp(np.log(sigma), np.log(table), np.arange(len(table)))
    logs, value = np.log(table.astype(np.float32)), np.log(sigma)
    low = np.clip(np.sum(value[:, None] - logs >= 0, axis=1) - 1, 0, len(table) - 2)
    w = np.clip((logs[low] - value) / (logs[low] - logs[low + 1]), 0, 1)
    return (1 - w) * low + w * (low + 1)


def only_flows(name: str, process: Process) -> None:
    if process.name not in ("flow", "sit"):
        raise ValueError(f"grid {name} needs a flow process; {process.name} is none (flow, sit are)")


def _check_flow(
    name: str, total: int, shift: float | None, dynamic: bool, mu: float | None, terminal: float | None
) -> None:
    if total < 1:
        raise ValueError(f"{name}: num_train_timesteps={total}; allowed: 1 or more")
    if shift is not None and not 1e-3 <= shift <= 1e3:
        raise ValueError(f"{name}: shift={shift}; allowed: > 0, 0.001 ... 1000")
    if mu is not None and not -7 <= mu <= 7:  # e^7 is about the largest shift
        raise ValueError(f"{name}: mu={mu}; allowed: -7 ... 7")
    if dynamic and mu is None:
        raise ValueError(f"{name}: use_dynamic_shifting=True without mu; allowed: mu too")
    if terminal is not None and not 0 < terminal < 1:
        raise ValueError(f"{name}: shift_terminal={terminal}; allowed: above 0, below 1")


def _check_linear(name: str, dynamic: bool, kind: str, mu: float | None) -> None:
    if dynamic and kind == "linear" and mu is not None and mu <= 0:
        raise ValueError(f"{name}: mu={mu} with time_shift_type=linear; allowed: above 0")
