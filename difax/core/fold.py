"""The blocks of one stage, put together: each branch is offered to the accelerator, and its update added to the tokens.

The only place where blocks are put together. A model gives the pieces of a block, an accelerator decides what is
computed and what is filled.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from difax.core import placement
from difax.core.contracts import (
    Accelerator,
    Attention,
    Context,
    Done,
    Params,
    Report,
    Row,
    Segments,
    Stage,
    State,
    Tokens,
    Where,
)
from difax.core.hooks import hooked
from difax.core.shapes import zeros_of


class Block(NamedTuple):
    """One block, as the block level of an accelerator gets it.

    It is called: (tokens, inner) -> (tokens, inner, done).
    skip(tokens, inner) -> the same, with nothing run: zeros in what was done.
    hidden(tokens) -> the stream [B, N, D] that the head reads.
    """

    run: Callable[..., tuple[Tokens, State, Report]]
    hidden: Callable[[Tokens], jax.Array]

    def __call__(self, tokens: Tokens, inner: State) -> tuple[Tokens, State, Report]:
        return self.run(tokens, inner)

    def skip(self, tokens: Tokens, inner: State) -> tuple[Tokens, State, Report]:
        return tokens, inner, zeros_of(lambda: self.run(tokens, inner)[2])


class Compute(NamedTuple):
    """One residual branch, as the branch level of an accelerator gets it.

    It is called: (inner, attend=None, dense=None, tokens=None) -> (update before the gate, inner).
    tokens: the whole ones, which it is given unless the call names others.
    """

    run: Callable[..., tuple[Any, State]]
    tokens: Tokens

    def __call__(self, inner: State, attend: Any = None, dense: Any = None, tokens: Tokens = None) -> tuple[Any, State]:
        return self.run(self.tokens if tokens is None else tokens, inner, attend, dense)


class Fold:
    """The blocks of one stage, folded over the tokens by a `lax.scan`, or written out for a tuple of layers."""

    def __init__(
        self,
        stage: Stage,
        context: Context,
        accelerator: Accelerator,
        attention: Attention,
        row: Row | None,
        halves: int,
        emits: bool,
        hidden: Callable[[Tokens], jax.Array],
    ):
        self.stage, self.context, self.accelerator, self.attention = stage, context, accelerator, attention
        self.row, self.halves, self.emits, self.hidden = row, halves, emits, hidden

    def __call__(
        self, carry: Any, params: Any, state: State, skips: Any, low: int, high: int, unroll: int | bool
    ) -> tuple[Any, State, Tokens, Report]:
        """Blocks low to high: (carry, state, what each block emitted [high - low, ...] or None, report).

        What one block hands to the next is (tokens, the accelerator's "along").
        """
        depth = self.stage.depth
        if low >= high:
            if self.accelerator.block is None and self.accelerator.branch is None:
                metric = {"block": (), "branch": dict.fromkeys(self.stage.branches, ())}
                computed = jnp.zeros((depth, len(self.stage.branches), self.halves), jnp.float32)
                return carry, state, None, Report(computed, jnp.zeros((depth, self.halves), jnp.float32), metric)
            if self.stage.takes:  # of the tokens' shape, as what it takes has
                skips = jax.tree.map(lambda a: jnp.zeros((depth, *a.shape), a.dtype), carry[0])
            return carry, state, None, zeros_of(lambda: self(carry, params, state, skips, 0, depth, unroll)[3])
        leaves, tree = jax.tree.flatten(state)
        at = partial(jax.lax.dynamic_index_in_dim, keepdims=False)

        def layer(carry: Any, leaves: list[Any], index: Any, p: Any, skip: Any) -> Any:
            # each layer writes its own part of the memory where it lies, which holds it once, not twice
            own = [at(a, index) for a in leaves]
            carry, new, done = self._block(carry, p, index, skip, tree.unflatten(own))
            leaves = [
                a if n is o else jax.lax.dynamic_update_index_in_dim(a, n, index, 0)
                for a, o, n in zip(leaves, own, tree.flatten_up_to(new), strict=True)
            ]
            return carry, leaves, carry[0] if self.emits else (), done

        if isinstance(params[0], tuple):
            outs = []
            for index in range(low, high):
                p = (
                    params[0][index],
                    params[1][index] if params[1] else (),
                    jax.tree.map(lambda a, i=index: a[i], params[2]),
                )
                skip = jax.tree.map(lambda a, i=index - low: a[i], skips)
                carry, leaves, out, done = layer(carry, leaves, index, p, skip)
                # a filled block is elementwise: without a border XLA fuses all of them into each consumer of the last
                carry = jax.lax.optimization_barrier(carry)
                outs.append((out, done))
            out, done = jax.tree.map(lambda *a: jnp.stack(a), *outs)
        else:
            whole = (low, high) == (0, depth)

            def body(carry: Any, xs: Any) -> Any:
                index, p, skip = xs
                if not whole:  # by index, since a slice of the stacked parameters would be copied
                    p = jax.tree.map(lambda a: at(a, index), params)
                along, leaves, out, done = layer(carry[0], carry[1], index, p, skip)
                return (along, leaves), (out, done)

            xs = (jnp.arange(low, high), params if whole else (), skips)
            (carry, leaves), (out, done) = jax.lax.scan(body, (carry, leaves), xs, unroll=unroll)
        if (low, high) != (0, depth):
            place = partial(jax.lax.dynamic_update_slice_in_dim, start_index=low, axis=0)
            done = jax.tree.map(lambda a: place(jnp.zeros((depth, *a.shape[1:]), a.dtype), a), done)
        return carry, tree.unflatten(leaves), out if self.emits else None, done

    def _block(self, carry: Any, params: Any, index: Any, skip: Any, state: State) -> Any:
        (tokens, along), (p, learned, known) = carry, params
        tokens = placement.tokens(tokens, self.halves)
        where = Where(self.stage.name, None, index, self.stage.depth, learned)

        def run(tokens: Tokens, inner: Any) -> tuple[Tokens, Any, Report]:
            return self._branches(tokens, p, known, where, skip, inner)

        inner, own = {"branch": state["branch"], "attention": state["attention"], "along": along}, state["block"]
        if self.accelerator.block is None:
            tokens, inner, done = run(tokens, inner)
        else:
            block = Block(run, self.hidden)
            tokens, own, inner, done = self.accelerator.block(block, where, tokens, own, inner, self.row)
        return (
            (placement.tokens(tokens, self.halves), inner["along"]),
            {"block": own, "branch": inner["branch"], "attention": inner["attention"]},
            done,
        )

    def _branches(self, tokens: Tokens, p: Params, known: Any, where: Where, skip: Any, state: State) -> Any:
        apply = partial(self.stage.block.apply, {"params": p})
        if self.stage.takes:
            tokens = apply(tokens, skip, method="skip")
        mods, context = known and known.mods, self.context
        if mods is None:
            mods = apply(context, method="mods")
        if known is not None and known.once:
            context = {**context, **known.once}
        branch_state, attention_state, along = state["branch"], state["attention"], state["along"]
        computed, metrics, given = [], {}, tokens
        for branch in self.stage.branches:
            at = where._replace(branch=branch)
            given = given if branch in self.stage.beside else tokens
            compute = Compute(partial(self._compute, apply, mods, context, branch, at), given)

            def gate(update: Any, branch: str = branch, tokens: Tokens = tokens) -> Any:
                factor = apply(mods, branch, method="gate")
                return jax.tree.map(lambda h, g, u: (g * u).astype(h.dtype), tokens, factor, update)

            acts, inner = self.accelerator.branches, {"attention": attention_state[branch], "along": along}
            if self.accelerator.branch is None or (acts is not None and branch not in acts):
                update, inner = compute(inner)
                residual, new, done = gate(update), branch_state[branch], Done(1.0)
            else:
                residual, new, inner, done = self.accelerator.branch(
                    compute, gate, at, branch_state[branch], inner, self.row
                )
            branch_state, along = {**branch_state, branch: new}, inner["along"]
            attention_state = {**attention_state, branch: inner["attention"]}
            tokens = jax.tree.map(jnp.add, tokens, residual)
            computed.append(jnp.broadcast_to(jnp.asarray(done.computed, jnp.float32), (self.halves,)))
            metrics[branch] = done.metric
        entered = jnp.ones((self.halves,), jnp.float32)
        report = Report(jnp.stack(computed), entered, {"block": (), "branch": metrics})
        return tokens, {"branch": branch_state, "attention": attention_state, "along": along}, report

    def _compute(
        self,
        apply: Any,
        mods: Any,
        context: Context,
        branch: str,
        where: Where,
        tokens: Tokens,
        inner: State,
        attend: Any,
        dense: Any,
    ) -> tuple[Any, State]:
        cell = [inner["attention"]]

        def plain(q: jax.Array, k: jax.Array, v: jax.Array, segments: Segments | None = None) -> jax.Array:
            o, cell[0] = self.attention.apply(q, k, v, segments, where, self.row, cell[0])
            return o

        def offered(q: jax.Array, k: jax.Array, v: jax.Array, segments: Segments | None = None) -> jax.Array:
            return attend(q, k, v, segments, plain)

        call = partial(
            apply,
            tokens,
            mods,
            context,
            plain if attend is None else offered,
            method=branch,
        )
        if dense is None:
            update = call()
        else:
            with hooked(dense):
                update = call()
        return update, {**inner, "attention": cell[0]}
