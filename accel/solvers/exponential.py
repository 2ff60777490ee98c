"""What the exponential integrators in lambda = log(alpha/sigma) share: their levels, gains, orders and two layouts.

With m the data prediction (kind "x0") or the noise prediction (kind "eps"), a step from s to t of length h is

  x_t = alpha_t x0_s + sigma_t eps_s + scale (g1 M0 + g2 M1 + g3 M2)    without what is already in the first two terms

M1 and M2 being differences of m that stand for its derivatives along lambda, and g the integrals of `gains`: of E = h
with scale = alpha_t for "x0", of E = -h with scale = sigma_t for "eps". So both kinds are one table.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from difax.accel.solvers.bounds import Bound
from difax.accel.solvers.linear import Steps, linear
from difax.core.contracts import Solver
from difax.core.process import Process

KINDS = ("x0", "eps")
SOLVER_TYPES = ("midpoint", "heun")
STAGES = ("exponential", "midpoint")


class Levels(NamedTuple):
    """alpha, sigma and half = log(alpha/sigma) at times, float64; half is -inf where alpha = 0, inf where sigma = 0."""

    alpha: np.ndarray
    sigma: np.ndarray
    half: np.ndarray


def levels_at(process: Process, times: np.ndarray) -> Levels:
    """The levels of a process at times of any shape."""
    level = process.level(np.asarray(times, np.float64))
    with np.errstate(divide="ignore"):
        return Levels(level.alpha, level.sigma, np.log(level.alpha) - np.log(level.sigma))


def gains(E: float) -> tuple[float, float, float]:
    """g_k = integral over u from 0 to 1 of E e^{-E (1 - u)} u^{k-1}/(k-1)!, k = 1, 2, 3.

    g1 = 1 - e^{-E}, g2 = 1 - g1/E, g3 = 1/2 - g2/E; by their series where these cancel. E may be negative or infinite.
    """
    if abs(E) > 0.5:
        g1 = -np.expm1(-E)
        g2 = 1.0 - g1 / E
        return g1, g2, 0.5 - g2 / E
    # E^j (-1)^(j+1) / (j+k-1)! for j = 1, 2, ...
    powers = [-((-E) ** j) for j in range(1, 20)]
    factorial = np.cumprod(np.arange(1.0, 23.0))  # 1!, 2!, ...
    g1, g2, g3 = (float(np.dot(powers, 1.0 / factorial[k : k + len(powers)])) for k in range(3))
    return g1, g2, g3


def checked_choice(solver: str, key: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raises ValueError for a value that is not among those allowed."""
    if value not in allowed:
        raise ValueError(f"{solver}: {key}={value!r}; allowed: {', '.join(allowed)}")


def check_multistep(solver: str, lower_order_final: int, stretch: float, solver_type: str) -> None:
    """Raises ValueError for settings of `lay_multistep` that are out of range."""
    if not stretch > 0:
        raise ValueError(f"{solver}: stretch={stretch}; allowed: above 0")
    if lower_order_final < 0:
        raise ValueError(f"{solver}: lower_order_final={lower_order_final}; allowed: 0 or more")
    checked_choice(solver, "solver_type", solver_type, SOLVER_TYPES)


def check_singlestep(
    solver: str, solver_type: str, stage: str = "exponential", **ratios: float | None
) -> tuple[float, ...] | None:
    """Raises ValueError for settings of `lay_singlestep` that are out of range, else `check_ratios`."""
    checked_choice(solver, "solver_type", solver_type, SOLVER_TYPES)
    checked_choice(solver, "stage", stage, STAGES)
    return check_ratios(solver, **ratios)


def check_ratios(solver: str, **ratios: float | None) -> tuple[float, ...] | None:
    """The inner times of a single step as shares of it, or None where none is given: the grid's own times.

    Raises:
      ValueError: some of them only, or shares that do not rise within (0, 1).
    """
    if all(r is None for r in ratios.values()):
        return None
    given = tuple(r for r in ratios.values() if r is not None)
    if len(given) < len(ratios) or not np.all(np.diff([0.0, *given, 1.0]) > 0):
        told = ", ".join(f"{key}={r}" for key, r in ratios.items())
        raise ValueError(f"{solver}: {told}; allowed: rising and between 0 and 1, or all None")
    return given


def check_eta(solver: str, eta: float) -> None:
    """Raises ValueError unless 0 <= eta <= 1."""
    if not 0 <= eta <= 1:
        raise ValueError(f"{solver}: eta={eta}; allowed: 0 ... 1")


def multistep_orders(
    h: np.ndarray, order: int, lower_order_final: int, stretch: float, euler_at_final: bool = False
) -> list[int]:
    """The order of each multistep step of lengths h [n].

    As many as there are outputs, n - j or less at the end with fewer than `lower_order_final` steps (as the authors
    have it), and 1 for a step that is over `stretch` times as long as the one before it, or that ends where sigma = 0.
    With `euler_at_final` the last one is of order 1 too.
    """
    n, orders = len(h), []
    for j in range(n):
        p = min(order, j + 1, n - j if n < lower_order_final else order)
        if not np.isfinite(h[j]) or (euler_at_final and j == n - 1) or (p > 1 and h[j] > stretch * h[j - 1]):
            p = 1
        if p > 2 and not h[j - 1] <= stretch * h[j - 2]:
            p = 2
        orders.append(p)
    return orders


def differences(p: int, r0: float, r1: float, first: float, second: float) -> list[float]:
    """Weights [p] of m_0, m_before, m_before2 in first M1 + second M2.

    M1 = (m_0 - m_before)/r0 and M2 = 0 of two outputs; of three, with d0 = (m_0 - m_before)/r0 and
    d1 = (m_before - m_before2)/r1, M1 = d0 + r0/(r0 + r1)(d0 - d1) and M2 = (d0 - d1)/(r0 + r1).
    """
    if p == 1:
        return [0.0]
    if p == 2:
        return [first / r0, -first / r0]
    bend = (first * r0 + second) / (r0 + r1)
    a, b = (first + bend) / r0, bend / r1
    return [a, -a - b, b]


def lay_multistep(
    steps: Steps,
    process: Process,
    times: np.ndarray,
    *,
    kind: str,
    order: int,
    lower_order_final: int,
    stretch: float,
    solver_type: str,
    eta: float = 0.0,
    exact: bool = False,
    euler_at_final: bool = False,
) -> None:
    """One evaluation a step, with order - 1 past outputs in the slots "before" and "before2".

    Args:
      kind: "x0" or "eps", which of them is extrapolated.
      exact: does g3 get the whole second derivative, 2 M2, so that the three outputs' polynomial is integrated.
      eta: above 0 (kind "x0" only) the SDE whose noise is eta times the reverse SDE's: its E is (1 + eta) h.
    """
    at = levels_at(process, times)
    h = np.diff(at.half)
    names = (kind, "before", "before2")[:order]
    for j, p in enumerate(multistep_orders(h, order, lower_order_final, stretch, euler_at_final)):
        E = (1 + eta) * h[j] if kind == "x0" else -h[j]
        scale = at.alpha[j + 1] if kind == "x0" else at.sigma[j + 1]
        extra = [0.0]
        if p > 1:
            g1, g2, g3 = gains(E)
            r0, r1 = h[j - 1] / h[j], h[j - 2] / h[j]
            first = g1 / 2 if p == 2 and solver_type == "midpoint" else g2
            extra = differences(p, r0, r1, scale * first, scale * g3 * (2 if exact else 1))
        x = dict(zip(names, extra, strict=False))
        if kind == "x0":
            decay = np.exp(-eta * h[j]) if eta else 1.0
            x["x0"] += -scale * np.expm1(-E)
            x["x"] = at.sigma[j + 1] / at.sigma[j] * decay
            if eta:
                x["z1"] = at.sigma[j + 1] * np.sqrt(-np.expm1(-2 * eta * h[j]))
        else:
            x["eps"] += at.sigma[j + 1]
            x["x0"] = at.alpha[j + 1]
        past = {new: {old: 1.0} for old, new in zip(names, names[1:], strict=False)}
        steps.row(times[j], j, x, **past)


def budget(n: int, order: int) -> list[int]:
    """The orders of single steps that make n evaluations: as many of the highest as fit, what is left at the end.

    With order 3 and n divisible by 3 the last two are of order 2 and 1, so that there is a short last step.

    References: Lu et al. 2022, arXiv:2206.00927, section 3.4 (DPM-Solver-fast).
    """
    if order == 3 and n % 3 == 0:
        return [3] * (n // 3 - 1) + [2, 1]
    return [order] * (n // order) + ([n % order] if n % order else [])


def blocks(times: np.ndarray, half: np.ndarray, order: int) -> list[tuple[int, int]]:
    """(index of its first time, order) of each single step; a step into sigma = 0 or out of alpha = 0 is of order 1."""
    found, i = [], 0
    for p in budget(len(times) - 1, order):
        parts = [p]
        if p > 1 and not np.isfinite(half[i + p]):
            parts = [p - 1, 1]
        if parts[0] > 1 and not np.isfinite(half[i]):
            parts = [1, parts[0] - 1, *parts[1:]]
        for part in parts:
            found.append((i, part))
            i += part
    return found


def inner(process: Process, times: np.ndarray, i: int, p: int, ratios: tuple[float, ...] | None) -> np.ndarray:
    """Times [p + 1] of one single step of order p: the grid's own, or at given shares of its length in lambda."""
    t = times[i : i + p + 1].copy()
    if ratios is not None and p > 1:
        half = levels_at(process, t[[0, -1]]).half
        t[1:-1] = process.inverse(half[0] + np.asarray(ratios[: p - 1]) * (half[1] - half[0]))
    return t


def lay_singlestep(
    steps: Steps,
    process: Process,
    times: np.ndarray,
    *,
    kind: str,
    order: int,
    solver_type: str,
    ratios: Mapping[int, tuple[float, ...] | None] | None = None,
    stage: str = "exponential",
) -> None:
    """n evaluations for n + 1 times: `blocks` of up to `order` of them, with the first outputs of a step in the slots
    "first_x0" and "first_eps", and the second in "second".

    Args:
      ratios: of each order, the inner times as shares of the step in lambda; None: the grid's own times.
      stage: what the second stage of order 3 is: "exponential", or "midpoint" as in diffusers.
    """
    half = levels_at(process, times).half
    first = f"first_{kind}"
    for step, (i, p) in enumerate(blocks(times, half, order)):
        t = inner(process, times, i, p, (ratios or {}).get(p))
        at = levels_at(process, t)
        scale = at.alpha if kind == "x0" else at.sigma
        h = at.half[p] - at.half[0] if p > 1 else np.inf
        E = h if kind == "x0" else -h
        r = (at.half - at.half[0]) / h if p > 1 else np.zeros(2)
        for k in range(p):
            names = ("x0", "eps") if k == 0 else ("first_x0", "first_eps")
            x = {names[0]: at.alpha[k + 1], names[1]: at.sigma[k + 1]}
            if k > 0:
                x[kind] = 0.0
            if k == 1:
                g1, g2, _ = gains(r[2] * E)
                midpoint = (solver_type if p == 2 else stage) == "midpoint"
                c = scale[2] * (g1 / 2 if midpoint else g2) * r[2] / r[1]
                x[kind], x[first] = c, x[first] - c
            if k == 2:
                _, g2, g3 = gains(E)
                a, b, c = _third(solver_type, r[1], r[2], scale[3] * g2, scale[3] * g3)
                x[first] += a
                x["second"], x[kind] = b, c
            kept = {}
            if k == 0 and p > 1:
                kept = {"first_x0": {"x0": 1.0}, "first_eps": {"eps": 1.0}}
            if k == 1 and p == 3:
                kept = {"second": {kind: 1.0}}
            steps.row(t[k], step, x, **kept)


def _third(solver_type: str, r1: float, r2: float, first: float, second: float) -> tuple[float, float, float]:
    """Weights of the three outputs of a single step of order 3, beyond those of the first order."""
    if solver_type == "midpoint":
        return -first / r2, 0.0, first / r2
    # D1 = (r2 d1 - r1 d2)/(r2 - r1), D2 = 2 (d2 - d1)/(r2 - r1), d_k = (m_k - m_0)/r_k
    d1 = (first * r2 - 2 * second) / (r2 - r1) / r1
    d2 = (2 * second - first * r1) / (r2 - r1) / r2
    return -d1 - d2, d1, d2


def singlestep_slots(order: int) -> tuple[str, ...]:
    """The slots of `lay_singlestep`."""
    return ("first_x0", "first_eps", "second")[:order]


def multistep(
    solver: str,
    kind: str,
    order: int,
    lower_order_final: int,
    stretch: float,
    solver_type: str,
    bound: Bound | None,
    **settings: Any,
) -> Solver:
    """The multistep solver of a kind of prediction and an order, 2 or 3, its settings checked.

    Args:
      solver: whose settings these are, for messages. settings: others of `lay_multistep`; one with eta draws noise.
    """
    check_multistep(solver, lower_order_final, stretch, solver_type)
    ends = dict(lower_order_final=lower_order_final, stretch=stretch, solver_type=solver_type)
    lay = partial(lay_multistep, kind=kind, order=order, **ends, **settings)
    return linear(lay, slots=("before", "before2")[: order - 1], noises=int("eta" in settings), bound=bound)
