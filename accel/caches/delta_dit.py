"""Delta-DiT. Chen et al., A Training-Free Acceleration Method Tailored for Diffusion Transformers, 2024."""

from __future__ import annotations

from difax.accel.caches.span import Span, planned_span
from difax.core.annotations import checked
from difax.core.contracts import Accelerator, Row


@checked
def delta_dit(
    interval: int = 2, cutoff: int | None = None, blocks: int | None = None, dtype: str | None = None
) -> Accelerator:
    """Holds what a span of blocks adds to the tokens: the rear blocks in the early phase, the front ones later.

    every block runs at evaluation i of E iff i mod interval = 0; else tokens += the span's last residual, the span
    being the last `blocks` blocks while E - i > cutoff, and the first `blocks` blocks from then on.

    Args:
      interval: evaluations from one full one to the next, 1 or more (2 and 3 in comparisons; 1 is no cache).
      cutoff: how many evaluations at the end are of the later phase, 0 or more (12 of 20 for PixArt-alpha; 2 of 4
        for its LCM); None is three fifths of them.
      blocks: of the span, 1 or more; None is three quarters of the model's, rounded: 21 of 28, with which an interval
        of 2 computes 1 / 1.6 of the blocks, the paper's speed-up.
      dtype: of the residuals that are kept; None is the model's.

    Returns:
      An `Accelerator` that remembers the residual of each of the two spans, B N D values each.

    References: Chen et al. 2024, arXiv:2406.01125. Not checked against code: none is published. The clock is counted
      from the first evaluation; the paper does not say how it meets the cut-off.
    """
    if interval < 1:
        raise ValueError(f"delta_dit: interval={interval}; allowed: 1 or more")
    if cutoff is not None and cutoff < 0:
        raise ValueError(f"delta_dit: cutoff={cutoff}; allowed: 0 or more")
    if blocks is not None and blocks < 1:
        raise ValueError(f"delta_dit: blocks={blocks}; allowed: 1 or more")

    def schedule(rows: Row, depth: int) -> list[Span | None]:
        evaluations = len(rows.i)
        late = round(0.6 * evaluations) if cutoff is None else cutoff
        size = max(1, round(0.75 * depth)) if blocks is None else blocks
        if size > depth:
            raise ValueError(f"delta_dit: blocks={size}; allowed: up to the {depth} of the model")
        rear, front = (depth - size, depth), (0, size)
        return [None if i % interval == 0 else rear if evaluations - i > late else front for i in range(evaluations)]

    return planned_span("delta_dit", schedule, dtype=dtype)
