"""FastCache. Liu et al., Fast Caching for Diffusion Transformer Through Learnable Linear Approximation, 2025.

The linear maps are an .npz file with the arrays "stage.weight" [L, D, D] and "stage.bias" [L, D], float32; where the
tokens are several streams, "stage.stream.weight". `fit` makes them.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from difax.accel.caches import measured
from difax.accel.caches.tokens import gather, scatter, top
from difax.contracts import (
    Accelerator,
    Done,
    Model,
    Params,
    Plan,
    Row,
    Stage,
    State,
    Tokens,
    TrunkSpec,
    Where,
    no_memory,
)
from difax.cost import count
from difax.stack import indexed
from difax.trunk import Block, Blocks, Compute, memory_for, reference_attention, run_trunk, trunk_spec

PREFIX = "linear."


class Values(NamedTuple):
    """Leaves [E]: the change that counts as none, and the normal quantile of the significance."""

    threshold: Any
    z: Any


def fastcache(
    threshold: float = 0.05,
    *,
    significance: float = 0.05,
    motion: float = 1.0,
    weights: Mapping[str, Mapping[str, Any]] | None = None,
    file: str | None = None,
) -> Accelerator:
    """Puts a linear map in the place of each block whose input passes a test of having changed no more than noise.

    delta = |h - h'|_F / |h'|_F, h' the block's input at the evaluation before; linear map h + h W + b iff
    delta^2 <= threshold^2 chi2_{ND}(1 - significance) / (ND). With motion < 1 a block that is computed runs on those
    tokens alone whose embedding changed most since the evaluation before, sum over D of (x - x')^2; the others, static,
    take its linear map.

    Args:
      threshold: relative change under the hypothesis of none (0.05); 1 is the paper's test, which a change of less
        than everything never fails; 0 computes all.
      significance: of the test (0.05).
      motion: share of the tokens that run, in (0, 1] (1; the authors report 0.2 to 0.4).
      weights: {stage: {"weight": W [L, D, D], "bias": b [L, D]}}, or "stream.weight" where the tokens have streams.
        They become learned parameters (`difax.stack.with_learned`). None, with no file: W = b = 0, the identity.
      file: in place of them.

    Returns:
      An `Accelerator` that remembers each block's input, L B N D values.

    References: Liu et al. 2025, arXiv:2505.20353, of which the abstract and the rules in its repository's README and
      docs/methods/fastcache.md were read (commit 7d894fc), not the paper itself; not checked against code: the released
      one projects by an untrained random layer. As chi2_{ND} / (ND) is 1 for any real size, a scale is needed: the
      released code's threshold max(0.05, ...) comes to 0.05. There a threshold of the token's change says which ones
      are static; an array of a fixed size takes their share. Static tokens have one map for the whole stack there.
      Token merging, its later addition, is not here.
    """
    if not threshold >= 0:
        raise ValueError(f"fastcache: threshold={threshold}; allowed: 0 or more")
    if not 0 < significance < 1 or not 0 < motion <= 1:
        raise ValueError(f"fastcache: significance={significance}, motion={motion}; allowed: between 0 and 1")
    if weights is not None and file is not None:
        raise ValueError("fastcache: weights and file were both given; allowed: one of them, or none")
    given = measured.by_stage_arrays("fastcache", file) if file is not None else weights
    learned: dict[str, dict[str, Any]] | None = None
    if given is not None:
        learned = {s: {PREFIX + n: np.asarray(a, np.float32) for n, a in of.items()} for s, of in given.items()}
    split = motion < 1

    def plan(rows: Row, stages: tuple[Stage, ...]) -> Plan:
        e, depths = len(rows.i), {s.name: s.depth for s in stages}
        for stage, of in (learned or {}).items():
            for name, a in of.items():
                if stage not in depths or len(a) != depths[stage]:
                    raise ValueError(
                        f"fastcache: {stage}.{name.removeprefix(PREFIX)} is {a.shape}; allowed: of the stages "
                        f"{', '.join(f'{s} [{n}, ...]' for s, n in depths.items())}"
                    )
        z = statistics.NormalDist().inv_cdf(1 - significance)
        whole = np.asarray(rows.fresh, bool) | (np.arange(e) == 0)
        modes = indexed(["whole" if w else "ask" for w in whole])
        return Plan(**modes, values=Values(np.full(e, float(threshold)), np.full(e, z)), owner="fastcache")

    def init(spec: TrunkSpec, modes: tuple[Any, ...]) -> State:
        memory = no_memory(spec, modes)
        empty = jnp.zeros(spec.hidden.shape, spec.hidden.dtype)
        if split:
            if isinstance(spec.tokens, dict):
                raise ValueError(f"fastcache: motion={motion}; allowed: 1, as the tokens are {', '.join(spec.tokens)}")
            memory["trunk"] = empty
            index = jnp.zeros((spec.hidden.shape[0], math.ceil(motion * spec.hidden.shape[1])), jnp.int32)
            memory["along"]["fastcache"] = index
        memory["block"] = {s: jnp.zeros((depth, *empty.shape), empty.dtype) for s, depth in spec.depth.items()}
        return memory

    def trunk(blocks: Blocks, tokens: Tokens, context: Any, before: Any, memory: State, row: Row) -> Any:
        if row.plan.mode == "ask":
            index = memory["along"]["fastcache"]
            change = (tokens.astype(jnp.float32) - before.astype(jnp.float32)) ** 2
            moved = top(change.sum(-1), index.shape[1]).astype(index.dtype)
            memory = {**memory, "along": {**memory["along"], "fastcache": moved}}
        out, memory, report = blocks.run(tokens, memory)
        return out, tokens, memory, report

    def block(run: Block, where: Where, tokens: Tokens, before: Any, inner: State, row: Row) -> Any:
        now, values = run.hidden(tokens), row.plan.values
        if learned is not None and not where.learned:
            raise ValueError("fastcache: the parameters hold no linear maps; see difax.stack.with_learned")
        if row.plan.mode == "whole":
            out, inner, done = run(tokens, inner)
            delta, reuse = jnp.full((), jnp.nan), jnp.zeros((), bool)
        else:
            wide = [a.astype(jnp.promote_types(a.dtype, jnp.float32)) for a in (before, now)]
            delta = jnp.linalg.norm(wide[1] - wide[0]) / jnp.linalg.norm(wide[0])
            bound = values.threshold * jnp.sqrt(quantile(values.z, math.prod(now.shape[1:])))
            reuse = (values.threshold > 0) & (delta <= bound)

            def computed(inner: State) -> Any:
                out, inner, done = run(tokens, inner)
                if split:
                    index = inner["along"]["fastcache"]
                    moved = scatter(jnp.zeros(now.shape[:2], bool), index, True)
                    out = jnp.where(moved[..., None], out, _mapped(tokens, where))
                return out, inner, done

            out, inner, done = jax.lax.cond(reuse, lambda i: run.skip(_mapped(tokens, where), i), computed, inner)
        shown = {"metric": delta, "reused": reuse}
        shown = {k: jnp.full((row.plan.halves,), a, jnp.float32) for k, a in shown.items()}
        return out, now, inner, done._replace(metric={**done.metric, "block": shown})

    def branch(compute: Compute, gate: Any, where: Where, state: State, inner: State, row: Row) -> Any:
        if row.plan.mode == "whole":
            update, inner = compute(inner)
            return gate(update), state, inner, Done(1.0)
        update, inner, share = among(compute, inner, inner["along"]["fastcache"])
        return gate(update), state, inner, Done(share)

    return Accelerator(
        name="fastcache",
        plan=plan,
        init=init,
        trunk=trunk if split else None,
        block=block,
        branch=branch if split else None,
        learned=learned,
    )


def quantile(z: Any, freedom: int) -> Any:
    """chi2_k(p) / k by Wilson and Hilferty's approximation, z the normal quantile of p."""
    return (1 - 2 / (9 * freedom) + z * math.sqrt(2 / (9 * freedom))) ** 3


def among(compute: Compute, inner: State, index: jax.Array) -> tuple[jax.Array, State, float]:
    """A branch among the tokens at index [B, M] alone: (update [B, N, D], 0 elsewhere; inner; the share computed)."""
    tokens, n = compute.tokens, compute.tokens.shape[1]
    rows = jnp.arange(index.shape[0])[:, None]

    def place(a: jax.Array) -> jax.Array:
        return jnp.zeros((a.shape[0], n, *a.shape[2:]), a.dtype).at[rows, index].set(a)

    def take(a: jax.Array) -> jax.Array:
        return a[rows, index]

    def attend(q: Any, k: Any, v: Any, segments: Any, apply: Any) -> Any:
        if segments is not None:
            segments = type(segments)(*(jax.tree.map(lambda s: s[rows, index], part) for part in segments))
        return place(apply(take(q), take(k), take(v), segments))

    def dense(name: str, x: Any, apply: Any) -> Any:
        return place(apply(take(x))) if x.ndim == 3 and x.shape[1] == n else apply(x)

    def gathered(inner: State, tokens: Any) -> Any:
        update, inner = compute(inner, tokens=gather(tokens, index))
        return place(update), inner

    def hooked(inner: State, tokens: Any) -> Any:
        return compute(inner, attend=attend, dense=dense, tokens=tokens)

    try:
        jax.eval_shape(gathered, inner, tokens)
        run = gathered
    except (TypeError, ValueError):  # a rotation by place fits all tokens only: take them behind it
        run = hooked
    update, after = run(inner, tokens)
    return update, after, count(run, inner, tokens) / count(lambda i, t: compute(i, tokens=t), inner, tokens)


def fit(model: Model, params: Params, batches: Iterable[Any], ridge: float = 1e-6) -> dict[str, dict[str, Any]]:
    """Least squares for the linear maps: W, b with h W + b nearest to what each block adds to h, over all tokens.

    Args:
      batches: (x [B, ...], model_time [B], cond) each: inputs of the network at times of a run.
      ridge: added to the normal equations' diagonal, relative to its mean.

    Returns:
      The `weights` of `fastcache`.
    """

    def sums(h: jax.Array, out: jax.Array) -> Any:
        x = h.astype(jnp.float32).reshape(-1, h.shape[-1])
        x = jnp.concatenate([x, jnp.ones((len(x), 1))], axis=1)
        y = (out.astype(jnp.float32) - h.astype(jnp.float32)).reshape(-1, h.shape[-1])
        return x.T @ x, x.T @ y

    def block(run: Block, where: Where, tokens: Tokens, state: State, inner: State, row: Row) -> Any:
        out, inner, done = run(tokens, inner)
        streams = {f"{n}.": (tokens[n], out[n]) for n in tokens} if isinstance(tokens, dict) else {"": (tokens, out)}
        return out, {n: sums(*pair) for n, pair in streams.items()}, inner, done

    def init(spec: TrunkSpec, modes: tuple[Any, ...]) -> State:
        memory, d = no_memory(spec, modes), spec.hidden.shape[-1]
        names = [f"{n}." for n in spec.tokens] if isinstance(spec.tokens, dict) else [""]
        zeros = {s: [jnp.zeros((n, d + 1, m)) for m in (d + 1, d)] for s, n in spec.depth.items()}
        return {**memory, "block": {s: {name: tuple(z) for name in names} for s, z in zeros.items()}}

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


def _mapped(tokens: Tokens, where: Where) -> Tokens:
    """h + h W + b, stream by stream; a stream without a map as it is."""

    def one(stream: str, h: jax.Array) -> jax.Array:
        if f"{PREFIX}{stream}weight" not in (where.learned or {}):
            return h
        w, b = (where.learned[f"{PREFIX}{stream}{part}"].astype(h.dtype) for part in ("weight", "bias"))
        return h + h @ w + b[None, None]

    return {n: one(f"{n}.", h) for n, h in tokens.items()} if isinstance(tokens, dict) else one("", tokens)
