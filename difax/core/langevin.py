"""Critically damped Langevin diffusion: a process of position and velocity, whose noise levels are matrices.

Half of the channels are the position x, the data's own, the others its velocity v:

  dx = v/M dB,  dv = -x dB - Gamma v/M dB + sqrt(2 Gamma) dW(B),  B(t) = integral of beta,  Gamma = 2 sqrt(M).

Noise enters the velocity alone, so that its score is all that sampling needs. With v = N(0, gamma M) at t = 0,

  x = alpha x0 + sigma e_x,   v = alpha_v x0 + cross e_x + sigma_v e_v,

whose first line is that of any other process (`Level`). A network that says e_v says x0 and e_x too: both lines
together have no other unknowns.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax.numpy as jnp
import numpy as np

from difax.core.annotations import checked
from difax.core.contracts import Array
from difax.core.process import Process

KINDS = ("eps", "x0", "score")  # what a network may predict: e_v, x0 (each in its own half), the velocity's score
PANELS, POINTS = 12, 16  # of the quadrature of the turning angle


class LangevinLevel(NamedTuple):
    """Levels of position (as `Level`) and velocity at one time; mixed: what is added to the network's output, in
    velocities, to give e_v ("mixed score")."""

    alpha: Array
    sigma: Array
    alpha_dot: Array
    sigma_dot: Array
    alpha_v: Array
    cross: Array
    sigma_v: Array
    mixed: Array


class Augmented(NamedTuple):
    """What a process of several parts has beside its levels. Matrices [..., 2, 2] act on the parts, position first.

    prior_std: of each part at t = 1.
    clock(t) -> B; time(B) -> t. mass, friction: M and Gamma.
    transition(b) -> exp(F b), the drift's own motion over a stretch b of B, forward, or backward where b < 0.
    spread(b) -> the covariance that the noise of a stretch b > 0 adds.
    root(t) -> K with K K^T the covariance of x_t given x0: what eps is multiplied by.
    turn(t) -> Q, orthogonal: with R = K Q the noise of a known x0 stays as it is along the probability flow (gDDIM).
    convert, target: as those of `difax.core.process`.
    """

    prior_std: tuple[float, ...]
    mass: float
    friction: float
    clock: Callable[..., Array]
    time: Callable[..., Array]
    transition: Callable[[Array], np.ndarray]
    spread: Callable[[Array], np.ndarray]
    root: Callable[[Array], np.ndarray]
    turn: Callable[[Array], np.ndarray]
    convert: Callable[..., Any]
    target: Callable[..., Any]


@checked
def cld(
    beta: float = 4.0,
    beta_slope: float = 0.0,
    mass: float = 0.25,
    gamma: float = 0.04,
    mixed_score: bool = True,
    t_min: float = 1e-3,
) -> Process:
    """Critically damped Langevin diffusion (CLD), of position and velocity; half of the model's channels are each.

    beta(t) = beta + beta_slope t; Gamma = 2 sqrt(M), the critical damping. x0 begins with velocities N(0, gamma M),
    which are averaged out (hybrid score matching), and ends as N(0, 1) and N(0, M).

    Args:
      beta, beta_slope: 1e-3 ... 100 and 0 ... 100 (4 and 0).
      mass: M, 1e-3 ... 1000 (1/4).
      gamma: variance of the first velocities over that of the last, above 0, up to 1 (0.04).
      mixed_score: the network says what is missing from the score of data N(0, 1), e_v = output + mixed v (true).
      t_min: smallest time of grids that take one (1e-3, where the authors' runs end before their last step).

    The network is told 999 t, for embeddings that are made for that; it predicts eps (e_v), x0 or the score of the
    velocity. The authors add 1e-9 to the variances against rounding; here they are exact.

    References: Dockhorn, Vahdat & Kreis, Score-Based Generative Modeling with CLD, 2021, arXiv:2112.07068.
    """
    if not 1e-3 <= beta <= 100 or not 0 <= beta_slope <= 100:
        raise ValueError(f"cld: beta={beta}, beta_slope={beta_slope}; allowed: 0.001 ... 100, and 0 ... 100")
    if not 1e-3 <= mass <= 1e3:
        raise ValueError(f"cld: mass={mass}; allowed: 0.001 ... 1000")
    if not 1e-6 <= gamma <= 1:
        raise ValueError(f"cld: gamma={gamma}; allowed: 1e-6 ... 1")
    if not 0 < t_min < 1:
        raise ValueError(f"cld: t_min={t_min}; allowed: above 0, below 1")
    friction = 2 * math.sqrt(mass)
    rate, first = 1 / friction, gamma * mass  # 2 rate is the drift's double eigenvalue

    def clock(t):
        return beta * t + 0.5 * beta_slope * t**2

    def time(b):
        return 2 * b / (beta + np.sqrt(beta**2 + 2 * beta_slope * b))

    def added(y, xp):
        """Variances and covariance that the noise of a stretch y = 4 rate b adds: of x, of both, of v."""
        decay = xp.exp(-y)
        xx = _third(y, xp)
        vv = friction**2 / 4 * (-xp.expm1(-y) + decay * (y - y**2 / 2))
        return xx, friction * decay * y**2 / 4, vv

    def covariance(b, xp, start: float = first, spread_x: float = 0.0):
        """Of x_t given x0, with first velocities of variance `start` and positions of variance `spread_x`."""
        y, decay = 4 * rate * b, xp.exp(-4 * rate * b)
        xx, xv, vv = added(y, xp)
        from_v, keeps_v = y * rate, 1 - y / 2  # what a first velocity adds to x and to v, without the decay
        from_x, keeps_x = -b, 1 + y / 2
        return (
            xx + decay * (from_v**2 * start + keeps_x**2 * spread_x),
            xv + decay * (from_v * keeps_v * start + keeps_x * from_x * spread_x),
            vv + decay * (keeps_v**2 * start + from_x**2 * spread_x),
        )

    def level(t, xp=np):
        b = clock(t)
        y, decay = 4 * rate * b, xp.exp(-2 * rate * b)
        xx, xv, _ = covariance(b, xp)
        sigma = xp.sqrt(xx)
        safe = xp.where(sigma > 0, sigma, 1.0)
        cross = xp.where(sigma > 0, xv / safe, math.sqrt(first))  # the limit t -> 0
        n_xx, n_xv, n_vv = added(y, xp)
        # det(A + s w w^T) without its cancellation, A of the noise and w of the first velocities
        w_x, w_v = y * rate, 1 - y / 2
        det = n_xx * n_vv - n_xv**2 + first * decay**2 * (w_x**2 * n_vv - 2 * w_x * w_v * n_xv + w_v**2 * n_xx)
        sigma_v = xp.sqrt(xp.maximum(det, 0.0)) / safe
        per_model_time = (beta + beta_slope * t) / 999.0
        alpha_dot = -4 * rate**2 * b * decay * per_model_time
        mixed = sigma_v / covariance(b, xp, first, 1.0)[2] if mixed_score else xp.zeros_like(b)
        return LangevinLevel(
            alpha=(1 + y / 2) * decay,
            sigma=sigma,
            alpha_dot=alpha_dot,
            sigma_dot=cross / mass * per_model_time,
            alpha_v=-b * decay,
            cross=cross,
            sigma_v=sigma_v,
            mixed=mixed,
        )

    def inverse(value):
        value = np.asarray(value, np.float64)
        low, high = np.full(value.shape, -30.0), np.zeros(value.shape)  # of log t
        for _ in range(100):
            middle = (low + high) / 2
            at = level(np.exp(middle))
            below = np.log(at.alpha) - np.log(at.sigma) > value  # log(alpha/sigma) falls with t
            low, high = np.where(below, middle, low), np.where(below, high, middle)
        return np.exp((low + high) / 2)

    def transition(b):
        b = np.asarray(b, np.float64)
        rows = ((1 + 2 * rate * b, 4 * rate**2 * b), (-b, 1 - 2 * rate * b))
        return np.exp(-2 * rate * b)[..., None, None] * _matrix(rows)

    def spread(b):
        xx, xv, vv = added(4 * rate * np.asarray(b, np.float64), np)
        return _matrix(((xx, xv), (xv, vv)))

    def root(t):
        at = level(np.asarray(t, np.float64))
        return _matrix(((at.sigma, np.zeros_like(at.sigma)), (at.cross, at.sigma_v)))

    def turn(t):
        """By the angle that is the integral of sigma_v/(M sigma) dB; with B = r^2 the integrand is smooth down to 0."""
        t = np.asarray(t, np.float64)
        ends = np.sqrt(clock(t))[..., None] * np.geomspace(1e-3, 1, PANELS)
        ends = np.concatenate([np.zeros_like(ends[..., :1]), ends], -1)
        points, weights = np.polynomial.legendre.leggauss(POINTS)
        half = np.diff(ends) / 2
        r = (ends[..., :-1] + half)[..., None] + half[..., None] * points
        at = level(time(r**2))
        slope = np.where(at.sigma > 0, at.sigma_v / np.where(at.sigma > 0, at.sigma, 1.0), 0.0) / mass
        angle = (2 * r * slope * weights * half[..., None]).sum((-1, -2))
        return _matrix(((np.cos(angle), np.sin(angle)), (-np.sin(angle), np.cos(angle))))

    augmented = Augmented(
        prior_std=(1.0, math.sqrt(mass)),
        mass=mass,
        friction=friction,
        clock=clock,
        time=time,
        transition=transition,
        spread=spread,
        root=root,
        turn=turn,
        convert=convert,
        target=target,
    )
    levels = cast(Callable[..., Any], level)  # which have more than a `Level`
    return Process("cld", levels, inverse, lambda t: t * 999.0, None, t_min, 1.0, 1.0, augmented=augmented)


AUGMENTED = {"cld": cld}


def convert(output: Array, kind: str, x: Array, level: LangevinLevel) -> tuple[Array, Array]:
    """A network's output as (x0, eps), both of two parts: (x0, 0), the mean velocity at t = 0, and (e_x, e_v).

    Args:
      output: [B, ..., 2C], of which the half of velocities is the prediction (of `x0`, that of positions).
      x: [B, ..., 2C], position and velocity.
    """
    _check_kind(kind)
    position, velocity = jnp.split(x, 2, -1)
    first, second = jnp.split(output, 2, -1)
    if kind == "x0":
        x0, e_x = first, (position - level.alpha * first) / level.sigma
        e_v = (velocity - level.alpha_v * x0 - level.cross * e_x) / level.sigma_v
    else:
        e_v = -level.sigma_v * second if kind == "score" else second
        e_v = e_v + level.mixed * velocity
        tilt = level.cross / level.sigma
        x0 = (velocity - level.sigma_v * e_v - tilt * position) / (level.alpha_v - tilt * level.alpha)
        e_x = (position - level.alpha * x0) / level.sigma
    return jnp.concatenate([x0, jnp.zeros_like(x0)], -1), jnp.concatenate([e_x, e_v], -1)


def target(kind: str, x0: Array, eps: Array, x: Array, level: LangevinLevel) -> Array:
    """What a network's own half should return [B, ..., C] for x0 [B, ..., C] and eps [B, ..., 2C]."""
    _check_kind(kind)
    if kind == "x0":
        return x0
    missing = jnp.split(eps, 2, -1)[1] - level.mixed * jnp.split(x, 2, -1)[1]
    return -missing / level.sigma_v if kind == "score" else missing


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"prediction={kind!r} of process cld; allowed: {', '.join(KINDS)}")


def _third(y, xp):
    """1 - e^-y (1 + y + y^2/2), which cancels where y is small: there by its series."""
    small = xp.minimum(y, 1.0)
    series = xp.ones_like(small)
    for k in range(16, 3, -1):
        series = 1 + small / k * series
    return xp.where(y < 1, xp.exp(-small) * small**3 / 6 * series, -xp.expm1(-y) - xp.exp(-y) * (y + y**2 / 2))


def _matrix(rows: Any) -> np.ndarray:
    """[..., 2, 2] of two rows of two arrays."""
    return np.stack([np.stack(np.broadcast_arrays(*row), -1) for row in rows], -2)
