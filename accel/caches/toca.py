"""ToCa. Zou et al., Accelerating Diffusion Transformers with Token-wise Feature Caching, 2024, arXiv:2410.05317."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from difax.accel.caches.planned import everywhere
from difax.accel.caches.tokens import Schedule, token_cache
from difax.core.annotations import checked
from difax.core.contracts import Accelerator, Row, Stage

# name -> interval, step_weight, layer_weight of the authors' recommended runs of DiT-XL/2
PRESETS = {"ddim50": (3, 2.0, -0.2), "ddpm250": (4, 0.4, 0.8)}
MODULES = {"mlp": 2.5}  # 1 + 0.6 * 2.5; for attention 1 - 0.4 * 2.5 = 0


@checked
def toca(
    preset: str = "ddim50",
    *,
    interval: int | None = None,
    ratio: float = 0.07,
    step_weight: float | None = None,
    layer_weight: float | None = None,
    modules: Mapping[str, float] | None = None,
    score: str = "attention",
    staleness: float = 0.25,
    bonus: float = 0.6,
    grid: tuple[int, ...] | None = None,
    select: str = "top",
    reference_quirks: bool = False,
    seed: int = 0,
    dtype: str | None = None,
) -> Accelerator:
    """Between full evaluations holds attention, and computes the MLP of the tokens that matter most.

    With s = T - 1 ... 0 the steps that are left, an evaluation is full iff s = T - 1 or s mod c = 0, where c is set by
    each full one: c = 2 for s in [0.2 T, 0.4 T), else round(interval / (1.4 - 0.8 s/T)). Any other computes in layer l
    the floor(r N) tokens of the highest score,
      r = ratio (1 + v - 2v l/(L-1)) (1 + w - 2w s/T) module,
      score = normalised column sums of the attention + staleness age/interval,
    the best of each 2 x 2 cell raised by `bonus`; age counts the partial evaluations since the token was computed.

    Args:
      preset: "ddim50" or "ddpm250", for interval (3, 4), step_weight w (2.0, 0.4) and layer_weight v (-0.2, 0.8), each
        of which may also be given. interval 1 is no cache.
      ratio: of the tokens (0.07); 0 holds everything, at every interval-th step as FORA.
      modules: branch -> what the ratio is multiplied with there; branches without one are held ({"mlp": 2.5}).
      score, staleness, bonus, grid, select, seed, dtype: as in `difax.accel.caches.tokens.token_cache`; the paper's
        finding for DuCa is that score="random" is no worse.
      reference_quirks: c is set while a step's first block runs, so that the other blocks already go by the new one
        and may be partial in a step whose first block is full.

    Returns:
      An `Accelerator` that remembers one output per branch and layer, the age of every token and a score of it.

    References: Zou et al. 2024; the authors' DiT code, whose numbers these are. Their 27 is L - 1 here. Layers count in
      their stage. Branches in which tokens attend to each other are held whole, FLUX's single blocks among them (the
      authors compute their MLP in part); text tokens have no cells. PixArt's cross-attention score is not here, and
      a random score is one draw for the whole batch.
    """
    if preset not in PRESETS:
        raise ValueError(f"toca: preset={preset!r}; allowed: {', '.join(PRESETS)}")
    n, w, v = PRESETS[preset]
    n = n if interval is None else interval
    w, v = w if step_weight is None else step_weight, v if layer_weight is None else layer_weight
    check("toca", n, ratio, staleness)

    def schedule(rows: Row, stages: tuple[Stage, ...]) -> Schedule:
        first, rest = clock(len(rows.i), n, ratio, reference_quirks)
        full = {s.name: np.repeat((rest == 0)[:, None], s.depth, 1) for s in stages}
        full[stages[0].name][:, 0] = first == 0
        idle = np.zeros(len(rows.i), bool)
        return Schedule(full, shares("toca", rows, stages, ratio, w, v, MODULES if modules is None else modules), idle)

    return token_cache(
        "toca",
        schedule,
        score=score,
        staleness=staleness / n,
        bonus=bonus,
        grid=grid,
        select=select,
        seed=seed,
        dtype=dtype,
    )


def clock(evaluations: int, interval: int, ratio: float, quirks: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Steps left modulo c for the first block and for the others, in the order of the run; 0 is a full evaluation."""
    first, rest, c = np.zeros(evaluations, int), np.zeros(evaluations, int), 1
    for i in range(evaluations):
        left = evaluations - 1 - i
        first[i] = rest[i] = 0 if i == 0 else left % c
        if first[i] == 0:
            c = _cycle(left, evaluations, interval, ratio)
            rest[i] = left % c if quirks and i > 0 else 0
    return first, rest


def _cycle(left: int, evaluations: int, interval: int, ratio: float) -> int:
    if interval == 1 or ratio == 0:
        return interval
    if int(0.2 * evaluations) <= left < int(0.4 * evaluations):
        return 2
    return max(round(interval / (1.4 - 0.8 * left / evaluations)), 1)


def shares(
    name: str,
    rows: Row,
    stages: tuple[Stage, ...],
    ratio: float,
    step_weight: float,
    layer_weight: float,
    modules: Mapping[str, float],
) -> dict[str, dict[str, np.ndarray]]:
    """Which share of its tokens a partial evaluation computes in each stage, branch and layer, [E, L]."""
    try:
        sites = everywhere(np.zeros(0), stages, tuple(modules))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    t = len(rows.i)
    by_step = 1 + step_weight - 2 * step_weight * (t - 1 - np.arange(t)) / t
    out: dict[str, dict[str, np.ndarray]] = {}
    for stage in stages:
        by_layer = 1 + layer_weight - 2 * layer_weight * np.arange(stage.depth) / max(stage.depth - 1, 1)
        r = ratio * by_layer * by_step[:, None]
        out[stage.name] = {branch: np.clip(r * modules[branch], 0, 1) for branch in sites[stage.name]}
    return out


def check(name: str, interval: int, ratio: float, staleness: float) -> None:
    """Refuses what the clock cannot mean."""
    if interval < 1 or not 0 <= ratio <= 1:
        raise ValueError(f"{name}: interval={interval}, ratio={ratio}; allowed: 1 or more, and 0 to 1")
    if not staleness >= 0:
        raise ValueError(f"{name}: staleness={staleness}; allowed: 0 or more")
