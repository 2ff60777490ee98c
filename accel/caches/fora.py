"""FORA. Selvaraju et al., Fast-Forward Caching in Diffusion Transformer Acceleration, 2024, arXiv:2407.01425."""

from __future__ import annotations

import numpy as np

from difax.accel.caches.planned import Schedule, every, everywhere, planned
from difax.core.annotations import checked
from difax.core.contracts import Accelerator, Row, Stage


@checked
def fora(interval: int = 3, dtype: str | None = None) -> Accelerator:
    """Computes every branch at every `interval`-th evaluation and holds its output, before the gate, in between.

    compute at evaluation i iff i mod interval = 0; gates and shifts are always computed.

    Args:
      interval: evaluations from one computation to the next, 1 or more (3 in the paper; 1 is no cache).
      dtype: of what is held, "float32", "bfloat16", "float8_e4m3fn" or "float8_e5m2"; None is the model's.

    Returns:
      An `Accelerator` that remembers one output per branch and layer: sum over branches of L B N D values.

    References: Selvaraju et al. 2024, arXiv:2407.01425. Evaluations are counted upwards from the noise; the authors'
    code counts DiT's steps downwards, so that its last step, not its first, is always a full one: `fora_dit`.
    """
    if interval < 1:
        raise ValueError(f"fora: interval={interval}; allowed: 1 or more")
    return planned("fora", lambda rows, stages: everywhere(every(interval, rows), stages), dtype=dtype)


@checked
def fora_dit(interval: int = 3, dtype: str | None = None) -> Accelerator:
    """FORA with the clock of the authors' DiT code, which counts the steps down to 0.

    compute at evaluation i of E iff i = 0 or (E - 1 - i) mod interval = 0: the last one is always computed, and the
    second too where E - 2 is a multiple of the interval.

    Args:
      interval, dtype: as in `fora`.

    References: Selvaraju et al. 2024, arXiv:2407.01425, by the rule of prathebaselva/FORA (src/models.py).
    """
    if interval < 1:
        raise ValueError(f"fora_dit: interval={interval}; allowed: 1 or more")

    def schedule(rows: Row, stages: tuple[Stage, ...]) -> Schedule:
        i = np.asarray(rows.i)
        return everywhere((i == 0) | ((len(i) - 1 - i) % interval == 0), stages)

    return planned("fora_dit", schedule, dtype=dtype)
