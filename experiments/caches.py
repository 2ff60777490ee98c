"""Every cache on the shipped model: operations, seconds, and how far its images are from the uncached ones.

  python -m experiments.caches                          every method of the list that is not measured yet, both parts
  python -m experiments.caches --parts speed --methods fora dbcache
  python -m experiments.caches --table                  the measured rows as a Markdown table

Samples of one seed, 50 steps, guidance as the shipped configuration has it. Speed: medians of batches that alternate
with the uncached sampler's, both compiled ahead of time; `realised` is the ratio of seconds over the ratio of
operations (`difax.cost`): 1 would be a cache that costs nothing. Quality: PSNR and SSIM to the uncached images of the
same noise; agreement with the requested label and the Frechet distance to real images are the classifier's
(`difax.judge`), beside those of the uncached images and the real-to-real control. Calibrated methods are
calibrated first, on other seeds; their files stay in experiments/results/caches/calibrated. Rows go to
experiments/results/caches/LANE.jsonl; a row that is there already is not measured again.
"""

from __future__ import annotations

import argparse
import pathlib
import statistics
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from difax.build import FITS, Run, build_run, load_weights, save_by_stage
from difax.calibrate import Sampler, calibrate, fit, save_json, search
from difax.config import load_config, override
from difax.contracts import Params
from difax.cost import model_cost, run_cost
from difax.decisions import averaged, strip
from difax.images import to_uint8
from difax.judge import judge_samples, make_judge
from difax.metrics import psnr, ssim
from difax.noise import sample_keys
from difax.pareto import PSNR_LIMIT
from difax.report import peak_memory
from difax.sample import initial_noise
from experiments.provenance import RESULTS, append_row, provenance, read_rows

CONFIG, CALIBRATION_SEED, ICC_RANK = "fmnist_dit", 1_000, 32
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
    "fastcache, fitted": ("fastcache", {}, "fastcache"),
    "fastercache": ("fastercache", {}, None),
    "toca": ("toca", {}, None),
    "duca": ("duca", {}, None),
    "toca, random score": ("toca", {"score": "random"}, None),
    "tokencache, random score": ("tokencache", {"score": "random"}, None),
    "icc, rank 32": ("icc", {}, "icc"),
    "scheduled 0.4, searched": ("scheduled", {}, "scheduled"),
    "dbcache F1 W4 0.12 MC3 + fora 2": (
        "dbcache+fora",
        {
            "dbcache.threshold": 0.12,
            "dbcache.first": 1,
            "dbcache.warmup": 4,
            "dbcache.max_continuous": 3,
            "fora.interval": 2,
        },
        None,
    ),
    "teacache 0.1 + toca": ("teacache+toca", {"teacache.threshold": 0.1}, None),
}


def prepared(method: str, base: dict[str, Any], folder: pathlib.Path, params: Params) -> tuple[Run, dict[str, Any]]:
    """The run of a method, calibrated if it needs that, and the settings that it has."""
    cache, settings, technique = METHODS[method]
    if technique is not None:
        file = calibrated(technique, base, folder, params)
        settings = {**settings, "file": str(file)}
    named = [("cache.name", cache), *((f"cache.{k}", v) for k, v in settings.items())]
    shown = {k: v for k, v in settings.items() if k != "file"}
    return build_run(override(base, named)), {"cache": cache, **shown, "calibrated": technique is not None}


def calibrated(technique: str, base: dict[str, Any], folder: pathlib.Path, params: Params) -> pathlib.Path:
    """The file of a technique that is calibrated on the uncached run, made where it is missing."""
    file = folder / f"{technique}.{'npz' if technique in FITS else 'json'}"
    if file.exists():
        return file
    run = build_run(base)
    sampler = Sampler(run, run.prepare(params), np.arange(run.model.classes), CALIBRATION_SEED)
    tell = lambda text: print(f"  {technique}: {text}", file=sys.stderr, flush=True)  # noqa: E731
    folder.mkdir(parents=True, exist_ok=True)
    if technique == "scheduled":
        save_json(file, search(sampler, 0.4, 10, tell, rounds=6))
    elif technique in FITS:
        save_by_stage(file, fit(technique, sampler, 20, 10, tell, ICC_RANK))
    else:
        save_json(file, calibrate(technique, sampler, 20, 10, tell))
    return file


class Program:
    """One compiled sampler, and its draws."""

    def __init__(self, run: Run, params: Params, seed: int, batch: int):
        self.run, self.seed, self.batch = run, seed, batch
        self.params = jax.block_until_ready(run.prepare(params))
        self.rows, self.scale = jax.tree.map(jnp.asarray, run.rows), jnp.float32(run.scale)
        start = time.perf_counter()
        self.compiled = run.sampler().lower(self.params, *self.inputs(0), self.rows, self.scale).compile()
        self.compile_seconds = time.perf_counter() - start

    def inputs(self, index: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        keys = sample_keys(self.seed, self.batch, index * self.batch)
        labels = jnp.arange(index * self.batch, (index + 1) * self.batch, dtype=jnp.int32) % self.run.model.classes
        return initial_noise(self.run.process, keys, self.run.model.input_shape), keys, labels

    def draw(self, index: int) -> tuple[np.ndarray, Any, float]:
        x, keys, labels = jax.block_until_ready(self.inputs(index))
        start = time.perf_counter()
        samples, trace = jax.block_until_ready(self.compiled(self.params, x, keys, labels, self.rows, self.scale))
        return np.asarray(samples), jax.tree.map(np.asarray, trace), time.perf_counter() - start


def speed(run: Run, plain: Program, params: Params, repeats: int) -> dict[str, Any]:
    """Seconds and operations of a method over those of the uncached sampler, turn by turn."""
    program = Program(run, params, plain.seed, plain.batch)
    turns = []
    for index in range(repeats + 1):
        _, trace, cached = program.draw(index)
        _, whole, uncached = plain.draw(index)
        if index:  # the first touches its memory
            cost = model_cost(run.model, program.params, run.attention)
            turns.append((cached, uncached, run_cost(cost, trace), run_cost(cost, whole)))
    cached, uncached, flops, all_flops = (statistics.median(column) for column in zip(*turns, strict=True))
    flops_ratio, seconds_ratio = all_flops / flops, uncached / cached
    return {
        "gflops_per_image": flops / 1e9,
        "seconds_per_image": cached / plain.batch,
        "uncached_seconds_per_image": uncached / plain.batch,
        "flops_ratio": flops_ratio,
        "seconds_ratio": seconds_ratio,
        "realised": seconds_ratio / flops_ratio,
        "realised_turns": [round(b * d / (a * c), 4) for a, b, d, c in turns],
        "batch": plain.batch,
        "compile_seconds": program.compile_seconds,
        "peak_memory_mib": peak_memory(program.compiled) / 2**20,
    }


def quality(run: Run, plain: Program, params: Params, samples: int, judge: Any) -> dict[str, Any]:
    """How far the images of a method are from the uncached ones, and what the judge says of them."""
    program, batches = Program(run, params, plain.seed, plain.batch), -(-samples // plain.batch)
    images, wanted, traces = [], [], []
    for index in range(batches):
        cached, trace, _ = program.draw(index)
        images.append(cached)
        traces.append(trace)
        if index not in UNCACHED:
            UNCACHED[index] = plain.draw(index)[0]
        wanted.append(UNCACHED[index])
    cost = model_cost(run.model, program.params, run.attention)
    together, other = np.concatenate(images), np.concatenate(wanted)
    labels = np.arange(len(together)) % run.model.classes
    # a distance between sets needs more samples than the judge has features
    found = judge_samples(judge, to_uint8(together), labels) if len(labels) >= 300 else {}
    each = [min(psnr(a, b), PSNR_LIMIT) for a, b in zip(together, other, strict=True)]
    return {
        "gflops_per_image": sum(run_cost(cost, t) for t in traces) / batches / 1e9,
        "computed_fraction": float(np.mean([np.mean(c) for c in averaged(traces).computed.values()])),
        "decisions": strip(traces[0]),
        "psnr": {"mean": float(np.mean(each)), "low": float(np.quantile(each, 0.05))},
        "ssim": {"mean": float(ssim(together, other).mean())},
        **{key: found.get(key) for key in ("agreement", "frechet", "real_frechet")},
        "samples": len(labels),
    }


def line(method: str, part: str, row: dict[str, Any]) -> str:
    """One row for people."""
    if part == "speed":
        return (
            f"{method:30} FLOPs x{row['flops_ratio']:.2f}  seconds x{row['seconds_ratio']:.2f}  realised "
            f"{row['realised']:.2f}"
        )
    judged = ""
    if row["agreement"]:
        judged = f"  agreement {row['agreement']['rate']:.3f}  Frechet {row['frechet']:.2f}"
    return f"{method:30} PSNR {row['psnr']['mean']:.1f}  SSIM {row['ssim']['mean']:.3f}{judged}"


def table(rows: list[dict[str, Any]]) -> str:
    """The rows of a file as a Markdown table, the most operations first."""
    parts = {part: {r["method"]: r for r in rows if r["part"] == part} for part in ("speed", "quality")}
    lines = [
        "| method | GFLOPs an image | FLOPs | seconds | realised | PSNR (5 % quantile) | SSIM | agreement | Frechet |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    both = [m for m in parts["speed"] if m in parts["quality"]]
    for method in sorted(both, key=lambda m: -parts["speed"][m]["gflops_per_image"]):
        s, q = parts["speed"][method], parts["quality"][method]
        psnr_ = "" if method == "none" else f"{q['psnr']['mean']:.1f} ({q['psnr']['low']:.1f})"
        agreement = q["agreement"]
        lines.append(
            f"| {method} | {s['gflops_per_image']:.0f} | x{s['flops_ratio']:.2f} | x{s['seconds_ratio']:.2f} | "
            f"{s['realised']:.2f} | {psnr_} | {q['ssim']['mean']:.3f} | {agreement['rate']:.3f} "
            f"({agreement['low']:.3f}-{agreement['high']:.3f}) | {q['frechet']:.2f} |"
        )
    return "\n".join(lines)


UNCACHED: dict[int, np.ndarray] = {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["none", *METHODS])
    parser.add_argument("--parts", nargs="+", default=("speed", "quality"), choices=("speed", "quality"))
    parser.add_argument("--samples", type=int, default=500, help="of quality, in whole batches (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5, help="batches that are timed (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", metavar="DIR", help="folder of the data set's files")
    parser.add_argument("--calibrated", type=pathlib.Path, default=RESULTS / "caches" / "calibrated")
    parser.add_argument("--lane", default=f"jax{''.join(jax.__version__.split('.')[:2])}", help="name of the file")
    parser.add_argument("--out", type=pathlib.Path, help="file of rows, instead of the lane's")
    parser.add_argument("--table", action="store_true", help="print what is measured, and measure nothing")
    options = parser.parse_args()
    path = options.out or RESULTS / "caches" / f"{options.lane}.jsonl"
    if options.table:
        print(table(read_rows(path)))
        return
    for method in options.methods:
        if method not in ("none", *METHODS):
            parser.error(f"unknown method {method!r}; allowed: none, {', '.join(METHODS)}")
    base = load_config(CONFIG)
    run = build_run(base)
    model, params, _ = load_weights(base, run.model)
    plain = Program(run._replace(model=model), params, options.seed, options.batch)
    judge = make_judge(options.data) if "quality" in options.parts else None
    there = {(row["method"], row["part"]) for row in read_rows(path)}
    for part in options.parts:
        for method in options.methods:
            if (method, part) in there:
                continue
            if method == "none":
                run, settings = build_run(base), {"cache": "none"}
            else:
                run, settings = prepared(method, base, options.calibrated, params)
            if part == "speed":
                row = speed(run, plain, params, options.repeats)
            else:
                row = quality(run, plain, params, options.samples, judge)
            append_row(path, {"method": method, "part": part, **settings, **row, "provenance": provenance()})
            print(line(method, part, row), flush=True)


if __name__ == "__main__":
    main()
