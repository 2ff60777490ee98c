"""One denoising step and a whole sample of DiT-S/2, B/2, XL/2: seconds, GFLOP/s against the machine's own ceiling.

  python -m experiments.bench_step                                     all rows, difax alone
  python -m experiments.bench_step --torch eager compile --lane jax012 also diffusers on the same weights

A step is one evaluation of the network on latents [batch, 32, 32, 4]. With the `parity` extra a second process runs
diffusers' DiTTransformer2DModel; all run turn by turn, and the ratios are of the medians. CPU seconds (all threads)
are the steadier column on a shared machine. `stacked` scans over the blocks, `unstacked` (`difax.core.trunk.unstack`)
writes them out. Rows go to experiments/results/bench_step/LANE.jsonl; a row that is
there already is not measured again.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from difax.accel.solvers import SOLVERS
from difax.core.cost import model_cost
from difax.core.device import peak_memory
from difax.core.files import read_rows
from difax.core.grids import GRIDS, make_times
from difax.core.guidance import unguided
from difax.core.noise import sample_keys
from difax.core.process import vp_linear
from difax.core.sample import initial_noise, make_rows, make_sampler
from difax.core.trunk import forward, unstack
from difax.models.dit import dit
from difax.models.dit_checkpoint import load_dit
from difax.study.profile import ceiling
from experiments.provenance import RESULTS, append_row, provenance

MODELS, BATCHES, DTYPES = ("S/2", "B/2", "XL/2"), (1, 4), ("float32", "bfloat16")


def measure(run: Callable[[], Any], repeats: int, warm: bool = True) -> tuple[list[float], list[float]]:
    """Wall and CPU seconds of `repeats` calls, after one that is thrown away (`warm`)."""
    if warm:
        run()
    wall, cpu = [], []
    for _ in range(repeats):
        start, start_cpu = time.perf_counter(), time.process_time()
        run()
        wall.append(time.perf_counter() - start)
        cpu.append(time.process_time() - start_cpu)
    return wall, cpu


class Torch:
    """diffusers in a process of its own, asked for one step at a time."""

    def __init__(self, python: str, variant: str, batch: int, dtype: str, mode: str, weights: str):
        arguments = [variant, str(batch), dtype, mode, weights]
        command = [python, "-m", "experiments.torch_step", *arguments]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.ready = self._read()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the diffusers process ended with exit code {self.process.wait()}")
        return json.loads(line)

    def step(self) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        return self._read()

    def close(self) -> None:
        self.process.communicate(input="")


def bench(
    variant: str,
    batch: int,
    dtype: str,
    repeats: int,
    modes: list[str],
    steps: int,
    top: float,
    python: str = sys.executable,
) -> dict[str, Any]:
    """One row: a step of one geometry, its sample of `steps` steps, and diffusers beside it."""
    key = jax.random.key(0)
    with tempfile.TemporaryDirectory() as folder:
        weights = f"{folder}/diffusers.safetensors"
        torches = {mode: Torch(python, variant, batch, dtype, mode, weights) for mode in modes}
        if torches:  # the first one wrote its weights
            model, params = load_dit(weights, layout="diffusers", size=32, dtype=jnp.dtype(dtype))
        else:
            model = dit(variant, dtype=dtype)
            params = jax.jit(model.init)(key)
            params = jax.tree.map(lambda a: a + 0.02 * jax.random.normal(key, a.shape), params)
        params = jax.tree.map(lambda a: a.astype(dtype), params)
        x = jax.random.normal(key, (batch, *model.input_shape))
        time_, labels = jnp.full((batch,), 500.0), jnp.arange(batch)
        step = jax.jit(lambda p, x: forward(model, p, x, time_, labels))
        layouts = {"stacked": params, "unstacked": unstack(model, params)}
        programs, compile_seconds = {}, {}
        for layout, p in layouts.items():
            start = time.perf_counter()
            programs[layout] = step.lower(p, x).compile()
            compile_seconds[layout] = time.perf_counter() - start

        def run(layout: str) -> Any:
            return jax.block_until_ready(programs[layout](layouts[layout], x))

        ours: dict[str, list[tuple[float, float]]] = {layout: [] for layout in layouts}
        theirs: dict[str, list[tuple[float, float]]] = {mode: [] for mode in modes}
        for layout in layouts:
            run(layout)
        for _ in range(repeats):
            for layout in layouts:
                wall, cpu = measure(partial(run, layout), 1, warm=False)
                ours[layout].append((wall[0], cpu[0]))
            for mode, worker in torches.items():
                answer = worker.step()
                theirs[mode].append((answer["seconds"], answer["cpu_seconds"]))
        for worker in torches.values():
            worker.close()
    flops = batch * model_cost(model, params).evaluation
    row: dict[str, Any] = {
        "model": f"DiT-{variant}",
        "batch": batch,
        "dtype": dtype,
        "gflops": flops / 1e9,
        "ceiling_gflops_per_second": top,
        "repeats": repeats,
    }
    for layout, values in ours.items():
        wall, cpu = (statistics.median(column) for column in zip(*values, strict=True))
        row[layout] = {
            "seconds": wall,
            "seconds_min": min(w for w, _ in values),
            "seconds_max": max(w for w, _ in values),
            "cpu_seconds": cpu,
            "gflops_per_second": flops / wall / 1e9,
            "fraction_of_ceiling": flops / wall / 1e9 / top,
            "compile_seconds": compile_seconds[layout],
            "peak_memory_mib": peak_memory(programs[layout]) / 2**20,
        }
    for mode, values in theirs.items():
        wall, cpu = (statistics.median(column) for column in zip(*values, strict=True))
        row[f"torch_{mode}"] = {
            "seconds": wall,
            "cpu_seconds": cpu,
            "difax_over_torch": {layout: row[layout]["seconds"] / wall for layout in ours},
            "difax_over_torch_cpu": {layout: row[layout]["cpu_seconds"] / cpu if cpu else None for layout in ours},
            "warm_up_seconds": torches[mode].ready["warm_up_seconds"],
            "torch": torches[mode].ready["torch"],
        }
    if steps:
        del programs, torches
        row["sample"] = sample(model, layouts, batch, steps)
    return row


def sample(model: Any, layouts: dict[str, Any], batch: int, steps: int) -> dict[str, Any]:
    """A whole DDIM sample of `steps` steps without guidance: compile seconds of each layout, run seconds of one."""
    process, solver = vp_linear(), SOLVERS["ddim"]()
    sampler = make_sampler(model, process, "eps", solver)
    rows = make_rows(solver, unguided(), process, make_times(GRIDS["leading"](), process, steps))
    rows = jax.tree.map(jnp.asarray, rows)
    keys = sample_keys(0, batch)
    x = initial_noise(process, keys, model.input_shape)
    answer: dict[str, Any] = {"steps": steps}
    program: Any = None
    for layout, params in layouts.items():
        start = time.perf_counter()
        program = sampler.lower(params, x, keys, jnp.arange(batch), rows, 1.0).compile()
        answer[layout] = {
            "compile_seconds": time.perf_counter() - start,
            "peak_memory_mib": peak_memory(program) / 2**20,
        }
    start = time.perf_counter()  # of the last one, unstacked
    jax.block_until_ready(program(layouts["unstacked"], x, keys, jnp.arange(batch), rows, jnp.float32(1.0)))
    answer["unstacked"]["seconds"] = time.perf_counter() - start
    return answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES)
    parser.add_argument("--dtypes", nargs="+", default=DTYPES, choices=DTYPES)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--sample-steps", type=int, default=50, help="0: no whole sample")
    parser.add_argument("--torch", nargs="*", default=[], choices=("eager", "compile"))
    parser.add_argument("--torch-python", default=sys.executable, help="interpreter that has the parity extra")
    parser.add_argument("--lane", default=f"jax{''.join(jax.__version__.split('.')[:2])}", help="name of the file")
    parser.add_argument("--out", type=pathlib.Path, help="file of rows, instead of the lane's")
    options = parser.parse_args()
    path = options.out or RESULTS / "bench_step" / f"{options.lane}.jsonl"
    keys = ("model", "batch", "dtype")
    for dtype in options.dtypes:
        top = None
        for variant in options.models:
            for batch in options.batches:
                done = {tuple(row[k] for k in keys) for row in read_rows(path)}
                if (f"DiT-{variant}", batch, dtype) in done:
                    continue
                top = top or ceiling(dtype)
                row = bench(
                    variant,
                    batch,
                    dtype,
                    options.repeats,
                    options.torch,
                    options.sample_steps,
                    top,
                    options.torch_python,
                )
                append_row(path, {**row, "provenance": provenance()})
                for layout in ("stacked", "unstacked"):
                    part = row[layout]
                    ratios = "".join(
                        f"  x{row[f'torch_{m}']['difax_over_torch'][layout]:.2f} of {m}" for m in options.torch
                    )
                    print(
                        f"{row['model']:9} b{batch} {dtype:8} {layout:9} {part['seconds']:.3f} s  "
                        f"{part['gflops_per_second']:.0f} GFLOP/s ({100 * part['fraction_of_ceiling']:.0f} %){ratios}",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
