"""What stands in for a value that is not computed: a linear mix of the last computed ones.

  value = sum_j w_j ring_j

The weights depend on when the ring's entries were computed and on now, not on their contents, so that a static plan
tabulates them on the host and an online gate works them out from a handful of integers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from difax.core.mixing import lagrange

DTYPES = ("float32", "bfloat16", "float8_e4m3fn", "float8_e5m2")


MOST_ORDER = 16  # a ring has order + 1 values, and differences of values in float32 are noise long before


def check_order(name: str, order: int, least: int = 0) -> None:
    """Refuses an order of extrapolation that no ring holds."""
    if not least <= order <= MOST_ORDER:
        raise ValueError(f"{name}: order={order}; allowed: {least} or more, up to {MOST_ORDER}")


class Fill(NamedTuple):
    """A linear mix of the `depth` values that were computed last.

    weights(steps, now) -> [depth]: the weights of the ring's entries, the newest first; steps [depth] are the
        evaluations at which they were computed (-1: not yet), now the evaluation under way. numpy, or jax where
        `steps` is traced. None: the newest value as it is.
    recent: how many of the last values of either kind, computed or filled, are mixed in too, behind the others.
    """

    depth: int = 1
    weights: Callable[[Any, Any], Any] | None = None
    recent: int = 0


def hold() -> Fill:
    """The value that was computed last."""
    return Fill()


def taylor(order: int = 1, first: int = 0) -> Fill:
    """TaylorSeer's expansion around the newest value.

    G_0 = F, G_{i+1} = (G_i - G_i of the computation before) / (steps between the two); value = sum_i G_i x^i / i!
    with x = now - newest. The differences are those of the factors themselves, each divided by the newest gap alone,
    and taken as derivatives at the newest point, so that the mix is exact for polynomials of degree 0 and 1 only.

    Args:
      order: highest derivative, 0 or more.
      first: no difference is formed at an evaluation before this one (3 in cache-dit, whose clock starts late).

    References: Liu et al. 2025, arXiv:2503.06923.
    """
    check_order("taylor", order)

    def weights(steps: Any, now: Any) -> Any:
        xp = np if isinstance(steps, np.ndarray) else jnp
        k = order + 1
        # factors[j][i]: G_i as of the j-th newest computation, as weights of the ring; None: there is none
        unit = xp.eye(k)
        known = [steps[j] >= 0 for j in range(k)]
        factors = [[(unit[j], known[j])] for j in range(k)]
        for i in range(order):
            for j in range(k - 1 - i):
                (newer, has), (older, had) = factors[j][i], factors[j + 1][i]
                gap = xp.where(steps[j] > steps[j + 1], steps[j] - steps[j + 1], 1)
                factors[j].append(((newer - older) / gap, has & had & (steps[j] >= first)))
        x = now - steps[0]
        terms = [xp.where(ok, g * (x**i / math.factorial(i)), 0.0) for i, (g, ok) in enumerate(factors[0])]
        return sum(terms)

    return Fill(order + 1, weights if order else None)


def newton(order: int = 1) -> Fill:
    """The polynomial through the last `order` + 1 values, extrapolated: exact up to degree `order`.

    value = sum_j F_j prod_{m != j} (now - s_m) / (s_j - s_m); at unit distances the weights are
    (-1)^j C(order + 1, j + 1), those of Adams-Bashforth extrapolation.

    Args:
      order: of the polynomial, 0 or more; fewer known values give a lower one.
    """
    check_order("newton", order)

    def weights(steps: Any, now: Any) -> Any:
        return lagrange(steps, now, steps >= 0)

    return Fill(order + 1, weights if order else None)


def damped(factor: Callable[[Any], Any]) -> Fill:
    """A straight line with a damped slope: F_0 + (F_0 - F_1) factor(now), the newest two values in any distance.

    Args:
      factor: evaluation -> how much of the last difference is added, 0 where it is not to be used.
    """

    def weights(steps: Any, now: Any) -> Any:
        xp = np if isinstance(steps, np.ndarray) else jnp
        slope = xp.where(steps[1] >= 0, factor(now), 0.0)
        return xp.stack([1.0 + slope, -slope])

    return Fill(2, weights)


def foca() -> Fill:
    """FoCa as cache-dit 1.5.3 ships it: F_0 + (x / 2) d up to x = 3 steps, then a blend back to F_0.

    d = (F_0 - F_1) + (c - p), the difference of the last two computed values (undivided by their distance) and that
    of the last two values of either kind; from x > 3 on (3 / x) (F_0 + 1.5 d) + (1 - 3 / x) F_0.
    """

    def weights(steps: Any, now: Any) -> Any:
        xp = np if isinstance(steps, np.ndarray) else jnp
        x = now - steps[0]
        slope = xp.where(steps[1] >= 0, xp.where(x <= 3, x / 2, 4.5 / xp.where(x == 0, 1, x)), 0.0)
        return xp.stack([1.0 + slope, -slope, slope, -slope])

    return Fill(2, weights, recent=2)


def stored(value: Any, dtype: str | None) -> Any:
    """A value as the ring holds it: in its own type, or in a narrower one, clipped where that has no infinity."""
    if dtype is None:
        return value

    def cast(a: jax.Array) -> jax.Array:
        to = jnp.dtype(dtype)
        if to.itemsize == 1:
            top = float(jnp.finfo(to).max)
            a = jnp.clip(a, -top, top)
        return a.astype(to)

    return jax.tree.map(cast, value)


def check_dtype(name: str, dtype: str | None) -> None:
    """Refuses a type that a ring cannot hold."""
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"{name}: dtype={dtype!r}; allowed: {', '.join(DTYPES)}, or None for that of the model")
