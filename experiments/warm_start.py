"""How long a first and a second start take: seconds of compiling, seconds to the first image, and what was compiled.

  python -m experiments.warm_start
  python -m experiments.warm_start --configs fmnist_dit --turns 1

Each start is `difax sample` in a process of its own, from the import on; the first one with empty caches, the second
with what the first has kept, and beside both a start that keeps nothing (--no-compile-cache). A turn is the three of
them; a row has the medians of all turns.

compiled: how many programs XLA compiled in that process, the small ones of reading and preparing weights included. It
is counted by JAX's own events: /jax/core/compile/backend_compile_duration is one request to the compiler or to the
cache before it, /jax/compilation_cache/cache_hits one that the cache answered; a sampler that difax loads makes no
request. found: those answered by the cache. lowered: programs that were made into MLIR. "compile_seconds" and "program"
are of the table that the command prints. Rows go to experiments/results/warm_start/LANE.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from typing import Any

from experiments.provenance import RESULTS, append_row, provenance

FLAGS = {
    "fmnist_dit": ["--config", "fmnist_dit", "--labels", "8"],
    "flux_tiny": ["--config", "flux_tiny"],
}

CHILD = """
import time
start = time.perf_counter()
import collections, json, sys
import jax
seen = collections.Counter()
jax.monitoring.register_event_listener(lambda event, **_: seen.update([event]))
jax.monitoring.register_event_duration_secs_listener(lambda event, _, **__: seen.update([event]))
from difax.cli import main
code = main(sys.argv[1:])
seconds = time.perf_counter() - start
asked, found = seen["/jax/core/compile/backend_compile_duration"], seen["/jax/compilation_cache/cache_hits"]
lowered = seen["/jax/core/compile/jaxpr_to_mlir_module_duration"]
row = {"seconds": seconds, "compiled": asked - found, "found": found, "lowered": lowered}
print(json.dumps(row), file=sys.stderr)
sys.exit(code)
"""


def start(flags: list[str], cache: str, keep: bool) -> dict[str, Any]:
    """One `difax sample` in a process of its own, whose caches are in a folder."""
    drop = ("JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE")
    env = {k: v for k, v in os.environ.items() if k not in drop} | {"XDG_CACHE_HOME": cache}
    more = ["--quiet", "--json", "--out", os.path.join(cache, "image.npz"), *([] if keep else ["--no-compile-cache"])]
    command = [sys.executable, "-c", CHILD, "sample", *flags, *more]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"difax sample {' '.join(flags)} ended with exit code {done.returncode}: {done.stderr}")
    table, counted = json.loads(done.stdout), json.loads(done.stderr.strip().splitlines()[-1])
    run = table["seconds_per_image"] * table["images"]
    return {"program": table["program"], "compile_seconds": table["compile_seconds"], "run_seconds": run, **counted}


def measure(name: str, turns: int) -> dict[str, Any]:
    """A row: medians of the three starts of a configuration, and the counts, which are the same in every turn."""
    starts: dict[str, list[dict[str, Any]]] = {"nothing kept": [], "first": [], "second": []}
    sizes = []
    for turn in range(turns):
        with tempfile.TemporaryDirectory() as cache:
            for kind in starts:
                starts[kind].append(start(FLAGS[name], cache, kind != "nothing kept"))
                print(f"{name} {turn + 1}/{turns} {kind}: {starts[kind][-1]}", file=sys.stderr, flush=True)
            sizes.append(sum(e.stat().st_size for e in os.scandir(os.path.join(cache, "difax", "executables"))))
    row: dict[str, Any] = {"config": name, "turns": turns, "executable_bytes": int(statistics.median(sizes))}
    for kind, found in starts.items():
        middle = {
            key: round(statistics.median(one[key] for one in found), 3)
            for key in ("compile_seconds", "run_seconds", "seconds")
        }
        same = {key: sorted({one[key] for one in found}) for key in ("program", "compiled", "found", "lowered")}
        row[kind] = {**middle, **{key: values[0] if len(values) == 1 else values for key, values in same.items()}}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", nargs="+", default=list(FLAGS), choices=FLAGS)
    parser.add_argument("--turns", type=int, default=5, help="of which the median is taken (default: %(default)s)")
    parser.add_argument("--lane", default="jax010", help="name of the file of rows (default: %(default)s)")
    options = parser.parse_args()
    for name in options.configs:
        row = {**measure(name, options.turns), **provenance()}
        append_row(RESULTS / "warm_start" / f"{options.lane}.jsonl", row)
        first, second = row["first"], row["second"]
        print(
            f"{name}: compile {first['compile_seconds']} -> {second['compile_seconds']} s, to the first image "
            f"{first['seconds']} -> {second['seconds']} s, compiled {first['compiled']} -> {second['compiled']}"
        )


if __name__ == "__main__":
    main()
