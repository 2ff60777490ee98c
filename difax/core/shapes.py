"""Shapes of everything that a network hands around, by abstract evaluation, and the memory that is made for them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from difax.core import ops
from difax.core.contracts import Accelerator, Attention, AttentionSpec, Model, Params, State, TrunkSpec
from difax.core.hooks import hooked


def first_layer(stage_params: Params) -> Params:
    """The parameters of a stage's first block, stacked or not."""
    return stage_params[0] if isinstance(stage_params, tuple) else jax.tree.map(lambda a: a[0], stage_params)


def trunk_spec(
    model: Model, params: Params, x: Any, cond: Any, halves: int = 1, together: bool = True, ahead: bool = False
) -> TrunkSpec:
    """Shapes of every branch's update, attention call and dense layers for inputs x [B, ...] and cond, by abstract
    evaluation.

    Args:
      halves: how many copies of the batch x holds; together: do they run in one batch.
      ahead: is what depends on the condition alone known before (`make_sampler`), and no part of the branches.

    What was found for the same model and shapes is kept: a sampler is traced with several of them, and a sweep with
    the same ones again and again.
    """
    leaves, tree = jax.tree.flatten((params, x, cond))
    shapes = tuple((a.shape, str(a.dtype)) for a in leaves)
    blocks = tuple((s.name, s.depth, id(s.block), s.branches, s.enter, s.once, s.streams) for s in model.stages)
    key = (model.embed, model.head, model.hidden, blocks, tree, shapes, halves, together, ahead)
    key = (*key, str(jnp.result_type(float)))
    if key not in _KEPT:
        if len(_KEPT) >= MOST_KEPT:
            _KEPT.pop(next(iter(_KEPT)))
        # the model is kept too, or another block could have the same id
        _KEPT[key] = model, _trunk_spec(model, params, x, cond, halves, together, ahead)
    return _KEPT[key][1]


MOST_KEPT = 64
_KEPT: dict[Any, tuple[Model, TrunkSpec]] = {}


def _trunk_spec(model: Model, params: Params, x: Any, cond: Any, halves: int, together: bool, ahead: bool) -> TrunkSpec:
    shape = partial(jax.tree.map, lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype))
    calls: dict[str, dict[str, AttentionSpec | None]] = {s.name: dict.fromkeys(s.branches) for s in model.stages}
    layers: dict[str, dict[str, dict[str, Any]]] = {s.name: {b: {} for b in s.branches} for s in model.stages}

    def shapes(params: Params, x: jax.Array, cond: Any) -> Any:
        tokens, context = model.embed(params, x, jnp.zeros(x.shape[:1]), cond)
        first, updates, within = tokens, {}, {}
        for stage in model.stages:
            tokens = stage.enter(tokens, context)
            p = first_layer(params[stage.name])
            mods = stage.block.apply({"params": p}, context, method="mods")
            updates[stage.name], within[stage.name] = {}, stage.within(tokens)
            given = context
            if ahead and stage.once:
                given = {**context, **stage.block.apply({"params": p}, context, method="once")}
            for branch in stage.branches:

                def record(q: Any, k: Any, v: Any, segments: Any = None, s: str = stage.name, b: str = branch) -> Any:
                    if calls[s][b] is not None:
                        raise ValueError(f"{model.name}: the branch {b} of {s} attends more than once; allowed: once")
                    calls[s][b] = AttentionSpec(*shape((q, k, v, segments)))
                    return ops.attend(q, k, v, segments)

                def dense(name: str, x: Any, apply: Any, found: dict[str, Any] = layers[stage.name][branch]) -> Any:
                    y = apply(x)
                    found[name] = shape((x, y))
                    return y

                with hooked(dense):
                    update = stage.block.apply({"params": p}, within[stage.name], mods, given, record, method=branch)
                updates[stage.name][branch] = update
        return first, updates, within, model.head(params, tokens, context), dict(model.told(context))

    tokens, updates, within, output, told = jax.eval_shape(shapes, params, x, cond)
    first = next(iter(model.stages), None)
    inputs = [] if first is None else [x for x, _ in layers[first.name][first.branches[0]].values()]
    return TrunkSpec(
        depth={s.name: s.depth for s in model.stages},
        update=updates,
        attention=calls,
        dense=layers,
        tokens=tokens,
        within=within,
        hidden=jax.eval_shape(model.hidden, tokens),
        first_input=inputs[0] if inputs else None,
        output=output,
        halves=halves,
        together=together,
        told=told,
    )


def memory_for(spec: TrunkSpec, accelerator: Accelerator, attention: Attention, modes: tuple[Any, ...]) -> State:
    """What the runner carries from one evaluation to the next: the accelerator's and the attention's memory."""

    def every_layer(stage: str, branch: str) -> State:
        call = spec.attention[stage][branch]
        state = () if call is None else attention.init(call)
        return jax.tree.map(lambda a: jnp.broadcast_to(a, (spec.depth[stage], *a.shape)), state)

    remembered = {s: {b: every_layer(s, b) for b in branches} for s, branches in spec.update.items()}
    return {**accelerator.init(spec, modes), "attention": remembered}


def zeros_of(function: Callable[..., Any], *arguments: Any) -> Any:
    """Zeros in the place of every array that function(*arguments) would return; nothing of it is run."""
    return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(function, *arguments))
