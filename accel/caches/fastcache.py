"""FastCache. Liu et al., Fast Caching for Diffusion Transformer Through Learnable Linear Approximation, 2025.

The linear maps are an .npz file with the arrays "stage.weight" [L, D, D] and "stage.bias" [L, D], float32; where the
tokens are several streams, "stage.stream.weight". `difax calibrate --cache fastcache` makes it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from difax.accel.caches import measured
from difax.accel.caches.gate import UNKNOWN, by_group, over, per_group, where_group
from difax.accel.caches.motion import moving
from difax.accel.caches.token_axis import scatter
from difax.core.annotations import checked
from difax.core.contracts import Accelerator, Plan, Row, Stage, State, Tokens, TrunkSpec, Where
from difax.core.fold import Block
from difax.core.stack import indexed

PREFIX = "linear."


class Values(NamedTuple):
    """Leaves [E]: the change that counts as none, and the normal quantile of the significance."""

    threshold: Any
    z: Any


@checked
def fastcache(
    threshold: float = 0.05,
    *,
    significance: float = 0.05,
    motion: float = 1.0,
    weights: Mapping[str, Mapping[str, Any]] | None = None,
    file: str | None = None,
    per_sample: bool = False,
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
        They become learned parameters (`difax.core.stack.with_learned`). None, with no file: W = b = 0, the identity.
      file: in place of them.
      per_sample: every sample decides for itself at each block, so that sample i is that of a batch of one, to
        rounding; without it one decision serves the batch, so that an image depends on its companions. A block is run
        for the whole batch as soon as one sample asks for it.

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
    if not 0 < significance < 1 or 1 - significance == 1 or not 0 < motion <= 1:
        raise ValueError(f"fastcache: significance={significance}, motion={motion}; allowed: between 0 and 1")
    given = measured.given_or_read("fastcache", "weights", weights, file)
    learned: dict[str, dict[str, Any]] | None = None
    if given is not None:
        learned = {s: {PREFIX + n: np.asarray(a, np.float32) for n, a in of.items()} for s, of in given.items()}
    tokens_that_move = moving("fastcache", motion)

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
        memory, empty = tokens_that_move.init(spec, modes), spec.hidden
        memory["block"] = {s: jnp.zeros((depth, *empty.shape), empty.dtype) for s, depth in spec.depth.items()}
        return memory

    def block(run: Block, where: Where, tokens: Tokens, before: Any, inner: State, row: Row) -> Any:
        now, values = run.hidden(tokens), row.plan.values
        if learned is not None and not where.learned:
            raise ValueError("fastcache: the parameters hold no linear maps; see difax.core.stack.with_learned")
        groups = now.shape[0] // row.plan.halves if per_sample else 1
        if row.plan.mode == "whole":
            out, inner, done = run(tokens, inner)
            delta, reuse = jnp.full((groups,), UNKNOWN), jnp.zeros((groups,), bool)
        else:
            wide = [a.astype(jnp.promote_types(a.dtype, jnp.float32)) for a in (before, now)]
            norms = [jnp.sqrt(per_group(a * a, groups)) for a in (wide[1] - wide[0], wide[0])]
            delta = over(*norms)  # Frobenius norms
            bound = values.threshold * jnp.sqrt(quantile(values.z, math.prod(now.shape[1:])))
            reuse = (values.threshold > 0) & (delta >= 0) & (delta <= bound)

            def computed(inner: State) -> Any:
                out, inner, done = run(tokens, inner)
                if motion < 1:
                    index = inner["along"]["fastcache"]
                    moved = scatter(jnp.zeros(now.shape[:2], bool), index, True)
                    out = jnp.where(moved[..., None], out, _mapped(tokens, where))
                if groups > 1:
                    out = jax.tree.map(partial(where_group, reuse), _mapped(tokens, where), out)
                return out, inner, done

            out, inner, done = jax.lax.cond(
                jnp.all(reuse), lambda i: run.skip(_mapped(tokens, where), i), computed, inner
            )
        shown = {"metric": delta, "asked": jnp.full(reuse.shape, row.plan.mode == "ask"), "reused": reuse}
        shown = {k: by_group(a, row.plan.halves, per_sample) for k, a in shown.items()}
        return out, now, inner, done._replace(metric={**done.metric, "block": shown})

    says = measured.record("fastcache", file)
    own = {"plan": plan, "init": init, "block": block, "learned": learned, "measured": says}
    return tokens_that_move._replace(**own, batchwide=not per_sample)


def quantile(z: Any, freedom: int) -> Any:
    """chi2_k(p) / k by Wilson and Hilferty's approximation, z the normal quantile of p."""
    return (1 - 2 / (9 * freedom) + z * math.sqrt(2 / (9 * freedom))) ** 3


def _mapped(tokens: Tokens, where: Where) -> Tokens:
    """h + h W + b, stream by stream; a stream without a map as it is."""

    def one(stream: str, h: jax.Array) -> jax.Array:
        if f"{PREFIX}{stream}weight" not in (where.learned or {}):
            return h
        w, b = (where.learned[f"{PREFIX}{stream}{part}"].astype(h.dtype) for part in ("weight", "bias"))
        return h + h @ w + b[None, None]

    return {n: one(f"{n}.", h) for n, h in tokens.items()} if isinstance(tokens, dict) else one("", tokens)
