"""Solvers that are parallel in time on the shipped model: batches and evaluations to a tolerance, and seconds.

  python -m experiments.parallel_time                              what is evaluated, rows to results/parallel_time
  python -m experiments.parallel_time --seconds [--turns 5]        wall clock of one sample, sequential against windows
  python -m experiments.parallel_time --table                      the rows as tables

A row of the first kind has, over some samples (one label each), how many batches of evaluations a sample took and how
many evaluations, against the steps of DDIM with the same noise, and how far the samples are from DDIM's: the largest
difference of a pixel, of a range of 2, and the PSNR. A row of the second kind has seconds of one sample, as the median
of turns taken in rotation: DDIM on one device, and each window on one device and over the eight devices that one CPU is
made into. Those devices share the cores of that CPU, so windows gain there only what a larger batch gains; the batches
are what a machine with eight accelerators would take, one after another.
"""

from __future__ import annotations

import argparse
import pathlib
import statistics
from typing import Any

import jax
import numpy as np

import difax
from difax.core.files import read_rows
from experiments.provenance import RESULTS, append_row, provenance

CONFIG = "fmnist_dit"
STEPS = (25, 50, 100)
METHODS: dict[str, dict[str, Any]] = {
    "paradigms 0.1, window 8": {"name": "paradigms", "window": 8},
    "paradigms 0.1, all rows": {"name": "paradigms", "window": None},
    "paradigms 0.01, all rows": {"name": "paradigms", "window": None, "tolerance": 0.01},
    "parataa, window 8": {"name": "parataa", "window": 8},
    "parataa, all rows": {"name": "parataa"},
    "parataa, memory 1 (no acceleration)": {"name": "parataa", "memory": 1},
    "parataa 0.01, all rows": {"name": "parataa", "tolerance": 0.01},
    "deq": {"name": "deq"},
    "deq 0.01": {"name": "deq", "tolerance": 0.01},
}
TIMED = ("paradigms 0.1, window 8", "parataa, window 8", "parataa, all rows")
ETAS = (0.0, 1.0)


def run_of(steps: int, solver: dict[str, Any], config: str = CONFIG, **settings: Any) -> difax.Run:
    weights = {} if config == CONFIG else {"weights": "random"}
    return difax.load(config, steps=steps, solver=solver, **weights, **settings)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Of images in [-1, 1]."""
    return float(10 * np.log10(4 / max(np.mean((a - b) ** 2, dtype=np.float64), 1e-20)))


def counted(method: str, steps: int, eta: float, samples: int, config: str = CONFIG) -> dict[str, Any]:
    """A row of what is evaluated."""
    labels = [i % 10 for i in range(samples)]
    wanted = np.asarray(run_of(steps, {"name": "ddim", "eta": eta}, config).sample(labels).images)
    found = run_of(steps, {**METHODS[method], "eta": eta}, config).sample(labels)
    images = np.asarray(found.images)
    return {
        "method": method,
        "steps": steps,
        "eta": eta,
        "samples": samples,
        "batches": found.cost["batches"],
        "evaluations": found.cost["evaluations"],
        "difference": float(np.abs(images - wanted).max()),
        "psnr": psnr(images, wanted),
        "unfinished": found.cost.get("unfinished", 0.0),
    }


def timed(steps: int, turns: int, config: str = CONFIG) -> list[dict[str, Any]]:
    """Rows of seconds: DDIM and windows, in rotation."""
    runs = {("ddim", 1): run_of(steps, {"name": "ddim"}, config)}
    for method in TIMED:
        for devices in (1, 8):
            mesh = {"mesh": {"data": devices}} if devices > 1 else {}
            runs[method, devices] = run_of(steps, METHODS[method], config, **mesh)
    seconds: dict[Any, list[float]] = {key: [] for key in runs}
    batches = {}
    for turn in range(turns + 1):
        for key, run in runs.items():
            cost = run.sample([turn % 10]).cost
            batches[key] = cost.get("batches", steps)
            if turn:  # the first touches its memory
                seconds[key].append(cost["seconds_per_image"])
    sequential = statistics.median(seconds["ddim", 1])
    return [
        {
            "method": method,
            "steps": steps,
            "devices": devices,
            "seconds": statistics.median(values),
            "least": min(values),
            "most": max(values),
            "ddim_seconds": sequential,
            "batches": batches[method, devices],
        }
        for (method, devices), values in seconds.items()
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as tables of a page."""
    lines = []
    for eta in ETAS:
        part = [row for row in rows if row.get("eta") == eta]
        steps = sorted({row["steps"] for row in part})
        if not part:
            continue
        head = [f"{n} steps: batches, evaluations, PSNR" for n in steps]
        lines += [f"**eta {eta:g}**", "", f"| solver | {' | '.join(head)} |", f"|---|{'---|' * len(steps)}"]
        for method in METHODS:
            cells = {row["steps"]: row for row in part if row["method"] == method}
            shown = [
                f"{cells[n]['batches']:g}, {cells[n]['evaluations']:g}, {cells[n]['psnr']:.1f} dB" if n in cells else ""
                for n in steps
            ]
            lines.append(f"| {method} | {' | '.join(shown)} |")
        lines.append("")
    part = [row for row in rows if "seconds" in row]
    if part:
        lines += [
            "| solver | steps | devices | batches | seconds (least to most) | of DDIM's |",
            "|---|---|---|---|---|---|",
        ]
        for row in part:
            spread = f"{row['seconds']:.2f} ({row['least']:.2f} to {row['most']:.2f})"
            of = f"{row['seconds'] / row['ddim_seconds']:.2f}"
            lines.append(
                f"| {row['method']} | {row['steps']} | {row['devices']} | {row['batches']:g} | {spread} | {of} |"
            )
    return "\n".join(lines).rstrip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", nargs="+", type=int, default=STEPS)
    parser.add_argument("--methods", nargs="+", default=tuple(METHODS), choices=tuple(METHODS))
    parser.add_argument("--etas", nargs="+", type=float, default=ETAS, choices=ETAS)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--seconds", action="store_true", help="time one sample instead")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--table", action="store_true", help="print the rows as tables")
    parser.add_argument("--config", default=CONFIG)
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS / "parallel_time" / "rows.jsonl")
    options = parser.parse_args()
    if options.table:
        print(table(read_rows(options.out)))
        return
    jax.config.update("jax_num_cpu_devices", 8)
    if options.seconds:
        for steps in options.steps:
            for row in timed(steps, options.turns, options.config):
                append_row(options.out, {**row, "provenance": provenance()})
                print(
                    f"{row['method']:24} {steps:4} steps, {row['devices']} devices: {row['seconds']:.2f} s", flush=True
                )
        return
    done = {(r["method"], r["steps"], r["eta"]) for r in read_rows(options.out) if "eta" in r}
    for steps in options.steps:
        for eta in options.etas:
            for method in options.methods:
                if (method, steps, eta) in done:
                    continue
                row = counted(method, steps, eta, options.samples, options.config)
                append_row(options.out, {**row, "provenance": provenance()})
                print(
                    f"{method:36} {steps:4} steps, eta {eta:g}: {row['batches']:g} batches, {row['evaluations']:g} "
                    f"evaluations, {row['psnr']:.1f} dB",
                    flush=True,
                )


if __name__ == "__main__":
    main()
