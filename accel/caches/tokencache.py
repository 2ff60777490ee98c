"""TokenCache. Lou et al., Token Caching for Diffusion Transformer Acceleration, 2024, arXiv:2409.18523."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from difax.accel.caches import measured
from difax.accel.caches.tokens import SCORES, Schedule, token_cache
from difax.core.annotations import checked
from difax.core.contracts import Accelerator, Row, Stage


@checked
def tokencache(
    intervals: tuple[int, int] = (2, 3),
    switch: float = 0.5,
    *,
    ratio: float = 0.5,
    blocks: float = 1.0,
    file: str | None = None,
    importance: Sequence[float] | None = None,
    score: str | None = None,
    select: str = "top",
    seed: int = 0,
    dtype: str | None = None,
) -> Accelerator:
    """Full evaluations in rounds of two lengths; between them unimportant blocks compute their important tokens alone.

    The cache predictor g(l, t) gives a number for every token of block l at time t. A round begins with a full
    evaluation and has intervals[0] of them in the first part of the run, intervals[1] in the second, which begins with
    a round of its own (two-phase round-robin). In the others, the `blocks` of the smallest mean_n g(l, t)_n compute
    the floor(ratio N) tokens of the largest g, their other tokens keep what they had; the other blocks are computed.

    Args:
      intervals, switch: lengths of the rounds, 1 or more (1, 1 is no cache), and the part of the run at which they
        change, 0 to 1.
      ratio: of the tokens that such a block computes. blocks: the share of all blocks that are such.
      file: of a predictor, .npz: "times" [K], model times, and per stage, named as it, [K, L, N]; an evaluation goes by
        the nearest time. Tokens of several streams stand one behind the other, as their attention takes them.
      importance: without a file, a number for each block of the model, by which `blocks` less than 1 choose.
      score: without a file, how tokens are chosen, one of `difax.accel.caches.tokens.SCORES` ("random").
      select, seed, dtype: as in `difax.accel.caches.tokens.token_cache`.

    Returns:
      An `Accelerator` that remembers one output per branch and layer.

    References: Lou et al. 2024. Not checked against code: none is published; the paper's own lengths and ratios are not
      known here, so that the defaults are not its. There a predictor is trained with
      w f(z_t) + (1 - w) f(z_{t+1}), w = g(l, t), in place of each block f; what stands in here is the output of a
      branch, not of a block, and branches in which tokens attend to each other are held whole.
    """
    if min(intervals) < 1 or len(intervals) != 2 or not 0 <= switch <= 1:
        raise ValueError(
            f"tokencache: intervals={tuple(intervals)}, switch={switch}; allowed: two of 1 or more; 0 to 1"
        )
    if not 0 <= ratio <= 1 or not 0 <= blocks <= 1:
        raise ValueError(f"tokencache: ratio={ratio}, blocks={blocks}; allowed: 0 to 1")
    if file is not None and (importance is not None or score is not None):
        raise ValueError("tokencache: a file was given beside importance or score; allowed: one or the other")
    if blocks < 1 and file is None and importance is None:
        raise ValueError(f"tokencache: blocks={blocks} without importance or file; allowed: 1.0, or one of them")
    if score is not None and score not in SCORES:
        raise ValueError(f"tokencache: score={score!r}; allowed: {', '.join(SCORES)}")
    table = None if file is None else _read(file)
    given = None if importance is None else measured.numbers("tokencache: importance", importance)

    def schedule(rows: Row, stages: tuple[Stage, ...]) -> Schedule:
        e, depth = len(rows.i), sum(s.depth for s in stages)
        cuts = np.cumsum([s.depth for s in stages])[:-1]
        with measured.naming(file):
            scores = None if table is None else _at(table, np.asarray(rows.model_time), stages)
        if scores is not None:
            weight = np.concatenate([scores[s.name].mean(2) for s in stages], axis=1)
        else:
            if given is not None and len(given) != depth:
                raise ValueError(f"tokencache: importance of {len(given)} blocks; the model has {depth}")
            weight = np.tile(np.zeros(depth) if given is None else given, (e, 1))
        pruned = np.argsort(np.argsort(weight, axis=1, kind="stable"), axis=1) < round(blocks * depth)
        full = round_robin(e, intervals, switch)[:, None] | ~pruned
        parts = np.split(full, cuts, axis=1)
        return Schedule(
            {s.name: part for s, part in zip(stages, parts, strict=True)},
            {s.name: {b: np.full((e, s.depth), ratio) for b in s.branches} for s in stages},
            np.zeros(e, bool),
            scores,
        )

    how = "given" if table is not None else score or "random"
    return token_cache("tokencache", schedule, score=how, select=select, seed=seed, dtype=dtype)


def round_robin(evaluations: int, intervals: tuple[int, int], switch: float) -> np.ndarray:
    """The first evaluation of every round, bool [E]."""
    i, begin = np.arange(evaluations), round(switch * evaluations)
    return np.where(i < begin, i % intervals[0] == 0, (i - begin) % intervals[1] == 0)


def _read(file: str) -> dict[str, np.ndarray]:
    table = {k: np.asarray(a, np.float64) for k, a in measured.finite_arrays("tokencache", file).items()}
    if table.get("times", np.zeros(0)).ndim != 1 or not len(table.get("times", ())):
        raise ValueError(f"tokencache: {file} has no times; allowed: times [K], and [K, L, N] per stage")
    return table


def _at(table: dict[str, np.ndarray], times: np.ndarray, stages: tuple[Stage, ...]) -> dict[str, np.ndarray]:
    nearest = np.abs(times[:, None] - table["times"][None]).argmin(1)
    scores = {}
    for stage in stages:
        given = table.get(stage.name)
        if given is None or given.ndim != 3 or given.shape[:2] != (len(table["times"]), stage.depth):
            found = "nothing" if given is None else f"an array {given.shape}"
            raise ValueError(
                f"tokencache: {found} for the stage {stage.name}; allowed: [{len(table['times'])}, {stage.depth}, "
                "tokens], times of the file by blocks of the stage"
            )
        scores[stage.name] = measured.finite(f"tokencache: predictor of {stage.name}", given)[nearest]
    return scores
