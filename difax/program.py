"""A setup compiled: samplers that share a compilation where their programs are the same text, and measured draws."""

from __future__ import annotations

import hashlib
import math
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from difax.build import Setup
from difax.core.contracts import Params, Trace
from difax.core.cost import model_cost, run_cost
from difax.core.decisions import averaged, inert, known, summary
from difax.core.device import check_memory, device_name, memory_available, peak_memory
from difax.core.noise import sample_keys
from difax.core.placement import SAMPLES
from difax.core.qtensor import size_in_bytes
from difax.media.images import image_grid, to_uint8

CHUNK = 64


class Program:
    """One sampler compiled ahead of time.

    A call takes x, keys and conditions of the shapes that it was compiled for, and returns (samples, trace); x is
    donated. `shared`: was it compiled before, for another setup; `compile_seconds`: of tracing and compiling.
    """

    def __init__(
        self,
        setup: Setup,
        params: Params,
        inputs: tuple[Any, Any, Any],
        compiled: dict[str, Any] | None = None,
        on_step: Callable[[Any], None] | None = None,
        known: Any = None,
    ):
        """params: as `Setup.prepare` returns them. inputs: x, keys, cond, or their shapes. compiled: by text, of
        those that may be shared, to which this one is added. on_step: as `make_sampler` takes it. known: what this
        very setup was compiled to before."""
        self.setup, self.params = setup, params
        self.rows, self.scale = jax.tree.map(jnp.asarray, setup.rows), jnp.float32(setup.scale)
        if setup.placement is not None:
            whole = setup.placement.sharding()
            self.rows, self.scale = jax.device_put((self.rows, self.scale), whole)
        if known is not None:
            self.compiled, self.shared, self.compile_seconds = known, True, 0.0
            return
        compiled = {} if compiled is None else compiled
        start = time.perf_counter()
        lowered = setup.sampler(on_step=on_step).lower(params, *inputs, self.rows, self.scale)
        # equal texts may differ in what their arguments are called, which a compiled program insists on
        text = hashlib.sha256(f"{lowered.in_tree}{lowered.as_text()}".encode()).hexdigest()
        self.shared = text in compiled
        if not self.shared:
            made = lowered.compile()
            _check_program(setup, made, inputs)
            compiled[text] = made
        self.compiled = compiled[text]
        self.compile_seconds = time.perf_counter() - start

    def __call__(self, x: jax.Array, keys: jax.Array, cond: Any) -> tuple[jax.Array, Trace]:
        return self.compiled(self.params, x, keys, cond, self.rows, self.scale)


_KEPT = 8  # programs of setups that were drawn with last
_texts: dict[str, Any] = {}
_drawn: list[tuple[Setup, Any, Any]] = []


def kept_program(setup: Setup, params: Params, inputs: Any, on_step: Callable[[Any], None] | None = None) -> Program:
    """A `Program`, of which this process keeps the last few without their weights, as a jitted function does."""
    if on_step is not None:  # it calls back to this draw's bar
        return Program(setup, params, inputs, on_step=on_step)
    shapes = jax.tree.map(lambda a: (jnp.shape(a), str(jnp.result_type(a))), (params, inputs))
    for before, of, compiled in _drawn:
        if before is setup and of == shapes:
            return Program(setup, params, inputs, known=compiled)
    program = Program(setup, params, inputs, _texts)
    _drawn.insert(0, (setup, shapes, program.compiled))
    del _drawn[_KEPT:]
    for text in list(_texts)[:-_KEPT]:
        del _texts[text]
    return program


def _check_program(setup: Setup, compiled: Any, inputs: Any) -> None:
    """Refuses a program whose own memory, beside the weights that are there already, the device does not have."""
    memory = compiled.memory_analysis()
    if memory is not None and any(isinstance(a, jax.Array) for a in jax.tree.leaves(inputs)):
        own = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        n = jax.tree.leaves(inputs)[0].shape[0]
        what = f"sampling {setup.model.name}, {n} at once with cache {setup.described.get('cache', 'none')},"
        check_memory(what, own, memory_available(), "a smaller size, fewer conditions or steps, or another cache")


class Drawn(NamedTuple):
    """samples and the latents that they began from [n, ...] float32; trace: the mean over the chunks; table: of what
    it cost (`draw`)."""

    samples: np.ndarray
    latents: np.ndarray
    trace: Trace
    table: dict[str, Any]


def draw(
    setup: Setup,
    params: Params,
    cond: Any,
    seed: int = 0,
    *,
    latents: np.ndarray | None = None,
    progress: bool = False,
    program: Callable[..., Program] = kept_program,
) -> Drawn:
    """Draws one sample per condition with one ahead-of-time compiled program, and measures it.

    Samples go through in equal chunks of at most 64 (times the devices that share them). Sample i depends on (seed,
    i), its condition and its latents, to rounding, and on nothing else, but for caches that decide in the run: without
    `per_sample` one decision serves a whole chunk, and depends on all of it.

    Args:
      setup, params: what to sample with; params as `Setup.prepare` returns them.
      cond: labels [n] int (a list too), or a tree of arrays that lead with [n]. seed: of the run.
      latents: [n, ...] to begin from, at t = 1; None is noise of the seed.
      progress: a bar on stderr, at the price of a callback per step.
      program: (setup, params, inputs, on_step=...) -> `Program`, for those that keep their programs.

    Returns:
      `Drawn`; its table has steps, evaluations (rows of the scan), network evaluations of one sample (both halves of
      guidance counted), what a cache decided (`difax.core.decisions`), GFLOPs of one sample, compile and run seconds,
      peak memory, whether all samples are `finite` and, where they are not, how many are `not_finite`. That, and a
      cache that did nothing, is warned of on stderr.
    """
    from tqdm import tqdm

    if isinstance(cond, (list, tuple)):
        cond = np.asarray(cond, np.int32)
    n = len(jax.tree.leaves(cond)[0])
    check_samples(setup, n)
    shards = 1 if setup.placement is None else setup.placement.size(*SAMPLES)
    chunks = -(-n // (CHUNK * shards))
    size = -(-n // (chunks * shards)) * shards
    if setup.accelerator.batchwide and shards > 1 and n % shards:
        raise ValueError(
            f"{n} samples over data x fsdp = {shards} with cache {setup.accelerator.name}, whose decisions those that "
            f"fill the last device would change; allowed: a multiple of {shards} samples, or per_sample=True"
        )
    bar = tqdm(total=chunks * len(setup.rows.i), unit="evaluation", disable=not progress, file=sys.stderr)

    def inputs(chunk: int) -> tuple[jax.Array, jax.Array, Any]:
        x, keys, some = setup.inputs(seed, size, cond, chunk * size)
        if latents is not None:
            x = jnp.asarray(latents[np.arange(chunk * size, (chunk + 1) * size) % n], jnp.float32)
            x = setup.placed_samples(x)
        return x, keys, some

    compiled = program(setup, params, inputs(0), on_step=(lambda _: bar.update()) if progress else None)
    images, begun, seconds, traces = [], [], 0.0, []
    for chunk in range(chunks):
        x, keys, some = jax.block_until_ready(inputs(chunk))
        begun.append(np.asarray(x).copy())  # x is donated
        start = time.perf_counter()
        image, trace = jax.block_until_ready(compiled(x, keys, some))
        seconds += time.perf_counter() - start
        images.append(np.asarray(image))
        traces.append(trace)
    bar.close()
    trace = known(averaged(traces))
    samples = np.concatenate(images)[:n]
    broken = int(np.sum(~np.isfinite(samples.reshape(n, -1)).all(1)))
    if broken:
        print(f"difax: warning: {broken} of {n} images are not finite", file=sys.stderr)
    silent = inert(setup.rows, trace)
    if silent:
        print(f"difax: warning: {silent}", file=sys.stderr)
    gflops = run_cost(model_cost(setup.model, params, setup.attention), trace) / 1e9
    cost = {
        "images": n,
        "finite": broken == 0,
        **({"not_finite": broken} if broken else {}),
        "steps": len(setup.times) - 1,
        "evaluations": len(setup.rows.i),
        "network_evaluations": int(np.sum(np.asarray(trace.halves))),
        "computed_fraction": round(float(np.mean([np.mean(c) for c in trace.computed.values()])), 4),
        **({} if setup.rows.plan.owner == "none" else summary(trace)),
        "gflops_per_image": round(gflops, 3),
        "weights_mib": round(size_in_bytes(params) / 2**20, 1),
        "compile_seconds": round(compiled.compile_seconds, 2),
        "seconds_per_image": round(seconds / (chunks * size), 4),
        "peak_memory_mib": round(peak_memory(compiled.compiled) / 2**20, 1),
        "device": device_name(),
        "jax": jax.__version__,
    }
    return Drawn(samples, np.concatenate(begun)[:n], trace, cost)


def ahead_of_time(setup: Setup, n: int = 1) -> dict[str, Any]:
    """Compiles the sampler of a setup from shapes alone, without weights in memory: what the whole model would cost.

    Returns:
      The part of `draw`'s table that needs no run; the GFLOPs are of the neutral accelerator.
    """
    params = jax.eval_shape(setup.prepare, model_shapes(setup.model))
    shape = lambda tree: jax.tree.map(lambda a: jax.ShapeDtypeStruct((n, *a.shape), a.dtype), tree)  # noqa: E731
    keys = jax.eval_shape(lambda: sample_keys(0, n))
    x = jax.ShapeDtypeStruct((n, *setup.model.input_shape), jnp.float32)
    program = Program(setup, params, (x, keys, shape(setup.model.cond)))
    cost = model_cost(setup.model, params, setup.attention)
    return {
        "parameters": parameter_count(setup.model),
        "evaluations": len(setup.rows.i),
        "gflops_per_evaluation": round(cost.evaluation / 1e9, 3),
        "weights_mib": round(size_in_bytes(params) / 2**20, 1),
        "compile_seconds": round(program.compile_seconds, 2),
        "peak_memory_mib": round(peak_memory(program.compiled) / 2**20, 1),
    }


def model_shapes(model: Any) -> Params:
    """Shapes and dtypes of a model's parameters."""
    return jax.eval_shape(model.init, jax.random.key(0))


def parameter_count(model: Any) -> int:
    """Number of parameters of a model."""
    return sum(int(np.prod(a.shape)) for a in jax.tree.leaves(model_shapes(model)))


def weight_bytes(setup: Setup) -> int:
    """Bytes of a setup's random weights while they are made and prepared: once in float32, once as sampled with."""
    spec = model_shapes(setup.model)
    return size_in_bytes(spec) + size_in_bytes(jax.eval_shape(setup.prepare, spec))


def sample_bytes(setup: Setup, n: int) -> int:
    """Bytes on the host of n samples, float32: latents, samples and their copies while they are joined, conditions."""
    one = 4 * math.prod(setup.model.input_shape)
    return n * (4 * one + 2 * size_in_bytes(setup.model.cond))


def check_samples(setup: Setup, n: int) -> None:
    """Refuses samples that do not fit into the host's memory, before any of it is allocated.

    Raises:
      ValueError: with how much they need, and how much is free.
    """
    check_memory(f"{n} samples of {setup.model.name}", sample_bytes(setup, n), instead="fewer conditions or repeats")


def previewer(setup: Setup) -> Callable[[Params], np.ndarray]:
    """params -> picture of two images of each of the first ten classes, for a training run; compiled once."""
    sampler = setup.sampler()
    classes = min(setup.model.classes, 10)
    labels = np.arange(2 * classes, dtype=np.int32) % classes
    rows = jax.tree.map(jnp.asarray, setup.rows)

    def preview(params: Params) -> np.ndarray:
        x, keys, cond = setup.inputs(0, len(labels), labels)
        images, _ = sampler(params, x, keys, cond, rows, setup.scale)
        return image_grid(to_uint8(np.asarray(images)), classes, scale=2)

    return preview
