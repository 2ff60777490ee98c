"""Skip-Cache: DeepCache on Transformers with long skips.

Ma et al., DeepCache: Accelerating Diffusion Models for Free, 2023, arXiv:2312.00858; Chen et al., Accelerating Vision
Diffusion Transformers with Skip Branches (Skip-DiT), 2024, arXiv:2411.17616.
"""

from __future__ import annotations

import numpy as np

from difax.accel.caches.planned import every
from difax.accel.caches.span import planned_span
from difax.core.annotations import OrInfinite, checked
from difax.core.contracts import Accelerator, Plan, Row, Stage

KEYS = ("uniform", "power")


@checked
def skipcache(
    interval: int = 2,
    blocks: int | None = None,
    *,
    keys: str = "uniform",
    center: int = 15,
    power: float = 1.4,
    window: tuple[OrInfinite, OrInfinite] = (20.0, 1000.0),
    dtype: str | None = None,
) -> Accelerator:
    """Between full evaluations runs the first and the last few blocks alone, on the deep hidden stream of the last one.

    The deep stream is what enters block L - blocks, before its long skip; the last blocks then meet, through their
    skips, what the first ones have just given out. Evaluation i is full iff it is a key, t_i >= window[1], or
    t_{i-1} <= window[0]. Keys are every `interval`-th one ("uniform"), or as many, close together around the
    `center`-th ("power"): 0 and center + Re[((1 - u) (-center)^(1/p) + u (T - center)^(1/p))^p], cut to integers, for
    equally spaced u, with p the first of power, power - 0.02, ... that gives the right number of distinct ones.

    Args:
      interval: evaluations from one full one to the next, 1 or more (2 to 6 in Skip-DiT; 1 is no cache).
      blocks: that always run at either end, 1 or more, less than half of all; None is 4 (of 28), or a third of a model
        of fewer than 12.
      keys, center, power: "uniform"; of "power" 15 and 1.4, DeepCache's for 50 steps at interval 5.
      window: model times between which deep features are used ((20, 1000) for class to image; (50, 700) for video).
      dtype: of the hidden stream that is kept; None is the model's.

    Returns:
      An `Accelerator` that remembers one hidden state, for models with long skips (`Stage.takes`).

    References: Ma et al. 2023 and Chen et al. 2024, their code read: the root of a negative number is complex there,
      too, of which the real part is taken.
    """
    if interval < 1 or (blocks is not None and blocks < 1):
        raise ValueError(f"skipcache: interval={interval}, blocks={blocks}; allowed: 1 or more")
    if keys not in KEYS:
        raise ValueError(f"skipcache: keys={keys!r}; allowed: {', '.join(KEYS)}")
    if center < 0 or not 1 < power <= 10:
        raise ValueError(f"skipcache: center={center}, power={power}; allowed: 0 or more, and more than 1, up to 10")
    if not window[0] < window[1]:
        raise ValueError(f"skipcache: window={tuple(window)}; allowed: two times, the smaller first")

    def ends(depth: int) -> int:
        return min(4, depth // 3) if blocks is None else blocks

    def spans(rows: Row, depth: int) -> list[tuple[int, int] | None]:
        e, t = len(rows.i), np.asarray(rows.model_time)
        full = every(interval, rows)
        if keys == "power" and interval > 1:
            full = np.isin(rows.i, power_law(e, -(-e // interval), center, power))
        full = full | (t >= window[1]) | np.append(False, t[:-1] <= window[0])
        return [None if f else (ends(depth), depth - ends(depth)) for f in full]

    base = planned_span("skipcache", spans, keep="output", dtype=dtype)

    def plan(rows: Row, stages: tuple[Stage, ...]) -> Plan:
        if stages[-1].takes != stages[0].name or len(stages) < 2:
            raise ValueError(
                "skipcache: this model has no long skips from its first stage to its last; allowed: one that has, such "
                "as skip_dit"
            )
        depth, shorter = sum(s.depth for s in stages), min(stages[0].depth, stages[-1].depth)
        if ends(depth) > shorter or not 0 < 2 * ends(depth) < depth:
            raise ValueError(
                f"skipcache: blocks={ends(depth)}; allowed: 1 or more, less than half of the {depth} blocks"
            )
        return base.plan(rows, stages)

    return base._replace(plan=plan)


def power_law(evaluations: int, number: int, center: int, power: float) -> list[int]:
    """DeepCache's key evaluations, dense around the `center`-th.

    Raises:
      ValueError: no exponent above 1 gives that many.
    """
    p = power
    while p > 1 and center < evaluations:
        first, last = (complex(end) ** (1 / p) for end in (-center, evaluations - center))
        spread = np.unique((np.linspace(first, last, number + 1) ** p).real.astype(int))
        keys = [0, *(int(k) + center for k in spread[1:-1])]
        if len(keys) == number:
            return keys
        p -= 0.02
    raise ValueError(
        f"skipcache: no {number} keys of {evaluations} evaluations around the {center}th with power={power}; "
        "allowed: a smaller center, or keys='uniform'"
    )
