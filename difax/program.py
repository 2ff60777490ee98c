"""A setup compiled: samplers that share a compilation where their programs are the same text, and measured draws."""

from __future__ import annotations

import contextvars
import copy
import hashlib
import math
import sys
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from difax.accel.quant import products_of
from difax.build import Setup, input_shapes, recipe_of
from difax.core import executables, hosts
from difax.core.contracts import Params, Trace
from difax.core.cost import model_cost, run_cost
from difax.core.decisions import averaged, inert, known, summary
from difax.core.device import check_memory, device_name, memory_available, peak_memory
from difax.core.drive import evaluations
from difax.core.executables import settings
from difax.core.noise import Given
from difax.core.qtensor import size_in_bytes
from difax.core.sample import Held
from difax.core.shell import DifaxWarning
from difax.core.target import lowering_for
from difax.media.images import image_grid, to_uint8

CHUNK = 64


class _Pending:
    """An executable that is being made: in a thread of its own, or where that is not asked for, when it is made.

    work: makes it, or gives None where that has to be done by the caller's thread; otherwise: does so. Each returns the
    executable and its origin. A thread has JAX's settings of its own; where they differ, it leaves all to the caller.
    """

    def __init__(self, work: Callable[[], Made | None], otherwise: Callable[[], Made], in_thread: bool):
        self.seconds, self.failed = 0.0, False
        self._otherwise, self._made, self._error = otherwise, None, None
        self._thread: threading.Thread | None = None
        if not in_thread:
            self._make(work)
            return
        ours, context = settings(), contextvars.copy_context()
        call = lambda: self._make(work) if settings() == ours else None  # noqa: E731
        # no daemon: the interpreter waits for it, where XLA would be torn away beneath it
        self._thread = threading.Thread(target=context.run, args=(call,), name="difax-compile")
        self._thread.start()

    def _make(self, work: Callable[[], Made | None]) -> None:
        start = time.perf_counter()
        try:
            self._made = work()
        except BaseException as error:
            self._error, self.failed = error, True
        self.seconds += time.perf_counter() - start

    def result(self) -> Made:
        """The executable and its origin; waits, and raises what kept it from being made."""
        if self._thread is not None:
            self._thread.join()
        if self._made is None and self._error is None:
            self._make(self._otherwise)
        if self._error is not None:
            raise self._error
        assert self._made is not None
        return self._made


class Made(NamedTuple):
    """executable: a compiled program. origin: "compiled", or "loaded" from where a process before has kept it, in
    difax's folder or JAX's own cache."""

    executable: Any
    origin: str


class Program:
    """One sampler compiled ahead of time, or loaded from where it is kept (`difax.core.executables.kept_in`).

    A call takes x, keys and conditions of the shapes that it was compiled for, and returns (samples, trace); x is
    donated. `shared`: was it compiled before, for another setup; `compile_seconds`: of tracing and compiling, or of
    loading; `origin`: "compiled", "loaded", or "kept" by this process.

    Where the weights are shapes yet, the compiler goes on in a thread while they are read, and `params` is set when
    they are there; what the program is refused for is then raised where it is first used.
    """

    def __init__(
        self,
        setup: Setup,
        params: Params,
        inputs: tuple[Any, Any, Any],
        compiled: dict[str, _Pending] | None = None,
        on_step: Callable[[Any], None] | None = None,
        known: Program | None = None,
        watch: Callable[[Any, Any, Any], None] | None = None,
    ):
        """params: as `Setup.prepare` returns them, or their shapes. inputs: x, keys, cond, or their shapes. compiled:
        by text, of those that may be shared, to which this one is added. on_step, watch: as `make_sampler` takes them.
        known: what this very setup was compiled to before."""
        self.setup, self.params = setup, params
        self.rows, self.scale = jax.tree.map(jnp.asarray, setup.rows), jnp.float32(setup.scale)
        if setup.placement is not None:
            whole = setup.placement.sharding()
            self.rows, self.scale = hosts.put((self.rows, self.scale), whole)
        leaves = jax.tree.leaves(inputs)
        self._at_once = leaves[0].shape[0] if any(isinstance(a, jax.Array) for a in leaves) else None
        self._checked = False
        in_thread = any(isinstance(a, jax.ShapeDtypeStruct) for a in jax.tree.leaves(params))
        if known is not None:
            self._pending, self.shared, self._before = known._pending, True, 0.0
        else:
            arguments = (params, *inputs, self.rows, self.scale)
            compiled = {} if compiled is None else compiled
            calls = {"on_step": on_step, "watch": watch}
            self._pending, self.shared, self._before = _begun(setup, arguments, compiled, calls, in_thread)
        if not in_thread:
            self.compiled  # noqa: B018  (what is wrong with it is raised here)

    @property
    def failed(self) -> bool:
        """Could it not be made; False too while that is not known."""
        return self._pending.failed

    @property
    def compiled(self) -> Any:
        """The executable; waits for it.

        Raises:
          ValueError: the device does not have the memory that it takes beside the weights, or what tracing refuses.
        """
        made = self._pending.result().executable
        if not self._checked and self._at_once is not None:
            _check_program(self.setup, made, self._at_once)
        self._checked = True
        return made

    @property
    def origin(self) -> str:
        return "kept" if self.shared else self._pending.result().origin

    @property
    def compile_seconds(self) -> float:
        made = self._pending.result()
        return self._before + (self._pending.seconds if made and not self.shared else 0.0)

    def again(self) -> None:
        """Says that what follows is another draw, for which nothing is compiled."""
        self.shared, self._before = True, 0.0

    def __call__(self, x: jax.Array, keys: jax.Array, cond: Any) -> tuple[jax.Array, Trace]:
        return self.compiled(self.params, x, keys, cond, self.rows, self.scale)


def program_key(setup: Setup, arguments: tuple[Any, ...]) -> str | None:
    """The key of a setup's program that needs no tracing; None where the setup is no plain data (`recipe_of`).

    It is of the configuration, the files that it names, difax's own code, shapes, and all that is around
    (`difax.core.executables.environment`): what changes the program changes it, and so does some of what does not.

    Args:
      arguments: (params, x, keys, cond, rows, scale), or their shapes.
    """
    recipe, code = recipe_of(setup), executables.sources()
    if recipe is None or code is None:
        return None
    return executables.digest(executables.environment(), code, recipe, executables.signature(arguments))


def _begun(
    setup: Setup,
    arguments: tuple[Any, ...],
    compiled: dict[str, _Pending],
    calls: dict[str, Any],
    in_thread: bool,
) -> tuple[_Pending, bool, float]:
    """The executable of a setup, found in this process or where it is kept, or begun to be compiled; whether this
    process had it; and the seconds that it took to know that.

    Kept is what was compiled by its lowered text; where a setup has a `program_key`, that stands for it.
    """
    start = time.perf_counter()
    calling = any(call is not None for call in calls.values())
    place = None if calling else executables.folder()  # no file calls back to this process
    short = None if place is None else program_key(setup, arguments)

    def trace() -> tuple[Any, str]:
        lowered = setup.sampler(None, **calls).lower(*arguments)
        # equal texts may differ in what their arguments are called, which a compiled program insists on
        return lowered, hashlib.sha256(f"{lowered.in_tree}{lowered.as_text()}".encode()).hexdigest()

    def compile_(lowered: Any, text: str) -> Made:
        if place is None:
            executable, had = executables.compiled(lowered)
            return Made(executable, "loaded" if had else "compiled")
        key = executables.digest(executables.environment(), text, executables.signature(arguments))
        loaded, had = executables.load(place, key, arguments), True
        executable = loaded
        if loaded is None:
            executable, had = executables.compiled(lowered)
        kept = loaded is not None or (not had and executables.save(place, key, executable))
        if kept and short is not None:
            executables.point(place, short, key)
        return Made(executable, "loaded" if had else "compiled")

    def load_(key: str) -> Made | None:
        loaded = None if place is None else executables.load(place, key, arguments)
        return None if loaded is None else Made(loaded, "loaded")

    if short is not None and short in compiled and not compiled[short].failed:
        return compiled[short], True, time.perf_counter() - start
    key = executables.pointed(place, short) if place is not None and short is not None else None
    if key is not None and short is not None:
        before = time.perf_counter() - start
        compiled[short] = _Pending(lambda: load_(key), lambda: compile_(*trace()), in_thread)
        return compiled[short], False, before
    try:
        lowered, text = trace()
    except Exception:
        if not in_thread:
            raise
        # told when it is asked for: what is wrong with the weights comes first
        return _Pending(lambda: compile_(*trace()), lambda: compile_(*trace()), False), False, 0.0
    before = time.perf_counter() - start
    if text in compiled and not compiled[text].failed:
        return compiled[text], True, before
    work = lambda: compile_(lowered, text)  # noqa: E731
    compiled[text] = _Pending(work, work, in_thread)
    return compiled[text], False, before


_KEPT = 8  # programs of setups that were drawn with last
_texts: dict[str, _Pending] = {}
_drawn: list[tuple[Setup, Any, Program]] = []


def kept_program(setup: Setup, params: Params, inputs: Any, **calls: Callable[..., None] | None) -> Program:
    """A `Program`, of which this process keeps the last few without their weights, as a jitted function does."""
    if any(call is not None for call in calls.values()):  # it calls back to this draw's bar
        return Program(setup, params, inputs, **calls)  # type: ignore[arg-type]
    shapes = executables.signature((params, inputs))
    for before, of, drawn in _drawn:
        if before is setup and of == shapes and not drawn.failed:
            return Program(setup, params, inputs, known=drawn)
    program = Program(setup, params, inputs, _texts)
    weightless = copy.copy(program)
    weightless.params = None
    _drawn.insert(0, (setup, shapes, weightless))
    del _drawn[_KEPT:]
    for text in list(_texts)[:-_KEPT]:
        del _texts[text]
    return program


def _check_program(setup: Setup, compiled: Any, n: int) -> None:
    """Refuses a program whose own memory, beside the weights that are there already, the device does not have."""
    memory = compiled.memory_analysis()
    if memory is not None:
        own = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
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
    params: Params | Callable[[], Params],
    cond: Any,
    seed: int = 0,
    *,
    latents: np.ndarray | None = None,
    progress: bool = False,
    program: Callable[..., Program] = kept_program,
    numbers: np.ndarray | None = None,
    noise: np.ndarray | None = None,
    batch: int | None = None,
    watch: Callable[[int, Any, Any, Any], None] | None = None,
    image: np.ndarray | None = None,
    mask: np.ndarray | None = None,
) -> Drawn:
    """Draws one sample per condition with one ahead-of-time compiled program, and measures it.

    Samples go through in equal chunks of at most 64 evaluations at once, times the devices that share them. Sample i
    depends on (seed, i), its condition and its latents, to rounding, and on nothing else, but for caches that decide in
    the run: without `per_sample` one decision serves a whole chunk, and depends on all of it.

    Args:
      setup, params: what to sample with; params as `Setup.prepare` returns them, or a function that does so, which is
        called while the program is compiled.
      cond: labels [n] int (a list too), or a tree of arrays that lead with [n]. seed: of the run.
      latents: [n, ...] to begin from, at t = 1; None is noise of the seed.
      progress: a bar on stderr, at the price of a callback per step; by chunks where executables are kept.
      program: (setup, params, inputs, on_step=...) -> `Program`, for those that keep their programs.
      numbers: [n] of the samples in their run, where they are some of it; None is 0 ... n - 1.
      noise: [n, E, ...] that the solver's steps take in place of noise of the seed, one draw an evaluation.
      batch: samples at once, at most; None is what makes 64 evaluations at once.
      watch: called with the number of the first sample of a chunk, the index of an evaluation, the x [B, ...] that it
        is made at and the x0 that it predicts.
      image: [n, ...] samples that noise is added to, at the first time of the setup, to begin from (`Setup.started`).
      mask: [n, ..., 1], 1 where a sample may become another than the image.

    Returns:
      `Drawn`; its table has steps, evaluations (rows of the scan), network evaluations of one sample (both halves of
      guidance counted), what a cache decided (`difax.core.decisions`), GFLOPs of one sample, compile and run seconds,
      peak memory, whether all samples are `finite` and, where they are not, how many are `not_finite`. Of a solver that
      decides in the run the evaluations are those that were made, in the mean over the samples, with how many it might
      have made, of a window the batches of them, and where not all samples arrived, the share that is `unfinished`.
      What is not finite or not finished, and a cache that did nothing, is warned of on stderr.
    """
    from tqdm import tqdm

    if isinstance(cond, (list, tuple)):
        cond = np.asarray(cond, np.int32)
    n = len(jax.tree.leaves(cond)[0])
    check_samples(setup, n)
    if noise is not None:
        _check_noise(setup, noise, n)
    shards = setup.shards
    most = CHUNK * setup.parts // setup.width if batch is None else batch
    chunks = -(-n // (shards * max(most // shards, 1)))
    size = -(-n // (chunks * shards)) * shards
    if setup.accelerator.batchwide and shards > 1 and n % shards:
        raise ValueError(
            f"{n} samples over data x fsdp = {shards} with cache {setup.accelerator.name}, whose decisions those that "
            f"fill the last device would change; allowed: a multiple of {shards} samples, or per_sample=True"
        )

    def inputs(chunk: int) -> tuple[jax.Array, Any, Any]:
        x, keys, some = setup.inputs(seed, size, cond, chunk * size, numbers)
        if latents is not None:
            x = jnp.asarray(latents[np.arange(chunk * size, (chunk + 1) * size) % n], jnp.float32)
            x = setup.placed_samples(x)
        if noise is not None:
            some_noise = noise[np.arange(chunk * size, (chunk + 1) * size) % n]
            keys = Given(setup.placed_samples(jnp.asarray(some_noise, jnp.float32)))
        if image is not None:
            index = np.arange(chunk * size, (chunk + 1) * size) % n
            x0, eps = setup.placed_samples(jnp.asarray(image[index], jnp.float32)), x / setup.process.prior_std
            if mask is not None:
                keys = Held(keys, x0, eps, setup.placed_samples(jnp.asarray(mask[index], jnp.float32)))
            level = setup.process.level(setup.times[0])
            x = np.float32(level.alpha) * x0 + np.float32(level.sigma) * eps
        return x, keys, some

    # a program that is kept cannot call back to a bar, which then moves by chunks
    stepwise = progress and executables.folder() is None
    on_step = (lambda _: bar.update()) if stepwise else None
    looked = None if watch is None else lambda i, x, x0: watch(chunk * size, int(i), x, x0)
    started = lambda weights: program(setup, weights, inputs(0), on_step=on_step, watch=looked)  # noqa: E731
    compiled, params = _with_weights(setup, params, started)
    bar = tqdm(total=chunks * len(setup.rows.i), unit="evaluation", disable=not progress, file=sys.stderr)
    images, begun, seconds, traces, chunk = [], [], 0.0, [], 0
    for chunk in range(chunks):
        x, keys, some = jax.block_until_ready(inputs(chunk))
        begun.append(np.array(hosts.fetch(x)))  # x is donated
        start = time.perf_counter()
        drawn, trace = jax.block_until_ready(compiled(x, keys, some))
        seconds += time.perf_counter() - start
        if watch is not None:
            jax.effects_barrier()  # what is called back says of which chunk it is
        bar.update(0 if stepwise else len(setup.rows.i))
        images.append(hosts.fetch(drawn))
        traces.append(trace if hosts.processes() == 1 else hosts.fetch(trace))
    bar.close()
    trace = known(averaged(traces))
    samples = np.concatenate(images)[:n]
    broken = int(np.sum(~np.isfinite(samples.reshape(n, -1)).all(1)))
    if broken:
        print(f"difax: warning: {broken} of {n} images are not finite", file=sys.stderr)
    silent = inert(setup.rows, trace)
    if silent:
        print(f"difax: warning: {silent}", file=sys.stderr)
    if trace.unfinished > 0:
        warnings.warn(unfinished(setup, trace), DifaxWarning, stacklevel=2)
    parts = model_cost(setup.model, params, setup.attention, networks=setup.accelerator.networks)
    gflops = run_cost(parts, trace) / 1e9
    cost = {
        "images": n,
        "finite": broken == 0,
        **({"not_finite": broken} if broken else {}),
        "steps": len(setup.times) - 1,
        **_made(setup, trace),
        "network_evaluations": int(np.sum(np.asarray(trace.halves))),
        "computed_fraction": round(_computed(setup, trace), 4),
        **({} if setup.rows.plan.owner == "none" else summary(trace)),
        "gflops_per_image": round(gflops, 3),
        **_served(setup, params),
        "weights_mib": round(size_in_bytes(params) / 2**20, 1),
        "program": compiled.origin,
        "compile_seconds": round(compiled.compile_seconds, 2),
        "seconds_per_image": round(seconds / (chunks * size), 4),
        "peak_memory_mib": round(peak_memory(compiled.compiled) / 2**20, 1),
        "device": device_name(),
        **({"processes": hosts.processes()} if hosts.processes() > 1 else {}),
        "jax": jax.__version__,
    }
    return Drawn(samples, np.concatenate(begun)[:n], trace, cost)


def _check_noise(setup: Setup, noise: np.ndarray, n: int) -> None:
    """Refuses noise of another shape than the evaluations', or for a solver that takes other noise too."""
    shape = (n, len(setup.rows.i), *setup.model.input_shape)
    if noise.shape != shape:
        raise ValueError(f"noise: {list(noise.shape)}; allowed: {list(shape)}, samples by evaluations")
    if setup.solver.drive != "scan" or setup.solver.start is not None:
        name = setup.described.get("solver", "of the run")
        raise ValueError(f"noise: solver {name} draws other noise than one an evaluation; allowed: a seed")


def together(parts: list[tuple[np.ndarray, Drawn]]) -> Drawn:
    """Runs of several lengths as one: (which of all samples, drawn) of each.

    Returns:
      `Drawn` in the order of all samples, its trace {steps: trace}; in its table steps and evaluations are words, what
      is of one image is the mean over all of them, compile seconds are the sum, and memory is the largest.
    """
    n = sum(len(numbers) for numbers, _ in parts)
    shares = np.array([len(numbers) / n for numbers, _ in parts])
    tables = [drawn.table for _, drawn in parts]
    mean = lambda key, digits: round(float(shares @ [table[key] for table in tables]), digits)  # noqa: E731
    words = lambda key: ", ".join(f"{t[key]} ({t['images']} images)" for t in tables)  # noqa: E731
    order = np.argsort(np.concatenate([numbers for numbers, _ in parts]))
    joined = lambda arrays: np.concatenate(arrays)[order]  # noqa: E731
    table = {
        **tables[0],
        "images": n,
        "finite": all(table["finite"] for table in tables),
        "steps": words("steps"),
        "evaluations": words("evaluations"),
        "network_evaluations": mean("network_evaluations", 2),
        "computed_fraction": mean("computed_fraction", 4),
        "gflops_per_image": mean("gflops_per_image", 3),
        "program": ", ".join(dict.fromkeys(table["program"] for table in tables)),
        "compile_seconds": round(sum(table["compile_seconds"] for table in tables), 2),
        "seconds_per_image": mean("seconds_per_image", 4),
        "peak_memory_mib": max(table["peak_memory_mib"] for table in tables),
    }
    broken = sum(table.get("not_finite", 0) for table in tables)
    of_one = ("not_finite", "unfinished", "most_evaluations", "batches", "decisions", "hit_rate", "metric")
    for key in of_one:  # of runs of one length
        table.pop(key, None)
    table |= {"not_finite": broken} if broken else {}
    traces: Any = {table["steps"]: drawn.trace for table, (_, drawn) in zip(tables, parts, strict=True)}
    return Drawn(joined([d.samples for _, d in parts]), joined([d.latents for _, d in parts]), traces, table)


def _computed(setup: Setup, trace: Trace) -> float:
    """The fraction of the branches that was computed, of all evaluations, or of those that were made."""
    found = float(np.mean([np.mean(c) for c in trace.computed.values()]))
    if setup.solver.drive == "scan":
        return found
    made = float(np.sum(np.asarray(trace.live) > 0)) * setup.width
    return found * len(setup.rows.i) / made


def _made(setup: Setup, trace: Trace) -> dict[str, Any]:
    """Of `draw`'s table, the evaluations that were made."""
    most = len(setup.rows.i)
    if setup.solver.drive == "scan":
        return {"evaluations": most}
    found: dict[str, Any] = {"evaluations": round(evaluations(setup.solver, setup.rows, trace), 2)}
    if setup.solver.drive == "window":
        found["batches"] = round(float(np.sum(trace.live)), 2)
    found["most_evaluations"] = most * setup.width
    return found | ({"unfinished": round(float(trace.unfinished), 4)} if trace.unfinished > 0 else {})


def unfinished(setup: Setup, trace: Trace) -> str:
    """What is told of samples that had not arrived when the rows were used up."""
    most, name = len(setup.rows.i), setup.described.get("solver", "of the run")
    what = "batches of evaluations" if setup.solver.drive == "window" else "evaluations"
    return (
        f"solver {name}: {100 * float(trace.unfinished):.3g} % of the samples are not finished after {most} {what}, "
        "which is all that `steps` allows; allowed: more steps, or a looser tolerance"
    )


def _served(setup: Setup, params: Params) -> dict[str, Any]:
    """What the names of a configuration came to on the device: attentions, and products of quantised weights."""
    with lowering_for(setup.target):
        attentions = dict.fromkeys(setup.attention.chosen().values())
    products = products_of(params)
    return {
        **({"attended_by": ", ".join(attentions)} if attentions else {}),
        **({"multiplied_by": ", ".join(f"{name} ({n})" for name, n in products.items())} if products else {}),
    }


def _with_weights(
    setup: Setup, params: Params | Callable[[], Params], started: Callable[[Params], Program]
) -> tuple[Program, Params]:
    """A program with its weights, which are read, where a function does that, while the program is compiled."""
    if not callable(params):
        return started(params), params
    try:
        shapes = setup.placed_shapes(jax.eval_shape(setup.prepare, model_shapes(setup.model)))
    except Exception:  # what is wrong with the weights themselves is told first
        params = params()
        return started(params), params
    program, params = started(shapes), params()
    if executables.signature(params) != executables.signature(shapes):  # such as where they are placed otherwise
        program = started(params)
    program.params = params
    return program, params


def ahead_of_time(setup: Setup, n: int = 1) -> dict[str, Any]:
    """Compiles the sampler of a setup from shapes alone, without weights in memory: what the whole model would cost.

    Returns:
      The part of `draw`'s table that needs no run; the GFLOPs are of the neutral accelerator.
    """
    params = setup.placed_shapes(jax.eval_shape(setup.prepare, model_shapes(setup.model)))
    program = Program(setup, params, input_shapes(setup.model, n))
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
    placement = setup.placement
    n = -(-len(labels) // setup.shards) * setup.shards
    rows, scale = jax.tree.map(jnp.asarray, setup.rows), jnp.float32(setup.scale)
    if placement is not None:
        rows, scale = hosts.put((rows, scale), placement.sharding())

    def preview(params: Params) -> np.ndarray:
        x, keys, cond = setup.inputs(0, n, labels)
        if placement is not None:
            params = setup.place(placement.arranged(params))
        images, _ = sampler(params, x, keys, cond, rows, scale)
        return image_grid(to_uint8(hosts.fetch(images)[: len(labels)]), classes, scale=2)

    return preview
