"""Attention by blocks and within a window against the plain one: seconds, GFLOP/s and memory by length.

  python -m experiments.attention                                                     difax alone
  python -m experiments.attention --lane jax012 --torch-python PYTHON_WITH_TORCH      also torch's SDPA
  python -m experiments.attention --lists                                             lists of blocks, by density

One call on q, k, v [1, tokens, 8, 64], default settings, the contenders turn by turn; torch's
scaled_dot_product_attention runs in a process of its own. GFLOP/s count the two products over the pairs that attend
(a window: over its own pairs). `planned_memory_mib` is what XLA says that the compiled program needs, which on a CPU
leaves out what one product hands to the next at run time; `memory_growth_mib` (Linux) is by how much the resident
memory of a process of its own grows at most during a call. A contender that needs more than 0.7 of what is free is
left out, with that as the reason. Rows go to
experiments/results/attention/LANE.jsonl; a row that is there already is not measured again.

With `--lists` a row is one length, dtype and block size: `chunked` without a list, and with random lists of distinct
blocks for every head that hold each `density` of all blocks (at least one), turn by turn; `over_dense` is the seconds
over those of the call without a list, and `listed` the share of blocks that the lists hold. Those rows go to
experiments/results/attention/LANE_lists.jsonl.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from difax.accel.attention.chunked import chunked
from difax.accel.attention.window import window
from difax.accel.attention.xla import xla
from difax.core.contracts import BlockList
from difax.core.device import peak_memory
from difax.core.files import read_rows
from difax.study.profile import ceiling
from experiments.bench_step import Torch, measure
from experiments.provenance import RESULTS, append_row, provenance

TOKENS, DTYPES, HEADS, WIDTH, RADIUS = (1024, 4096, 16384), ("float32", "bfloat16"), 8, 64, 512
WINDOW = f"window {RADIUS}"
DENSITIES, BLOCKS = (1.0, 0.5, 0.2), ((128, 128), (128, 64), (512, 1024))


class TorchAttention(Torch):
    """torch's scaled_dot_product_attention in a process of its own, asked for one call at a time."""

    def __init__(self, python: str, tokens: int, dtype: str):
        command = [python, "-m", "experiments.torch_attention", *map(str, (tokens, HEADS, WIDTH)), dtype]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.ready = self._read()


def pairs(name: str, tokens: int) -> int:
    """How many pairs of a query and a key attend."""
    return (
        sum(min(i + RADIUS, tokens - 1) - max(i - RADIUS, 0) + 1 for i in range(tokens))
        if name == WINDOW
        else tokens**2
    )


def available_memory() -> int:
    """Bytes that a new program may take without swapping."""
    try:
        lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def contenders() -> dict[str, Callable[..., Any]]:
    """What is compared, by name."""
    return {"xla": xla(), "chunked": chunked(), WINDOW: window(RADIUS)}


def inputs(tokens: int, dtype: str) -> list[jax.Array]:
    """Random q, k, v."""
    return [jax.random.normal(jax.random.key(i), (1, tokens, HEADS, WIDTH)).astype(dtype) for i in range(3)]


def resident(field: str) -> float:
    """MiB of this process: "VmRSS" now, "VmHWM" the most since `/proc/self/clear_refs` was last told 5."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def growth(name: str, tokens: int, dtype: str) -> float:
    """By how many MiB a second call of one contender makes this process grow at most."""
    arguments, program = inputs(tokens, dtype), jax.jit(contenders()[name])
    jax.block_until_ready(program(*arguments))  # and its result is dropped
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    jax.block_until_ready(program(*arguments))
    return resident("VmHWM") - before


def bench(tokens: int, dtype: str, repeats: int, python: str | None = None) -> dict[str, Any]:
    """One row: a call of every contender at one length in one dtype.

    Args:
      repeats: measured calls of each, after one that is thrown away.
      python: the interpreter with torch; None leaves torch out.
    """
    arguments = inputs(tokens, dtype)
    row: dict[str, Any] = {"tokens": tokens, "heads": HEADS, "head_width": WIDTH, "dtype": dtype, "repeats": repeats}
    row["load_before"] = os.getloadavg()[0]  # of other work too: CPU seconds bear it better than seconds
    programs, times = {}, {}
    for name, function in contenders().items():
        start = time.perf_counter()
        program = jax.jit(function).lower(*arguments).compile()
        row[name] = {"compile_seconds": time.perf_counter() - start, "planned_memory_mib": peak_memory(program) / 2**20}
        needs, free = peak_memory(program), available_memory()
        if jax.default_backend() == "cpu" and needs > 0.7 * free:
            row[name]["skipped"] = f"needs {needs / 2**30:.1f} GiB of {free / 2**30:.1f} GiB that are free"
            continue
        programs[name] = program
        if jax.default_backend() == "cpu" and pathlib.Path("/proc/self/clear_refs").exists():
            command = [sys.executable, "-m", "experiments.attention", "--growth-of", name]
            command += ["--tokens", str(tokens), "--dtypes", dtype]
            grown = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
            row[name]["memory_growth_mib"] = float(grown)
    outputs = {name: jax.block_until_ready(program(*arguments)) for name, program in programs.items()}
    if "xla" in outputs:
        error = jnp.abs(outputs["chunked"].astype(jnp.float32) - outputs["xla"].astype(jnp.float32)).max()
        row["chunked"]["largest_difference_from_xla"] = float(error)
    del outputs
    worker = TorchAttention(python, tokens, dtype) if python else None
    for _ in range(repeats):
        for name, program in programs.items():
            run = partial(lambda p: jax.block_until_ready(p(*arguments)), program)
            wall, cpu = measure(run, 1, warm=False)
            times.setdefault(name, []).append((wall[0], cpu[0]))
        if worker:
            answer = worker.step()
            times.setdefault("torch_sdpa", []).append((answer["seconds"], answer["cpu_seconds"]))
    if worker:
        worker.close()
        row["torch_sdpa"] = {"torch": worker.ready["torch"]}
    for name, values in times.items():
        wall, cpu = (statistics.median(column) for column in zip(*values, strict=True))
        flops = 4 * HEADS * WIDTH * pairs(name, tokens)
        row[name] |= {
            "seconds": wall,
            "seconds_min": min(w for w, _ in values),
            "seconds_max": max(w for w, _ in values),
            "cpu_seconds": cpu,
            "gflops": flops / 1e9,
            "gflops_per_second": flops / wall / 1e9,
        }
    return row


def random_list(tokens: int, block_q: int, block_k: int, density: float) -> BlockList:
    """For every head and block of queries so large a share of the blocks of keys, at random, in ascending order."""
    n_q, n_k = -(-tokens // block_q), -(-tokens // block_k)
    n = max(1, round(density * n_k))
    order = np.argsort(np.random.default_rng(0).random((1, HEADS, n_q, n_k)), -1)[..., :n]
    counts = jnp.full((1, HEADS, n_q), n, jnp.int32)
    return BlockList(jnp.asarray(np.sort(order, -1), jnp.int32), counts, block_q, block_k)


def bench_lists(tokens: int, dtype: str, block_q: int, block_k: int, repeats: int) -> dict[str, Any]:
    """One row: calls with lists of each density at one length, beside the dense call, turn by turn.

    Args:
      repeats: measured calls of each, after one that is thrown away.
    """
    arguments = inputs(tokens, dtype)
    row: dict[str, Any] = {"tokens": tokens, "heads": HEADS, "head_width": WIDTH, "dtype": dtype, "repeats": repeats}
    row |= {"block_q": block_q, "block_k": block_k, "load_before": os.getloadavg()[0]}
    lists = {f"density {density:g}": random_list(tokens, block_q, block_k, density) for density in DENSITIES}
    calls: dict[str, Callable[[], Any]] = {}
    for name, blocks in [("dense", None), *lists.items()]:
        program = jax.jit(lambda q, k, v, blocks: chunked()(q, k, v, blocks=blocks))
        program = program.lower(*arguments, blocks).compile()
        calls[name] = partial(lambda p, blocks: jax.block_until_ready(p(*arguments, blocks)), program, blocks)
        calls[name]()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, run in calls.items():
            wall, cpu = measure(run, 1, warm=False)
            times[name].append((wall[0], cpu[0]))
    for name, values in times.items():
        wall, cpu = (statistics.median(column) for column in zip(*values, strict=True))
        row[name] = {"seconds": wall, "seconds_min": min(values)[0], "seconds_max": max(values)[0], "cpu_seconds": cpu}
    for name, blocks in lists.items():
        row[name]["listed"] = blocks.indices.shape[-1] / -(-tokens // block_k)
        row[name]["over_dense"] = row[name]["seconds"] / row["dense"]["seconds"]
    return row


def measure_lists(options: argparse.Namespace, path: pathlib.Path) -> None:
    """Every row of lists that is not in the file yet."""
    for dtype in options.dtypes:
        for tokens in options.tokens:
            for block_q, block_k in BLOCKS:
                key = (tokens, dtype, block_q, block_k)
                if key in {tuple(row[k] for k in ("tokens", "dtype", "block_q", "block_k")) for row in read_rows(path)}:
                    continue
                row = bench_lists(tokens, dtype, block_q, block_k, options.repeats)
                append_row(path, {**row, "provenance": provenance()})
                parts = [f"{name} {1e3 * row[name]['seconds']:8.1f} ms" for name in row if name.startswith("den")]
                print(f"{tokens:6} {dtype:8} {block_q:4} x {block_k:4}  {'  '.join(parts)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--dtypes", nargs="+", default=DTYPES, choices=DTYPES)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--torch-python", help="interpreter that has the parity extra; without it torch is left out")
    parser.add_argument("--lane", default=f"jax{''.join(jax.__version__.split('.')[:2])}", help="name of the file")
    parser.add_argument("--out", type=pathlib.Path, help="file of rows, instead of the lane's")
    parser.add_argument("--lists", action="store_true", help="lists of blocks by density, instead")
    parser.add_argument("--growth-of", choices=contenders(), help="only print how much memory a call of it takes")
    options = parser.parse_args()
    if options.growth_of:
        print(growth(options.growth_of, options.tokens[0], options.dtypes[0]))
        return
    path = options.out or RESULTS / "attention" / f"{options.lane}{'_lists' if options.lists else ''}.jsonl"
    if options.lists:
        measure_lists(options, path)
        return
    for dtype in options.dtypes:
        top = None
        for tokens in options.tokens:
            if (tokens, dtype) in {(row["tokens"], row["dtype"]) for row in read_rows(path)}:
                continue
            top = top or ceiling(dtype)
            row = bench(tokens, dtype, options.repeats, options.torch_python)
            source = provenance()
            if options.torch_python:
                source["command"] = source["command"].replace(options.torch_python, "PYTHON_WITH_TORCH")
            append_row(path, {**row, "ceiling_gflops_per_second": top, "provenance": source})
            for name in ("xla", "chunked", WINDOW, "torch_sdpa"):
                part = row.get(name, {})
                if "seconds" in part:
                    print(
                        f"{tokens:6} {dtype:8} {name:10} {1e3 * part['seconds']:9.1f} ms  CPU "
                        f"{1e3 * part['cpu_seconds']:9.1f} ms  {part['gflops_per_second']:5.0f} GFLOP/s",
                        flush=True,
                    )
                elif part:
                    print(f"{tokens:6} {dtype:8} {name:10} left out: {part['skipped']}", flush=True)


if __name__ == "__main__":
    main()
