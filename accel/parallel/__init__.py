"""Attention over tokens that lie on several devices: an `Attention` made into one, whatever it is inside.

`parallel` runs the attention of a run device by device, inside `jax.shard_map`, by one of three ways or a product:

  keys whole   cross-attention: the queries of a device see all keys, which every device has
  `ulysses`    heads are exchanged for tokens, so that a device has all tokens of some heads
  `ring`       keys and values go around, and what was attended to is merged by its log-sum-exp

The model sees arrays of all tokens and all heads, before and behind.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from difax.accel.parallel.ring import ring
from difax.accel.parallel.ulysses import ulysses
from difax.core.contracts import Attention, AttentionSpec, Row, Segments, State, Where
from difax.core.placement import SEQ, Placement

PADDED = -1  # the id of a key that is none: no query has it
WHOLE = ("cross",)  # branches whose keys every device has whole


class Cut(NamedTuple):
    """Mesh axes of the samples, tokens and heads of a call; crossing: are its keys whole on every device."""

    samples: Any
    tokens: Any
    heads: Any
    crossing: bool

    @property
    def q(self) -> PartitionSpec:
        return PartitionSpec(self.samples, self.tokens, self.heads)

    @property
    def k(self) -> PartitionSpec:
        return PartitionSpec(self.samples, None, self.heads) if self.crossing else self.q


def parallel(attention: Attention, placement: Placement, joint: bool = False) -> Attention:
    """An attention of global arrays, run device by device where a placement cuts samples, tokens or heads.

    Tokens that the devices do not divide are padded, with keys that no query attends to, which is exact. What an
    attention remembers is held by the device that remembers it.

    Args:
      attention: of one device.
      placement: of the run.
      joint: does the model join several streams of tokens into one sequence, which then has another order.

    Returns:
      An `Attention` with the same results, to rounding.

    Raises:
      ValueError: an attention that the placement does not allow: one that goes by the order of the tokens where these
        lie in another, or that has no log-sum-exp for a ring.
    """
    r, u = placement.size("ring"), placement.size("ulysses")
    if attention.ordered and (r > 1 or (joint and placement.seq > 1)):
        where = "a ring" if r > 1 else "tokens of several streams, cut"
        raise ValueError(f"an attention that goes by the order of tokens, over {where}; allowed: mesh.seq=1")
    if r > 1 and attention.lse is None:
        raise ValueError("an attention without a log-sum-exp, over a ring; allowed: mesh.ulysses = mesh.seq")
    inner = ring(attention, "ring", r) if r > 1 else attention
    inner = ulysses(inner, "ulysses", u) if u > 1 else inner

    def apply(q: Any, k: Any, v: Any, segments: Any, where: Where, row: Row | None, state: State) -> Any:
        at = _cut(placement, q, k, None if where is None else where.branch, row)
        queries = q.shape[1]
        q, k, v, segments = padded(placement.seq, q, k, v, segments, at.crossing)
        leaves, tree = jax.tree.flatten((where, row))
        traced = [i for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array)]

        def local(q: Any, k: Any, v: Any, segments: Any, arrays: Any, held: State) -> Any:
            around = list(leaves)
            for i, a in zip(traced, arrays, strict=True):
                around[i] = a
            chosen = attention if at.crossing else inner
            if q.shape[1] * placement.seq > queries and not at.crossing:
                segments = _real(queries, q.shape[0], q.shape[1])
            o, new = chosen.apply(q, k, v, segments, *tree.unflatten(around), jax.tree.map(lambda a: a[0], held))
            return o, jax.tree.map(lambda a: a[None], new)

        ids: Any = None if segments is None else tuple(PartitionSpec(*spec[:2]) for spec in (at.q, at.k))
        ids = ids and Segments(*ids)
        held = jax.tree.map(lambda _: PartitionSpec(placement.mesh.axis_names), state)
        o, new = jax.shard_map(
            local,
            mesh=placement.mesh,
            in_specs=(at.q, at.k, at.k, ids, PartitionSpec(), held),
            out_specs=(at.q, held),
            check_vma=False,
        )(q, k, v, segments, [leaves[i] for i in traced], state)
        return o[:, :queries], new if jax.tree.leaves(state) else state

    def init(spec: AttentionSpec) -> State:
        at = _cut(placement, spec.q, spec.k, None, None)
        state = (attention if at.crossing else inner).init(_local(spec, at, placement))
        if jax.tree.leaves(state) and placement.size("data", "fsdp", "cfg") > 1:
            raise ValueError("an attention that remembers, on a mesh of data, fsdp or cfg; allowed: seq and tensor")
        n = placement.mesh.size
        return jax.tree.map(lambda a: jnp.broadcast_to(a[None], (n, *a.shape)), state)

    return Attention(init, apply, chosen=attention.chosen)


def _cut(placement: Placement, q: Any, k: Any, branch: str | None, row: Row | None) -> Cut:
    return Cut(
        samples=placement.even(q.shape[0], placement.samples(1 if row is None else row.plan.halves)),
        tokens=SEQ if placement.seq > 1 else None,
        heads="tensor" if placement.tensor > 1 else None,
        crossing=placement.seq == 1 or q.shape[1] != k.shape[1] or branch in WHOLE,
    )


def _local(spec: AttentionSpec, at: Cut, placement: Placement) -> AttentionSpec:
    """The shapes of a call on one device, tokens padded."""

    def shape(a: Any, spec: PartitionSpec) -> Any:
        cuts = [placement.size(*(c if isinstance(c, tuple) else (c,) if c else ())) for c in spec]
        sizes = [-(-d // n) for d, n in zip(a.shape, [*cuts, 1, 1, 1, 1][: a.ndim], strict=True)]
        return jax.ShapeDtypeStruct(sizes, a.dtype)

    ids = spec.segments and Segments(shape(spec.segments.q, at.q[:2]), shape(spec.segments.k, at.k[:2]))
    return AttentionSpec(shape(spec.q, at.q), shape(spec.k, at.k), shape(spec.v, at.k), ids)


def padded(n: int, q: Any, k: Any, v: Any, segments: Segments | None, crossing: bool) -> Any:
    """Queries, and keys unless they are whole, with tokens up to a multiple of n.

    Raises:
      ValueError: keys with ids of their own: a query that has none of them gets the mean of all, and would count these.
    """
    more = -q.shape[1] % n
    if not more:
        return q, k, v, segments
    if segments is not None and not crossing:
        raise ValueError(f"{q.shape[1]} tokens with ids over mesh.seq={n}; allowed: a multiple of {n}")
    grow = lambda a: jnp.pad(a, [(0, 0), (0, more)] + [(0, 0)] * (a.ndim - 2))  # noqa: E731
    if crossing:
        return grow(q), k, v, segments and Segments(grow(segments.q), segments.k)
    return grow(q), grow(k), grow(v), None


def _real(tokens: int, batch: int, local: int) -> Segments:
    """The ids of a device's tokens: 0, and `PADDED` for the keys behind the end.

    Made where they are used: XLA's partitioner loses what a constant is padded with (jax 0.10.2).
    """
    at = jax.lax.axis_index(SEQ) * local + jnp.arange(local)
    ids = jnp.broadcast_to(jnp.where(at < tokens, 0, PADDED)[None], (batch, local))
    return Segments(jnp.zeros_like(ids), ids)
