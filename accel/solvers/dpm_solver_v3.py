"""DPM-Solver-v3. Zheng, Lu, Chen & Zhu, DPM-Solver-v3: Improved Diffusion ODE Solver with Empirical Model Statistics,
2023, arXiv:2310.13268.

The file of statistics is an .npz with lambda [K], rising, and l, s, b, each [K, *d], d the shape of a sample or one
that broadcasts to it (`difax.accel.fit.dpm_v3` makes them).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from difax.accel.caches import measured
from difax.accel.solvers.adams import Ladder, ladder
from difax.accel.solvers.quadrature import legendre
from difax.core.annotations import checked
from difax.core.contracts import Array, Solver
from difax.core.grids import check_times, lay_rows
from difax.core.process import Process

NAMES = ("lambda", "l", "s", "b")
POINTS = 12  # of a piece between two log-SNRs


class V3Update(NamedTuple):
    """x_t = x x_s + sum_i outputs[i] f_i + constant, each [*d]."""

    x: Array
    outputs: tuple[Array, ...]
    constant: Array


class V3Table(NamedTuple):
    """Of each evaluation: f = share x - x0, then the corrector's update from the start of the step, then the next."""

    share: Array  # (1 - l)/alpha
    corrects: Array  # bool: does the corrector act
    corrector: V3Update
    predictor: V3Update


class V3State(NamedTuple):
    start: jax.Array  # the corrected x of the evaluation before
    past: tuple[jax.Array, ...]  # f of the evaluations before, newest first


@checked
def dpm_solver_v3(
    file: str | None = None,
    order: int = 3,
    corrector: bool = True,
    predictor_pseudo: bool = False,
    corrector_pseudo: bool = False,
    corrector_above: float = 0.0,
    lower_order_final: bool = True,
) -> Solver:
    """Multistep predictor and corrector in the parametrisation that makes the solution of first order most exact.

    With statistics l, s, b of the network, one number of each per log-SNR and place in a sample, with
    f = (sigma eps - l x)/alpha, L = int l, S = int s (from the start of the step), and g = e^{-S} f - int e^{-S} b,

      x_t = (alpha_t/alpha_s) e^{-L} x - alpha_t e^{-L} (int e^{L + S} g + int e^{L + S} (int e^{-S} b)),

    all integrals over lambda. l takes the linear part of the network out, s and b the linear part of what f does along
    a trajectory. g is interpolated through the last evaluations. l = 1, s = b = 0 is the data prediction, l = s = b = 0
    the noise prediction, so that without a file this is UniPC's data prediction without its exceptions at order 2.

    Args:
      file: statistics of the network, of `difax calibrate --solver dpm_solver_v3`; None is l = 1, s = b = 0.
      order: of the predictor, 1 ... 3 (3; 2 with guidance).
      corrector: False is the predictor alone (the authors': with 10 evaluations of CIFAR-10).
      predictor_pseudo: take each derivative of g from the fewest values there are, instead of from all (the authors':
        with 5 evaluations).
      corrector_pseudo: the same in the corrector, which then uses one value more (the authors' choice with guidance).
      corrector_above: the time above which x is corrected (0; 0.5 for the authors' Stable Diffusion).
      lower_order_final: the last steps are of order ..., 2, 1 (true).

    Returns:
      A `Solver` whose state is the corrected start of the step and the past f.

    Raises:
      ValueError: from `grid`, times that lie outside of the statistics.

    References: Zheng et al. 2023, arXiv:2310.13268, section 3 and the appendix on pseudo-order. The authors move the
      times of a run to those of the statistics, and integrate by trapezoids there; here statistics are linear between
      their log-SNRs, exponents between these and those of the run, and so the case without a file is exact. The authors
      end at the smallest time of the statistics; here the step to sigma = 0 is one to the data prediction that f holds,
      alpha_t ((1 - l) x/alpha_s - f). One out of alpha = 0 is of first order in the data prediction.
    """
    if not 1 <= order <= 3:
        raise ValueError(f"dpm_solver_v3: order={order}; allowed: 1, 2, 3")
    if not 0 <= corrector_above <= 1:
        raise ValueError(f"dpm_solver_v3: corrector_above={corrector_above}; allowed: 0 ... 1")
    found = None if file is None else read_statistics(file)
    kept = order - 1 + (corrector and corrector_pseudo)

    def grid(process: Process, times: np.ndarray):
        check_times(times)
        levels, n = ladder(process, times), len(times) - 1
        integrals = integrals_of(levels, found)
        alpha, sigma, shape = levels.level.alpha, levels.level.sigma, integrals.l.shape[1:]
        first, zero = int(alpha[0] == 0), np.zeros(shape)  # the first f that is known at a finite log-SNR
        order_of = [max(1, min(order, j + 1 - first, n - j if lower_order_final else order)) for j in range(n)]
        if sigma[-1] == 0:
            order_of[-1] = 1
        rows = []
        for j in range(n):
            share = (1 - integrals.l[j]) / alpha[j] if alpha[j] > 0 else zero
            many = order_of[j - 1] + corrector_pseudo
            acts = corrector and j > first and many > 1 and times[j] > corrector_above
            nodes = [j - 1, j, *range(j - 2, j - many, -1)] if acts else []
            back = update_of(integrals, j - 1, nodes, corrector_pseudo) if acts else V3Update(zero, (), zero)
            back = _placed(back, nodes, j, kept)
            nodes = list(range(j, j - order_of[j], -1))
            if sigma[j + 1] == 0:
                on = V3Update(alpha[j + 1] * share, (zero - alpha[j + 1],), zero)
            elif alpha[j] == 0:
                on = V3Update(zero + sigma[j + 1] / sigma[j], (zero - alpha[j + 1],), zero)
            else:
                on = update_of(integrals, j, nodes, predictor_pseudo)
            rows.append(V3Table(share, np.bool_(acts), back, _placed(on, nodes, j, kept)))
        table = jax.tree.map(lambda *leaves: np.stack(leaves), *rows)
        return lay_rows(process, times[:-1], np.arange(n), table)

    def step(prediction, x, state: V3State, row, keys):
        c: V3Table = row.coefficients
        d, sample = c.share.shape, x.shape[1:]
        if len(d) > len(sample) or any(a not in (1, b) for a, b in zip(d[::-1], sample[::-1], strict=False)):
            raise ValueError(f"dpm_solver_v3: file={file!r} has statistics of samples {d}; allowed: {sample}")
        c = jax.tree.map(lambda a: _beside(jnp.asarray(a), x.ndim), c)
        f = c.share * x - prediction.x0  # (sigma eps - l x)/alpha, where alpha may be 0
        outputs = (f, *state.past)

        def moved(update: V3Update, start: jax.Array) -> jax.Array:
            return update.x * start + update.constant + sum(w * o for w, o in zip(update.outputs, outputs, strict=True))

        here = jnp.where(c.corrects, moved(c.corrector, state.start), x) if corrector else x
        after = jnp.asarray(moved(c.predictor, here), x.dtype)
        return after, V3State(jnp.asarray(here, x.dtype), tuple(jnp.asarray(o, x.dtype) for o in outputs[:kept]))

    def init(x: jax.Array) -> V3State:
        return V3State(jnp.zeros_like(x), tuple(jnp.zeros_like(x) for _ in range(kept)))

    return Solver(grid=grid, init=init, step=step)


class Integrals(NamedTuple):
    """Cumulative integrals on `at` [K], all log-SNRs of the statistics and of a run.

    of: where the run's log-SNRs lie in `at`. l: [n + 1, *d] at these. L, S, B: [K, *d], of l, s and e^{-S} b.
    """

    at: np.ndarray
    of: np.ndarray
    alpha: np.ndarray
    l: np.ndarray  # noqa: E741
    L: np.ndarray
    S: np.ndarray
    B: np.ndarray


def integrals_of(levels: Ladder, found: dict[str, np.ndarray] | None) -> Integrals:
    """Of statistics (`read_statistics`), or of l = 1, s = b = 0.

    Raises:
      ValueError: a run that goes beyond the statistics.
    """
    finite = np.isfinite(levels.half)
    half = levels.half[finite] if finite.any() else np.zeros(1)
    there, slack = half[[0, -1]] + [-1, 1], 1e-6 * (1 + np.abs(half).max())
    if found is None:
        found = {"lambda": there, "l": np.ones(2), "s": np.zeros(2), "b": np.zeros(2)}
    elif half[0] < found["lambda"][0] - slack or half[-1] > found["lambda"][-1] + slack:
        there = found["lambda"]
        raise ValueError(
            f"dpm_solver_v3: log(alpha/sigma) of the run is {half[0]:.3f} ... {half[-1]:.3f}; allowed: within "
            f"that of the statistics, {there[0]:.3f} ... {there[-1]:.3f}"
        )
    at = np.unique(np.concatenate([found["lambda"], half]))
    of = np.searchsorted(at, np.where(finite, levels.half, half[0]))  # what is endless is not asked for
    l, s, b = (_linear(at, found["lambda"], found[name]) for name in ("l", "s", "b"))  # noqa: E741
    flat = np.zeros_like(l)
    L, S = (_sums(_pieces(at, flat, v)) for v in (l, s))
    return Integrals(at, of, levels.level.alpha, l[of], L, S, _sums(_pieces(at, -S, b)))


def update_of(integrals: Integrals, j: int, nodes: list[int], pseudo: bool) -> V3Update:
    """From the run's time j to time j + 1, by f at the times `nodes`, the first of which is j."""
    at, of, alpha = integrals.at, integrals.of, integrals.alpha
    s, t = of[j], of[j + 1]
    here = slice(s, t + 1)
    L, S = integrals.L[here] - integrals.L[s], integrals.S[here] - integrals.S[s]
    scale = alpha[j + 1] * np.exp(-L[-1])
    B = np.exp(integrals.S[s]) * (integrals.B - integrals.B[s])
    along = _shaped(at[here] - at[s], L)
    moments = np.stack([_pieces(at[here], L + S, along, power=k).sum(0) for k in range(len(nodes))])
    rule = derivative_rule(at[of[nodes]] - at[s], pseudo)
    weights = -scale * np.tensordot(rule.T, moments, 1)  # of g at the nodes
    known = of[nodes]
    constant = -scale * _pieces(at[here], L + S, B[here]).sum(0) - (weights * B[known]).sum(0)
    return V3Update(scale / alpha[j], tuple(weights * np.exp(integrals.S[s] - integrals.S[known])), constant)


def derivative_rule(apart: np.ndarray, pseudo: bool) -> np.ndarray:
    """[k, k]: rule @ values = coefficients of the powers of a function of which k values are known.

    Args:
      apart: [k], where they are known, the first at 0.
      pseudo: take the coefficient of power i as the divided difference of the first i + 1 values; else all are those of
        the polynomial through all values.
    """
    if not pseudo:
        return np.linalg.inv(apart[:, None] ** np.arange(len(apart)))
    rule = np.zeros((len(apart), len(apart)))
    for k in range(len(apart)):
        for i in range(k + 1):
            rule[k, i] = 1 / np.prod([apart[i] - apart[m] for m in range(k + 1) if m != i])
    return rule


def read_statistics(file: str) -> dict[str, np.ndarray]:
    """lambda [K], l, s, b [K, *d] of a file, float64.

    Raises:
      ValueError: no such file, arrays that are missing or of other shapes, or log-SNRs that do not rise.
    """
    found = measured.finite_arrays("dpm_solver_v3", file, wrote=" of difax calibrate --solver dpm_solver_v3")
    where = measured.source("dpm_solver_v3", file)
    missing = [name for name in NAMES if name not in found]
    if missing:
        raise ValueError(f"{where} has no {missing[0]!r}; allowed: {', '.join(NAMES)}")
    found = {name: found[name].astype(np.float64) for name in NAMES}
    at, shape = found["lambda"], found["l"].shape
    if at.ndim != 1 or len(at) < 2 or np.any(np.diff(at) <= 0):
        raise ValueError(f"{where}: lambda of shape {at.shape}; allowed: two rising numbers or more")
    for name in NAMES[1:]:
        if found[name].shape != shape or len(shape) < 1 or shape[0] != len(at):
            raise ValueError(f"{where}: {name} of shape {found[name].shape}; allowed: {(len(at), *shape[1:])}")
    return found


def _placed(update: V3Update, nodes: list[int], j: int, kept: int) -> V3Update:
    """The same with its outputs in the order of the step's: f at j, j - 1, ..., zero where there is none."""
    weights = dict(zip(nodes, update.outputs, strict=True))
    nothing = np.zeros(np.shape(update.constant))
    return update._replace(outputs=tuple(weights.get(j - k, nothing) for k in range(kept + 1)))


def _beside(a: jax.Array, ndim: int) -> jax.Array:
    """[*d] with leading axes for the batch, and what a sample has more."""
    return a.reshape(*(1,) * (ndim - a.ndim), *a.shape)


def _shaped(a: np.ndarray, like: np.ndarray) -> np.ndarray:
    """[K] with as many axes as [K, *d]."""
    return a.reshape(-1, *(1,) * (like.ndim - 1))


def _linear(at: np.ndarray, knots: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Values [K, *d] at knots, linear between them, held beyond."""
    at = np.clip(at, knots[0], knots[-1])
    k = np.clip(np.searchsorted(knots, at, side="right") - 1, 0, len(knots) - 2)
    share = _shaped((at - knots[k]) / (knots[k + 1] - knots[k]), values)
    return (1 - share) * values[k] + share * values[k + 1]


def _pieces(at: np.ndarray, exponent: np.ndarray, values: np.ndarray, power: int = 1) -> np.ndarray:
    """Integrals [K - 1, *d] of e^{exponent} values^power between the knots `at` [K], both linear there."""
    total = np.zeros(np.diff(exponent, axis=0).shape)
    for u, w in zip(*legendre(POINTS), strict=True):
        total += (
            w * np.exp((1 - u) * exponent[:-1] + u * exponent[1:]) * ((1 - u) * values[:-1] + u * values[1:]) ** power
        )
    return total * _shaped(np.diff(at), total)


def _sums(pieces: np.ndarray) -> np.ndarray:
    """Cumulative sums [K, *d] of [K - 1, *d], 0 first."""
    return np.concatenate([np.zeros_like(pieces[:1]), np.cumsum(pieces, 0)])
