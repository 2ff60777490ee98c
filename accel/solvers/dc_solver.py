"""DC-Solver. Zhao, Wang, Zhou & Lu, DC-Solver: Improving Predictor-Corrector Diffusion Sampler via Dynamic
Compensation, 2024, arXiv:2409.03755.

A file of ratios, written by `difax calibrate --solver dc_solver`, is one JSON object, which says what it was measured
on as the files of caches do (`difax.accel.caches.measured`):

  {"technique": "dc_solver", "ratios": [1, 1, 0.93, ...]}             one a step, for a run of as many steps
  {"technique": "dc_solver", "polynomial": [[[...]]], "scale": 4.0}   for any number of steps, `polynomial_ratios`
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from difax.accel.caches import measured
from difax.accel.solvers.adams import slots_of
from difax.accel.solvers.linear import LinearTable, Steps, linear
from difax.accel.solvers.unipc import check_unipc, lay_unipc
from difax.core.annotations import checked
from difax.core.contracts import Row, Solver
from difax.core.mixing import lagrange
from difax.core.process import Process

DEGREES = (4, 3, 3)  # of the polynomial in the share of the run, in guidance, in evaluations
SCALES = (1.0, 12.0, 50.0)  # what these three are divided by


@checked
def dc_solver(
    ratios: Sequence[float] | None = None,
    file: str | None = None,
    scale: float | None = None,
    dc_order: int = 2,
    order: int = 2,
    variant: Literal["bh1", "bh2"] = "bh2",
    prediction: Literal["data", "noise"] = "data",
    corrector_off: Sequence[int] = (),
    lower_order_final: bool = True,
) -> Solver:
    """UniPC whose newest output is replaced by what the outputs so far say of a time near it.

    The corrector leaves the output m_j at the predicted x_j while x_j moves, so m_j lags. Before the step from t_j,

      m_j <- sum_{i <= dc_order} l_i(t') m_{j-i},    t' = rho_j t_j + (1 - rho_j) t_{j-1},

    l_i the Lagrange polynomials of t_j, t_{j-1}, ..., in which older outputs are replaced already. Both the predictor
    of this step and the corrector at its end use it. rho = 1 keeps the output: all ratios 1 is `unipc`, exactly.

    Args:
      ratios: rho_j of each step; those of the first `dc_order` steps, which know too few outputs, are 1.
      file: of `difax calibrate`, in place of ratios. Neither: all are 1.
      scale: of the guidance, for a file with a polynomial; None takes the file's own.
      dc_order: degree of the interpolant, 1 ... 3 (2).
      order, variant, prediction, corrector_off, lower_order_final: as `unipc` has them (the authors search for Stable
        Diffusion with order 2 and a first step that is not corrected, corrector_off = [0]).

    Returns:
      A `Solver` with the state of `unipc`.

    Raises:
      ValueError: from `grid`, ratios of another number of steps.

    References: Zhao et al. 2024, arXiv:2409.03755, section 3.
    """
    check_unipc("dc_solver", order, corrector_off)
    if not 1 <= dc_order <= 3:
        raise ValueError(f"dc_solver: dc_order={dc_order}; allowed: 1, 2, 3")
    ratios_for = _ratios_for(ratios, file, scale)

    def lay(steps: Steps, process: Process, times: np.ndarray) -> None:
        n = len(times) - 1
        given = ratios_for(n)
        if any(rho != 1 for rho in given[:dc_order]):
            raise ValueError(
                f"dc_solver: ratios={given[:dc_order].tolist()} of the first steps; allowed: 1 in the first "
                f"{dc_order}, which know too few outputs for dc_order={dc_order}"
            )

        def blend(j: int) -> np.ndarray | None:
            return None if given[j] == 1 else compensation(times, j, given[j], dc_order)

        lay_unipc(
            steps, process, times, order, variant, prediction, True, corrector_off, lower_order_final, blend=blend
        )

    return linear(lay, slots_of(max(order, dc_order), corrects=True))


def compensation(times: np.ndarray, j: int, ratio: float, dc_order: int) -> np.ndarray:
    """Weights [dc_order + 1] of the outputs at times[j], times[j - 1], ... in the compensated one."""
    return lagrange(times[np.arange(j, j - dc_order - 1, -1)], ratio * times[j] + (1 - ratio) * times[j - 1])


def table_of_ratios(process: Process, times: np.ndarray, dc_order: int = 2, **settings: Any) -> Callable[..., Row]:
    """What a search by gradients differentiates: a function of the ratios that lays the run's rows.

    The weights of a row are polynomials of degree `dc_order` in that row's ratio alone, so that tables at
    dc_order + 1 ratios, made in float64 on the host, hold them for all.

    Args:
      settings: of `dc_solver`, without ratios and file.

    Returns:
      rows(ratios [n]) -> the rows of `dc_solver(ratios)`, traced where the ratios are; the first dc_order are not read.
    """
    n, nodes = len(times) - 1, 1.0 + np.arange(dc_order + 1) / dc_order
    laid = [
        dc_solver([1.0] * min(n, dc_order) + [node] * (n - dc_order), dc_order=dc_order, **settings).grid(
            process, times
        )
        for node in nodes.tolist()
    ]
    tables: list[LinearTable] = [rows.coefficients for rows in laid]
    stacked = np.stack([table.weights for table in tables])
    used = tuple(
        at_one if at_one == at_two else tuple(map(int, np.flatnonzero(np.any(stacked[:, :, o], axis=(0, 1)))))
        for o, (at_one, at_two) in enumerate(zip(tables[0].used, tables[1].used, strict=True))
    )

    def rows(ratios: jax.Array) -> Row:
        free = jnp.where(jnp.arange(n) < dc_order, 1.0, jnp.asarray(ratios))
        basis = jax.vmap(lambda rho: lagrange(jnp.asarray(nodes, free.dtype), rho))(free)
        weights = jnp.einsum("ek,keoi->eoi", basis, jnp.asarray(stacked, free.dtype))
        return laid[0]._replace(coefficients=LinearTable(weights, used))

    return rows


def polynomial_ratios(coefficients: Any, steps: int, scale: float, dc_order: int = 2) -> np.ndarray:
    """Ratios [steps] for a number of steps and a guidance scale that no search has seen.

    rho_j = sum_{a b c} C_{abc} ((j + 1)/steps)^a (scale/12)^b (steps/50)^c for j >= dc_order, else 1: the cascade of
    polynomials of the paper, in the share of the run, whose coefficients are polynomials in the guidance, whose
    coefficients are polynomials in the evaluations, multiplied out.

    Args:
      coefficients: C [4, 3, 3], of `fit_polynomial`.

    References: cascade polynomial regression, in section 3 of the paper. The authors' file has each polynomial in
      guidance and evaluations with its highest power first.
    """
    basis = _basis(np.arange(1, steps + 1) / steps, scale, steps)
    ratios = np.einsum("jabc,abc->j", basis, np.asarray(coefficients, np.float64))
    return np.where(np.arange(steps) < dc_order, 1.0, ratios)


def fit_polynomial(found: Sequence[tuple[Sequence[float], float]], dc_order: int = 2) -> np.ndarray:
    """Least-squares C [4, 3, 3] of `polynomial_ratios` from searches: (ratios of each step, guidance scale)."""
    rows, values = [], []
    for ratios, scale in found:
        n = len(ratios)
        rows.append(_basis(np.arange(1, n + 1) / n, scale, n)[dc_order:])
        values.append(np.asarray(ratios, np.float64)[dc_order:])
    basis = np.concatenate(rows).reshape(-1, np.prod(DEGREES))
    return np.linalg.lstsq(basis, np.concatenate(values), rcond=None)[0].reshape(DEGREES)


def _basis(share: np.ndarray, scale: float, steps: int) -> np.ndarray:
    """[len(share), 4, 3, 3], powers of the three."""
    parts = (share, scale, float(steps))
    a, b, c = (
        (np.asarray(part) / unit)[..., None] ** np.arange(d)
        for part, unit, d in zip(parts, SCALES, DEGREES, strict=True)
    )
    return a[:, :, None, None] * b[:, None] * c


def _ratios_for(ratios: Sequence[float] | None, file: str | None, scale: float | None) -> Callable[[int], np.ndarray]:
    """steps -> ratios [steps]."""
    if ratios is not None and file is not None:
        raise ValueError("dc_solver: ratios and file were both given; allowed: one of them")
    source = measured.source("dc_solver", file)
    if file is not None:
        content = measured.read("dc_solver", file, ())
        if "polynomial" in content:
            return _polynomial_of(source, content, scale)
        ratios = measured.read("dc_solver", file, ("ratios",))["ratios"]
    if ratios is None:
        return np.ones
    given = measured.numbers(f"{source}: ratios", ratios)

    def of(steps: int) -> np.ndarray:
        if len(given) != steps:
            raise ValueError(f"{source}: ratios of {len(given)} steps; allowed: the {steps} of this run")
        return given

    return of


def _polynomial_of(source: str, content: dict[str, Any], scale: float | None) -> Callable[[int], np.ndarray]:
    """The ratios of a file with a polynomial."""
    coefficients = measured.finite(f"{source}: polynomial", content["polynomial"])
    if coefficients.shape != DEGREES:
        raise ValueError(f"{source}: a polynomial of shape {coefficients.shape}; allowed: {DEGREES}")
    used = content.get("scale") if scale is None else scale
    if not isinstance(used, (int, float)):
        raise ValueError(f"{source}: scale={used!r}; allowed: the guidance scale, as a number")
    return lambda steps: polynomial_ratios(coefficients, steps, float(used))
