"""Every kind of mesh against one device: the same images, the same decisions, for each model and kind of technique.

  python -m experiments.placements                    eight devices of this host, rows to results/placements
  python -m experiments.placements --models flux_tiny --meshes seq=4,tensor=2

A row has the largest difference of a sample over the largest value of one, and whether the traces are equal. In float32
the order of sums differs from mesh to mesh, by about 1e-6. `int8_w8a8` rounds every row of activations to 255 steps,
so where such a difference lies on the border of two of them the sample differs by a step: those rows show how much
that is, beside `int8_weight`, which rounds no activations.
"""

from __future__ import annotations

import argparse
import pathlib
from typing import Any

import jax
import numpy as np

import difax
from difax.config import mesh_settings
from difax.core.files import read_rows
from experiments.provenance import RESULTS, append_row, provenance

MODELS = (
    "fmnist_smoke",
    "flux_tiny",
    "pixart_tiny",
    "wan_tiny",
    "skip_dit_tiny",
    "sd3_tiny",
    "qwen_image_tiny",
    "flux2_tiny",
    "z_image_tiny",
)
MESHES = (
    "data=2",
    "cfg=2,seq=2",
    "seq=4,ulysses=1",
    "seq=4,ulysses=2",
    "seq=4,tensor=2",
    "data=2,fsdp=2",
    "fsdp=2,tensor=2",
)
TECHNIQUES: dict[str, dict[str, Any]] = {
    "plain": {},
    "fora": {"cache": "fora"},
    "teacache": {"cache": {"name": "teacache", "threshold": 0.3}},
    "toca": {"cache": "toca"},
    "int8_weight": {"quant": "int8_weight"},
    "int8_w8a8": {"quant": "int8_w8a8"},
}
STEPS = 4
# the others are guided by themselves; a scale of 5 makes more of a step of int8 activations
GUIDED: dict[str, dict[str, Any]] = {name: {"guide": "cfg", "scale": 3.0} for name in ("flux_tiny", "flux2_tiny")}
GUIDED["z_image_tiny"] = {"scale": 3.0}


def run_of(model: str, technique: str) -> difax.Run:
    """A small model with random weights, no branch of which is zero."""
    return difax.load(model, weights="random", steps=STEPS, **GUIDED.get(model, {}), **TECHNIQUES[technique])


def drawn(run: difax.Run) -> difax.Result:
    return run.sample([1, 2, 3, 4]) if run.setup.model.classes else run.sample(repeat=4)


def difference(one: difax.Result, other: difax.Result) -> tuple[float, bool]:
    """The largest difference of two results over the largest value, and whether their traces are equal."""
    a, b = np.asarray(one.images), np.asarray(other.images)
    traces = [jax.tree.leaves(result.trace.computed) for result in (one, other)]
    same = all(np.array_equal(x, y) for x, y in zip(*traces, strict=True))
    return float(np.abs(a - b).max() / np.abs(a).max()), same


def meshed(run: difax.Run, mesh: str) -> difax.Run:
    return run.replace(**dict(mesh_settings(mesh)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--meshes", nargs="+", default=MESHES)
    parser.add_argument("--techniques", nargs="+", default=tuple(TECHNIQUES), choices=tuple(TECHNIQUES))
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS / "placements" / "rows.jsonl")
    options = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", 8)
    done = {(r["model"], r["technique"], r["mesh"]) for r in read_rows(options.out)}
    for model in options.models:
        for technique in options.techniques:
            rest = [mesh for mesh in options.meshes if (model, technique, mesh) not in done]
            if not rest:
                continue
            run = run_of(model, technique)
            one = drawn(run)
            for mesh in rest:
                row: dict[str, Any] = {"model": model, "technique": technique, "mesh": mesh}
                try:
                    row["difference"], row["trace_equal"] = difference(one, drawn(meshed(run, mesh)))
                except ValueError as refusal:
                    row["refused"] = str(refusal)
                append_row(options.out, {**row, "provenance": provenance()})
                shown = row.get("refused") or f"{row['difference']:.1e}  traces equal: {row['trace_equal']}"
                print(f"{model:14} {technique:12} {mesh:18} {shown}", flush=True)


if __name__ == "__main__":
    main()
