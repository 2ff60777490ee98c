"""Operations and bytes of a model's parts, counted from its own program, and of a run, from its trace.

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

from difax.core.contracts import Attention, Model, Network, Params, Trace, Where
from difax.core.shapes import first_layer, trunk_spec
from difax.core.trunk import reference_attention


class ModelCost(NamedTuple):
    """Operations per sample of one evaluation: `ends` (embeddings and head), and per stage the conditioning of one
    block (with its long skip, if it has one) and each branch of one block; `depth` says how many blocks. Of them
    `ends_once` and, of each branch, `once` are what depends on the condition alone (`Model.once`, `Stage.once`).
    `others`: of the other networks that an accelerator runs (`Accelerator.networks`)."""

    ends: float
    mods: dict[str, float]
    branches: dict[str, tuple[float, ...]]
    depth: dict[str, int]
    ends_once: float
    once: dict[str, tuple[float, ...]]
    others: tuple[ModelCost, ...] = ()

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


def moved(function: Callable[..., Any], *specs: Any) -> float:
    """Bytes that the products in a traced function read and write, each operand and result once.

    Args, Raises: as of `count`.
    """
    return _moved(jax.make_jaxpr(function)(*specs).jaxpr)


def model_cost(
    model: Model,
    params: Params,
    attention: Attention | None = None,
    of: tuple[str, ...] | None = None,
    networks: tuple[Network, ...] = (),
) -> ModelCost:
    """Counts a model's parts for one sample, from shapes alone.

    Args:
      model: the network. params: its parameters, or their ShapeDtypeStructs (`jax.eval_shape(model.init, key)`).
      attention: how the blocks attend; None is the reference.
      of: only products whose two operands are of one of these types, such as ("int8",); None is all.
      networks: that an accelerator runs besides; the cost of the full model is not theirs.
    """
    others = tuple(model_cost(one.model, one.params, attention, of) for one in networks)
    return _each_part(lambda part: _count(part.jaxpr, of), model, params, attention, 1)._replace(others=others)


class _Part(NamedTuple):
    """A traced function of a model, and how many of its inputs are parameters."""

    jaxpr: Any
    parameters: int


class ModelBytes(NamedTuple):
    """Bytes that the parts of one evaluation move: `weights`, the parameters that each reads, whatever the batch, and
    `activations`, what its products read and write for each sample."""

    weights: ModelCost
    activations: ModelCost


def model_bytes(
    model: Model, params: Params, attention: Attention | None = None, networks: tuple[Network, ...] = ()
) -> ModelBytes:
    """Counts what a model's parts move to and from memory, from shapes alone.

    A product reads its operands and writes its result once; what is not a product is taken as fused into one, and
    what a cache remembers is not in it (`Accelerator.init` says how much that is). Quantised weights count as stored.

    Args:
      model, params, attention, networks: as in `model_cost`; params as they are sampled with (`Setup.prepare`).
    """
    others = [model_bytes(one.model, one.params, attention) for one in networks]
    weights = _each_part(_weights, model, params, attention, 1)
    one, two = (_each_part(lambda part: _moved(part.jaxpr), model, params, attention, n) for n in (1, 2))
    # what grows with the batch is the activations', the rest was the weights' again
    activations = jax.tree.map(lambda a, b: b - a, one, two)._replace(depth=one.depth)
    return ModelBytes(
        weights._replace(others=tuple(other.weights for other in others)),
        activations._replace(others=tuple(other.activations for other in others)),
    )


def _each_part(
    figure: Callable[[_Part], float], model: Model, params: Params, attention: Attention | None, batch: int
) -> ModelCost:
    """A figure of every part, whose first argument is the parameters."""
    attention = attention or reference_attention()
    shape = lambda tree: jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tree)  # noqa: E731
    params = shape(params)
    x = jax.ShapeDtypeStruct((batch, *model.input_shape), jnp.float32)
    time = jax.ShapeDtypeStruct((batch,), jnp.float32)
    cond = jax.tree.map(lambda a: jax.ShapeDtypeStruct((batch, *a.shape), a.dtype), model.cond)
    calls = trunk_spec(model, params, x, cond).attention
    tokens, context = jax.eval_shape(model.embed, params, x, time, cond)
    ends = figure(_traced(model.embed, params, x, time, cond))
    known = jax.eval_shape(model.once, params, cond)
    ends_once = ends - figure(_traced(model.embed, params, x, time, known))
    mods, branches, once = {}, {}, {}
    for stage in model.stages:
        tokens = jax.eval_shape(stage.enter, tokens, context)
        p = jax.eval_shape(first_layer, params[stage.name])

        def mod(p: Any, c: Any, stage: Any = stage) -> Any:
            return stage.block.apply({"params": p}, c, method="mods")

        m = jax.eval_shape(mod, p, context)
        mods[stage.name] = figure(_traced(mod, p, context))
        if stage.takes:

            def skip(p: Any, h: Any, stage: Any = stage) -> Any:
                return stage.block.apply({"params": p}, h, h, method="skip")

            mods[stage.name] += figure(_traced(skip, p, tokens))

        def one(p: Any, h: Any, m: Any, c: Any, stage: Any = stage, branch: str = "") -> Any:
            call = calls[stage.name][branch]
            state = () if call is None else attention.init(call)
            where = Where(stage.name, branch, jnp.int32(0), stage.depth)

            def attend(q: Any, k: Any, v: Any, segments: Any = None) -> Any:
                return attention.apply(q, k, v, segments, where, None, state)[0]

            return stage.block.apply({"params": p}, h, m, c, attend, method=branch)

        each = partial(_each_branch, figure, one, stage.branches, p, jax.eval_shape(stage.within, tokens), m)
        branches[stage.name] = each(context)
        once[stage.name] = (0.0,) * len(stage.branches)
        if stage.once:

            def keep(p: Any, c: Any, stage: Any = stage) -> Any:
                return stage.block.apply({"params": p}, c, method="once")

            spared = each({**context, **jax.eval_shape(keep, p, context)})
            once[stage.name] = tuple(a - b for a, b in zip(branches[stage.name], spared, strict=True))
    ends += figure(_traced(model.head, params, tokens, context))
    return ModelCost(ends, mods, branches, {s.name: s.depth for s in model.stages}, ends_once, once)


def _each_branch(
    figure: Callable[[_Part], float], one: Any, names: tuple[str, ...], p: Any, tokens: Any, mods: Any, context: Any
) -> tuple[float, ...]:
    return tuple([figure(_traced(partial(one, branch=name), p, tokens, mods, context)) for name in names])


def run_cost(cost: ModelCost, trace: Trace) -> float:
    """Operations per sample of a whole run: what its trace says was computed.

    sum over evaluations of halves ends + sum over stages and halves of (entered blocks mods + sum over layers and
    branches of the computed fraction of their cost). What depends on the condition alone counts once for each of
    `trace.ahead` copies, and in no evaluation, where it was computed before the first one.
    """
    if cost.others:
        costs = (cost._replace(others=()), *cost.others)
        return sum(run_cost(costs[k], its) for k, its in _by_network(trace, len(cost.others)).items())
    ahead, halves = float(trace.ahead), float(np.sum(np.asarray(trace.halves, np.float64)))
    total = cost.ends * halves + (cost.ends_once * (ahead - halves) if ahead else 0.0)
    for stage, depth in cost.depth.items():
        computed = np.asarray(trace.computed[stage], np.float64)  # [E, L, branches, halves]
        once = np.asarray(cost.once[stage] if ahead else np.zeros(computed.shape[2]))
        total += cost.mods[stage] * float(np.sum(np.asarray(trace.entered[stage], np.float64)))
        total += float(computed.sum((0, 1, 3)) @ (np.asarray(cost.branches[stage]) - once))
        total += ahead * depth * float(np.sum(once))
    return total


def run_bytes(cost: ModelBytes, trace: Trace, batch: int, together: bool = True) -> float:
    """Bytes that a whole run of a batch moves: activations as operations are counted, weights once where they are read.

    A part's weights are read at an evaluation if any of its samples computes it.

    Args:
      cost: `model_bytes`.
      trace: of the batch.
      together: do both halves of guidance run in one batch (`Guide.together`), and read the weights once.
    """

    if cost.weights.others:
        each = [(part._replace(others=()), *part.others) for part in cost]
        traces = _by_network(trace, len(cost.weights.others))
        return sum(run_bytes(ModelBytes(each[0][k], each[1][k]), its, batch, together) for k, its in traces.items())

    def reads(computed: Any) -> np.ndarray:  # [E, ..., halves] -> how often a part was read
        ran = np.asarray(computed, np.float64) > 0
        return np.asarray(ran.any(-1) if together else ran.sum(-1), np.float64)

    halves, weights, ahead = np.asarray(trace.halves, np.float64), cost.weights, float(trace.ahead) > 0
    times = float(np.sum(np.minimum(halves, 1) if together else halves))
    total = weights.ends * times + (weights.ends_once * (1 - times) if ahead else 0.0)
    for stage, depth in weights.depth.items():
        once = np.asarray(weights.once[stage] if ahead else np.zeros(len(weights.once[stage])))
        total += weights.mods[stage] * (depth if ahead else float(reads(trace.entered[stage]).sum()))
        total += float(reads(trace.computed[stage]).sum((0, 1)) @ (np.asarray(weights.branches[stage]) - once))
        total += depth * float(np.sum(once))
    return total + batch * run_cost(cost.activations, trace)


def _by_network(trace: Trace, others: int) -> dict[int, Trace]:
    """The traces of the model (0) and of each other network in it, whose first block is entered where it ran."""
    halves, found = np.asarray(trace.halves, np.float64), {}
    for k in range(1, others + 1):
        own = lambda of, k=k: {n.partition("/")[2]: a for n, a in of.items() if n.startswith(f"{k}/")}  # noqa: E731
        entered = own(trace.entered)
        if not entered:
            continue
        ran = np.asarray(next(iter(entered.values())), np.float64)[:, 0].sum(-1)
        halves = halves - ran
        found[k] = trace._replace(computed=own(trace.computed), entered=entered, halves=ran)
    return {0: trace._replace(halves=halves), **found}


def _traced(function: Callable[..., Any], *specs: Any) -> _Part:
    return _Part(jax.make_jaxpr(function)(*specs).jaxpr, len(jax.tree.leaves(specs[0])))


def _weights(part: _Part) -> float:
    """Bytes of the parameters that a part uses."""
    used = _used(part.jaxpr)
    return sum(_size(v.aval) for v in part.jaxpr.invars[: part.parameters] if v in used)


def _used(jaxpr: Any) -> set[Any]:
    """The variables of a jaxpr that an equation reads; what a nested call is given and does not read is not used."""
    found = set()
    for equation in jaxpr.eqns:
        inner = getattr(equation.params.get("jaxpr"), "jaxpr", None)
        if inner is not None and len(inner.invars) == len(equation.invars):
            there = _used(inner)
            read = [o for o, i in zip(equation.invars, inner.invars, strict=True) if i in there]
        else:
            read = equation.invars
        found.update(v for v in read if not hasattr(v, "val"))
    return found


def _size(aval: Any) -> float:
    """Bytes of an array; four bits are half a byte."""
    kind = jnp.dtype(aval.dtype)
    if jnp.issubdtype(kind, jnp.floating):
        bits = jnp.finfo(kind).bits
    else:
        bits = jnp.iinfo(kind).bits if jnp.issubdtype(kind, jnp.integer) else 8 * kind.itemsize
    return math.prod(aval.shape) * bits / 8


def _count(jaxpr: Any, of: tuple[str, ...] | None = None) -> float:
    """Operations of the products in a jaxpr, or of those whose operands have certain types."""

    def operations(equation: Any) -> float:
        if of is not None and not all(str(v.aval.dtype) in of for v in equation.invars[:2]):
            return 0.0
        out = math.prod(equation.outvars[0].aval.shape)
        if equation.primitive.name == "dot_general":
            (contract, _), _ = equation.params["dimension_numbers"]
            return 2.0 * out * math.prod(equation.invars[0].aval.shape[i] for i in contract)
        kernel = equation.invars[1].aval.shape
        return 2.0 * out * math.prod(kernel) / kernel[equation.params["dimension_numbers"].rhs_spec[0]]

    return _summed(jaxpr, operations)


def _moved(jaxpr: Any) -> float:
    """Bytes that the products in a jaxpr read and write."""
    return _summed(jaxpr, lambda e: sum(_size(v.aval) for v in (*e.invars[:2], *e.outvars)))


def _summed(jaxpr: Any, figure: Callable[[Any], float]) -> float:
    """The sum of a figure over the products (dot_general, convolution) of a jaxpr, as often as they run."""
    total = 0.0
    by_platform = [e.outvars[0] for e in jaxpr.eqns if e.primitive.name == "platform_index"]
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name in ("dot_general", "conv_general_dilated"):
            total += figure(equation)
        elif name == "cond" and any(equation.invars[0] is index for index in by_platform):
            total += _summed(params["branches"][-1].jaxpr, figure)  # the default: a platform's own may pad
        elif name == "cond":
            total += max(_summed(branch.jaxpr, figure) for branch in params["branches"])
        elif name == "scan":
            total += params["length"] * _summed(params["jaxpr"].jaxpr, figure)
        elif name == "while":
            raise ValueError("cost: a while loop has no known length")
        else:
            for value in params.values():
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    total += _summed(inner, figure)
    return total
