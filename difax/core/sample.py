"""The sampler: one jitted function of model evaluations, driven by `difax.core.drive`.

  rows  = solver.grid(process, times)            on the host, float64, rounded once
  carry = (x, solver state, guide state, accelerator state, keys)
  body  : x -> guide(denoise) -> prediction -> solver.step -> x

A technique enters through its seam (solver, guide, accelerator, attention) and never needs a loop of its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from difax.core import noise
from difax.core import placement as placement_
from difax.core import process as process_
from difax.core.contracts import (
    Accelerator,
    Attention,
    Chosen,
    Guide,
    Known,
    Model,
    Prediction,
    Report,
    Row,
    Solver,
    Stage,
    State,
    Trace,
    no_plan,
)
from difax.core.cost import count
from difax.core.drive import DRIVES, Run, check_drive, per_sample, width
from difax.core.guidance import unguided
from difax.core.ops import narrowed
from difax.core.placement import Placement
from difax.core.process import Process
from difax.core.shapes import first_layer, memory_for, trunk_spec, zeros_of
from difax.core.target import lowering_for
from difax.core.trunk import neutral, reference_attention, run_trunk


def make_rows(
    solver: Solver,
    guide: Guide,
    process: Process,
    times: np.ndarray,
    accelerator: Accelerator | None = None,
    stages: tuple[Stage, ...] = (),
) -> Row:
    """Lays out the evaluations of a run: the solver's table with the guide's and the accelerator's plans, rounded to
    float32 once (not at all where jax has 64 bits).

    Args:
      times: decreasing times [n + 1] in [0, 1], from `difax.core.grids.make_times`.
      accelerator: the one that the sampler has; None is the neutral one.
      stages: `model.stages`, for which the accelerator plans.

    Returns:
      Rows [E] as numpy arrays (E = n for one-evaluation solvers, 2n - 1 for Heun).
    """
    accelerator = accelerator or neutral()
    process_.check_parts(process, solver.augmented)
    rows = solver.grid(process, np.asarray(times, np.float64))
    rows = rows if accelerator.fresh is None else accelerator.fresh(rows)
    rows = _guided(guide, accelerator).plan(rows)
    rows = rows._replace(plan=accelerator.plan(rows, stages))
    check_drive(solver, rows, accelerator)
    return rounded(rows)


def rounded(tables: Any) -> Any:
    """Host tables in float64 as the device takes them: float32, or as they are where jax has 64 bits."""
    return jax.tree.map(lambda a: a.astype(jnp.result_type(float)) if a.dtype == np.float64 else a, tables)


def _guided(guide: Guide, accelerator: Accelerator) -> Guide:
    return guide if accelerator.guide is None else accelerator.guide(guide)


def initial_noise(process: Process, keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """x at t = 1: prior_std times standard normal noise [len(keys), *shape], one key per sample."""
    drawn, own = noise.normal(noise.fold(keys, 0), shape), process.augmented
    if own is None:
        return process.prior_std * drawn
    halves = jnp.split(drawn, len(own.prior_std), -1)
    return jnp.concatenate([std * half for std, half in zip(own.prior_std, halves, strict=True)], -1)


@flax.struct.dataclass
class Held:
    """In place of keys: what is known of the samples beforehand, which they are held to after each evaluation.

    x = mask x + (1 - mask)(alpha x0 + sigma eps), alpha and sigma of the next evaluation, in the end 1 and 0.

    keys: [B], or `difax.core.noise.Given`. x0, eps: [B, ...], known and noise of their own. mask: [B, ..., 1], 1 where
    the sample is free.

    References: Lugmayr et al. (RePaint, without its resampling), 2022, arXiv:2201.09865.
    """

    keys: Any
    x0: jax.Array
    eps: jax.Array
    mask: jax.Array


def _holding(solver: Solver, rows: Row, held: Held) -> Solver:
    """A solver whose samples are held after every step."""
    if solver.drive != "scan":
        raise ValueError("samples that are held to what is known need a solver that takes its rows in order, as ddim")
    alpha = jnp.append(jnp.ravel(rows.level.alpha)[1:], 1.0).astype(held.x0.dtype)
    sigma = jnp.append(jnp.ravel(rows.level.sigma)[1:], 0.0).astype(held.x0.dtype)

    def step(prediction, x, state, row, keys):
        x, state = solver.step(prediction, x, state, row, keys)
        known = alpha[row.i] * held.x0 + sigma[row.i] * held.eps
        return jnp.where(held.mask == 0, known, held.mask * x + (1 - held.mask) * known), state

    return solver._replace(step=step)


def make_sampler(
    model: Model,
    process: Process,
    prediction: str,
    solver: Solver,
    guide: Guide | None = None,
    accelerator: Accelerator | None = None,
    *,
    attention: Attention | None = None,
    on_step: Callable[[Any], None] | None = None,
    watch: Callable[[Any, Any, Any], None] | None = None,
    remat: bool = False,
    ahead: bool = False,
    placement: Placement | None = None,
) -> Any:
    """Builds the jitted sampler `sample(params, x, keys, cond, rows, scale) -> (samples, trace)`.

    Everything in `rows`, the keys and the guidance scale are traced, so that seeds, scales, grids, eta, intervals
    and thresholds of one shape share one compilation. `x` is donated: its buffer becomes the result's.

    Args of the factory:
      model, process, prediction: the network, its noising process, and what it predicts (`PREDICTIONS`).
      solver, guide, accelerator, attention: the seams; they default to no guidance, the neutral accelerator and the
        reference attention. The rows of a run are laid out for the same accelerator (`make_rows`).
      on_step: called on the host with the index of each finished evaluation (a progress bar); costs a callback.
      watch: called on the host with the index of each evaluation, the x that it was made at and the x0 that it predicts
        (previews); costs a callback, and the copies.
      remat: for gradients through the sampler: keep each evaluation's inputs only, and compute it again.
      ahead: compute before the first evaluation what no sample's x goes into. Of the condition alone: projections of
        the text (`Model.once`) and, layer by layer, the keys and values of cross-attention (`Stage.once`), once a run
        and not once an evaluation, for a memory of L halves B (2 S D) values. Of the condition and the time: what the
        blocks' modulation gives at all evaluations, which reads its weights once a run: worth it in small batches,
        where a cached evaluation does little else, for a memory of E L halves B (6 D in a DiT) values; left in the loop
        where it has no products. The samples differ by rounding.
      placement: where the arrays lie, and what is compiled for (`difax.core.placement`); None is the device that jax
        runs on.

    Args of the sampler:
      params: the model's parameters.
      x: [B, ...] initial noise, float32 (`initial_noise`); float64, where jax has 64 bits, runs all of it in them.
      keys: [B] one key per sample (`difax.core.noise.sample_keys`), or the noise of every evaluation
        (`difax.core.noise.Given`), or these with what the samples are held to (`Held`).
      cond: the model's condition, leaves lead with [B] (labels, int32).
      rows: `make_rows`.
      scale: guidance scale, a scalar (1 is unguided).

    Rows, conditions and scale in 64 bits are narrowed to the precision of x, so that a program that has asked jax for
    64 bits draws a float32 model as any other does.

    Returns:
      The jitted function; it returns samples [B, ...] in the dtype of x, of a process of position and velocity the
      position's channels alone, and the `Trace` of what was computed.
    """
    if prediction not in process_.PREDICTIONS:
        raise ValueError(f"unknown prediction {prediction!r}; allowed: {', '.join(process_.PREDICTIONS)}")
    if ahead and any(stage.takes for stage in model.stages):
        raise ValueError(f"{model.name} has long skips, which are not conditioning; allowed: ahead=False")
    if ahead and solver.drive != "scan":
        raise ValueError("conditioning ahead needs times that are known before the run; allowed: ahead=False")
    accelerator = accelerator or neutral()
    if ahead and not all(network.shared for network in accelerator.networks):
        raise ValueError(f"cache {accelerator.name} runs another network too; allowed: conditioning each, ahead=False")
    guide = _guided(guide or unguided(), accelerator)
    attention = attention or reference_attention()

    def sample(params, x, keys, cond, rows, scale):
        planner = "none" if accelerator.plan is no_plan else accelerator.name
        if rows.plan.owner != planner:
            raise ValueError(f"the rows were laid out for {rows.plan.owner}, the sampler runs {planner}: see make_rows")
        rows, cond, scale = narrowed((rows, cond, scale), x.dtype)
        stepping = solver if not isinstance(keys, Held) else _holding(solver, rows, keys)
        keys = keys.keys if isinstance(keys, Held) else keys
        wide = width(solver, rows)
        if wide > 1:
            cond = jax.tree.map(lambda a: jnp.repeat(a, wide, 0), cond)
        null = model.null(cond)
        known: Any = None
        sets = [params, *({**params, **other} for other in params.get("networks", ()))]  # of weights
        several = ahead and accelerator.network is not None  # each has a condition of its own ahead
        if several:
            each = [_known(model, own, x, cond, null, rows.model_time, guide.halves) for own in sets]
            cond, null, known = (list(of) for of in zip(*each, strict=True))
        elif ahead:
            cond, null, known = _known(model, params, x, cond, null, rows.model_time, guide.halves)
        batch = jax.ShapeDtypeStruct((wide * len(x), *x.shape[1:]), x.dtype)
        one = cond[0] if several else cond
        axes, memory = _memory(model, params, accelerator, attention, batch, one, guide, rows.plan.modes, ahead)
        x = placement_.rows(x)

        def denoise(x_in, cond_in, row, memory, half):
            halves = 2 if half == "both" else 1
            if jnp.ndim(row.model_time):  # of each sample
                row = row._replace(model_time=jnp.tile(row.model_time, halves))
            x_in, cond_in = placement_.rows((x_in, cond_in), halves)
            at = None if halves == guide.halves else int(half == "uncond")  # which half of the memory

            index, values = row.plan.index, row.plan.values
            if accelerator.lookup is not None:
                index, values = accelerator.lookup(rows.plan, row, _slice(memory["along"], axes["along"], at))

            def at_hand(known):
                return {
                    name: Known(
                        jax.tree.map(lambda a: _part(a[row.i], len(x), at), of.mods),
                        jax.tree.map(lambda a: _part(a, len(x), at), of.once),
                    )
                    for name, of in known.items()
                }

            def evaluate(mode, memory):
                chosen = row._replace(plan=Chosen(mode, values, halves))
                which = 0 if accelerator.network is None else accelerator.network(chosen)
                own, given = sets[which], cond_in[which] if several else cond_in
                here = known and at_hand(known[which] if several else known)

                def run(part, network=0):
                    time = jnp.broadcast_to(row.model_time, x_in.shape[:1])
                    if network:
                        nothing = zeros_of(lambda: run(part)[2])
                        output, report = _other(accelerator, attention, network, params, x_in, time, cond_in, chosen)
                        return output, part, _with_others(nothing, accelerator, report)
                    tokens, context = model.embed(own, x_in, time, given)
                    tokens, part, report = run_trunk(
                        model, own, tokens, context, accelerator, attention, part, chosen, known=here
                    )
                    output = model.head(own, tokens, context)
                    report = _with_others(report, accelerator)
                    if solver.head is not None:  # behind the channels that guidance mixes
                        extra = solver.head(x_in, time, model.hidden(tokens), output)
                        output = jnp.concatenate([output, extra.astype(output.dtype)], -1)
                    return output.astype(jnp.promote_types(output.dtype, jnp.float32)), part, report

                part = _slice(memory, axes, at)
                if accelerator.output is None:
                    output, new, report = run(part)
                    ran = 1.0
                else:
                    output, state, new, report, ran = accelerator.output(run, part["output"], part, chosen)
                    new = {**new, "output": state}
                output = placement_.rows(output, halves)
                return output, _write(memory, part, new, axes, at), _padded(report, guide.halves, at or 0), halves * ran

            def bordered(mode, memory):
                # without a border XLA copies, at every evaluation, memory that some mode hands on without reading it
                return jax.lax.optimization_barrier(evaluate(mode, memory))

            if len(row.plan.modes) == 1:
                out = evaluate(row.plan.modes[0], memory)
            else:
                out = jax.lax.switch(index, [partial(bordered, mode) for mode in row.plan.modes], memory)
            output, memory, report, ran = out
            ran = jnp.asarray(ran, jnp.float32)
            return output, memory, Trace(report.computed, report.entered, ran, report.metric, (), (), ())

        def network(x, row, guide_state, memory):
            output, guide_state, memory, trace = guide.apply(denoise, x, cond, null, scale, row, guide_state, memory)
            width, extra = x.shape[-1] * (2 if model.learn_sigma else 1), None
            if solver.head is not None:
                output, extra = output[..., :width], output[..., width:]
            predicted = process_.predict(output, prediction, model.learn_sigma, x, row.level, process)
            return predicted._replace(extra=extra), guide_state, memory, trace

        def evaluation(x, row, guide_state, memory):
            if solver.derivatives:
                found = _differentiated(network, process, x, row, guide_state, memory)
            else:
                found = network(x, row, guide_state, memory)
            if on_step is not None:
                jax.debug.callback(on_step, row.i)
            if watch is not None:
                jax.debug.callback(watch, row.i, x, found[0].x0)
            return found

        if solver.start is not None:
            first = jax.tree.map(lambda a: a[0], rows)
            x = solver.start(x, first, noise.fold(keys, len(rows.i) + 1))  # an index that no evaluation has
        run = Run(stepping, process, evaluation, rows, keys, remat)
        x, trace = DRIVES[solver.drive](run, x, guide.init(jnp.repeat(x, wide, 0)), memory)
        if known is not None:  # all of it was computed, whatever was made of it
            first = known[0] if several else known
            entered = {n: a if first[n].mods is None else jnp.ones_like(a) for n, a in trace.entered.items()}
            trace = trace._replace(entered=entered)
        trace = trace._replace(ahead=jnp.float32(guide.halves * (len(sets) if several else 1) if ahead else 0))
        if solver.drive == "scan":
            trace = trace._replace(live=jnp.ones(len(rows.i), jnp.float32), unfinished=jnp.float32(0))
        return x if process.augmented is None else process_.observed(process, x), trace

    def sample_there(params, x, keys, cond, rows, scale):
        where = contextlib.nullcontext() if placement is None else lowering_for(placement.target)
        with placement_.placed(placement), where:
            return sample(params, x, keys, cond, rows, scale)

    whole = process.augmented is None  # where the result is as large as the noise, it takes its place
    return jax.jit(sample_there, donate_argnames="x" if whole else ())


def _differentiated(network, process, x, row, guide_state, memory):
    """The network's prediction with its derivatives in x and in the time, of which the noise level is a function."""

    def at(x, t):
        def moving(value, of_t):  # the numbers of the table, with their slope
            return value + (of_t - jax.lax.stop_gradient(of_t)).astype(value.dtype)

        level = process.level(t, jnp)
        if jnp.ndim(t):
            level = jax.tree.map(lambda a: per_sample(a, x.ndim), level)
        here = row._replace(
            model_time=moving(row.model_time, process.model_time(t)), level=jax.tree.map(moving, row.level, level)
        )
        predicted, *rest = network(x, here, guide_state, memory)
        return (predicted.x0, predicted.eps), (predicted.variance, *rest)

    (x0, eps), linear, (variance, *rest) = jax.linearize(at, x, row.t, has_aux=True)

    def vjp(dx0, deps):
        return jax.linear_transpose(lambda dx: linear(dx, jnp.zeros_like(row.t)), x)((dx0, deps))[0]

    def jvp(dx, dt):
        return linear(dx, jnp.broadcast_to(jnp.asarray(dt, row.t.dtype), row.t.shape))

    return Prediction(x0, eps, variance, jvp, vjp), *rest


def _known(model, params, x, cond, null, model_time, halves) -> tuple[Any, Any, dict[str, Known]]:
    """The conditions with what the network makes of them alone, and of each stage what is known before the first
    evaluation: mods [E, L, halves * B, ...], once [L, halves * B, ...]."""
    batch = len(x)
    if halves == 2:
        x, cond = jnp.concatenate([x, x]), jax.tree.map(lambda a, b: jnp.concatenate([a, b]), cond, null)
    cond = model.once(params, cond)

    def context_at(time):
        return model.embed(params, x, jnp.full(x.shape[:1], time), cond)[1]

    contexts, first = jax.vmap(context_at)(model_time), context_at(model_time[0])

    def of(stage):
        def mods(p, context):
            return stage.block.apply({"params": p}, context, method="mods")

        def every(p):
            return jax.vmap(lambda context: mods(p, context))(contexts)

        def once(p):
            return stage.block.apply({"params": p}, first, method="once") if stage.once else {}

        layers = params[stage.name]
        p = jax.eval_shape(first_layer, layers)
        products = count(mods, p, jax.eval_shape(context_at, model_time[0])) > 0
        if isinstance(layers, tuple):
            given = jax.tree.map(lambda *a: jnp.stack(a, 1), *map(every, layers)) if products else None
            return Known(given, jax.tree.map(lambda *a: jnp.stack(a), *map(once, layers)))
        given = jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1), jax.lax.map(every, layers)) if products else None
        return Known(given, jax.lax.map(once, layers) if stage.once else {})

    known = {stage.name: of(stage) for stage in model.stages}
    if halves == 1:
        return cond, null, known
    halved = [jax.tree.map(lambda a, part=part: a[part], cond) for part in (slice(0, batch), slice(batch, None))]
    return *halved, known


def _other(accelerator, attention, network, params, x, time, cond, row) -> tuple[jax.Array, Report]:
    """The output of one of an accelerator's other networks, whole, and its report with its stages named as its own."""
    model, params = accelerator.networks[network - 1].model, params["networks"][network - 1]
    memory = memory_for(trunk_spec(model, params, x, cond), neutral(), attention, ((),))
    tokens, context = model.embed(params, x, time, cond)
    tokens, _, report = run_trunk(model, params, tokens, context, neutral(), attention, memory, row)
    output = model.head(params, tokens, context)
    named = lambda of: {f"{network}/{stage}": a for stage, a in of.items()}  # noqa: E731
    report = report._replace(computed=named(report.computed), entered=named(report.entered))
    return output.astype(jnp.promote_types(output.dtype, jnp.float32)), report


def _with_others(report: Report, accelerator: Accelerator, ran: Report | None = None) -> Report:
    """A report of the model with the stages of an accelerator's other networks, zeros but of the one that ran."""
    computed, entered = dict(report.computed), dict(report.entered)
    for k, network in enumerate(accelerator.networks, 1):
        for stage in () if network.shared else network.model.stages:
            name, halves = f"{k}/{stage.name}", next(iter(report.entered.values())).shape[-1]
            shape = (stage.depth, len(stage.branches), halves)
            computed.setdefault(name, jnp.zeros(shape, jnp.float32))
            entered.setdefault(name, jnp.zeros((stage.depth, halves), jnp.float32))
    if ran is not None:
        computed, entered = {**computed, **ran.computed}, {**entered, **ran.entered}
    return report._replace(computed=computed, entered=entered)


def _part(a: Any, batch: int, at: int | None) -> Any:
    """Of [L, halves * B, ...] what belongs to the first or second half; all of it for None."""
    return a if at is None else a[:, at * batch : (at + 1) * batch]


def _memory(model, params, accelerator, attention, x, cond, guide, modes, ahead) -> tuple[Any, State]:
    """The runner's memory for all copies of the batch that the guide runs, and the batch axis of each of its leaves."""

    def spec(copies: int):
        grow = lambda a: jax.ShapeDtypeStruct((copies * a.shape[0], *a.shape[1:]), a.dtype)  # noqa: E731
        return trunk_spec(model, params, grow(x), jax.tree.map(grow, cond), copies, guide.together, ahead)

    specs = {copies: spec(copies) for copies in (1, 2)}
    small, large = (jax.eval_shape(lambda s=s: memory_for(s, accelerator, attention, modes)) for s in specs.values())
    axes = jax.tree.map(_batch_axis, small, large)
    memory, placement = memory_for(specs[guide.halves], accelerator, attention, modes), placement_.current()
    if placement is not None:
        memory = placement.memory(memory, axes, specs[guide.halves].tokens, guide.halves)
    return axes, memory


def _batch_axis(small: Any, large: Any) -> int:
    """Where a leaf grows with the batch; -1 for a leaf that all samples share."""
    grown = [i for i, (a, b) in enumerate(zip(small.shape, large.shape, strict=True)) if a != b]
    return grown[0] if grown else -1


def _slice(state: State, axes: Any, at: int | None) -> State:
    """The part of the memory that belongs to the first or second half; all of it for None."""
    if at is None:
        return state

    def cut(a, axis):
        size = a.shape[axis] // 2
        return a if axis < 0 else jax.lax.slice_in_dim(a, at * size, (at + 1) * size, axis=axis)

    return jax.tree.map(cut, state, axes)


def _write(state: State, part: State, new: State, axes: Any, at: int | None) -> State:
    """The memory with one half's part replaced, where that was written at all."""
    if at is None:
        return new

    def put(a, old, n, axis):
        if n is old:
            return a
        return n if axis < 0 else jax.lax.dynamic_update_slice_in_dim(a, n, at * n.shape[axis], axis)

    return jax.tree.map(put, state, part, new, axes)


def _padded(report: Report, halves: int, at: int) -> Report:
    """A report with zeros for the halves that did not run: the last axis of every leaf is the halves."""

    def pad(a):
        width = halves - a.shape[-1]
        return a if width == 0 else jnp.pad(a, [(0, 0)] * (a.ndim - 1) + [(at, width - at)])

    return jax.tree.map(pad, report)
