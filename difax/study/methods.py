"""The methods that `difax pareto` compares: names for settings of a configuration, from every seam, and together.

A method is what `difax sample --config.key=value` would be given; one that a model or a configuration cannot have is
refused by its factory and reported with the reason. `calibrated` names the file that it needs (`difax calibrate`).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from difax.config import SHORT
from difax.registry import REGISTRIES

FAMILIES = ("steps", "solver", "guidance", "cache", "attention", "quantisation", "together")


class Method(NamedTuple):
    """family: one of `FAMILIES`; settings: {key of the configuration: value}; calibrated: a technique, or None.

    evaluations: the steps are as many as make so many model evaluations, or as near below as the solver comes; None:
    the settings say it.
    """

    family: str
    settings: dict[str, Any]
    calibrated: str | None = None
    evaluations: int | None = None


def _steps(n: int) -> Method:
    return Method("steps", {"steps": n})


def _solver(name: str, n: int, grid: str | None = None) -> Method:
    return Method("solver", {"solver.name": name, "steps": n, **({"grid.name": grid} if grid else {})})


def _cache(name: str, calibrated: str | None = None, **settings: Any) -> Method:
    keys = {f"cache.{k.replace('__', '.')}": v for k, v in settings.items()}
    return Method("cache", {"cache.name": name, **keys}, calibrated)


def _quant(name: str) -> Method:
    return Method("quantisation", {"quant.name": name})


def _together(calibrated: str | None = None, **settings: Any) -> Method:
    return Method("together", {k.replace("__", "."): v for k, v in settings.items()}, calibrated)


METHODS: dict[str, Method] = {
    "steps 35": _steps(35),
    "steps 25": _steps(25),
    "steps 20": _steps(20),
    "steps 16": _steps(16),
    "steps 12": _steps(12),
    "steps 8": _steps(8),
    "dpmpp_2m 25": _solver("dpmpp_2m", 25),
    "dpmpp_2m 16": _solver("dpmpp_2m", 16),
    "dpmpp_2m 12": _solver("dpmpp_2m", 12),
    "dpmpp_2m 8": _solver("dpmpp_2m", 8),
    "dpmpp_2m 12, log_snr": _solver("dpmpp_2m", 12, "log_snr"),
    "heun 13": _solver("heun", 13),
    "heun 8": _solver("heun", 8),
    "ddim 16": _solver("ddim", 16),
    "guidance t 0.1 to 0.9": Method("guidance", {"guide.name": "interval", "guide.low": 0.1, "guide.high": 0.9}),
    "guidance t 0.3 to 0.8": Method("guidance", {"guide.name": "interval", "guide.low": 0.3, "guide.high": 0.8}),
    "fora 2": _cache("fora", interval=2),
    "fora 3": _cache("fora", interval=3),
    "fora 5": _cache("fora", interval=5),
    "fora_dit 3": _cache("fora_dit", interval=3),
    "taylorseer 3, order 1": _cache("taylorseer", interval=3, order=1),
    "taylorseer 4, order 2": _cache("taylorseer", interval=4, order=2),
    "taylorseer 6, order 4": _cache("taylorseer", interval=6, order=4),
    "taylorseer_diffusers 5": _cache("taylorseer_diffusers"),
    "ab_cache": _cache("ab_cache"),
    "delta_dit": _cache("delta_dit"),
    "pab": _cache("pab"),
    "frdiff": _cache("frdiff"),
    "attention_map": _cache("attention_map"),
    "smoothcache 0.18": _cache("smoothcache", "smoothcache", alpha=0.18),
    "smoothcache 0.10": _cache("smoothcache", "smoothcache", alpha=0.1),
    "block_caching": _cache("block_caching", "block_caching"),
    "bacache 20": _cache("bacache", "bacache", updates=20),
    "magcache": _cache("magcache", "magcache"),
    "magcache, published": _cache("magcache"),  # of a pipeline whose model has published ratios
    "teacache 0.1": _cache("teacache", threshold=0.1),
    "teacache 0.2": _cache("teacache", threshold=0.2),
    "teacache fitted 0.2": _cache("teacache", "teacache", threshold=0.2),
    "fbcache 0.08": _cache("fbcache", threshold=0.08),
    "fbcache 0.12": _cache("fbcache", threshold=0.12),
    "dbcache F8 W8 0.08": _cache("dbcache", threshold=0.08, first=8),
    "dbcache F1 W4 0.12 MC3": _cache("dbcache", threshold=0.12, first=1, warmup=4, max_continuous=3),
    "dbcache F1 W4 0.12 MC3 taylor": _cache(
        "dbcache", threshold=0.12, first=1, warmup=4, max_continuous=3, forecast="taylor"
    ),
    "dbprune": _cache("dbprune"),
    "adacache": _cache("adacache"),
    "fastcache": _cache("fastcache"),
    "fastcache, fitted": _cache("fastcache", "fastcache"),
    "fastercache": _cache("fastercache"),
    "tgate": _cache("tgate"),
    "toca": _cache("toca"),
    "toca, random score": _cache("toca", score="random"),
    "duca": _cache("duca"),
    "tokencache, random score": _cache("tokencache", score="random"),
    "icc, rank 32": _cache("icc", "icc"),
    "scheduled 0.4, searched": _cache("scheduled", "scheduled"),
    "dbcache F1 W4 0.12 MC3 + fora 2": _cache(
        "dbcache+fora",
        dbcache__threshold=0.12,
        dbcache__first=1,
        dbcache__warmup=4,
        dbcache__max_continuous=3,
        fora__interval=2,
    ),
    "teacache 0.1 + toca": _cache("teacache+toca", teacache__threshold=0.1),
    "window 14": Method("attention", {"attend.name": "window", "attend.radius": 14}),
    "bfloat16": Method("quantisation", {"model.dtype": "bfloat16"}),
    "int8_weight": _quant("int8_weight"),
    "int8_w8a8": _quant("int8_w8a8"),
    "int4_weight": _quant("int4_weight"),
    "int4_w4a8": _quant("int4_w4a8"),
    "svdquant_w4a8": _quant("svdquant_w4a8"),
    "fp8_weight": _quant("fp8_weight"),
    "fp8": _quant("fp8"),
    "steps 25 + fora 2": _together(steps=25, cache__name="fora", cache__interval=2),
    "dpmpp_2m 25 + fora 2": _together(solver__name="dpmpp_2m", steps=25, cache__name="fora", cache__interval=2),
    "dpmpp_2m 25 + taylorseer 3": _together(
        solver__name="dpmpp_2m", steps=25, cache__name="taylorseer", cache__interval=3
    ),
    "dpmpp_2m 16 + guidance t 0.1 to 0.9": _together(
        solver__name="dpmpp_2m", steps=16, guide__name="interval", guide__low=0.1, guide__high=0.9
    ),
    "dpmpp_2m 12 + bfloat16": _together(solver__name="dpmpp_2m", steps=12, model__dtype="bfloat16"),
    "fora 3 + guidance t 0.1 to 0.9": _together(
        cache__name="fora", cache__interval=3, guide__name="interval", guide__low=0.1, guide__high=0.9
    ),
    "fora 3 + int8_w8a8": _together(cache__name="fora", cache__interval=3, quant__name="int8_w8a8"),
    "fbcache 0.12 + bfloat16": _together(cache__name="fbcache", cache__threshold=0.12, model__dtype="bfloat16"),
    "dpmpp_2m 25 + fora 2 + bfloat16 + guidance t 0.1 to 0.9": _together(
        solver__name="dpmpp_2m",
        steps=25,
        cache__name="fora",
        cache__interval=2,
        model__dtype="bfloat16",
        guide__name="interval",
        guide__low=0.1,
        guide__high=0.9,
    ),
}


BUDGETS = (5, 8, 10, 15, 20, 50)  # evaluations at which solvers are compared

# which are another solver until they have learned (experiments/learned_solvers.py compares what they are then)
LEARNED = ("bns", "ddss", "ltsl", "iia", "usf", "dc_solver", "dpm_solver_v3")

# every solver at its defaults, at equal evaluations; what it needs besides (a measurement, a process) is its refusal
SOLVER_METHODS: dict[str, Method] = {
    f"{name}, {n} evaluations": Method("solver", {"solver.name": name}, evaluations=n)
    for name in REGISTRIES["solver"]
    if name not in LEARNED
    for n in BUDGETS
}

_KEYS = {"solver": "solver", "cache": "cache", "attention": "attend", "quantisation": "quant"}  # family: section


def chosen(wanted: Sequence[str], parse: Any) -> dict[str, Method]:
    """The methods that a command line names: "all" of `METHODS`, families, names, entries of the registries of solvers,
    caches, attention and quantisation at their defaults ("fora"), and settings such as "steps=12,cache.name=fora". The
    family "solver" has `SOLVER_METHODS` too.

    Args:
      parse: text of a value -> value (`difax.config.parse_value`).

    Raises:
      ValueError: a name that is none of them (with the nearest match).
    """
    found: dict[str, Method] = {}
    known = {name: family for family, key in _KEYS.items() for name in REGISTRIES[key] if name != "none"}
    for name in wanted:
        if name == "all":
            found.update(METHODS)
        elif name in FAMILIES:
            found.update({n: m for n, m in METHODS.items() if m.family == name})
            found.update(SOLVER_METHODS if name == "solver" else {})
        elif name in METHODS or name in SOLVER_METHODS:
            found[name] = METHODS.get(name) or SOLVER_METHODS[name]
        elif name in known:
            found[name] = Method(known[name], {f"{_KEYS[known[name]]}.name": name})
        elif "=" in name:
            found[name] = Method("together", _written(name, parse))
        else:
            near = difflib.get_close_matches(name, [*METHODS, *SOLVER_METHODS, *FAMILIES, *known, "all"], 1, 0.4)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise ValueError(
                f"unknown method {name!r}{hint}; allowed: all, {', '.join(FAMILIES)}, names of "
                "difax list, settings such as "
                f"steps=12,cache.name=fora, and {', '.join(map(repr, METHODS))}"
            )
    return found


def _written(text: str, parse: Any) -> dict[str, Any]:
    """Settings "steps=12,cache.name=fora" by key; a comma within a value, as in (1, 2), parts nothing."""
    settings: dict[str, Any] = {}
    for setting in re.split(r",(?=[^,=()\[\]]+=)", text):
        key, equals, value = (part.strip() for part in setting.partition("="))
        key = SHORT.get(key, key)
        if not key or not equals or not value:
            raise ValueError(f"method {text!r}: {setting.strip()!r}; allowed: KEY=VALUE, with commas between several")
        if key in settings:
            raise ValueError(f"method {text!r}: {key} is set twice; allowed: once")
        settings[key] = parse(value, key)
    return settings
