"""The block runner: folds the stages of a model and offers the trunk and branch seams to an accelerator.

The only place where blocks are put together. A model gives the pieces of a block, an accelerator decides what is
computed and what is filled, and this file adds `gate * update` to the tokens.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from difax import ops
from difax.contracts import Accelerator, Context, Model, Params, Row, Stage, State, Tokens, TrunkSpec, Where


def neutral() -> Accelerator:
    """The accelerator that changes nothing: every branch of every block is computed, nothing is remembered."""
    return Accelerator(
        init=lambda spec: {"trunk": (), "branch": {s: {b: () for b in u} for s, u in spec.update.items()}},
        trunk=run_all,
        branch=lambda compute, where, state, row: (compute(), state, jnp.ones((), jnp.float32)),
    )


def run_all(run: Any, tokens: Tokens, context: Context, state: State, row: Row) -> tuple[Tokens, State, Any]:
    """The trunk seam of accelerators that act on branches only: run every block."""
    tokens, branch, computed = run(tokens, state["branch"])
    return tokens, {**state, "branch": branch}, computed


def run_trunk(
    model: Model,
    params: Params,
    tokens: Tokens,
    context: Context,
    accelerator: Accelerator,
    state: State,
    row: Row | None,
    attend: Any = ops.attend,
    unroll: int | bool = 1,
) -> tuple[Tokens, State, dict[str, jax.Array]]:
    """Runs all stages of a model on embedded tokens through an accelerator.

    Args:
      model, params: the network; `params[stage.name]` leads with [depth], or is a tuple of layers (`unstack`).
      tokens, context: what `model.embed` returned.
      accelerator, state: what may be filled instead of computed, and its memory.
      row: the evaluation under way (None outside of sampling, for the neutral accelerator).
      attend: (q, k, v) -> o.
      unroll: of the `lax.scan` over depth; True writes the blocks out (faster gradients on CPU, slower compile).

    Returns:
      (tokens, state, computed {stage: [L, branches] float32}).
    """

    def run(tokens: Tokens, branch_state: State) -> tuple[Tokens, State, dict[str, jax.Array]]:
        states, computed = {}, {}
        for stage in model.stages:
            tokens = stage.enter(tokens, context)
            tokens, states[stage.name], computed[stage.name] = _run_stage(
                stage,
                params[stage.name],
                tokens,
                context,
                accelerator,
                branch_state[stage.name],
                row,
                attend,
                unroll,
            )
        return tokens, states, computed

    return accelerator.trunk(run, tokens, context, state, row)


def _run_stage(
    stage: Stage,
    params: Params,
    tokens: Tokens,
    context: Context,
    accelerator: Accelerator,
    state: State,
    row: Row | None,
    attend: Any,
    unroll: int | bool,
) -> tuple[Tokens, State, jax.Array]:
    def block(tokens: Tokens, layer: Any) -> tuple[Tokens, Any]:
        p, index, s = layer
        mods = stage.block.apply({"params": p}, context, method="mods")
        fractions = []
        for branch in stage.branches:

            def compute(branch: str = branch, tokens: Tokens = tokens) -> Any:
                return stage.block.apply({"params": p}, tokens, mods, context, attend, method=branch)

            where = Where(stage.name, branch, index, stage.depth)
            update, new, fraction = accelerator.branch(compute, where, s[branch], row)
            s = {**s, branch: new}
            gate = stage.block.apply({"params": p}, mods, branch, method="gate")
            tokens = jax.tree.map(lambda h, g, u: h + (g * u).astype(h.dtype), tokens, gate, update)
            fractions.append(fraction)
        return tokens, (s, jnp.stack(fractions))

    if isinstance(params, tuple):
        done = []
        for index, layer in enumerate(params):
            tokens, out = block(tokens, (layer, jnp.int32(index), jax.tree.map(lambda a, i=index: a[i], state)))
            done.append(out)
        state, computed = jax.tree.map(lambda *leaves: jnp.stack(leaves), *done)
        return tokens, state, computed
    layers = (params, jnp.arange(stage.depth), state)
    tokens, (state, computed) = jax.lax.scan(block, tokens, layers, unroll=unroll)
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
    """Shapes of every branch's update for inputs x [B, ...] and cond, by abstract evaluation."""

    def shapes(params: Params, x: jax.Array, cond: Any) -> Any:
        tokens, context = model.embed(params, x, jnp.zeros(x.shape[:1]), cond)
        first, updates = tokens, {}
        for stage in model.stages:
            tokens = stage.enter(tokens, context)
            p = first_layer(params[stage.name])
            mods = stage.block.apply({"params": p}, context, method="mods")
            updates[stage.name] = {
                b: stage.block.apply({"params": p}, tokens, mods, context, ops.attend, method=b) for b in stage.branches
            }
        return first, updates

    tokens, updates = jax.eval_shape(shapes, params, x, cond)
    return TrunkSpec({s.name: s.depth for s in model.stages}, updates, tokens)


def forward(
    model: Model,
    params: Params,
    x: jax.Array,
    model_time: jax.Array,
    cond: Any,
    attend: Any = ops.attend,
    unroll: int | bool = 1,
) -> jax.Array:
    """The plain network: embed, every block, head. Used by training and by parity tests.

    Args:
      x: [B, ...] noised input; model_time: [B]; cond: the model's condition (labels [B]).

    Returns:
      [B, ..., C] (2C with learned variance), in the model's compute dtype.
    """
    tokens, context = model.embed(params, x, model_time, cond)
    accelerator = neutral()
    state = {"trunk": (), "branch": {s.name: {b: () for b in s.branches} for s in model.stages}}
    tokens, _, _ = run_trunk(model, params, tokens, context, accelerator, state, None, attend, unroll)
    return model.head(params, tokens, context)
