"""FORA. Selvaraju et al., Fast-Forward Caching in Diffusion Transformer Acceleration, 2024, arXiv:2407.01425."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from difax.contracts import Accelerator
from difax.trunk import run_all


def fora(interval: int = 3) -> Accelerator:
    """Computes every branch at every `interval`-th evaluation and holds its output, before the gate, in between.

    compute at evaluation i iff i mod interval = 0; gates and shifts are always computed.

    Args:
      interval: evaluations from one computation to the next, 1 or more (3 in the paper; 1 is no cache).

    Returns:
      An `Accelerator` that remembers one output per branch and layer.

    References: Selvaraju et al. 2024, arXiv:2407.01425. Evaluations are counted upwards from the noise; the authors'
    code counts DiT's steps downwards, so that its last step, not its first, is always a full one.
    """
    if interval < 1:
        raise ValueError(f"fora: interval={interval}; allowed: 1 or more")

    def init(spec):
        def held(depth: int, updates: Any) -> Any:
            return jax.tree.map(lambda a: jnp.zeros((depth, *a.shape), a.dtype), updates)

        branch = {stage: held(spec.depth[stage], updates) for stage, updates in spec.update.items()}
        return {"trunk": (), "branch": branch}

    def branch(compute, where, held, inner, row):
        full = (row.i % interval == 0) | row.fresh
        update, inner = jax.lax.cond(full, compute, lambda inner: (held, inner), inner)
        return update, update, inner, full.astype(jnp.float32)

    return Accelerator(init=init, trunk=run_all, branch=branch)
