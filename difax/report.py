"""What the command line shows: images drawn with their measured cost, training previews, and listings."""

from __future__ import annotations

import inspect
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from difax.build import REGISTRIES, Run, embedded_weights
from difax.config import config_names, load_config
from difax.contracts import Params
from difax.cost import model_cost, run_cost
from difax.images import image_grid, to_uint8
from difax.noise import sample_keys
from difax.sample import initial_noise, make_sampler

CHUNK = 64


def draw(run: Run, params: Params, labels: Any, seed: int, progress: bool = False) -> tuple[np.ndarray, dict[str, Any]]:
    """Draws one image per label with one ahead-of-time compiled program, and measures it.

    Images go through in equal chunks of at most 64; image i depends on (seed, i) and its label alone.

    Args:
      run, params: what to sample with. labels: [n] int. seed: of the run.
      progress: a bar on stderr, at the price of a callback per step.

    Returns:
      images [n, H, W, C] float32 and the table: steps, evaluations (rows of the scan), network evaluations of one
      image (both halves of guidance counted), GFLOPs of one image, compile and run seconds, peak memory.
    """
    from tqdm import tqdm

    labels = np.asarray(labels, np.int32)
    n = len(labels)
    chunks = -(-n // CHUNK)
    size = -(-n // chunks)
    padded = np.concatenate([labels, np.repeat(labels[-1:], chunks * size - n)])
    evaluations = len(run.rows.i)
    bar = tqdm(total=chunks * evaluations, unit="evaluation", disable=not progress, file=sys.stderr)

    def advance(_: Any) -> None:
        bar.update()

    sampler = make_sampler(
        run.model,
        run.process,
        run.prediction,
        run.solver,
        run.guide,
        run.accelerator,
        on_step=advance if progress else None,
    )
    # cast once, so that no weight is converted inside the loop
    params = jax.tree.map(lambda a: jnp.asarray(a).astype(run.model.dtype), params)
    rows, scale = jax.tree.map(jnp.asarray, run.rows), jnp.asarray(run.scale, jnp.float32)

    def inputs(chunk: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        keys = sample_keys(seed, size, chunk * size)
        x = initial_noise(run.process, keys, run.model.input_shape)
        return x, keys, jnp.asarray(padded[chunk * size : (chunk + 1) * size])

    x, keys, cond = inputs(0)
    start = time.perf_counter()
    program = sampler.lower(params, x, keys, cond, rows, scale).compile()
    compile_seconds = time.perf_counter() - start
    images, seconds, trace = [], 0.0, None
    for chunk in range(chunks):
        x, keys, cond = jax.block_until_ready(inputs(chunk))
        start = time.perf_counter()
        image, trace = jax.block_until_ready(program(params, x, keys, cond, rows, scale))
        seconds += time.perf_counter() - start
        images.append(np.asarray(image))
    bar.close()
    assert trace is not None
    stacked = np.concatenate(images)[:n]
    if not np.all(np.isfinite(stacked)):
        print("difax: warning: some images are not finite", file=sys.stderr)
    gflops = run_cost(model_cost(run.model, params), trace) / 1e9
    return stacked, {
        "images": n,
        "steps": len(run.times) - 1,
        "evaluations": evaluations,
        "network_evaluations": int(np.sum(np.asarray(trace.halves))),
        "computed_fraction": round(float(np.mean([np.mean(c) for c in trace.computed.values()])), 4),
        "gflops_per_image": round(gflops, 3),
        "compile_seconds": round(compile_seconds, 2),
        "seconds_per_image": round(seconds / (chunks * size), 4),
        "peak_memory_mib": round(peak_memory(program) / 2**20, 1),
        "device": device_name(),
        "jax": jax.__version__,
    }


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


def device_name() -> str:
    """Platform and, where the runtime knows it, kind and number of the devices."""
    devices = jax.devices()
    return f"{devices[0].platform}:{devices[0].device_kind} x{len(devices)}"


_ROWS = {
    "model": "model",
    "weights": "weights",
    "solver": "solver",
    "guide": "guidance",
    "cache": "cache",
    "dtype": "dtype",
    "images": "images",
    "steps": "steps",
    "evaluations": "evaluations",
    "network_evaluations": "network evaluations per image",
    "computed_fraction": "fraction of branches computed",
    "gflops_per_image": "GFLOPs per image",
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
    return "\n".join(f"{_ROWS[k]:<{width}}  {v}" for k, v in table.items() if k in _ROWS)


def previewer(run: Run) -> Callable[[Params], np.ndarray]:
    """params -> picture of two images of each of the first ten classes, for a training run; compiled once."""
    sampler = make_sampler(run.model, run.process, run.prediction, run.solver, run.guide, run.accelerator)
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
    return [(name, _first_line(inspect.getdoc(f) or "")) for name, f in REGISTRIES[singular].items()]


def _config_doc(name: str) -> str:
    import importlib

    load_config(name)
    return importlib.import_module(f"difax.configs.{name}").__doc__ or ""


def _first_line(doc: str) -> str:
    return doc.strip().split("\n\n")[0].replace("\n", " ")
