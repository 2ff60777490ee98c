"""Quantised weights on DiT-B/2 and on the model that ships: bytes, errors and seconds, side by side.

  python -m experiments.quantisation [--model B/2] [--batch 4] [--lane NAME]

Steps: every recipe's step of DiT-B/2 on latents [batch, 32, 32, 4], all in one process turn by turn, with random
weights of standard deviation 1/sqrt(inputs) everywhere; error is that of the network's output against float32.
Layers: the largest and the mean relative error of a weight, over all layers. Images: the shipped Fashion-MNIST DiT,
50 Euler steps with guidance 2, 100 images, against the float32 images of the same seeds.
Rows go to experiments/results/quantisation/LANE.json.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import difax
from difax.accel.quant import QUANTS
from difax.core.qtensor import QTensor, cast, dequantize, is_quantized, quantize_params, size_in_bytes
from difax.core.trunk import forward
from difax.models.dit import dit
from difax.study.metrics import psnr
from difax.study.profile import ceiling
from experiments.bench_step import measure
from experiments.provenance import RESULTS, provenance

DTYPES = ("float32", "bfloat16")


def randomised(variant: str) -> Any:
    """DiT parameters with no zeros: the published initialisation would hide every block."""
    spec = jax.eval_shape(dit(variant).init, jax.random.key(0))
    leaves, tree = jax.tree.flatten(spec)
    rng = np.random.default_rng(0)

    def random(leaf: Any) -> jax.Array:
        fan_in = leaf.shape[-2] if leaf.ndim > 1 else 100
        return jnp.asarray(rng.normal(size=leaf.shape) / np.sqrt(fan_in), jnp.float32)

    return jax.tree.unflatten(tree, [random(leaf) for leaf in leaves])


def layer_errors(params: Any, quantised: Any) -> dict[str, float]:
    """Largest and mean relative error over the layers of every quantised weight."""
    errors = []
    for w, q in zip(jax.tree.leaves(params), jax.tree.leaves(quantised, is_leaf=is_quantized), strict=True):
        if isinstance(q, QTensor):
            axes = tuple(range(1, w.ndim))
            difference = jnp.sqrt(((dequantize(q) - w) ** 2).sum(axes) / (w**2).sum(axes))
            errors.extend(np.asarray(difference).tolist())
    return {"largest": max(errors), "mean": statistics.mean(errors)} if errors else {"largest": 0.0, "mean": 0.0}


def steps(variant: str, batch: int, repeats: int) -> list[dict[str, Any]]:
    """One row per recipe and compute dtype."""
    params = randomised(variant)
    x = jax.random.normal(jax.random.key(1), (batch, 32, 32, 4))
    times, labels = jnp.full((batch,), 500.0), jnp.arange(batch)
    rows, programs = [], []
    reference = None
    for name, recipe in QUANTS.items():
        for dtype in DTYPES:
            model = dit(variant, dtype=dtype)
            q = quantize_params(params, recipe(model))
            errors = layer_errors(params, q)
            q = jax.block_until_ready(cast(q, dtype))
            step = jax.jit(lambda p, x, model=model: forward(model, p, x, times, labels))
            program = step.lower(q, x).compile()
            out = np.asarray(program(q, x), np.float32)
            reference = out if reference is None else reference
            rows.append(
                {
                    "recipe": name,
                    "dtype": dtype,
                    "model": f"DiT-{variant}",
                    "batch": batch,
                    "mib": size_in_bytes(q) / 2**20,
                    "layer_error": errors,
                    "output_error": float(np.linalg.norm(out - reference) / np.linalg.norm(reference)),
                }
            )
            programs.append((program, q))
            print(f"{name:14} {dtype:8} compiled", flush=True)
    seconds: list[list[float]] = [[] for _ in rows]
    for _ in range(repeats):
        for i, (program, q) in enumerate(programs):
            wall, _ = measure(lambda p=program, q=q: jax.block_until_ready(p(q, x)), 1, warm=False)
            seconds[i] += wall
    base = {row["dtype"]: statistics.median(s) for row, s in zip(rows, seconds, strict=True) if row["recipe"] == "none"}
    for row, s in zip(rows, seconds, strict=True):
        row["seconds"] = statistics.median(s)
        row["over_float32"] = row["seconds"] / base["float32"]
        row["over_bfloat16"] = row["seconds"] / base["bfloat16"]
    return rows


def images(n: int) -> dict[str, Any]:
    """PSNR and relative error of the shipped model's images under every recipe."""
    labels, found, reference, run = np.arange(n) % 10, {}, None, difax.load("fmnist_dit")
    for name in QUANTS:
        drawn = run.replace(quant=name).sample(labels)
        samples = drawn.images.clip(-1, 1)
        reference = samples if reference is None else reference
        found[name] = {
            "psnr": None if name == "none" else float(psnr(samples, reference)),
            "relative_error": float(np.linalg.norm(samples - reference) / np.linalg.norm(reference)),
            "weights_mib": drawn.table["weights_mib"],
        }
        print(f"{name:14} images {found[name]}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="B/2")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--images", type=int, default=100, help="of the shipped model; 0: none")
    parser.add_argument("--lane", default=f"jax{''.join(jax.__version__.split('.')[:2])}", help="name of the file")
    parser.add_argument("--out", type=pathlib.Path, help="file of the report, instead of the lane's")
    options = parser.parse_args()
    rows = steps(options.model, options.batch, options.repeats)
    for row in rows:
        print(
            f"{row['recipe']:14} {row['dtype']:8} {row['mib']:6.0f} MiB  weight error {row['layer_error']['mean']:.4f}"
            f"  output error {row['output_error']:.4f}  {row['seconds']:.3f} s  x{row['over_float32']:.2f} of float32"
            f"  x{row['over_bfloat16']:.2f} of bfloat16",
            flush=True,
        )
    report = {
        "rows": rows,
        "images": images(options.images) if options.images else {},
        "ceiling_gflops_per_second": {dtype: ceiling(dtype) for dtype in DTYPES},
        "provenance": provenance(),
    }
    path = options.out or RESULTS / "quantisation" / f"{options.lane}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
