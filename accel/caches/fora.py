"""FORA. Selvaraju et al., Fast-Forward Caching in Diffusion Transformer Acceleration, 2024, arXiv:2407.01425."""

from __future__ import annotations

from difax.accel.caches.planned import every, everywhere, planned
from difax.contracts import Accelerator


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
