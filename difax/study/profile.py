"""`difax profile`: where the seconds of a step go, part by part, against what the device can do.

Every part of an evaluation (embedding, conditioning, each branch of each stage over all its blocks, head, guidance,
solver) is compiled by itself on the shapes of the run and timed in turns with the others, and so is the whole sampler,
with and without its cache. What the parts do not add up to is shown as a row of its own: memory between the parts, the
loop, or, where it is negative, what XLA fuses across them. What a cache takes is its evaluation's seconds less those of
the parts that it computes, by its trace.
"""

from __future__ import annotations

import pathlib
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from difax.build import Setup, check_laid_out
from difax.core.contracts import Params, Trace, Where
from difax.core.cost import model_cost, run_cost
from difax.core.device import device_name
from difax.core.process import predict
from difax.core.sample import initial_noise
from difax.core.shapes import trunk_spec
from difax.core.trunk import neutral
from difax.media.images import drawing
from difax.program import Program


class Part(NamedTuple):
    """One row: seconds and operations of one evaluation of the batch."""

    name: str
    seconds: float
    gflops: float


class Profile(NamedTuple):
    """parts: of one evaluation without a cache; evaluation: seconds of one, in the whole sampler, uncached; cached: the
    same of the run's own cache, or None; remembering: seconds of that evaluation beyond the parts that are computed in
    it, or None; ceiling: GFLOP/s of the best product of two matrices."""

    parts: list[Part]
    evaluation: Part
    cached: Part | None
    remembering: Part | None
    ceiling: float
    batch: int
    device: str


def ceiling(dtype: Any = "float32", sizes: tuple[int, ...] = (), repeats: int = 15) -> float:
    """Best GFLOP/s of a square product in this process (of 1024 and 2048 on a CPU, 8192 elsewhere)."""
    best = 0.0
    for n in sizes or ((1024, 2048) if jax.default_backend() == "cpu" else (8192,)):
        a, b = (jax.random.normal(jax.random.key(i), (n, n)).astype(dtype) for i in range(2))
        product = jax.jit(jnp.matmul)
        seconds = [_timed(partial(product, a, b)) for _ in range(repeats + 1)]
        best = max(best, 2 * n**3 / min(seconds[1:]) / 1e9)
    return best


def profile(run: Setup, params: Params, cond: Any, seed: int = 0, repeats: int = 5) -> Profile:
    """Times the parts of one evaluation, and the sampler whole.

    Args:
      run, params: what to sample with; params as `Setup.prepare` returns them.
      cond: conditions of the batch, leaves lead with [B].
      repeats: turns, of which the median is taken (5).
    """
    check_setup(run)
    batch = len(jax.tree.leaves(cond)[0])
    x, keys, cond = run.inputs(seed, batch, cond)
    rows, scale = jax.tree.map(jnp.asarray, run.rows), jnp.float32(run.scale)
    programs, gflops = _parts(run, params, x, keys, cond)
    cost = model_cost(run.model, params, run.attention, networks=run.accelerator.networks)
    whole: dict[str, Any] = {"uncached": neutral()}
    if run.rows.plan.owner != "none" or run.accelerator != neutral():
        whole["cached"] = run.accelerator
    operations: dict[str, float] = {}
    shares: dict[str, float] = {}
    for name, accelerator in whole.items():
        sampler = run.sampler(accelerator)
        its = rows if name == "cached" else rows._replace(plan=jax.tree.map(jnp.asarray, neutral().plan(run.rows, ())))
        compiled = sampler.lower(params, x, keys, cond, its, scale).compile()

        def once(compiled: Any = compiled, its: Any = its) -> Any:
            return compiled(params, initial_noise(run.process, keys, run.model.input_shape), keys, cond, its, scale)

        trace = jax.tree.map(np.asarray, once()[1])
        operations[name] = batch * run_cost(cost, trace) / 1e9
        shares = _shares(run, trace)
        programs[f"whole, {name}"] = once
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for turn in range(repeats + 1):
        for name, program in programs.items():
            taken = _timed(program)
            if turn:  # the first touches its memory
                seconds[name].append(taken)
    evaluations = len(run.rows.i)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    parts = [Part(name, median[name], gflops[name]) for name in gflops]

    def of(name: str) -> Part:
        return Part(name, median[f"whole, {name}"] / evaluations, operations[name] / evaluations)

    evaluation = of("uncached")
    rest = evaluation.seconds - sum(part.seconds for part in parts)
    parts.append(Part("memory, loop", rest, 0.0))
    cached = remembering = None
    if "cached" in whole:
        cached = of("cached")
        computed = sum(shares.get(part.name, 1.0) * part.seconds for part in parts)
        remembering = Part("cache", cached.seconds - computed, 0.0)
    return Profile(parts, evaluation, cached, remembering, ceiling(run.model.dtype), batch, device_name())


def check_setup(run: Setup) -> None:
    """Refuses a setup whose parts cannot be told apart, before its weights are read."""
    check_laid_out(run, "difax profile")
    if not run.stacked:
        raise ValueError("difax profile: the layout is unstacked; allowed: stacked, whose parts can be told apart")
    if run.ahead:
        raise ValueError("difax profile: conditioning is ahead of the evaluations; allowed: each, a part of them")


def _shares(run: Setup, trace: Trace) -> dict[str, float]:
    """Of each part that a trace counts, the share that was computed."""
    most = len(run.rows.i) * run.guide.halves
    shares = {"embedding and head": float(np.sum(trace.halves)) / most}
    for stage in run.model.stages:
        name = f"{stage.name}: conditioning" + (", skip" if stage.takes else "")
        shares[name] = float(np.sum(trace.entered[stage.name])) / (most * stage.depth)
        each = np.sum(trace.computed[stage.name], axis=(0, 1, 3)) / (most * stage.depth)
        shares |= {f"{stage.name}: {branch}": float(share) for branch, share in zip(stage.branches, each, strict=True)}
    return shares


def _parts(
    run: Setup, params: Params, x: Any, keys: Any, cond: Any
) -> tuple[dict[str, Callable[[], Any]], dict[str, float]]:
    """Compiled parts of one evaluation of all halves, and the operations of each (GFLOP, of the batch)."""
    model = run.model
    halves = run.guide.halves
    alone, null = cond, model.null(cond)
    if halves == 2:
        cond = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), cond, model.null(cond))
    wide = jnp.concatenate([x] * halves)
    t = jnp.full(wide.shape[:1], jnp.asarray(run.rows.model_time[0], jnp.float32))
    spec = trunk_spec(model, params, wide, cond, halves)
    cost = model_cost(model, params, run.attention)
    embed, head = jax.jit(model.embed), jax.jit(model.head)
    tokens, context = jax.block_until_ready(embed(params, wide, t, cond))
    programs: dict[str, Callable[[], Any]] = {"embedding": partial(embed, params, wide, t, cond)}
    gflops: dict[str, float] = {}
    for stage in model.stages:
        tokens = stage.enter(tokens, context)

        def conditioning(p: Any, context: Any, stage: Any = stage) -> Any:
            return jax.lax.map(lambda one: stage.block.apply({"params": one}, context, method="mods"), p)

        conditioning = jax.jit(conditioning)
        mods = jax.block_until_ready(conditioning(params[stage.name], context))
        name = f"{stage.name}: conditioning"
        programs[name] = partial(conditioning, params[stage.name], context)
        if stage.takes:

            def skipping(p: Any, tokens: Any, stage: Any = stage) -> Any:
                def one(h: Any, weights: Any) -> Any:
                    return stage.block.apply({"params": weights}, h, h, method="skip"), None

                return jax.lax.scan(one, tokens, p)[0]

            first, skips = programs.pop(name), partial(jax.jit(skipping), params[stage.name], tokens)
            name = f"{stage.name}: conditioning, skip"
            programs[name] = lambda first=first, skips=skips: (first(), skips())
        gflops[name] = len(wide) * stage.depth * cost.mods[stage.name] / 1e9
        for branch, operations in zip(stage.branches, cost.branches[stage.name], strict=True):
            call = spec.attention[stage.name][branch]
            state = () if call is None else run.attention.init(call)

            def every(p: Any, mods: Any, tokens: Any, context: Any, stage=stage, branch=branch, state=state) -> Any:
                """The branch of every block on the same tokens, added up as the network does."""

                def one(total: Any, xs: Any) -> Any:
                    layer, weights, m = xs
                    where = Where(stage.name, branch, layer, stage.depth)

                    def attend(q: Any, k: Any, v: Any, segments: Any = None) -> Any:
                        return run.attention.apply(q, k, v, segments, where, None, state)[0]

                    apply = partial(stage.block.apply, {"params": weights})
                    update = apply(total, m, context, attend, method=branch)
                    gate = apply(m, branch, method="gate")
                    return jax.tree.map(lambda h, g, u: h + (g * u).astype(h.dtype), total, gate, update), None

                return jax.lax.scan(one, tokens, (jnp.arange(stage.depth), p, mods))[0]

            name = f"{stage.name}: {branch}"
            programs[name] = partial(jax.jit(every), params[stage.name], mods, stage.within(tokens), context)
            gflops[name] = len(wide) * stage.depth * operations / 1e9
    programs["head"] = partial(head, params, tokens, context)
    both = jax.block_until_ready(programs["head"]())
    row = jax.tree.map(lambda a: jnp.asarray(a[0]), run.rows._replace(plan=()))

    @jax.jit
    def guidance(both: Any, x: Any, cond: Any, null: Any, scale: Any) -> Any:
        def denoise(x: Any, cond: Any, row: Any, memory: Any, half: str) -> Any:
            output = both if half == "both" else jnp.split(both, halves)[int(half == "uncond")]
            return output, memory, ()

        return run.guide.apply(denoise, x, cond, null, scale, row, run.guide.init(x), ())[0]

    programs["guidance"] = partial(guidance, both, x, alone, null, jnp.float32(run.scale))
    output = jax.block_until_ready(programs["guidance"]())

    @jax.jit
    def solver(output: Any, x: Any, keys: Any) -> Any:
        predicted = predict(output.astype(jnp.float32), run.prediction, model.learn_sigma, x, row.level)
        return run.solver.step(predicted, x, run.solver.init(x), row, keys)

    programs["solver"] = partial(solver, output, x, keys)
    gflops = {"embedding and head": len(wide) * cost.ends / 1e9, **gflops, "guidance": 0.0, "solver": 0.0}
    ends = programs.pop("embedding"), programs.pop("head")
    programs = {"embedding and head": lambda: (ends[0](), ends[1]()), **programs}
    return programs, gflops


def _timed(program: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(program())
    return time.perf_counter() - start


def format_profile(found: Profile) -> str:
    """The table of a profile, with a bar for each part."""
    total, width = found.evaluation, max(len(p.name) for p in found.parts)
    lines = [f"{'':{width}}  {'ms':>9}  {'share':>6}  {'GFLOP':>8}  {'GFLOP/s':>8}  {'of ceiling':>10}"]
    whole = {"evaluation": total, "evaluation, cached": found.cached, "  of it the cache": found.remembering}
    for name, part in [*((p.name, p) for p in found.parts), *whole.items()]:
        if part is None:
            continue
        share = part.seconds / total.seconds if total.seconds > 0 else 0.0
        rate = part.gflops / part.seconds if part.gflops and part.seconds > 0 and found.ceiling > 0 else 0.0
        speed = f"{rate:8.1f}  {100 * rate / found.ceiling:8.0f} %" if rate else f"{'':8}  {'':10}"
        bar = "#" * round(40 * min(max(share, 0), 1)) if name not in whole else ""
        numbers = f"{1e3 * part.seconds:9.2f}  {100 * share:5.1f}%  {part.gflops:8.2f}"
        lines.append(f"{name:{width}}  {numbers}  {speed}  {bar}".rstrip())
    drawn = f"{found.batch} sample{'s' * (found.batch != 1)} on {found.device}"
    lines.append(f"{drawn}; ceiling (best product of matrices) {found.ceiling:.0f} GFLOP/s")
    return "\n".join(lines)


def as_json(found: Profile) -> dict[str, Any]:
    """A profile as plain numbers."""
    parts = [p._asdict() for p in found.parts]
    whole = {"evaluation": found.evaluation, "cached": found.cached, "remembering": found.remembering}
    return {**found._asdict(), "parts": parts, **{k: part and part._asdict() for k, part in whole.items()}}


def perfetto(run: Setup, params: Params, cond: Any, seed: int, folder: str) -> str:
    """Writes JAX's trace of one run of the sampler, compiled before, and returns the folder."""
    inputs = run.inputs(seed, len(jax.tree.leaves(cond)[0]), cond)
    program = Program(run, params, inputs)
    with jax.profiler.trace(folder, create_perfetto_trace=True):
        jax.block_until_ready(program(*inputs))
    return folder


def draw_profile(found: Profile, path: pathlib.Path) -> None:
    """The parts as horizontal bars, in milliseconds, each with its share of the ceiling.

    Raises:
      ValueError: matplotlib is missing (the extra `plot`).
    """
    parts = list(reversed(found.parts))
    with drawing(path, (9, 0.45 * len(parts) + 1.6), layout="constrained") as picture:
        _bars(picture.add_subplot(), found, parts)


def _bars(axes: Any, found: Profile, parts: list[Part]) -> None:
    milliseconds = [1e3 * p.seconds for p in parts]
    axes.barh([p.name for p in parts], milliseconds, color="#0b5fa5")
    for i, part in enumerate(parts):
        rate = part.gflops / part.seconds / found.ceiling if part.gflops and min(part.seconds, found.ceiling) > 0 else 0
        text = f" {milliseconds[i]:.1f} ms" + (f", {100 * rate:.0f} % of ceiling" if rate else "")
        axes.text(max(milliseconds[i], 0), i, text, va="center", fontsize=9)
    axes.set_xlim(right=1.35 * max(milliseconds) if max(milliseconds) > 0 else 1.0)
    axes.set_xlabel("milliseconds of one evaluation")
    axes.set_title(
        f"{found.batch} samples, {1e3 * found.evaluation.seconds:.0f} ms an evaluation, {found.device}", fontsize=10
    )
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
