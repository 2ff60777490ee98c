"""gDDIM. Zhang, Tao & Chen, Generalized Denoising Diffusion Implicit Models, 2022, arXiv:2206.05564."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from difax.accel.solvers.linear import Steps, linear
from difax.core.annotations import checked
from difax.core.contracts import Array, Solver
from difax.core.process import Process

ORDERS = (1, 2, 3, 4)
STRETCHES = 100  # of the equation of the stochastic form, over one step
NEAREST = 1e-8  # to t = 0, of a step's length in B, where that equation ends


class Motion(NamedTuple):
    """A linear process as matrices over its parts (1 x 1 for a scalar one), by times.

    transition(s, t) -> Psi(s, t); mean(t) -> Psi(t, 0); root(t) -> K; turn(t) -> Q, with R = K Q.
    kept(times, lam) -> W [n, ...]: what is kept of eps over each step, in terms of R.
    """

    transition: Callable[[Array, Array], np.ndarray]
    mean: Callable[[Array], np.ndarray]
    root: Callable[[Array], np.ndarray]
    turn: Callable[[Array], np.ndarray]
    kept: Callable[[np.ndarray, float], np.ndarray]


@checked
def gddim(order: int = 2, corrector: bool = False, lam: float = 0.0) -> Solver:
    """DDIM for any linear diffusion, scalar (x = alpha x0 + sigma eps) or of position and velocity (`cld`).

    With Psi the transition of the drift, R R^T the covariance given x0, where dR/dt = (F + G G^T (R R^T)^-1/2) R, and
    eps = -R^T score, a known x0 keeps eps as it is along the probability flow. Held over a step that gives

      u_s = Psi(s, 0) x0 + R_s eps,

    exact for one image in any number of steps; on a scalar process it is DDIM. Of higher order, eps is the polynomial
    in t through the last `order` evaluations, in the integral of Psi(s, tau) G G^T R^-T eps(tau)/2. The corrector
    evaluates the network at s too, and takes the step again with that value in the polynomial: 2n - 1 evaluations.
    The stochastic form has the reverse diffusion with noise lam G:

      u_s = Psi(s, 0) x0 + R_s (W eps + (1 - W W^T)^(1/2) z);

    on a scalar process W = ((sigma_s alpha_t)/(alpha_s sigma_t))^(lam^2), so that lam = 1 is DDIM with eta = 1.

    Args:
      order: of the predictor, 1 ... 4 (2; the paper's q is order - 1); the first steps are of lower order.
      corrector: one order more (false).
      lam: lambda, 0 ... 10 (0); above 0 for order 1 without a corrector.

    Convergence is of order 1 and 2, and with a corrector of 2 and 3; orders 3 and 4 measure 2.8 and more at 40 to 160
    steps, and in the end no more than their first step allows, whose order is 1. A network that was trained for K = the
    Cholesky factor (CLD) serves, since e_v says all of eps there (`difax.core.langevin`), and Q turns it into R's; the
    authors train a network for R. R has a closed form up to one angle, where they integrate its equation numerically.

    References: Zhang et al. 2022, arXiv:2206.05564, propositions 2 to 5, algorithm 1; https://github.com/qsh-zh/gDDIM.
    """
    if order not in ORDERS:
        raise ValueError(f"gddim: order={order}; allowed: {', '.join(map(str, ORDERS))}")
    if not 0 <= lam <= 10:
        raise ValueError(f"gddim: lam={lam}; allowed: 0 ... 10")
    if lam > 0 and (order > 1 or corrector):
        raise ValueError(f"gddim: lam={lam} with order={order}, corrector={corrector}; allowed: order=1 without one")
    depth = order - 1 + corrector  # evaluations before this one that are kept, as noise in terms of R
    past = [f"past{k + 1}" for k in range(depth)]

    def lay(steps: Steps, process: Process, times: np.ndarray) -> None:
        m = _motion(process)
        ends, means, inward = m.root(times[1:]) @ m.turn(times[1:]), m.mean(times[1:]), m.turn(times).swapaxes(-1, -2)
        kept = m.kept(times, lam) if lam > 0 else np.broadcast_to(np.eye(steps.parts), ends.shape)
        for j in range(len(times) - 1):
            held = {"x0": means[j], "eps": ends[j] @ kept[j] @ inward[j]}
            known = [{"eps": inward[j]}, *({name: 1.0} for name in past)][: j + 1]
            x = _plus(held, m, known[:order], times[j - np.arange(len(known[:order]))], times[j + 1])
            if lam > 0:
                x["z1"] = ends[j] @ _rest(kept[j])
            moved = {name: known[k] for k, name in enumerate(past) if k < len(known)}
            corrected = corrector and times[j + 1] > 0
            steps.row(times[j], j, x, **moved, **({"held": held} if corrected else {}))
            if corrected:
                known = [{"eps": inward[j + 1]}, *({name: 1.0} for name in past[: j + 1])]
                nodes = times[j + 1 - np.arange(len(known))]
                steps.row(times[j + 1], j, _plus({"held": 1.0}, m, known, nodes, times[j + 1], times[j]))

    slots = [*past, *(["held"] if corrector else [])]
    return linear(lay, slots=slots, noises=1 if lam > 0 else 0, augmented=True)


def _motion(process: Process) -> Motion:
    """A process as matrices."""
    p = process.augmented
    if p is None:
        alpha = lambda t: process.level(np.asarray(t, np.float64)).alpha[..., None, None]  # noqa: E731
        sigma = lambda t: process.level(np.asarray(t, np.float64)).sigma[..., None, None]  # noqa: E731

        def kept(times: np.ndarray, lam: float) -> np.ndarray:
            level = process.level(times)
            ratio = level.sigma[1:] * level.alpha[:-1] / (level.alpha[1:] * level.sigma[:-1])
            return (ratio ** (lam**2))[:, None, None]

        one = lambda t: np.ones((*np.shape(t), 1, 1))  # noqa: E731
        return Motion(lambda s, t: alpha(s) / alpha(t), alpha, sigma, one, kept)
    return Motion(
        transition=lambda s, t: p.transition(p.clock(s) - p.clock(t)),
        mean=lambda t: p.transition(p.clock(t)),
        root=p.root,
        turn=p.turn,
        kept=lambda times, lam: _kept(process, times, lam),
    )


def _plus(
    held: dict[str, Array],
    m: Motion,
    known: list[dict[str, Array]],
    nodes: np.ndarray,
    s: float,
    t: float | None = None,
) -> dict[str, Array]:
    """The step from t to s with the noise of time t held, and what the polynomial through all nodes adds to it:
    integral of l_i'(tau) (R_s - Psi(s, tau) R_tau) for each.

    Args:
      known: for each node {input: weight} that gives its noise in terms of R. t: the first node, where it is not given.
    """
    x = dict(held)
    if len(nodes) < 2:
        return x
    start = nodes[0] if t is None else t
    points, weights = np.polynomial.legendre.leggauss(48)
    low, high = np.sqrt(s), np.sqrt(start)  # R goes with sqrt(t) near 0
    r = low + (high - low) * (points + 1) / 2
    tau = r**2
    lengths = -(high - low) * weights * r  # d tau, from t down to s
    root = m.root(np.array([s]))[0] @ m.turn(np.array([s]))[0]
    moved = root - m.transition(s, tau) @ m.root(tau) @ m.turn(tau)
    for i, of in enumerate(known):
        others = (np.delete(nodes, i) - start) / (s - start)
        own = (nodes[i] - start) / (s - start)
        slope = (
            np.polyval(np.polyder(np.poly(others)), (tau - start) / (s - start)) / np.prod(own - others) / (s - start)
        )
        change = np.einsum("k,kij->ij", lengths * slope, moved)
        for name, weight in of.items():
            x[name] = x.get(name, 0.0) + change @ (weight * np.eye(len(change)) if np.ndim(weight) == 0 else weight)
    return x


def _rest(kept: np.ndarray) -> np.ndarray:
    """(1 - W W^T)^(1/2)."""
    values, vectors = np.linalg.eigh(np.eye(len(kept)) - kept @ kept.T)
    return vectors * np.sqrt(np.maximum(values, 0.0)) @ vectors.T


def _kept(process: Process, times: np.ndarray, lam: float) -> np.ndarray:
    """W over each step [n, 2, 2]: dW/dB = lam^2 Gamma/sigma_v^2 n n^T W, n = Q^T (0, 1), from W = 1 back to its end.

    A product of exponentials, each at the middle of a stretch of log B, in which all is smooth down to B = 0, where
    whatever lies along n is forgotten. Each is a contraction, so that the noise that is added makes up for it exactly.
    """
    p = process.augmented
    clock = p.clock(times)
    start, end = np.log(clock[:-1]), np.log(np.maximum(clock[1:], NEAREST * clock[:-1]))
    h = (end - start) / STRETCHES
    at = start + h * (np.arange(STRETCHES)[:, None] + 0.5)
    t = p.time(np.exp(at))
    n = p.turn(t)[..., 1, :]
    forgotten = np.expm1(lam**2 * p.friction * np.exp(at) / p.root(t)[..., 1, 1] ** 2 * h)
    each = np.eye(2) + forgotten[..., None, None] * n[..., :, None] * n[..., None, :]
    w = np.broadcast_to(np.eye(2), (len(start), 2, 2))
    for factor in each:
        w = factor @ w
    return w
