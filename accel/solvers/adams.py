"""Adams methods as tables of the linear engine: steps from remembered outputs, and correctors one evaluation later.

  predictor   x_{j+1} = a x_j + sum_i w_i D_{j-i} + c z_{j+1}
  corrector   x_j     = a x_{j-1} + sum_i w_i D_{j-i} + c z_j        once D_j is known, with the noise that made x_j

D are outputs of the network, x0 or eps. The row of D_j first corrects x_j and then predicts from it; both are linear,
so that their product is one row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from difax.accel.solvers.linear import Steps
from difax.accel.solvers.quadrature import exponential_lagrange
from difax.core.contracts import Level
from difax.core.process import Process

Mix = Mapping[str, float]
OUTPUTS = {"data": "x0", "noise": "eps"}  # what a solver calls a prediction -> the engine's input


class Update(NamedTuple):
    """One step: x weighs the x that it starts from, outputs [k] the network's outputs, newest first, noise its draw."""

    x: float
    outputs: np.ndarray
    noise: float = 0.0


class Ladder(NamedTuple):
    """The noise levels of a run at its times [n + 1], and their half log-SNR; infinite where alpha or sigma is 0."""

    level: Level
    half: np.ndarray


def ladder(process: Process, times: np.ndarray) -> Ladder:
    """Levels at times [n + 1], float64."""
    level = process.level(np.asarray(times, np.float64))
    with np.errstate(divide="ignore"):
        return Ladder(level, np.log(level.alpha) - np.log(level.sigma))


def combine(*terms: tuple[float, Mix]) -> dict[str, float]:
    """sum_k weight_k mix_k of mixes {input: weight}."""
    total: dict[str, float] = {}
    for weight, mix in terms:
        for name, value in mix.items():
            total[name] = total.get(name, 0.0) + weight * value
    return total


def past(k: int) -> str:
    """The slot of the output k evaluations ago, k = 1, 2, ..."""
    return f"past{k}"


def slots_of(kept: int, corrects: bool = False, noisy: bool = False) -> tuple[str, ...]:
    """The slots that `lay_adams` uses: `kept` past outputs, the start of the step, the noise of it."""
    anchor = ("anchor",) * corrects + ("drawn",) * (corrects and noisy)
    return (*(past(k + 1) for k in range(kept)), *anchor)


def lay_adams(
    steps: Steps,
    times: np.ndarray,
    levels: Ladder,
    output: str,
    predict: Callable[[int], Update],
    correct: Callable[[int], Update | None] | None = None,
    blend: Callable[[int], np.ndarray | None] | None = None,
) -> None:
    """Lays one row an evaluation.

    Args:
      steps: with the slots of `slots_of`.
      times: [n + 1], with their levels.
      output: "x0" or "eps".
      predict(j): from times[j] to times[j + 1], by the outputs at j, j - 1, ...
      correct(j): of the step that ends at times[j], by the outputs at j, j - 1, ...; None leaves x as predicted.
      blend(j): what replaces the newest output, for the predictor and from then on, as weights of the outputs at
        j, j - 1, ...; None leaves it.
    """
    kept = sum(name.startswith("past") for name in steps.outputs)
    for j in range(len(times) - 1):
        known: list[Mix] = [{output: 1.0}, *({past(k + 1): 1.0} for k in range(kept))]
        here: Mix = {"x": 1.0}
        corrected = correct(j) if correct is not None and j else None
        if corrected is not None:
            here = _apply(corrected, {"anchor": 1.0}, known, "drawn")
        blended = blend(j) if blend is not None else None
        if blended is not None:
            known[0] = combine(*zip(map(float, blended), known, strict=False))
        slots: dict[str, Mix] = {past(k + 1): known[k] for k in range(kept)}
        if correct is not None:
            slots["anchor"] = here
            if "drawn" in steps.outputs:
                slots["drawn"] = {"z1": 1.0}
        update = predict(j)
        plain = output == "eps" and corrected is None and blended is None
        x = from_prediction(levels, j, update.outputs, known) if plain else _apply(update, here, known, "z1")
        steps.row(times[j], j, x=x, **slots)


def from_prediction(levels: Ladder, j: int, weights: np.ndarray, known: Sequence[Mix]) -> dict[str, float]:
    """(alpha_s/alpha_t) x + sum_i weights[i] eps_{j-i}, where x is what the network saw: x = alpha_t x0 + sigma_t eps.

    Since the weights add up to sigma_s - alpha_s sigma_t/alpha_t it is alpha_s x0 + sigma_s eps_j
    + sum_{i>0} weights[i] (eps_{j-i} - eps_j), which does not cancel where alpha is small, and holds at alpha = 0.
    """
    alpha, sigma = levels.level.alpha[j + 1], levels.level.sigma[j + 1]
    terms = [(float(w), mix) for w, mix in zip(weights[1:], known[1:], strict=False)]
    return combine((alpha, {"x0": 1.0}), (sigma - sum(w for w, _ in terms), {"eps": 1.0}), *terms)


def _apply(update: Update, start: Mix, known: list[Mix], noise: str) -> dict[str, float]:
    """An update of mixes."""
    terms = [(update.x, start), *zip(map(float, update.outputs), known, strict=False)]
    return combine(*terms, *[(update.noise, {noise: 1.0})] * (update.noise != 0))


def exponential(levels: Ladder, j: int, nodes: np.ndarray, prediction: str, tau: float = 0.0) -> Update:
    """The exponential Adams step from times[j] to times[j + 1] with the polynomial through the outputs at some times.

    With h = lambda_s - lambda_t and r = 1 + tau^2,

      data    x_s = (sigma_s/sigma_t) e^{-tau^2 h} x + alpha_s r int e^{r (lambda - lambda_s)} x0 d lambda
                    + sigma_s sqrt(1 - e^{-2 tau^2 h}) z
      noise   x_s = (alpha_s/alpha_t) x - sigma_s int e^{lambda_s - lambda} eps d lambda             (tau = 0)

    Args:
      nodes: indices of the times whose outputs are used, newest first; of one alone where the step ends at sigma = 0.
      prediction: "data" or "noise".
      tau: 0 of the probability flow, 1 of the reverse SDE.
    """
    (alpha, sigma, _, _), half = levels
    s = j + 1
    h = half[s] - half[j]
    if prediction == "noise":
        ratio = ratio_of(levels, j)
        if len(nodes) == 1:  # in differences of the levels, which are finite where h is not
            return Update(ratio, np.array([sigma[s] - ratio * sigma[j]]))
        return Update(ratio, -sigma[s] * exponential_lagrange(half[nodes], half[j], half[s], -1.0))
    rate = 1 + tau**2
    decay = np.exp(-(tau**2) * h) if tau else 1.0
    noise = sigma[s] * np.sqrt(-np.expm1(-2 * tau**2 * h)) if tau else 0.0
    weights = alpha[s] * rate * exponential_lagrange(half[nodes], half[j], half[s], rate)
    return Update(sigma[s] / sigma[j] * decay, weights, float(noise))


def order_at(order: int, j: int, n: int, levels: Ladder, lower_order_final: bool) -> int:
    """The order of step j of n: outputs there are, steps that remain where the last ones are lower, 1 to sigma = 0."""
    known = min(order, j + 1)
    left = min(known, n - j) if lower_order_final else known
    return left if np.isfinite(levels.half[j + 1]) else 1


def ratio_of(levels: Ladder, j: int) -> float:
    """alpha_{j+1}/alpha_j; 0 out of alpha = 0, where x says nothing of the data (`from_prediction`)."""
    alpha = levels.level.alpha
    return float(alpha[j + 1] / alpha[j]) if alpha[j] > 0 else 0.0
