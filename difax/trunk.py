"""The block runner: folds the stages of a model and offers the trunk and branch seams to an accelerator.

The only place where blocks are put together. A model gives the pieces of a block, an accelerator decides what is
computed and what is filled, and this file adds `gate * update` to the tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from difax import ops
from difax.contracts import (
    Accelerator,
    Attention,
    AttentionSpec,
    Context,
    Model,
    Params,
    Row,
    Segments,
    Stage,
    State,
    Tokens,
    TrunkSpec,
    Where,
)


def neutral() -> Accelerator:
    """The accelerator that changes nothing: every branch of every block is computed, nothing is remembered."""
    return Accelerator(
        init=lambda spec: {"trunk": (), "branch": {s: {b: () for b in u} for s, u in spec.update.items()}},
        trunk=run_all,
        branch=lambda compute, where, state, inner, row: _computed(state, *compute(inner)),
    )


def _computed(state: State, update: Any, inner: State) -> tuple[Any, State, State, jax.Array]:
    return update, state, inner, jnp.ones((), jnp.float32)


def run_all(run: Any, tokens: Tokens, context: Context, memory: State, row: Row) -> tuple[Tokens, State, Any]:
    """The trunk seam of accelerators that act on branches only: run every block."""
    return run(tokens, memory)


def stateless(attend: Callable[..., Any]) -> Attention:
    """An `Attention` that remembers nothing, from a function (q, k, v, segments) -> o."""
    return Attention(
        init=lambda spec: (),
        apply=lambda q, k, v, segments, where, row, state: (attend(q, k, v, segments), state),
    )


def memory_for(spec: TrunkSpec, accelerator: Accelerator, attention: Attention) -> State:
    """What the runner carries from one evaluation to the next: the accelerator's and the attention's memory."""

    def every_layer(stage: str, branch: str) -> State:
        call = spec.attention[stage][branch]
        state = () if call is None else attention.init(call)
        return jax.tree.map(lambda a: jnp.broadcast_to(a, (spec.depth[stage], *a.shape)), state)

    remembered = {s: {b: every_layer(s, b) for b in branches} for s, branches in spec.update.items()}
    return {**accelerator.init(spec), "attention": remembered}


def run_trunk(
    model: Model,
    params: Params,
    tokens: Tokens,
    context: Context,
    accelerator: Accelerator,
    attention: Attention,
    memory: State,
    row: Row | None,
    unroll: int | bool = 1,
) -> tuple[Tokens, State, dict[str, jax.Array]]:
    """Runs all stages of a model on embedded tokens through an accelerator and an attention.

    Args:
      model, params: the network; `params[stage.name]` leads with [depth], or is a tuple of layers (`unstack`).
      tokens, context: what `model.embed` returned.
      accelerator, attention: what may be filled instead of computed, and how the blocks attend.
      memory: of both, as `memory_for` made it.
      row: the evaluation under way (None outside of sampling, for the neutral accelerator).
      unroll: of the `lax.scan` over depth; True writes the blocks out (faster gradients on CPU, slower compile).

    Returns:
      (tokens, memory, computed {stage: [L, branches] float32}).
    """

    def run(tokens: Tokens, memory: State) -> tuple[Tokens, State, dict[str, jax.Array]]:
        branch, inner, computed = {}, {}, {}
        for stage in model.stages:
            n = stage.name
            tokens = stage.enter(tokens, context)
            state = (memory["branch"][n], memory["attention"][n])
            block = _block(stage, context, accelerator, attention, row)
            tokens, (branch[n], inner[n]), computed[n] = _run_stage(
                block, stage.depth, params[n], tokens, state, unroll
            )
        return tokens, {**memory, "branch": branch, "attention": inner}, computed

    return accelerator.trunk(run, tokens, context, memory, row)


def _block(stage: Stage, context: Context, accelerator: Accelerator, attention: Attention, row: Row | None) -> Any:
    """One block as the body of a scan: (tokens, (params, index, state)) -> (tokens, (state, computed))."""

    def block(tokens: Tokens, layer: Any) -> tuple[Tokens, Any]:
        p, index, (branch_state, attention_state) = layer
        mods = stage.block.apply({"params": p}, context, method="mods")
        fractions = []
        for branch in stage.branches:
            where = Where(stage.name, branch, index, stage.depth)

            def compute(inner: State, branch: str = branch, tokens: Tokens = tokens, where: Where = where) -> Any:
                cell = [inner]

                def attend(q: jax.Array, k: jax.Array, v: jax.Array, segments: Segments | None = None) -> jax.Array:
                    o, cell[0] = attention.apply(q, k, v, segments, where, row, cell[0])
                    return o

                update = stage.block.apply({"params": p}, tokens, mods, context, attend, method=branch)
                return update, cell[0]

            update, new, inner, fraction = accelerator.branch(
                compute, where, branch_state[branch], attention_state[branch], row
            )
            branch_state, attention_state = {**branch_state, branch: new}, {**attention_state, branch: inner}
            gate = stage.block.apply({"params": p}, mods, branch, method="gate")
            tokens = jax.tree.map(lambda h, g, u: h + (g * u).astype(h.dtype), tokens, gate, update)
            fractions.append(fraction)
        return tokens, ((branch_state, attention_state), jnp.stack(fractions))

    return block


def _run_stage(block: Any, depth: int, params: Params, tokens: Tokens, state: State, unroll: int | bool) -> Any:
    if isinstance(params, tuple):
        done = []
        for index, layer in enumerate(params):
            tokens, out = block(tokens, (layer, jnp.int32(index), jax.tree.map(lambda a, i=index: a[i], state)))
            done.append(out)
        state, computed = jax.tree.map(lambda *leaves: jnp.stack(leaves), *done)
        return tokens, state, computed
    tokens, (state, computed) = jax.lax.scan(block, tokens, (params, jnp.arange(depth), state), unroll=unroll)
    return tokens, state, computed


def unstack(model: Model, params: Params) -> Params:
    """The same parameters with each stage as a tuple of layers, for which the runner writes the blocks out.

    A scan over stacked layers reads each layer's weights through a copy, which XLA's CPU backend does not fuse into
    the products: written out, a DiT step took 5 to 12 % fewer seconds there, for a longer compilation
    (experiments/results/bench_step). Slicing once, outside of the compiled program, is what makes the difference.

    Args:
      params: with stages that lead with [depth].
    """
    stages = {
        s.name: tuple(jax.tree.map(lambda a, i=i: a[i], params[s.name]) for i in range(s.depth)) for s in model.stages
    }
    return {**params, **stages}


def first_layer(stage_params: Params) -> Params:
    """The parameters of a stage's first block, stacked or not."""
    return stage_params[0] if isinstance(stage_params, tuple) else jax.tree.map(lambda a: a[0], stage_params)


def trunk_spec(model: Model, params: Params, x: Any, cond: Any) -> TrunkSpec:
    """Shapes of every branch's update and attention call for inputs x [B, ...] and cond, by abstract evaluation."""
    calls: dict[str, dict[str, AttentionSpec | None]] = {s.name: dict.fromkeys(s.branches) for s in model.stages}

    def shapes(params: Params, x: jax.Array, cond: Any) -> Any:
        tokens, context = model.embed(params, x, jnp.zeros(x.shape[:1]), cond)
        first, updates = tokens, {}
        for stage in model.stages:
            tokens = stage.enter(tokens, context)
            p = first_layer(params[stage.name])
            mods = stage.block.apply({"params": p}, context, method="mods")
            updates[stage.name] = {}
            for branch in stage.branches:

                def record(q: Any, k: Any, v: Any, segments: Any = None, s: str = stage.name, b: str = branch) -> Any:
                    if calls[s][b] is not None:
                        raise ValueError(f"{model.name}: the branch {b} of {s} attends more than once; allowed: once")
                    shape = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype)  # noqa: E731
                    calls[s][b] = AttentionSpec(*jax.tree.map(shape, (q, k, v, segments)))
                    return ops.attend(q, k, v, segments)

                update = stage.block.apply({"params": p}, tokens, mods, context, record, method=branch)
                updates[stage.name][branch] = update
        return first, updates

    tokens, updates = jax.eval_shape(shapes, params, x, cond)
    return TrunkSpec({s.name: s.depth for s in model.stages}, updates, calls, tokens)


def forward(
    model: Model,
    params: Params,
    x: jax.Array,
    model_time: jax.Array,
    cond: Any,
    attention: Attention | None = None,
    unroll: int | bool = 1,
) -> jax.Array:
    """The plain network: embed, every block, head. Used by training and by parity tests.

    Args:
      x: [B, ...] noised input; model_time: [B]; cond: the model's condition (labels [B]).
      attention: how the blocks attend; None is the reference.

    Returns:
      [B, ..., C] (2C with learned variance), in the model's compute dtype.
    """
    attention = attention or reference_attention()
    accelerator = neutral()
    memory = memory_for(trunk_spec(model, params, x, cond), accelerator, attention)
    tokens, context = model.embed(params, x, model_time, cond)
    tokens, _, _ = run_trunk(model, params, tokens, context, accelerator, attention, memory, None, unroll)
    return model.head(params, tokens, context)


def reference_attention() -> Attention:
    """The exact attention of `difax.ops.attend`."""
    return stateless(ops.attend)
