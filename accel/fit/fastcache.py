"""FastCache's linear maps, by least squares on a model's own activations.

Liu et al., Fast Caching for Diffusion Transformer Through Learnable Linear Approximation, 2025, arXiv:2505.20353.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from difax.core.contracts import Accelerator, Model, Params, Row, State, Tokens, Trace, TrunkSpec, Where, no_memory
from difax.core.fold import Block
from difax.core.shapes import memory_for, trunk_spec
from difax.core.trunk import reference_attention, run_trunk


def fit(model: Model, params: Params, batches: Iterable[Any], ridge: float = 1e-6) -> dict[str, dict[str, Any]]:
    """Least squares for the linear maps: W, b with h W + b nearest to what each block adds to h, over all tokens.

    Args:
      batches: (x [B, ...], model_time [B], cond) each: inputs of the network at times of a run (`of_runs`).
      ridge: added to the normal equations' diagonal, relative to its mean.

    Returns:
      The `weights` of `fastcache`, float64.
    """

    def sums(h: jax.Array, out: jax.Array) -> Any:
        x = h.astype(jnp.float32).reshape(-1, h.shape[-1])
        x = jnp.concatenate([x, jnp.ones((len(x), 1))], axis=1)
        y = (out.astype(jnp.float32) - h.astype(jnp.float32)).reshape(-1, h.shape[-1])
        return jnp.matmul(x.T, x, precision="highest"), jnp.matmul(x.T, y, precision="highest")

    def block(run: Block, where: Where, tokens: Tokens, state: State, inner: State, row: Row) -> Any:
        out, inner, done = run(tokens, inner)
        streams = {f"{n}.": (tokens[n], out[n]) for n in tokens} if isinstance(tokens, dict) else {"": (tokens, out)}
        return out, {n: sums(*pair) for n, pair in streams.items()}, inner, done

    def init(spec: TrunkSpec, modes: tuple[Any, ...]) -> State:
        memory, d = no_memory(spec, modes), spec.hidden.shape[-1]
        zeros = {s: [jnp.zeros((n, d + 1, m)) for m in (d + 1, d)] for s, n in spec.depth.items()}
        named = {s: [f"{n}." for n in of] if isinstance(of, dict) else [""] for s, of in spec.within.items()}
        return {**memory, "block": {s: {name: tuple(zeros[s]) for name in of} for s, of in named.items()}}

    collector, attention = Accelerator(name="fit", block=block, init=init), reference_attention()

    @jax.jit
    def collect(x: jax.Array, model_time: jax.Array, cond: Any) -> Any:
        memory = memory_for(trunk_spec(model, params, x, cond), collector, attention, ((),))
        tokens, context = model.embed(params, x, model_time, cond)
        return run_trunk(model, params, tokens, context, collector, attention, memory, None)[1]["block"]

    total: Any = None
    for batch in batches:
        found = jax.tree.map(lambda a: np.asarray(a, np.float64), collect(*batch))
        total = found if total is None else jax.tree.map(np.add, total, found)
    weights: dict[str, dict[str, Any]] = {}
    for stage, streams in total.items():
        for name, (a, c) in streams.items():
            mean = np.trace(a, axis1=1, axis2=2)[:, None, None] / a.shape[1]
            solved = np.linalg.solve(a + ridge * mean * np.eye(a.shape[1]), c)
            weights.setdefault(stage, {}).update({f"{name}weight": solved[:, :-1], f"{name}bias": solved[:, -1]})
    return weights


def of_runs(model: Model, runs: Iterable[tuple[Row, Any, Trace]]) -> Iterator[tuple[jax.Array, jax.Array, Any]]:
    """The `batches` of `fit` from runs that were recorded: one for each evaluation, of all halves that ran in it.

    Args:
      runs: (rows, cond, trace) each, the trace that of `difax.accel.fit.record.record_inputs`.
    """
    for rows, cond, trace in runs:
        times, guided = (np.asarray(a) for a in (rows.model_time, rows.guided))
        for e, x in enumerate(np.asarray(trace.metric["output"])[..., 0]):
            halves = [cond, model.null(cond)] if guided[e] else [cond]
            together = jax.tree.map(lambda *a: jnp.concatenate(a), *halves)
            x = jnp.concatenate([jnp.asarray(x)] * len(halves))
            yield x, jnp.full(len(x), times[e]), together
