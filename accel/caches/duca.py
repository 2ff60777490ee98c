"""DuCa. Zou et al., Accelerating Diffusion Transformers with Dual Feature Caching, 2024, arXiv:2412.18911."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from difax.accel.caches.span import planned_span
from difax.accel.caches.toca import MODULES, PRESETS, check, clock, shares
from difax.accel.caches.tokens import Schedule, token_cache
from difax.core.annotations import checked
from difax.core.contracts import Accelerator, Plan, Row, Stage
from difax.core.stack import stack


@checked
def duca(
    interval: int = 3,
    ratio: float = 0.05,
    *,
    step_weight: float = PRESETS["ddim50"][1],
    layer_weight: float = PRESETS["ddim50"][2],
    modules: Mapping[str, float] | None = None,
    score: str = "value_norm",
    staleness: float = 0.25,
    bonus: float = 0.8,
    grid: tuple[int, ...] | None = None,
    select: str = "top",
    reference_quirks: bool = False,
    seed: int = 0,
    dtype: str | None = None,
) -> Accelerator:
    """Between full evaluations takes turns: a ToCa step, and a step that leaves out every block.

    With s = T - 1 ... 0 the steps that are left and c the modulus of `difax.accel.caches.toca`: full where s mod c = 0,
    a ToCa step where s mod c is odd, else the hidden state behind the last block is that of the evaluation before, and
    only the head runs, with the time and condition of now.

    Args:
      interval, ratio, step_weight, layer_weight: 3, 0.05, 2.0, -0.2; interval 1 is no cache.
      modules, staleness, bonus, grid, select, seed, dtype: as in `toca` ({"mlp": 2.5}, 0.25, 0.8).
      score: "value_norm" by default, which needs no attention map, so that any attention kernel serves. In the paper's
        second version "random" is as good or better.
      reference_quirks: as in `toca`; the other blocks of such a step may then be left out, too.

    Returns:
      An `Accelerator` that remembers what `toca` does, and one hidden state.

    References: Zou et al. 2024; the authors' DiT code. The command of its README takes the attention score, the paper
      the norm of the values. `toca` says what differs from their code here.
    """
    check("duca", interval, ratio, staleness)

    def rests(rows: Row) -> tuple[np.ndarray, np.ndarray]:
        return clock(len(rows.i), interval, ratio, reference_quirks)

    def schedule(rows: Row, stages: tuple[Stage, ...]) -> Schedule:
        first, rest = rests(rows)
        full = {s.name: np.repeat((rest == 0)[:, None], s.depth, 1) for s in stages}
        full[stages[0].name][:, 0] = first == 0
        share = shares("duca", rows, stages, ratio, step_weight, layer_weight, MODULES if modules is None else modules)
        return Schedule(full, share, idle=(rest != 0) & (rest % 2 == 0))

    def skipped(rows: Row, depth: int) -> list[tuple[int, int] | None]:
        first, rest = rests(rows)
        # where the first block of a step is full and the others are left out, that block refreshes its cache only
        begin = np.where((first == 0) & (rest != 0), min(1, depth - 1), 0)
        return [(int(b), depth) if r and r % 2 == 0 else None for b, r in zip(begin, rest, strict=True)]

    tokens = token_cache(
        "tokens",
        schedule,
        score=score,
        staleness=staleness / interval,
        bonus=bonus,
        grid=grid,
        select=select,
        seed=seed,
        dtype=dtype,
    )
    hidden = planned_span("hidden", skipped, keep="output", dtype=dtype)

    both = stack(tokens, hidden, one_clock=True)

    def plan(rows: Row, stages: tuple[Stage, ...]) -> Plan:
        return dataclasses.replace(both.plan(rows, stages), owner="duca")

    return both._replace(name="duca", plan=plan)
