"""Where = some of the tokens: a score says which of a branch's tokens are computed, the others keep what they had.

A full evaluation computes everything, and remembers each branch's output and what the score needs. A partial one
gathers the inputs of the chosen tokens, runs the branch on them alone, and scatters what comes out into the held
output, which is then used whole. That is exact for branches in which a token's output depends on this token only: those
that do not attend, and cross-attention. Branches in which the tokens attend to each other (`attn`, and FLUX's
`attn_mlp`, whose queries and keys are rotated by their place besides) are held whole between full evaluations.

How many tokens are computed may differ by layer and evaluation, while a program needs fixed sizes. So a partial
evaluation is one mode with a ladder of sizes, one small program a rung, of which each layer runs the smallest that is
large enough; tokens beyond the layer's own number are computed there and dropped, and `computed` counts them.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from difax.accel.caches.fill import check_dtype, stored
from difax.accel.caches.token_axis import (
    STREAMS,
    attended_score,
    by_stream,
    gather,
    normalised,
    scatter,
    stratified,
    top,
    with_bonus,
)
from difax.core import ops
from difax.core.contracts import Accelerator, Done, Plan, Row, Stage, State, Tokens, TrunkSpec, Where, no_memory
from difax.core.cost import count
from difax.core.fold import Compute
from difax.core.stack import indexed

ATTENDED = ("attention", "key_norm", "value_norm")  # scores that a full evaluation takes from the stage's attention
SCORES = (*ATTENDED, "similarity", "staleness", "random")
SELECTIONS = ("top", "stratified")
IMAGE = "img"  # the stream whose tokens lie on a grid
RUNGS = 16


class Schedule(NamedTuple):
    """What a technique computes; every array leads with [E, L], in its stage.

    full: {stage: bool}, is the whole block computed.
    share: {stage: {branch: float}}, the share of the tokens that is computed where it is not; a branch that is missing
        is held.
    idle: bool [E], the blocks that are not full do not run at all (another level fills them).
    score: {stage: float [E, L, N]}, for the score "given".
    """

    full: dict[str, np.ndarray]
    share: dict[str, dict[str, np.ndarray]]
    idle: np.ndarray
    score: dict[str, np.ndarray] | None = None


class Held(NamedTuple):
    """Of one branch: its output, how long ago each token was computed (only where tokens are computed one by one), and
    what the attention of a full evaluation says about the tokens."""

    value: Any
    age: Any = ()
    score: Any = ()


def token_cache(
    name: str,
    schedule: Callable[[Row, tuple[Stage, ...]], Schedule],
    *,
    score: str = "attention",
    staleness: float = 0.0,
    bonus: float = 0.0,
    grid: tuple[int, ...] | None = None,
    select: str = "top",
    seed: int = 0,
    dtype: str | None = None,
) -> Accelerator:
    """An accelerator that computes some tokens of branches by a static plan.

    Args:
      name: of the technique.
      schedule: (rows, stages) -> what is computed; an evaluation that is `fresh` is computed whole.
      score: of a token, the highest are computed. From the attention of the last full evaluation: "attention", the sum
        of its column over all queries, mean over heads; "key_norm", the mean norm of its keys; "value_norm", the sum
        of 1 - norm of its values (small values first). Else "similarity", 1 - cosine of input and held output;
        "staleness", its age; "random", one draw a layer and evaluation for all samples and both halves; "given", from
        the schedule. All but the last two are divided by their norm over the tokens.
      staleness: added to the score for each evaluation since the token was computed.
      bonus: the best token of each 2 x 2 cell gains this share of its score.
      grid: (rows, columns) or (frames, rows, columns) of the tokens, for the bonus; None is a square, and no bonus
        where the number of tokens is not that of an even square. A text stream has none.
      select: "top", or "stratified", the best of each of as many equal stretches of tokens.
      seed: of "random". dtype: of the held outputs; None is that of the model.

    Returns:
      An `Accelerator` that remembers one output per branch and layer, and with the scores of `ATTENDED` one number per
      layer and token (no attention map). For "attention", a full evaluation that scores multiplies queries by keys
      once more: `computed` is then above 1 by that.
    """
    check_dtype(name, dtype)
    _check(name, score, select, staleness, bonus, grid)

    def plan(rows: Row, stages: tuple[Stage, ...]) -> Plan:
        numbers = {"staleness": np.float64(staleness), "bonus": np.float64(bonus), "seed": np.int32(seed)}
        return _tabulate(name, schedule(rows, stages), np.asarray(rows.fresh, bool), numbers)

    def init(spec: TrunkSpec, modes: tuple[Any, ...]) -> State:
        memory = no_memory(spec, modes)
        if all(what == "full" for what, _ in modes):
            return memory
        sites = {site for _, ladders in modes for site, _ in ladders}
        for stage, updates in spec.update.items():
            choosing = {b for b in updates if (stage, b) in sites and not attends_itself(spec, stage, b)}
            source = None
            if choosing and score in ATTENDED:
                source = next((b for b in updates if attends_itself(spec, stage, b)), None)
                if source is None:
                    raise ValueError(
                        f"{name}: score={score!r}, but in the stage {stage} no token attends to another; allowed: "
                        f"{', '.join(s for s in SCORES if s not in ATTENDED)}"
                    )
            for branch, update in updates.items():
                depth = spec.depth[stage]

                def zeros(shape: Any, kind: Any, depth: int = depth, update: Any = update) -> Any:
                    return jax.tree.map(lambda a: jnp.zeros((depth, *shape(a)), kind or a.dtype), update)

                if branch == source:  # what the attention of a block says reaches its other branches along the way
                    along = jax.tree.map(lambda a: jnp.zeros(a.shape[:-1], jnp.float32), spec.tokens)
                    memory["along"] = {name: along}
                memory["branch"][stage][branch] = Held(
                    zeros(lambda a: a.shape, dtype),
                    zeros(lambda a: a.shape[:-1], jnp.int32) if branch in choosing else (),
                    zeros(lambda a: a.shape[:-1], jnp.float32) if branch == source else (),
                )
        return memory

    def branch(compute: Compute, gate: Any, where: Where, held: Held, inner: State, row: Row) -> Any:
        what, ladders = row.plan.mode
        if what == "full":
            update, inner = compute(inner)
            return gate(update), held, inner, Done(1.0)

        def whole(inner: State) -> Any:
            seen, more = [], 0.0

            def attend(q: Any, k: Any, v: Any, segments: Any, apply: Any) -> Any:
                nonlocal more
                looks = partial(attended_score, score, segments=segments)
                more = count(looks, q, k, v)
                seen.append(looks(q, k, v))
                return apply(q, k, v, segments)

            scored = _some(held.score)
            update, inner = compute(inner, attend=attend) if scored else compute(inner)
            computed = 1 + more / _operations(compute, inner, compute.tokens) if more else 1.0
            kept = Held(
                stored(update, dtype),
                jax.tree.map(jnp.zeros_like, held.age),
                by_stream(seen[0], held.value) if scored else (),
            )
            return update, kept, _handed_on(name, kept, inner), jnp.float32(computed)

        def part(inner: State) -> Any:
            new, computed, inner = held, jnp.float32(0), _handed_on(name, held, inner)
            if _some(held.age):
                values, seen = row.plan.values, inner["along"].get(name)
                if score == "given":
                    seen = values["score"]
                scores = _scores(score, held, compute.tokens, seen, where, row)
                scores = _each(lambda stream, s: with_bonus(s, values["bonus"], _grid(s, grid, stream)), scores)
                share, ladder = values["share"][where.stage][where.branch], dict(ladders)[where.stage, where.branch]
                new, inner, computed = _refreshed(
                    compute, held, inner, scores, share[where.layer], ladder, select, dtype
                )
            update = jax.tree.map(lambda a, t: a.astype(t.dtype), new.value, compute.tokens)
            return update, new, inner, computed

        if what == "mixed":
            full = row.plan.values["full"][where.stage][where.layer]
            update, held, inner, computed = jax.lax.cond(full, whole, part, inner)
        else:
            update, held, inner, computed = (whole if what == "store" else part)(inner)
        return gate(update), held, inner, Done(computed)

    return Accelerator(name=name, plan=plan, init=init, branch=branch)


def attends_itself(spec: TrunkSpec, stage: str, branch: str) -> bool:
    """Do the tokens of a branch attend to each other: has its attention as many keys as there are tokens, in all or in
    one of the streams."""
    # a caption of exactly that length passes for it: its cross-attention is then held whole, which is never wrong
    call, lengths = spec.attention[stage][branch], [a.shape[1] for a in jax.tree.leaves(spec.update[stage][branch])]
    return call is not None and call.k.shape[1] in (sum(lengths), *lengths)


# ---------------------------------------------------------------- one evaluation of one branch


def _some(tree: Any) -> bool:
    return bool(jax.tree.leaves(tree))


def _handed_on(name: str, held: Held, inner: State) -> State:
    """What the attention of a block says, put where its other branches find it; streams that its stage does not have
    (`Stage.streams`) keep what they had."""
    if not _some(held.score):
        return inner
    said = {**inner["along"][name], **held.score} if isinstance(held.score, dict) else held.score
    return {**inner, "along": {**inner["along"], name: said}}


def _each(function: Any, *trees: Any) -> Any:
    """function(name of the stream or None, its leaves), stream by stream."""
    if isinstance(trees[0], dict):
        return {s: function(s, *(t[s] for t in trees)) for s in trees[0]}
    return function(None, *trees)


def _grid(score: jax.Array, grid: tuple[int, ...] | None, stream: str | None) -> tuple[int, ...] | None:
    n, side = score.shape[1], math.isqrt(score.shape[1])
    if stream not in (None, IMAGE):
        return None
    if grid is None:
        return (side, side) if side * side == n and side % 2 == 0 else None
    if math.prod(grid) != n or len(grid) not in (2, 3) or grid[-1] % 2 or grid[-2] % 2:
        raise ValueError(
            f"grid={tuple(grid)} for {n} tokens; allowed: (rows, columns) or (frames, rows, columns) that multiply to "
            "it, with even rows and columns"
        )
    return grid


def _scores(kind: str, held: Held, tokens: Tokens, seen: Any, where: Where, row: Row) -> Any:
    """The score [B, N] of every token of a branch, in each stream."""
    numbers = row.plan.values
    key = jax.random.fold_in(jax.random.key(numbers["seed"]), row.i)
    key = jax.random.fold_in(key, zlib.crc32(f"{where.stage}/{where.branch}".encode()) >> 1)
    key = jax.random.fold_in(key, where.layer)

    def one(stream: str | None, age: jax.Array, x: jax.Array, value: jax.Array, seen: Any) -> jax.Array:
        if kind == "random":
            own = jax.random.fold_in(key, STREAMS.index(stream) if stream in STREAMS else 0)
            base = jax.random.uniform(own, age.shape[1:], jnp.float32)[None]
        elif kind == "given":
            base = seen
        elif kind == "staleness":
            base = normalised(age.astype(jnp.float32))
        elif kind == "similarity":
            a, b = x.astype(jnp.float32), value.astype(jnp.float32)
            norms = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
            base = normalised(1 - (a * b).sum(-1) / jnp.maximum(norms, 1e-12))
        else:
            base = normalised(seen)
        return jnp.broadcast_to(base + numbers["staleness"].astype(jnp.float32) * age.astype(jnp.float32), age.shape)

    if kind == "given":
        score, length = seen[where.stage][where.layer], sum(a.shape[1] for a in jax.tree.leaves(tokens))
        if score.shape[0] != length:
            raise ValueError(f"scores of {score.shape[0]} tokens in the stage {where.stage}; it has {length}")
        seen = by_stream(score[None].astype(jnp.float32), tokens)
    return _each(one, held.age, tokens, held.value, held.age if seen is None else seen)


def _refreshed(
    compute: Compute,
    held: Held,
    inner: State,
    scores: Any,
    share: jax.Array,
    ladder: tuple[float, ...],
    select: str,
    dtype: str | None,
) -> tuple[Held, State, jax.Array]:
    """What is held with the best tokens computed anew, as many as the layer's share says."""
    number = jax.tree.map(lambda a: jnp.floor(share.astype(jnp.float32) * a.shape[1]).astype(jnp.int32), held.age)
    sizes: list[Any] = []
    for f in ladder:
        size = jax.tree.map(lambda a, f=f: portion(f, a.shape[1]), held.age)
        sizes += [size] if size not in sizes else []  # of few tokens, two shares may be as many
    enough = np.asarray([jax.tree.leaves(size) for size in sizes])  # [rungs, streams]
    rung = jnp.sum(jnp.any(enough < jnp.stack(jax.tree.leaves(number))[None], axis=1))
    if select == "stratified":
        scores = jax.tree.map(stratified, scores, number)
    index = jax.tree.map(top, scores, sizes[-1])
    chosen = gather(compute.tokens, index)
    whole, each = _products(compute, inner)
    shapes = jax.eval_shape(lambda: compute(inner, tokens=chosen)[0])

    def step(size: Any) -> Any:
        left = [a.shape[1] - n for a, n in zip(jax.tree.leaves(held.age), jax.tree.leaves(size), strict=True)]
        computed = 1 - sum(np.multiply(left, each)) / whole if any(jax.tree.leaves(size)) else 0.0

        def run(inner: State) -> Any:
            fresh = jax.tree.map(lambda a: jnp.zeros((a.shape[0], 0, a.shape[2]), a.dtype), shapes)
            if computed:
                fresh, inner = compute(inner, tokens=jax.tree.map(lambda a, n: a[:, :n], chosen, size))
            fresh = jax.tree.map(lambda a, b: jnp.pad(a, ((0, 0), (0, b.shape[1] - a.shape[1]), (0, 0))), fresh, shapes)
            return fresh, inner, jnp.float32(computed)

        return run

    runs = [step(size) for size in sizes]
    fresh, inner, computed = runs[0](inner) if len(runs) == 1 else jax.lax.switch(rung, runs, inner)
    value = jax.tree.map(scatter, held.value, index, stored(fresh, dtype), number)
    age = jax.tree.map(lambda a, i, n: scatter(a + 1, i, 0, n), held.age, index, number)
    return held._replace(value=value, age=age), inner, computed


def portion(share: float, tokens: int) -> int:
    """How many tokens a share of them is, in float32 as in the program."""
    return int(np.floor(np.float32(share) * np.float32(tokens)))


def _operations(compute: Compute, inner: State, tokens: Tokens) -> float:
    """Operations of a branch's products on tokens of these shapes."""

    def attend(q: Any, k: Any, v: Any, segments: Any, apply: Any) -> Any:
        return ops.attend(q, k, v, segments)

    return count(lambda t: compute(inner, attend=attend, tokens=t)[0], tokens)


def _products(compute: Compute, inner: State) -> tuple[float, list[float]]:
    """Operations of a branch's products, and how many of them are those of one token of each stream."""
    leaves, tree = jax.tree.flatten(jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), compute.tokens))
    whole = _operations(compute, inner, tree.unflatten(leaves))
    each = []
    for i, a in enumerate(leaves):
        one = jax.ShapeDtypeStruct((a.shape[0], 1, a.shape[2]), a.dtype)
        single = _operations(compute, inner, tree.unflatten([*leaves[:i], one, *leaves[i + 1 :]]))
        each.append((whole - single) / max(a.shape[1] - 1, 1))
    return whole, each


# ---------------------------------------------------------------- the plan


def _tabulate(name: str, asked: Schedule, fresh: np.ndarray, numbers: dict[str, Any]) -> Plan:
    """The plan of a schedule: modes are ("full" | "store" | "partial" | "mixed", ladders of the sites)."""
    fresh = fresh.copy()
    fresh[0] = True
    full = {s: np.asarray(a, bool) | fresh[:, None] for s, a in asked.full.items()}
    every = np.all([a.all(1) for a in full.values()], axis=0)
    some = np.any([a.any(1) for a in full.values()], axis=0) & ~every
    idle = np.asarray(asked.idle, bool) & ~fresh
    share = {s: {b: np.clip(a, 0.0, 1.0) for b, a in of.items() if (a > 0).any()} for s, of in asked.share.items()}
    used, what = False, ["full"] * len(fresh)
    for e in reversed(range(len(fresh))):
        if some[e]:
            what[e], used = "mixed", True
        elif every[e]:
            what[e], used = ("store" if used else "full"), False
        elif not idle[e]:
            what[e], used = "partial", True
    if not used and "partial" not in what and "mixed" not in what:
        return Plan(**indexed([("full", ())] * len(fresh)), owner=name)
    ladders = {}
    for stage, of in share.items():
        for branch, a in of.items():
            partly = ~full[stage] & ~idle[:, None]
            if partly.any():
                ladders[stage, branch] = ladder(a[partly])
    fixed = tuple(sorted(ladders.items()))
    modes = [(w, fixed if w != "full" else ()) for w in what]
    values = {"full": full, "share": share, **{k: np.full(len(fresh), v) for k, v in numbers.items()}}
    return Plan(**indexed(modes), values=values | ({} if asked.score is None else {"score": asked.score}), owner=name)


def ladder(shares: np.ndarray) -> tuple[float, ...]:
    """The shares for which there is a program: those that occur, or where they are many, the sixteenths around them."""
    distinct = np.unique(shares)
    if len(distinct) > RUNGS:
        distinct = np.arange(np.floor(distinct[0] * RUNGS), np.ceil(distinct[-1] * RUNGS) + 1) / RUNGS
    return tuple(float(f) for f in distinct)


def _check(name: str, score: str, select: str, staleness: float, bonus: float, grid: tuple[int, ...] | None) -> None:
    if score not in (*SCORES, "given"):
        raise ValueError(f"{name}: score={score!r}; allowed: {', '.join(SCORES)}")
    if select not in SELECTIONS:
        raise ValueError(f"{name}: select={select!r}; allowed: {', '.join(SELECTIONS)}")
    if not staleness >= 0 or not bonus >= 0:
        raise ValueError(f"{name}: staleness={staleness}, bonus={bonus}; allowed: 0 or more")
    if grid is not None and (len(grid) not in (2, 3) or min(grid) < 1):
        raise ValueError(
            f"{name}: grid={tuple(grid)}; allowed: (rows, columns) or (frames, rows, columns), or none for a square"
        )
