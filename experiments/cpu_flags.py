"""XLA's CPU flags compared on one denoising step of DiT, turn by turn in a process each.

  python -m experiments.cpu_flags [--model B/2] [--batch 1] [--dtypes float32 bfloat16] [--lane NAME]

Every flag set has a process of its own with the step compiled; the processes run one at a time in turn, so that what
else the machine does falls on all alike. A flag that this jaxlib does not know is reported as such. Rows go to
experiments/results/cpu_flags/LANE.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

from experiments.provenance import RESULTS, provenance

FLAGS = {
    "default": "",
    "xnnpack off": "--xla_cpu_use_xnnpack=false",
    "XNNPACK dots": "--xla_cpu_experimental_xnn_fusion_type=dot",
    "XNNPACK graphs": "--xla_cpu_experimental_xnn_graph_fusion_mode=XNN_GRAPH_FUSION_MODE_GREEDY",
    "YNN dots": "--xla_cpu_experimental_ynn_fusion_type=+dot",
    "oneDNN": "--xla_cpu_use_onednn=true --xla_cpu_experimental_onednn_custom_call=true",
    "vectors of 512 bits": "--xla_cpu_prefer_vector_width=512",
    "fast math": "--xla_cpu_enable_fast_math=true",
    "preset for speed": "--xla_cpu_opt_preset=FAST_RUNTIME",
    "one-threaded products": "--xla_cpu_multi_thread_eigen=false",
}


def worker(variant: str, batch: int, dtype: str) -> None:
    """Compiles the step, then runs it once for each line on stdin."""
    import jax
    import jax.numpy as jnp

    from difax.core.trunk import forward
    from difax.models.dit import dit

    model = dit(variant, dtype=dtype)
    params = jax.jit(model.init)(jax.random.key(0))
    params = jax.tree.map(lambda a: (a + 0.02).astype(dtype), params)
    x = jax.random.normal(jax.random.key(1), (batch, *model.input_shape))
    time_, labels = jnp.full((batch,), 500.0), jnp.arange(batch)
    step = jax.jit(lambda p, x: forward(model, p, x, time_, labels))
    start = time.perf_counter()
    program = step.lower(params, x).compile()
    compile_seconds = time.perf_counter() - start
    jax.block_until_ready(program(params, x))
    print(json.dumps({"compile_seconds": compile_seconds}), flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        jax.block_until_ready(program(params, x))
        print(json.dumps(time.perf_counter() - start), flush=True)


def compare(variant: str, batch: int, dtype: str, repeats: int) -> list[dict[str, Any]]:
    """One row per flag set: median seconds and their ratio to the default's."""
    arguments = [sys.executable, "-m", "experiments.cpu_flags", "--worker", "--model", variant]
    arguments += ["--batch", str(batch), "--dtypes", dtype]
    rows, processes = [], {}
    for name, flags in FLAGS.items():
        process = subprocess.Popen(
            arguments,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"XLA_FLAGS": flags},
        )
        assert process.stdout is not None
        first = process.stdout.readline()
        if first:
            processes[name] = process, json.loads(first)["compile_seconds"], []
        else:
            error = process.communicate()[1]
            unknown = "Unknown flag" in error
            why = "unknown to this jaxlib" if unknown else (error.strip().splitlines() or ["no message"])[-1][:160]
            rows.append({"flags": name, "text": flags, "refused": why})
    for turn in range(repeats):  # each turn starts with another one: the first of a turn is slower by some percent
        order = list(processes.values())
        order = order[turn % len(order) :] + order[: turn % len(order)]
        for process, _, seconds in order:
            process.stdin.write("\n")
            process.stdin.flush()
            seconds.append(json.loads(process.stdout.readline()))
    base = statistics.median(processes["default"][2])
    for name, (process, compile_seconds, seconds) in processes.items():
        process.communicate(input="")
        median = statistics.median(seconds)
        row = {"flags": name, "text": FLAGS[name], "seconds": median, "over_default": median / base}
        rows.append({**row, "seconds_min": min(seconds), "compile_seconds": compile_seconds})
    return [{"model": f"DiT-{variant}", "batch": batch, "dtype": dtype, **row} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="B/2")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--lane", help="name of the file; jax010, jax012 ...")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.model, options.batch, options.dtypes[0])
        return
    rows = []
    for dtype in options.dtypes:
        for row in compare(options.model, options.batch, dtype, options.repeats):
            rows.append(row)
            what = row.get("refused") or f"{row['seconds']:.3f} s  x{row['over_default']:.2f}"
            print(f"{dtype:9} {row['flags']:24} {what}", flush=True)
    where = provenance()
    lane = options.lane or f"jax{''.join(where['versions']['jax'].split('.')[:2])}"
    path = RESULTS / "cpu_flags" / f"{lane}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"rows": rows, "provenance": where}, indent=1) + "\n")


if __name__ == "__main__":
    main()
