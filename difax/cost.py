"""Floating-point operations of a model's parts, counted from its own program, and of a run, from its trace.

XLA's cost analysis counts a scan body once and a conditional at its dearest branch, so it cannot say what a sampler
with a cache really did. Here the parts are counted once from abstract values, and the trace says how often each ran.
A multiply-add counts as two operations; only products (dot_general and convolutions) are counted, as in the
literature.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from difax.contracts import Attention, Model, Params, Trace, Where
from difax.trunk import first_layer, reference_attention, trunk_spec


class ModelCost(NamedTuple):
    """Operations per sample of one evaluation: `ends` (embeddings and head), and per stage the conditioning of one
    block (with its long skip, if it has one) and each branch of one block; `depth` says how many blocks."""

    ends: float
    mods: dict[str, float]
    branches: dict[str, tuple[float, ...]]
    depth: dict[str, int]

    @property
    def held(self) -> float:
        """Operations of one evaluation of one sample whose branches are all filled: ends and conditioning."""
        return self.ends + sum(depth * self.mods[stage] for stage, depth in self.depth.items())

    @property
    def evaluation(self) -> float:
        """Operations of one full evaluation of one sample."""
        blocks = (self.depth[s] * (self.mods[s] + sum(self.branches[s])) for s in self.depth)
        return self.ends + sum(blocks)


def count(function: Callable[..., Any], *specs: Any) -> float:
    """Operations of the products in a traced function; a scan counts its body times its length.

    Args:
      function: any traceable function.
      specs: its arguments, as arrays or ShapeDtypeStructs.

    Raises:
      ValueError: a while loop, whose length is not known.
    """
    return _count(jax.make_jaxpr(function)(*specs).jaxpr)


def model_cost(model: Model, params: Params, attention: Attention | None = None) -> ModelCost:
    """Counts a model's parts for one sample, from shapes alone.

    Args:
      model: the network. params: its parameters, or their ShapeDtypeStructs (`jax.eval_shape(model.init, key)`).
      attention: how the blocks attend; None is the reference.
    """
    attention = attention or reference_attention()
    shape = lambda tree: jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tree)  # noqa: E731
    params = shape(params)
    x = jax.ShapeDtypeStruct((1, *model.input_shape), jnp.float32)
    time = jax.ShapeDtypeStruct((1,), jnp.float32)
    cond = jax.tree.map(lambda a: jax.ShapeDtypeStruct((1, *a.shape), a.dtype), model.cond)
    calls = trunk_spec(model, params, x, cond).attention
    tokens, context = jax.eval_shape(model.embed, params, x, time, cond)
    ends = count(model.embed, params, x, time, cond)
    mods, branches = {}, {}
    for stage in model.stages:
        tokens = jax.eval_shape(stage.enter, tokens, context)
        p = jax.eval_shape(first_layer, params[stage.name])

        def mod(p: Any, c: Any, stage: Any = stage) -> Any:
            return stage.block.apply({"params": p}, c, method="mods")

        m = jax.eval_shape(mod, p, context)
        mods[stage.name] = count(mod, p, context)
        if stage.takes:

            def skip(p: Any, h: Any, stage: Any = stage) -> Any:
                return stage.block.apply({"params": p}, h, h, method="skip")

            mods[stage.name] += count(skip, p, tokens)

        def one(p: Any, h: Any, m: Any, c: Any, stage: Any = stage, branch: str = "") -> Any:
            call = calls[stage.name][branch]
            state = () if call is None else attention.init(call)
            where = Where(stage.name, branch, jnp.int32(0), stage.depth)

            def attend(q: Any, k: Any, v: Any, segments: Any = None) -> Any:
                return attention.apply(q, k, v, segments, where, None, state)[0]

            return stage.block.apply({"params": p}, h, m, c, attend, method=branch)

        each = (partial(one, branch=b) for b in stage.branches)
        branches[stage.name] = tuple([count(f, p, tokens, m, context) for f in each])
    ends += count(model.head, params, tokens, context)
    return ModelCost(ends, mods, branches, {s.name: s.depth for s in model.stages})


def run_cost(cost: ModelCost, trace: Trace) -> float:
    """Operations per sample of a whole run: what its trace says was computed.

    sum over evaluations of halves ends + sum over stages and halves of (entered blocks mods + sum over layers and
    branches of the computed fraction of their cost).
    """
    total = cost.ends * float(np.sum(np.asarray(trace.halves, np.float64)))
    for stage in cost.depth:
        computed = np.asarray(trace.computed[stage], np.float64)  # [E, L, branches, halves]
        total += cost.mods[stage] * float(np.sum(np.asarray(trace.entered[stage], np.float64)))
        total += float(computed.sum((0, 1, 3)) @ np.asarray(cost.branches[stage]))
    return total


def _count(jaxpr: Any) -> float:
    total = 0.0
    by_platform = [e.outvars[0] for e in jaxpr.eqns if e.primitive.name == "platform_index"]
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contract, _), _ = params["dimension_numbers"]
            lhs = equation.invars[0].aval.shape
            out = equation.outvars[0].aval.shape
            total += 2.0 * math.prod(out) * math.prod(lhs[i] for i in contract)
        elif name == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            out_channels = kernel[params["dimension_numbers"].rhs_spec[0]]
            total += 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) / out_channels
        elif name == "cond" and any(equation.invars[0] is index for index in by_platform):
            total += _count(params["branches"][-1].jaxpr)  # the default: a platform's own may pad
        elif name == "cond":
            total += max(_count(branch.jaxpr) for branch in params["branches"])
        elif name == "scan":
            total += params["length"] * _count(params["jaxpr"].jaxpr)
        elif name == "while":
            raise ValueError("cost: a while loop has no known length")
        else:
            for value in params.values():
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    total += _count(inner)
    return total
