"""Seconds and bytes of a run on chips that are not there: what the published peaks allow, and how a mesh divides it.

Nothing here is measured or compiled. Bounds of one device's seconds are max(compute, memory, collectives), where all
of them overlap, and their sum, where none does; peaks are never reached, so both are below what a chip will take.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jax.interpreters import partial_eval

from difax.build import Setup, input_shapes
from difax.core.chips import Chip
from difax.core.contracts import Attention, Params, Trace
from difax.core.cost import model_bytes, model_cost, run_bytes, run_cost
from difax.core.qtensor import size_in_bytes
from difax.core.sample import make_rows
from difax.core.shapes import memory_for, trunk_spec
from difax.core.target import Target, lowering_for
from difax.core.trunk import neutral, reference_attention

# axes of a mesh (`difax.core.placement.Axes`): what each divides
DIVIDES = {
    "data": "the batch",
    "fsdp": "the batch, and the weights until they are used",
    "cfg": "the halves of guidance",
    "seq": "the tokens",
    "tensor": "the columns and rows of the products, and the heads",
}
EIGHT_BITS = {"int8": ("int8", "int4"), "float8_e4m3fn": ("float8_e4m3fn",)}  # rate -> types of both operands


class Work(NamedTuple):
    """A run of a batch, on all devices together.

    operations: {type of the operands, which names the rate: operations}.
    weights, activations: bytes that are read and written: weights at every evaluation, activations by all samples.
    parameters, caches, inputs, widest: bytes that are held: weights, what is remembered between evaluations, samples
    with keys and conditions, and what the widest branch of a block reads and writes. tables: the rows, which every
    device has.
    evaluations: of the network. decided: False where a cache decides in the run what is computed: the work is then that
    of a run that computes everything, which is the most.
    heads, attended: of every attention call of an evaluation: heads, and bytes of (q, k, v, o) of a sample.
    tokens, output: bytes of a sample's tokens between blocks, and of the network's output. blocks: how many there are.
    halves: copies of the batch that run together.
    """

    operations: dict[str, float]
    weights: float
    activations: float
    parameters: int
    caches: int
    inputs: int
    tables: int
    widest: float
    evaluations: float
    decided: bool
    heads: tuple[int, ...]
    attended: tuple[tuple[float, float, float, float], ...]
    tokens: float
    blocks: int
    halves: int
    output: float
    batch: int


def work(setup: Setup, params: Params, batch: int) -> Work:
    """Counts a run from shapes alone.

    Args:
      setup: of the run. params: shapes, as `Setup.prepare` returns them. batch: samples.
    """
    model = setup.model
    with lowering_for(Target("cpu")):  # whose attention is products that can be counted
        trace, decided = planned_trace(setup, params)
        try:
            counted: Attention | None = setup.attention
            cost = model_cost(model, params, counted)
        except (NotImplementedError, ValueError):  # a kernel, which computes what the reference does
            counted = None
            cost = model_cost(model, params)
        per_sample = run_cost(cost, trace)
        eight = {}
        if setup.rules:
            for rate, types in EIGHT_BITS.items():
                some = run_cost(model_cost(model, params, counted, of=types), trace)
                eight |= {rate: batch * some} if some else {}
    moved = model_bytes(model, params, _unmoved())
    x = jax.ShapeDtypeStruct((1, *model.input_shape), jnp.float32)
    cond = jax.tree.map(lambda a: jax.ShapeDtypeStruct((1, *a.shape), a.dtype), model.cond)
    spec = trunk_spec(model, params, x, cond)
    branches, calls, widest, blocks = {}, [], 0.0, 0
    for stage in model.stages:
        blocks += stage.depth
        each = list(moved.activations.branches[stage.name])
        for i, branch in enumerate(stage.branches):
            call = spec.attention[stage.name][branch]
            dense = spec.dense[stage.name][branch]
            widest = max(widest, sum(size_in_bytes(pair) for pair in dense.values()))
            if call is not None:
                part = tuple(float(size_in_bytes(a)) for a in (call.q, call.k, call.v, call.q))
                each[i] += sum(part)  # scores stay on the chip
                calls += [(call.q.shape[2], part)] * stage.depth
        branches[stage.name] = tuple(each)
    moved = moved._replace(activations=moved.activations._replace(branches=branches))
    total = run_bytes(moved, trace, batch, setup.guide.together)
    weights = run_bytes(moved, trace, 0, setup.guide.together)
    return Work(
        operations={str(jnp.dtype(model.dtype)): batch * per_sample - sum(eight.values()), **eight},
        weights=weights,
        activations=total - weights,
        parameters=size_in_bytes(params),
        caches=cache_bytes(setup, params, batch),
        inputs=batch * (4 * math.prod(model.input_shape) + 8 + size_in_bytes(model.cond)),
        tables=size_in_bytes(jax.tree.map(np.asarray, setup.rows)),
        widest=widest * batch * setup.guide.halves,
        evaluations=float(np.sum(np.asarray(trace.halves) > 0)),
        decided=decided,
        heads=tuple(heads for heads, _ in calls),
        attended=tuple(part for _, part in calls),
        tokens=float(size_in_bytes(spec.tokens)),
        blocks=blocks,
        halves=setup.guide.halves if setup.guide.together else 1,
        output=float(size_in_bytes(spec.output)),
        batch=batch,
    )


def _unmoved() -> Attention:
    """An attention without products, whose reads and writes are counted apart."""
    return Attention(lambda spec: (), lambda q, k, v, segments, where, row, state: (q, state))


def planned_trace(setup: Setup, params: Params) -> tuple[Trace, bool]:
    """(trace, True) of a run whose plan says what is computed: the part of the sampler that the trace depends on is
    run, without weights. Where samples or weights decide, (trace of a run that computes everything, False)."""
    trace = _trace_alone(setup, params)
    if trace is not None:
        return trace, True
    rows = make_rows(
        setup.solver, setup.guide, setup.process, setup.times, neutral(), setup.model.stages
    )  # those of a run without a cache
    full = _trace_alone(setup._replace(accelerator=neutral(), rows=rows), params)
    if full is None:
        raise ValueError(f"plan: what {setup.described.get('guide', 'the guide')} computes depends on the samples")
    return full, False


def _trace_alone(setup: Setup, params: Params) -> Trace | None:
    """The trace of a run, if nothing but the rows and the scale goes into it."""
    x, keys, cond = input_shapes(setup.model, 1)
    rows, scale = jax.tree.map(np.asarray, setup.rows), np.float32(setup.scale)
    known = jax.tree.leaves((rows, scale))
    sampler = setup.sampler()
    closed, shapes = jax.make_jaxpr(sampler, return_shape=True)(params, x, keys, cond, rows, scale)
    outputs = len(jax.tree.leaves(shapes[0]))
    wanted = [i >= outputs for i in range(len(jax.tree.leaves(shapes)))]
    jaxpr, used = partial_eval.dce_jaxpr(_unbound(closed.jaxpr), wanted)
    first = len(used) - len(known)
    if any(used[:first]):
        return None
    given = [a for a, needed in zip(known, used[first:], strict=True) if needed]
    leaves = jax.jit(lambda *a: jaxpr_as_fun(ClosedJaxpr(jaxpr, closed.consts))(*a))(*given)
    return jax.tree.unflatten(jax.tree.structure(shapes[1]), [np.asarray(a) for a in leaves])


def _unbound(jaxpr: Any) -> Any:
    """A jaxpr whose borders hold each value by itself, so that one that is not needed does not stay for the others."""

    def inside(value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return type(value)(inside(v) for v in value) if not hasattr(value, "_fields") else value
        if hasattr(value, "jaxpr") and hasattr(value, "consts"):
            return value.replace(jaxpr=_unbound(value.jaxpr))
        return _unbound(value) if hasattr(value, "eqns") else value

    equations = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "optimization_barrier":
            pairs = zip(equation.invars, equation.outvars, strict=True)
            equations += [equation.replace(invars=[a], outvars=[b]) for a, b in pairs]
        else:
            equations.append(equation.replace(params={k: inside(v) for k, v in equation.params.items()}))
    return jaxpr.replace(eqns=equations)


def cache_bytes(setup: Setup, params: Params, batch: int) -> int:
    """Bytes that a run remembers from one evaluation to the next, of all copies of the batch."""
    copies = batch * setup.guide.halves
    x, _, cond = input_shapes(setup.model, copies)

    def memory() -> Any:
        attention = setup.attention or reference_attention()
        spec = trunk_spec(setup.model, params, x, cond, setup.guide.halves, setup.guide.together, setup.ahead)
        return memory_for(spec, setup.accelerator, attention, setup.rows.plan.modes)

    return size_in_bytes(jax.eval_shape(memory))


Axes = Mapping[str, int]  # of `DIVIDES`, and "ulysses" of "seq"; what is not named is 1


def share(of: Work, axes: Axes) -> int:
    """Into how many parts a mesh divides the samples' work; an axis "cfg" without two halves at once divides none."""
    return math.prod(axes.get(axis, 1) for axis in DIVIDES if axis != "cfg" or of.halves == 2)


def ulysses(of: Work, axes: Axes) -> int:
    """Of the devices along "seq", those that exchange heads for tokens; the rest are a ring."""
    local = math.gcd(*of.heads) // axes.get("tensor", 1)
    return axes.get("ulysses") or math.gcd(axes.get("seq", 1), local)


class Seconds(NamedTuple):
    """compute, memory, collectives: seconds of one device at the chip's peaks; rates: {what: the peak}."""

    compute: float
    memory: float
    collectives: float
    rates: dict[str, float]

    @property
    def least(self) -> float:
        """Where all three overlap."""
        return max(self.compute, self.memory, self.collectives)

    @property
    def summed(self) -> float:
        """Where none overlaps."""
        return self.compute + self.memory + self.collectives


def seconds(chip: Chip, operations: Mapping[str, float], moved: float, sent: float) -> Seconds | None:
    """The roofline of one device; None where nobody publishes the chip's peaks.

    compute = sum over types of operations/rate (a type that the chip has no rate for runs at that of bfloat16),
    memory = moved/bandwidth, collectives = sent/(links x bytes/s of a link in one direction).
    """
    if not chip.rates:
        return None
    rate = {kind: chip.rates.get(kind, chip.rates["bfloat16"]) for kind in operations}
    return Seconds(
        compute=sum(count / rate[kind] for kind, count in operations.items()),
        memory=moved / chip.bandwidth,
        collectives=sent / (chip.link * chip.links),
        rates={
            **{f"{kind}{'' if kind in chip.rates else ' as bfloat16'} operations/s": rate[kind] for kind in operations},
            "memory bytes/s": chip.bandwidth,
            "link bytes/s": chip.link * chip.links,
        },
    )


def per_device(of: Work, axes: Axes) -> tuple[dict[str, float], float]:
    """(operations by type, bytes moved) of one device: work over `share`, weights over the axis of the columns."""
    parts = share(of, axes)
    moved = of.activations / parts + of.weights / axes.get("tensor", 1)
    return {kind: count / parts for kind, count in of.operations.items()}, moved


def held(of: Work, axes: Axes) -> dict[str, float]:
    """An estimate of what one device holds, in bytes: weights, caches, inputs, and the widest branch's activations."""
    parts = share(of, axes)
    rest = parts // axes.get("tensor", 1)
    return {
        "weights": of.parameters / (axes.get("tensor", 1) * axes.get("fsdp", 1)),
        "caches": of.caches / rest,
        "inputs": of.tables + of.inputs / (axes.get("data", 1) * axes.get("fsdp", 1)),
        "activations": of.widest / parts + of.tokens * of.batch * of.halves / rest,
    }


def sent(of: Work, axes: Axes) -> float:
    """An estimate of the bytes that a device sends in a run, by the algorithms that the axes stand for."""
    t, f, cfg = (axes.get(axis, 1) for axis in ("tensor", "fsdp", "cfg"))
    u = ulysses(of, axes)
    r = axes.get("seq", 1) // u
    tokens = of.batch * of.halves * t / share(of, axes)  # samples whose tokens a device has: a fraction of one
    total = 0.0
    for q, k, v, o in of.attended:
        total += tokens / t * (q + k + v + o) * (u - 1) / u  # all-to-all of q, k, v and back
        total += tokens / t * (k + v) * (r - 1)  # keys and values pass from neighbour to neighbour
    total += of.blocks * 2 * (tokens * of.tokens * 2 * (t - 1) / t)  # two all-reduces of the tokens a block
    total += of.parameters / t * (f - 1) / f  # weights, gathered at each evaluation
    total += of.batch * of.output * (cfg - 1) * cfg * t / share(of, axes)  # the other half's output
    return total * of.evaluations


def factorised(n: int, of: Work) -> Iterator[dict[str, int]]:
    """All meshes of n devices that divide what they must: the batch, both halves, the heads."""
    heads = math.gcd(*of.heads)
    for data in _divisors(math.gcd(n, of.batch)):
        for fsdp in _divisors(math.gcd(n // data, of.batch // data)):
            rest = n // data // fsdp
            for cfg in (1, 2) if of.halves == 2 and rest % 2 == 0 else (1,):
                for tensor in _divisors(math.gcd(rest // cfg, heads)):
                    sizes = (data, fsdp, cfg, rest // cfg // tensor, tensor)
                    yield {axis: size for axis, size in zip(DIVIDES, sizes, strict=True) if size > 1}


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
