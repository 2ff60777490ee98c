"""Every cache on the shipped model: operations, seconds, and how far its images are from the uncached ones.

  python -m experiments.caches                          every method of the list that is not measured yet
  python -m experiments.caches --methods fora dbcache   these

Samples of one seed, 50 steps, guidance as the shipped configuration has it. A method's seconds are medians of batches
that alternate with the uncached sampler's, both compiled ahead of time. `realised` is the ratio of seconds over the
ratio of operations (`difax.cost`): 1 would be a cache that costs nothing. PSNR and SSIM compare with the uncached
images of the same noise; agreement with the requested label and the Frechet distance to real images are the
classifier's (`experiments.evaluate`), beside those of the uncached images and the real-to-real control. Calibrated
methods are calibrated first, on other seeds. Rows go to experiments/results/caches/LANE.jsonl; a row that is there
already is not measured again.
"""

from __future__ import annotations

import argparse
import pathlib
import statistics
import sys
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from difax.build import Run, build_run, choose, load_weights
from difax.calibrate import Sampler, calibrate, save_json, search
from difax.config import load_config, override
from difax.contracts import Params
from difax.cost import model_cost, run_cost
from difax.decisions import averaged, strip
from difax.images import to_uint8
from difax.metrics import psnr, ssim
from difax.noise import sample_keys
from difax.report import peak_memory
from difax.sample import initial_noise
from experiments.evaluate import judge_samples, make_judge
from experiments.provenance import RESULTS, append_row, provenance, read_rows

CONFIG, BATCH, CALIBRATION_SEED = "fmnist_dit", 20, 1_000
# name -> (cache, settings, what it is calibrated with)
METHODS: dict[str, tuple[str, dict[str, Any], str | None]] = {
    "fora 2": ("fora", {"interval": 2}, None),
    "fora 3": ("fora", {"interval": 3}, None),
    "fora 5": ("fora", {"interval": 5}, None),
    "fora_dit 3": ("fora_dit", {"interval": 3}, None),
    "taylorseer 3, order 1": ("taylorseer", {"interval": 3, "order": 1}, None),
    "taylorseer 4, order 2": ("taylorseer", {"interval": 4, "order": 2}, None),
    "taylorseer 6, order 4": ("taylorseer", {"interval": 6, "order": 4}, None),
    "taylorseer_diffusers 5": ("taylorseer_diffusers", {}, None),
    "ab_cache": ("ab_cache", {}, None),
    "delta_dit": ("delta_dit", {}, None),
    "pab": ("pab", {}, None),
    "frdiff": ("frdiff", {}, None),
    "attention_map": ("attention_map", {}, None),
    "smoothcache 0.18": ("smoothcache", {"alpha": 0.18}, "smoothcache"),
    "smoothcache 0.10": ("smoothcache", {"alpha": 0.1}, "smoothcache"),
    "block_caching": ("block_caching", {}, "block_caching"),
    "bacache 20": ("bacache", {"updates": 20}, "bacache"),
    "magcache": ("magcache", {}, "magcache"),
    "teacache 0.1": ("teacache", {"threshold": 0.1}, None),
    "teacache 0.2": ("teacache", {"threshold": 0.2}, None),
    "teacache fitted 0.2": ("teacache", {"threshold": 0.2}, "teacache"),
    "fbcache 0.08": ("fbcache", {"threshold": 0.08}, None),
    "fbcache 0.12": ("fbcache", {"threshold": 0.12}, None),
    "dbcache F8 W8 0.08": ("dbcache", {"threshold": 0.08, "first": 8}, None),
    "dbcache F1 W4 0.12 MC3": ("dbcache", {"threshold": 0.12, "first": 1, "warmup": 4, "max_continuous": 3}, None),
    "dbcache F1 W4 0.12 MC3 taylor": (
        "dbcache",
        {"threshold": 0.12, "first": 1, "warmup": 4, "max_continuous": 3, "forecast": "taylor"},
        None,
    ),
    "dbprune": ("dbprune", {}, None),
    "adacache": ("adacache", {}, None),
    "fastcache": ("fastcache", {}, None),
    "fastercache": ("fastercache", {}, None),
    "toca": ("toca", {}, None),
    "duca": ("duca", {}, None),
    "scheduled 0.4, searched": ("scheduled", {}, "scheduled"),
}


def prepared(method: str, base: dict[str, Any], folder: pathlib.Path, params: Params) -> tuple[Run, dict[str, Any]]:
    """The run of a method, calibrated if it needs that, and the settings that it has."""
    cache, settings, technique = METHODS[method]
    if technique is not None:
        run = build_run(base)
        sampler = Sampler(run, run.prepare(params), np.arange(run.model.classes), CALIBRATION_SEED)
        file = folder / f"{technique}.json"
        if not file.exists():
            tell = lambda text: print(f"  {technique}: {text}", file=sys.stderr, flush=True)  # noqa: E731
            if technique == "scheduled":
                save_json(file, search(sampler, 0.4, 10, tell, rounds=6))
            else:
                save_json(file, calibrate(technique, sampler, 20, 10, tell))
        settings = {**settings, "file": str(file)}
    named = [("cache.name", cache), *((f"cache.{k}", v) for k, v in settings.items())]
    shown = {k: v for k, v in settings.items() if k != "file"}
    return build_run(override(base, named)), {"cache": cache, **shown, "calibrated": technique is not None}


class Program:
    """One compiled sampler, and its draws."""

    def __init__(self, run: Run, params: Params, seed: int):
        self.run, self.params, self.seed = run, jax.block_until_ready(run.prepare(params)), seed
        sampler = run.sampler()
        self.rows, self.scale = jax.tree.map(jnp.asarray, run.rows), jnp.float32(run.scale)
        start = time.perf_counter()
        self.compiled = sampler.lower(self.params, *self.inputs(0), self.rows, self.scale).compile()
        self.compile_seconds = time.perf_counter() - start

    def inputs(self, batch: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        keys = sample_keys(self.seed, BATCH, batch * BATCH)
        labels = jnp.arange(batch * BATCH, (batch + 1) * BATCH, dtype=jnp.int32) % self.run.model.classes
        return initial_noise(self.run.process, keys, self.run.model.input_shape), keys, labels

    def draw(self, batch: int) -> tuple[np.ndarray, Any, float]:
        x, keys, labels = jax.block_until_ready(self.inputs(batch))
        start = time.perf_counter()
        samples, trace = jax.block_until_ready(self.compiled(self.params, x, keys, labels, self.rows, self.scale))
        return np.asarray(samples), jax.tree.map(np.asarray, trace), time.perf_counter() - start


def measure(
    run: Run, plain: Program, params: Params, samples: int, repeats: int, judge: Any, seed: int
) -> dict[str, Any]:
    """One row: speed over alternating batches, quality over `samples`."""
    program, batches = Program(run, params, seed), -(-samples // BATCH)
    times: dict[str, list[float]] = {"cached": [], "uncached": []}
    images, wanted, traces = [], [], []
    for batch in range(batches):
        cached, trace, seconds = program.draw(batch)
        images.append(cached)
        traces.append(trace)
        times["cached"].append(seconds)
        key = (plain.seed, batch)
        if batch < repeats or key not in UNCACHED:
            UNCACHED[key], _, seconds = plain.draw(batch)
            times["uncached"].append(seconds)
        wanted.append(UNCACHED[key])
    cost, labels = model_cost(run.model, program.params, run.attention), np.arange(batches * BATCH) % run.model.classes
    trace = averaged(traces)
    full = sum(run_cost(cost, t) for t in traces) / batches
    none = 2 * len(run.rows.i) * cost.evaluation if run.guide.halves == 2 else len(run.rows.i) * cost.evaluation
    together, other = np.concatenate(images), np.concatenate(wanted)
    seconds = {k: statistics.median(v[:repeats] or v) for k, v in times.items()}
    flops_ratio, seconds_ratio = none / full, seconds["uncached"] / seconds["cached"]
    # a distance between sets needs more samples than the judge has features
    found = judge_samples(judge, to_uint8(together), labels) if len(labels) >= 300 else {}
    each = [psnr(a, b) for a, b in zip(together, other, strict=True)]
    return {
        "computed_fraction": float(np.mean([np.mean(c) for c in trace.computed.values()])),
        "decisions": strip(traces[0]),
        "gflops_per_image": full / 1e9,
        "seconds_per_image": seconds["cached"] / BATCH,
        "uncached_seconds_per_image": seconds["uncached"] / BATCH,
        "flops_ratio": flops_ratio,
        "seconds_ratio": seconds_ratio,
        "realised": seconds_ratio / flops_ratio,
        "compile_seconds": program.compile_seconds,
        "peak_memory_mib": peak_memory(program.compiled) / 2**20,
        "psnr": {"mean": float(np.mean(each)), "low": float(np.quantile(each, 0.05))},
        "ssim": {"mean": float(ssim(together, other).mean())},
        **{key: found.get(key) for key in ("agreement", "frechet", "real_frechet")},
        "samples": len(labels),
    }


def line(method: str, row: dict[str, Any]) -> str:
    """One row for people."""
    judged = ""
    if row["agreement"]:
        judged = f"  agreement {row['agreement']['rate']:.3f}  Frechet {row['frechet']:.2f}"
    return (
        f"{method:30} FLOPs x{row['flops_ratio']:.2f}  seconds x{row['seconds_ratio']:.2f}  realised "
        f"{row['realised']:.2f}  PSNR {row['psnr']['mean']:.1f}  SSIM {row['ssim']['mean']:.3f}{judged}"
    )


UNCACHED: dict[tuple[int, int], np.ndarray] = {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["none", *METHODS])
    parser.add_argument("--samples", type=int, default=500, help="in whole batches of 20 (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="batches that are timed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", metavar="DIR", help="folder of the data set's files")
    parser.add_argument("--lane", default=f"jax{''.join(jax.__version__.split('.')[:2])}", help="name of the file")
    parser.add_argument("--out", type=pathlib.Path, help="file of rows, instead of the lane's")
    options = parser.parse_args()
    path = options.out or RESULTS / "caches" / f"{options.lane}.jsonl"
    base = load_config(CONFIG)
    run = build_run(base)
    model, params, _ = load_weights(base, run.model)
    plain, judge = Program(run._replace(model=model), params, options.seed), make_judge(options.data)
    there = {row["method"] for row in read_rows(path)}
    with tempfile.TemporaryDirectory() as folder:
        for method in options.methods:
            choose("method", method, ["none", *METHODS])
            if method in there:
                continue
            if method == "none":
                run, settings = build_run(base), {"cache": "none"}
            else:
                run, settings = prepared(method, base, pathlib.Path(folder), params)
            row = measure(run, plain, params, options.samples, options.repeats, judge, options.seed)
            append_row(path, {"method": method, **settings, **row, "provenance": provenance()})
            print(line(method, row), flush=True)


if __name__ == "__main__":
    main()
