"""Weights of exponential integrators, by quadrature in float64: their closed forms cancel where steps are short."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from difax.core.mixing import lagrange

POINTS = 48  # exact to rounding over a length of REACH
REACH = 60.0  # rate (end - start) beyond which e^{-that} is nothing


def exponential_lagrange(nodes: np.ndarray, start: float, end: float, rate: float) -> np.ndarray:
    """Integrals of e^{rate (lambda - end)} l_j(lambda) from start to end, l_j the Lagrange polynomials of the nodes.

    Args:
      nodes: [k], where the values are known; an infinite one weighs nothing next to finite ones.
      start, end: of the step; end - start may be infinite (start = -inf with rate > 0) and, for one node, end too.
      rate: of the exponential, any number; 0 integrates the polynomials.

    Returns:
      [k], whose sum is -expm1(-rate (end - start))/rate.

    Raises:
      ValueError: an integral that is infinite.
    """
    nodes = np.asarray(nodes, np.float64)
    known = np.isfinite(nodes)
    found = np.zeros(len(nodes))
    if not np.isfinite(end) and known.sum() > 1:
        raise ValueError(f"exponential_lagrange: {known.sum()} nodes and end={end}; allowed: one node")
    if known.sum() < 2:  # one value, held
        found[int(np.argmax(known))] = _constant(float(end) - float(start), rate)
        return found
    length = end - start
    if abs(rate) * length > REACH:
        length = REACH / abs(rate)
        start = end - length if rate > 0 else start
    if not np.isfinite(start):
        raise ValueError(f"exponential_lagrange: start={start}, rate={rate}; allowed: finite, or a rate above 0")
    points, weights = legendre(POINTS)
    at = start + length * points
    found[known] = lagrange(nodes[known], at) @ (weights * length * np.exp(rate * (at - end)))
    return found


def integrated_lagrange(
    nodes: np.ndarray, start: float, end: float, variable: Callable[[np.ndarray], np.ndarray] | None = None
) -> np.ndarray:
    """Integrals of l_j(variable(u)) du from start to end, l_j the Lagrange polynomials of the nodes.

    Args:
      nodes: [k], values of the variable.
      variable: u -> the variable, smooth between start and end; None is u itself.

    Returns:
      [k], whose sum is end - start.
    """
    points, weights = legendre(POINTS)
    u = start + (end - start) * points
    return lagrange(np.asarray(nodes, np.float64), u if variable is None else variable(u)) @ weights * (end - start)


def _constant(h: float, rate: float) -> float:
    """The integral of e^{rate (lambda - end)} over a step of length h."""
    value = h if rate == 0 else -np.expm1(-rate * h) / rate
    if not np.isfinite(value):
        raise ValueError(f"exponential_lagrange: a step of length {h} at rate {rate}; allowed: a finite integral")
    return float(value)


@functools.cache
def legendre(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Points and weights [count] of Gauss-Legendre on [0, 1], exact for polynomials of degree 2 count - 1."""
    points, weights = np.polynomial.legendre.leggauss(count)
    return (points + 1) / 2, weights / 2
