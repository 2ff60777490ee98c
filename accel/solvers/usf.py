"""The unified sampling framework (USF, S3). Liu, Ning, Lin, Yang & Wang, 2023, arXiv:2312.07243."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from difax.accel.caches.measured import source
from difax.accel.solvers.adams import Mix, combine
from difax.accel.solvers.learned import check_steps, read_learned
from difax.accel.solvers.linear import Steps, linear
from difax.accel.solvers.quadrature import exponential_lagrange
from difax.core.annotations import check_value, checked
from difax.core.contracts import Solver
from difax.core.grids import check_times
from difax.core.process import Process

Kind = Literal["data", "noise"]
Relaxed = Literal["none", "dpmsolver-2", "unipc-bh1"]
ORDERS = 4
INPUTS = {"data": ("x0", "x0_"), "noise": ("eps", "eps_")}  # prediction -> the newest output, and what older ones are
SLOTS = ("anchor", *(f"{old}{j}" for _, old in INPUTS.values() for j in range(1, ORDERS + 1)))


class Choice(NamedTuple):
    """How one step is made: see `usf`."""

    order: int
    prediction: str
    estimate: int
    relaxation: str
    corrector: bool


@checked
def usf(
    file: str | None = None,
    order: int | Sequence[int] = 2,
    prediction: Kind | Sequence[Kind] = "data",
    estimate: int | Sequence[int] = 0,
    relaxation: Relaxed | Sequence[Relaxed] = "none",
    corrector: bool | Sequence[bool] = False,
) -> Solver:
    """An exponential integrator in Taylor form whose every step may be made in another way.

    From lambda_s to lambda_t, h = lambda_t - lambda_s, with D = x0 (data) or eps (noise),

      data    x_t = (sigma_t/sigma_s) x_s + alpha_t sum_{k < p} D^(k) int e^{lambda - lambda_t} (lambda - lambda_s)^k/k!
      noise   x_t = (alpha_t/alpha_s) x_s - sigma_t sum_{k < p} D^(k) int e^{lambda_t - lambda} (lambda - lambda_s)^k/k!

    D^(k) are the derivatives at lambda_s of the polynomial through the outputs at s and e other times: those before
    s, and for the corrector the end of the step too. Where sigma_t = 0, alpha_s = 0, or fewer outputs are known, the
    order is as high as they allow, which is 1 where lambda is infinite.

    Args:
      file: of `difax calibrate --solver usf`, which searches for settings of each step and its time; its times are
        taken and not those of the grid, and the run has as many steps. None: the settings that follow, each one
        value, or one a step.
      order: p, 1 to 4 (2).
      prediction: "data" or "noise" ("data").
      estimate: e, order - 1 to 4; 0 is order - 1, for which the polynomial is integrated as it is.
      relaxation: of the first derivative, a factor that goes to 1 with h: "none", "dpmsolver-2" or "unipc-bh1" (what
        these methods do to it; the first makes order 2 on data DPM-Solver++ 2M).
      corrector: is the step made again once the output at its end is known, which costs no evaluation; never the last.

    Returns:
      A `Solver` whose state is x at the start of the step and the last outputs of both kinds.

    References: Liu et al. 2023, arXiv:2312.07243, section 4 (pseudo correctors, Taylor estimates, relaxations). Left
      out: their starts in the middle of a step (single-step methods), a first step without the network, and the
      prediction of DPM-Solver-v3.
    """
    times = None
    if file is not None:
        names = ("order", "prediction", "estimate", "relaxation", "corrector")
        found = read_learned("usf", file, {"times": ("n",)}, words=names)
        times = found.pop("times")
        for name, annotation in zip(names, (int, Kind, int, Relaxed, bool), strict=True):
            what = f"{source('usf', file)}: {name}"
            found[name] = check_value(what, found[name], Sequence[annotation])  # pyright: ignore[reportInvalidTypeForm]
            if len(found[name]) != len(times):
                raise ValueError(f"{what} has {len(found[name])} entries; allowed: {len(times)}, one a step")
    else:
        found = dict(order=order, prediction=prediction, estimate=estimate, relaxation=relaxation, corrector=corrector)
    where = source("usf", file)
    choices(where, found, 1 if times is None else len(times))  # refuses values that no number of steps would allow

    def lay(steps: Steps, process: Process, given: np.ndarray) -> None:
        check_times(given)
        if file is not None and times is not None:
            check_steps("usf", file, given, len(times))
            given = np.append(times, 0.0)
        lay_usf(steps, process, given, choices(where, found, len(given) - 1))

    return linear(lay, SLOTS)


def choices(where: str, settings: dict[str, Any], n: int) -> list[Choice]:
    """Settings, each one value or one a step, as the choice of each of n steps.

    Raises:
      ValueError: lists of another length (of n > 1), or numbers out of range.
    """
    each: dict[str, list[Any]] = {}
    for name, value in settings.items():
        one = isinstance(value, (str, int, bool))
        each[name] = [value] * n if one else list(value)
        if len(each[name]) != n and n > 1:
            raise ValueError(f"{where}: {name} of {len(each[name])} steps; allowed: one value, or {n}, one a step")
        if not each[name]:
            raise ValueError(f"{where}: {name}={value}; allowed: one value, or one a step")
    for p in each["order"]:
        if not 1 <= p <= ORDERS:
            raise ValueError(f"{where}: order={p}; allowed: 1 ... {ORDERS}")
    for e in each["estimate"]:
        if not 0 <= e <= ORDERS:
            raise ValueError(f"{where}: estimate={e}; allowed: 0 ... {ORDERS}")
    for p, e in zip(each["order"], each["estimate"], strict=False):
        if e and e < p - 1:
            raise ValueError(f"{where}: estimate={e} for order={p}; allowed: 0, or {p - 1} ... {ORDERS}")
    return [Choice(**dict(zip(each, values, strict=True))) for values in zip(*each.values(), strict=False)]


def lay_usf(steps: Steps, process: Process, times: np.ndarray, chosen: Sequence[Choice]) -> None:
    """Lays the rows of a run with one choice a step."""
    level = process.level(times)
    with np.errstate(divide="ignore"):
        half = np.log(level.alpha) - np.log(level.sigma)
    n = len(times) - 1

    def output(kind: str, ago: int) -> Mix:
        newest, older = INPUTS[kind]
        return {newest if ago == 0 else f"{older}{ago}": 1.0}

    def step(i: int, x: Mix, ago: int, newer: bool) -> dict[str, float]:
        """x at times[i + 1], from x at times[i], whose output is that of `ago` evaluations ago."""
        choice, s, e = chosen[i], half[i], half[i + 1]
        kind = choice.prediction
        if not np.isfinite(s) or not np.isfinite(e):
            kind = "data"
        rate = 1.0 if kind == "data" else -1.0
        near = [(half[i + 1], ago - 1)] if newer and np.isfinite(e) else []
        near += [(half[i - k], ago + k) for k in range(1, min(i, ORDERS - ago) + 1) if np.isfinite(half[i - k])]
        if not np.isfinite(s) or not np.isfinite(e):
            near = []
        near = near[: choice.estimate or choice.order - 1]
        order = min(choice.order, len(near) + 1)
        weights = taylor(np.array([s, *(at for at, _ in near)]), s, e, rate, order, choice.relaxation)
        scale = level.alpha[i + 1] if kind == "data" else -level.sigma[i + 1]
        kept = level.sigma[i + 1] / level.sigma[i] if kind == "data" else level.alpha[i + 1] / level.alpha[i]
        outputs = [ago, *(k for _, k in near)]
        mixes = [(scale * w, output(kind, k)) for w, k in zip(weights, outputs, strict=True)]
        return combine((kept, x), *mixes)

    for i in range(n):
        x: Mix = {"x": 1.0}
        if i and chosen[i - 1].corrector:
            x = step(i - 1, {"anchor": 1.0}, 1, newer=True)
        older = {f"{old}{j + 1}": {f"{old}{j}": 1.0} for _, old in INPUTS.values() for j in range(1, ORDERS)}
        first = {f"{old}1": {new: 1.0} for new, old in INPUTS.values()}
        steps.row(times[i], i, x=step(i, x, 0, newer=False), anchor=x, **first, **older)


def taylor(nodes: np.ndarray, start: float, end: float, rate: float, order: int, relaxation: str) -> np.ndarray:
    """Weights [k] of the outputs at nodes in the integral of e^{rate (lambda - end)} times their Taylor polynomial.

    Args:
      nodes: [k], the first of which is the start. order: k or less, terms of the polynomial.
    """
    plain = order == 1 or relaxation == "none"
    if order == len(nodes) and plain:
        return exponential_lagrange(nodes, start, end, rate)
    h = end - start
    # column k: the k-th derivative at the start of the polynomials that are 1 at one node and 0 at the others
    powers = np.stack([(nodes - start) ** k / math.factorial(k) for k in range(len(nodes))])
    derivatives = np.linalg.inv(powers)
    for k in range(order):
        at = np.linspace(start, end, k + 1)
        term = exponential_lagrange(at, start, end, rate) @ ((at - start) ** k / math.factorial(k))
        derivatives[:, k] *= term * (relaxed(relaxation, h if rate < 0 else -h) if k == 1 else 1.0)
    return derivatives[:, :order].sum(1)


def relaxed(name: str, h: float) -> float:
    """The factor of the first derivative; h is negative for data."""
    if name == "none":
        return 1.0
    rest = np.expm1(h) - h
    return 0.5 * h * (np.expm1(h) if name == "dpmsolver-2" else h) / rest
