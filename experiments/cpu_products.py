"""What XLA's CPU backend makes of the products and activations of a DiT: why `difax.core.ops.Trainable` exists.

  python -m experiments.cpu_products [--lane NAME]

Each line times one spelling of the same work for a block of DiT (tokens [8192], width 384): medians of 9 calls in one
process. Rows go to experiments/results/cpu_products/LANE.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from difax.core.ops import weight_gradients, weight_gradients_padded
from difax.study.profile import ceiling
from experiments.bench_step import measure
from experiments.provenance import RESULTS, provenance

B, T, K, N = 32, 256, 384, 1536


def cases(dtype: str) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...], float]]:
    """name -> (function, arguments, operations)."""
    x_BTK, w_KN, dy_BTN = (
        jax.random.normal(jax.random.key(i), shape).astype(dtype)
        for i, shape in enumerate([(B, T, K), (K, N), (B, T, N)])
    )
    x_MK, dy_MN = x_BTK.reshape(-1, K), dy_BTN.reshape(-1, N)
    flops = 2.0 * B * T * K * N
    gelu = jax.nn.gelu
    return {
        "product, folded to two dimensions": (lambda x, w: x @ w, (x_MK, w_KN), flops),
        "product, three dimensions": (lambda x, w: jnp.einsum("btk,kn->btn", x, w), (x_BTK, w_KN), flops),
        "weight gradient, as differentiated": (weight_gradients, (x_MK, dy_MN), flops),
        "weight gradient, padded transpose": (weight_gradients_padded, (x_MK, dy_MN), flops),
        "bias gradient, summed over batch and tokens": (lambda d: d.sum((0, 1)), (dy_BTN,), 0.0),
        "gelu in this dtype": (gelu, (dy_MN,), 0.0),
        "gelu in float32": (lambda a: gelu(a.astype(jnp.float32)).astype(dtype), (dy_MN,), 0.0),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lane", default=f"jax{''.join(jax.__version__.split('.')[:2])}")
    options = parser.parse_args()
    rows = []
    for dtype in ("float32", "bfloat16"):
        top = ceiling(dtype)
        print(f"{dtype}: matmul 2048 at {top:.0f} GFLOP/s")
        for name, (function, arguments, flops) in cases(dtype).items():
            program = jax.jit(function)
            wall, _ = measure(lambda p=program, a=arguments: jax.block_until_ready(p(*a)), 9)
            seconds = statistics.median(wall)
            rows.append({"dtype": dtype, "case": name, "seconds": seconds, "gflops_per_second": flops / seconds / 1e9})
            print(f"  {name:48} {1e3 * seconds:8.2f} ms  {flops / seconds / 1e9:6.0f} GFLOP/s", flush=True)
        rows.append({"dtype": dtype, "case": "matmul 2048", "gflops_per_second": top})
    path = RESULTS / "cpu_products" / f"{options.lane}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"rows": rows, "provenance": provenance()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
