"""What the command line shows: images drawn with their measured cost, training previews, and listings."""

from __future__ import annotations

import importlib.metadata
import inspect
import os
import pathlib
import platform
import resource
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from difax.build import REGISTRIES, Run, embedded_weights, make
from difax.catalogue import STATUSES, System, count
from difax.conditions import labelled
from difax.config import config_names, load_config
from difax.contracts import Params, Trace
from difax.cost import model_cost, run_cost
from difax.decisions import averaged, inert, summary
from difax.images import image_grid, to_uint8
from difax.noise import sample_keys
from difax.qtensor import size_in_bytes
from difax.sample import initial_noise

CHUNK = 64
# the configuration whose size `difax list models` states
NATIVE = {
    "dit": "dit_imagenet",
    "skip_dit": "skip_dit_imagenet",
    "flux": "flux_dev",
    "pixart": "pixart_sigma",
    "wan": "wan2_1",
}


class Drawn(NamedTuple):
    """samples [n, ...] float32; table: what they cost (`draw`); trace: the mean over the chunks."""

    samples: np.ndarray
    table: dict[str, Any]
    trace: Trace


def draw(run: Run, params: Params, cond: Any, seed: int, progress: bool = False) -> Drawn:
    """Draws one sample per condition with one ahead-of-time compiled program, and measures it.

    Samples go through in equal chunks of at most 64; sample i depends on (seed, i) and its condition alone.

    Args:
      run, params: what to sample with. cond: labels [n] int, or a tree of arrays that lead with [n]. seed: of the run.
      progress: a bar on stderr, at the price of a callback per step.

    Returns:
      `Drawn`; its table has steps, evaluations (rows of the scan), network evaluations of one sample (both halves of
      guidance counted), what a cache decided (`difax.decisions`), GFLOPs of one sample, compile and run seconds, peak
      memory. A cache that did nothing is warned of on stderr.
    """
    from tqdm import tqdm

    if labelled(run.model):
        cond = np.asarray(cond, np.int32)
    n = len(jax.tree.leaves(cond)[0])
    chunks = -(-n // CHUNK)
    size = -(-n // chunks)
    padded = jax.tree.map(lambda a: np.concatenate([a, np.repeat(a[-1:], chunks * size - n, 0)]), cond)
    bar = tqdm(total=chunks * len(run.rows.i), unit="evaluation", disable=not progress, file=sys.stderr)
    params = jax.block_until_ready(run.prepare(params))
    rows, scale = jax.tree.map(jnp.asarray, run.rows), jnp.asarray(run.scale, jnp.float32)

    def inputs(chunk: int) -> tuple[jax.Array, jax.Array, Any]:
        keys = sample_keys(seed, size, chunk * size)
        x = initial_noise(run.process, keys, run.model.input_shape)
        part = slice(chunk * size, (chunk + 1) * size)
        return x, keys, jax.tree.map(lambda a: jnp.asarray(a[part]), padded)

    x, keys, some = inputs(0)
    program, compile_seconds = _compiled(run, params, x, keys, some, (lambda _: bar.update()) if progress else None)
    images, seconds, traces = [], 0.0, []
    for chunk in range(chunks):
        x, keys, some = jax.block_until_ready(inputs(chunk))
        start = time.perf_counter()
        image, trace = jax.block_until_ready(program(params, x, keys, some, rows, scale))
        seconds += time.perf_counter() - start
        images.append(np.asarray(image))
        traces.append(trace)
    bar.close()
    trace = averaged(traces)
    stacked = np.concatenate(images)[:n]
    if not np.all(np.isfinite(stacked)):
        print("difax: warning: some images are not finite", file=sys.stderr)
    silent = inert(run.rows, trace)
    if silent:
        print(f"difax: warning: {silent}", file=sys.stderr)
    gflops = run_cost(model_cost(run.model, params, run.attention), trace) / 1e9
    table = {
        "images": n,
        "steps": len(run.times) - 1,
        "evaluations": len(run.rows.i),
        "network_evaluations": int(np.sum(np.asarray(trace.halves))),
        "computed_fraction": round(float(np.mean([np.mean(c) for c in trace.computed.values()])), 4),
        **({} if run.rows.plan.owner == "none" else summary(trace)),
        "gflops_per_image": round(gflops, 3),
        "weights_mib": round(size_in_bytes(params) / 2**20, 1),
        "compile_seconds": round(compile_seconds, 2),
        "seconds_per_image": round(seconds / (chunks * size), 4),
        "peak_memory_mib": round(peak_memory(program) / 2**20, 1),
        "device": device_name(),
        "jax": jax.__version__,
    }
    return Drawn(stacked, table, trace)


def ahead_of_time(run: Run, n: int = 1) -> dict[str, Any]:
    """Compiles the sampler of a run from shapes alone, without weights in memory: what the whole model would cost.

    Returns:
      The part of `draw`'s table that needs no run; the GFLOPs are of the neutral accelerator.
    """
    spec = jax.eval_shape(run.prepare, jax.eval_shape(run.model.init, jax.random.key(0)))
    shape = lambda tree: jax.tree.map(lambda a: jax.ShapeDtypeStruct((n, *a.shape), a.dtype), tree)  # noqa: E731
    keys = jax.eval_shape(lambda: sample_keys(0, n))
    x = jax.ShapeDtypeStruct((n, *run.model.input_shape), jnp.float32)
    program, compile_seconds = _compiled(run, spec, x, keys, shape(run.model.cond))
    cost = model_cost(run.model, spec, run.attention)
    return {
        "parameters": parameter_count(run.model),
        "evaluations": len(run.rows.i),
        "gflops_per_evaluation": round(cost.evaluation / 1e9, 3),
        "weights_mib": round(size_in_bytes(spec) / 2**20, 1),
        "compile_seconds": round(compile_seconds, 2),
        "peak_memory_mib": round(peak_memory(program) / 2**20, 1),
    }


def parameter_count(model: Any) -> int:
    """Number of parameters of a model."""
    return sum(int(np.prod(a.shape)) for a in jax.tree.leaves(jax.eval_shape(model.init, jax.random.key(0))))


def _compiled(run: Run, params: Params, x: Any, keys: Any, cond: Any, on_step: Any = None) -> tuple[Any, float]:
    sampler = run.sampler(on_step=on_step)
    rows, scale = jax.tree.map(jnp.asarray, run.rows), jnp.asarray(run.scale, jnp.float32)
    start = time.perf_counter()
    program = sampler.lower(params, x, keys, cond, rows, scale).compile()
    return program, time.perf_counter() - start


def peak_memory(program: Any) -> int:
    """Bytes that a compiled program holds at once: arguments, results and temporaries, shared buffers once."""
    memory = program.memory_analysis()
    if memory is None:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes
    )


def weight_bytes(run: Run) -> int:
    """Bytes of a run's random weights while they are made and prepared: once in float32, once as sampled with."""
    spec = jax.eval_shape(run.model.init, jax.random.key(0))
    return size_in_bytes(spec) + size_in_bytes(jax.eval_shape(run.prepare, spec))


def memory_available() -> int:
    """Bytes that the first device has left, or the host where the device's memory is the host's."""
    stats = jax.devices()[0].memory_stats() if jax.default_backend() != "cpu" else None
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def device_name() -> str:
    """Platform and, where the runtime knows it, kind and number of the devices."""
    devices = jax.devices()
    return f"{devices[0].platform}:{devices[0].device_kind} x{len(devices)}"


def processor() -> str:
    """The processor's model and its matrix instructions, as Linux names them."""
    try:
        text = pathlib.Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    lines = dict(line.split(":", 1) for line in text.split("\n\n")[0].splitlines() if ":" in line)
    found = {k.strip(): v.strip() for k, v in lines.items()}
    flags = [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f in found.get("flags", "").split()]
    return f"{found.get('model name', platform.machine())} ({', '.join(flags)})"


def versions() -> dict[str, str]:
    """Of python, difax and what its figures depend on."""
    of = {name: importlib.metadata.version(name) for name in ("difax", "jax", "jaxlib", "flax", "numpy")}
    return {"python": platform.python_version(), **of}


_ROWS = {
    "model": "model",
    "weights": "weights",
    "solver": "solver",
    "guide": "guidance",
    "cache": "cache",
    "attend": "attention",
    "quant": "quantisation",
    "dtype": "dtype",
    "images": "images",
    "steps": "steps",
    "evaluations": "evaluations",
    "network_evaluations": "network evaluations per image",
    "computed_fraction": "fraction of branches computed",
    "decisions": "computed (F), filled (.)",
    "hit_rate": "evaluations that filled something",
    "metric": "the gate's metric",
    "gflops_per_image": "GFLOPs per image",
    "weights_mib": "weights (MiB)",
    "compile_seconds": "compile seconds",
    "seconds_per_image": "seconds per image",
    "peak_memory_mib": "peak memory (MiB)",
    "device": "device",
    "jax": "jax",
    "out": "written to",
}


def format_table(table: dict[str, Any]) -> str:
    """The table of `difax sample` for people."""
    width = max(map(len, _ROWS.values()))
    lines = [f"{_ROWS[k]:<{width}}  {_shown(v)}" for k, v in table.items() if k in _ROWS and v is not None]
    if "full_size" in table:
        lines += ["", "compiled only, at full size:"]
        lines += [f"{_ROWS.get(k, k.replace('_', ' ')):<{width}}  {v}" for k, v in table["full_size"].items()]
    return "\n".join(lines)


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k}: {v:.3g}" for k, v in value.items())
    if isinstance(value, list):
        return value[0] if len(set(value)) == 1 else " | ".join(value)
    return str(value)


def previewer(run: Run) -> Callable[[Params], np.ndarray]:
    """params -> picture of two images of each of the first ten classes, for a training run; compiled once."""
    sampler = run.sampler()
    classes = min(run.model.classes, 10)
    labels = jnp.arange(2 * classes) % classes
    rows = jax.tree.map(jnp.asarray, run.rows)

    def preview(params: Params) -> np.ndarray:
        keys = sample_keys(0, 2 * classes)
        x = initial_noise(run.process, keys, run.model.input_shape)
        images, _ = sampler(params, x, keys, labels, rows, run.scale)
        return image_grid(to_uint8(np.asarray(images)), classes, scale=2)

    return preview


def listing(kind: str) -> list[tuple[str, str]]:
    """(name, one line) of everything of a kind, the line being the first sentence of its docstring."""
    singular = {"processes": "process", "data": "data", "losses": "loss"}.get(kind, kind.removesuffix("s"))
    if kind == "configs":
        return [(name, _first_line(_config_doc(name))) for name in config_names()]
    if kind == "weights":
        return [(name, f"weights embedded in difax: {name}") for name in embedded_weights()]
    lines = [(name, _first_line(inspect.getdoc(f) or "")) for name, f in REGISTRIES[singular].items()]
    return [(n, f"{line}{_size(n)}") for n, line in lines] if kind == "models" else lines


def format_systems(systems: Sequence[System]) -> str:
    """The catalogue for people: a line for each system, and their numbers by category and status."""
    columns = ("name", "year", "reference", "category", "training", "status", "composition")
    lines = [columns, *(tuple(str(getattr(s, c) or "") for c in columns) for s in systems)]
    numbers = {category: [*n.values(), sum(n.values())] for category, n in count(systems).items()}
    numbers["total"] = [sum(column) for column in zip(*numbers.values(), strict=True)] or [0] * (len(STATUSES) + 1)
    table = [("category", *STATUSES, "total"), *((category, *n) for category, n in numbers.items())]
    return _columns(lines) + "\n\n" + _columns(table, ">")


def _columns(rows: Sequence[Sequence[Any]], align: str = "<") -> str:
    """Rows of equal length in columns of equal width; the first column is aligned left."""
    widths = [max(len(str(row[i])) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [f"{str(v):{align if i else '<'}{w}}" for i, (v, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _size(name: str) -> str:
    """Parameters, and operations of one evaluation, of a model's native size."""
    config = NATIVE.get(name)
    if config is None:
        return ""
    model = make("model", load_config(config)["model"])
    spec = jax.eval_shape(model.init, jax.random.key(0))
    gflops = model_cost(model, spec).evaluation / 1e9
    return f" [{config}: {parameter_count(model) / 1e6:,.0f} M parameters, {gflops:,.0f} GFLOPs a step]"


def _config_doc(name: str) -> str:
    import importlib

    load_config(name)
    return importlib.import_module(f"difax.configs.{name}").__doc__ or ""


def _first_line(doc: str) -> str:
    return doc.strip().split("\n\n")[0].replace("\n", " ")
