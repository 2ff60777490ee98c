"""Fitted time grids against plain ones, on the shipped model and on seeds that no fit has seen.

  python -m experiments.grids                                  5, 8 and 10 evaluations, Euler and DPM-Solver++ 2M
  python -m experiments.grids --steps 5 --held-out 40 --solvers dpmpp_2m

For each solver and number of evaluations the grids that are fitted to a model (`difax calibrate --grid`) are fitted on
`--samples` samples of one seed; all grids draw the same `--held-out` samples of another seed, in one program. The
figure is the PSNR to the samples of the same noise over 100 steps of DPM-Solver++ 2M; intervals are bootstraps over
samples (`difax.study.metrics.bootstrap`), and `gain` is the paired difference in decibels over the best of the plain
grids on the seed of the fits, so that the choice among those is not made on the held-out samples either. Rows go to
experiments/results/grids/LANE.jsonl; a group that is there already is not measured again. `--page` writes the page.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import difax
from difax.accel.fit import GRID_FITS
from difax.core.contracts import Accelerator
from difax.core.files import read_rows
from difax.core.writing import replacing
from difax.run import Run
from difax.study.metrics import bootstrap, psnr
from experiments.provenance import RESULTS, append_row, provenance

CONFIG, FITTED, HELD_OUT, BATCH = "fmnist_dit", 2_000, 3_000, 20
REFERENCE: dict[str, Any] = {"solver": "dpmpp_2m", "grid": "uniform", "steps": 100}
PLAIN: dict[str, dict[str, Any]] = {
    "uniform": {"name": "uniform"},
    "quadratic": {"name": "quadratic"},
    "log_snr": {"name": "log_snr"},
    "karras": {"name": "karras"},
    "beta": {"name": "beta"},
    "shifted 0.5": {"name": "shifted", "shift": 0.5},
    "shifted 2": {"name": "shifted", "shift": 2.0},
    "logit 1.5": {"name": "logit", "scale": 1.5},
}
BOUNDS: dict[str, dict[str, Any]] = {  # of the process alone
    "dm_nonuniform": {"name": "dm_nonuniform"},
    "dm_nonuniform log_snr": {"name": "dm_nonuniform", "start": "log_snr"},
}
FITS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in GRID_FITS},
    "gits l2": ("gits", {"metric": "l2", "growth": 1.0}),
    "autodiffusion": ("autodiffusion", {"population": 16, "generations": 6, "select": 4}),
}


class Drawn:
    """grid's times -> samples of a solver, all of them by one program."""

    def __init__(self, run: Run, seed: int, n: int):
        self.run, self.seed, self.n = run, seed, n
        self.program = run.setup.sampler(Accelerator())

    def __call__(self, grid: dict[str, Any]) -> np.ndarray:
        run = self.run.replace(grid=grid)
        setup, found = run.setup, []
        rows, labels = jax.tree.map(jnp.asarray, setup.rows), np.arange(setup.model.classes)
        for start in range(0, self.n, BATCH):
            x, keys, cond = setup.inputs(self.seed, min(BATCH, self.n - start), labels, start)
            scale = jnp.asarray(setup.scale, jnp.float32)
            found.append(np.asarray(self.program(run.prepared, x, keys, cond, rows, scale)[0]))
        return np.concatenate(found)


def decibels(samples: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """PSNR of each sample, [n]."""
    return np.array([psnr(a, b) for a, b in zip(samples, wanted, strict=True)])


def grids_of(
    run: Run, fits: Sequence[str], samples: int, tell: Callable[[str], None]
) -> dict[str, tuple[str, dict[str, Any]]]:
    """{name: (kind, section)} of the grids for a run's solver and steps; fits are made here."""
    found = {name: ("plain", section) for name, section in PLAIN.items()}
    found |= {name: ("bound", section) for name, section in BOUNDS.items()}
    for name in fits:
        fit, settings = FITS[name]
        content = run.calibrate(
            fit, kind="grid", samples=samples, batch=min(BATCH, samples), seed=FITTED, tell=tell, **settings
        )
        found[name] = ("fitted", {"name": "given", "times": content["times"]})
    return found


def compare(run: Run, options: argparse.Namespace, wanted: dict[int, np.ndarray]) -> list[dict[str, Any]]:
    """The rows of one solver and number of steps."""
    solver, steps = run.setup.described["solver"], len(run.setup.times) - 1
    tell = lambda text: print(f"  {solver} {steps}: {text}", file=sys.stderr, flush=True)  # noqa: E731
    grids = grids_of(run, options.fits, options.samples, tell)
    chosen, held = Drawn(run, FITTED, options.samples), Drawn(run, HELD_OUT, options.held_out)
    by_fit = {n: decibels(chosen(s), wanted[FITTED]).mean() for n, (kind, s) in grids.items() if kind == "plain"}
    best = max(by_fit, key=lambda name: by_fit[name])
    values = {name: decibels(held(section), wanted[HELD_OUT]) for name, (_, section) in grids.items()}
    rows = []
    for name, (kind, section) in grids.items():
        gain = values[name] - values[best]
        rows.append(
            {
                "solver": solver,
                "steps": steps,
                "grid": name,
                "kind": kind,
                "times": [float(t) for t in run.replace(grid=section).setup.times],
                "psnr": float(np.mean(values[name])),
                "psnr_interval": list(bootstrap(values[name])[1:]),
                "best_plain": best,
                "gain": float(np.mean(gain)),
                "gain_interval": list(bootstrap(gain)[1:]),
                "fitted": {"seed": FITTED, "samples": options.samples},
                "held_out": {"seed": HELD_OUT, "samples": options.held_out},
            }
        )
    return rows


def page(rows: list[dict[str, Any]]) -> str:
    """The page of the rows, in Markdown: a table for each solver, a column for each number of evaluations."""
    lines = ["# Time grids, fitted and plain", "", *(__doc__ or "").strip().splitlines()[5:], ""]
    where, sets = rows[0]["provenance"], [(row["fitted"]["samples"], row["held_out"]["samples"]) for row in rows]
    fitted, held = (" to ".join(str(n) for n in sorted(set(column))) for column in zip(*sets, strict=True))
    lines += [
        f"Fitted on {fitted} samples, held out {held}; {where['device']}, {where['cores']} cores, {where['date']}: "
        f"`{where['command']}`. In brackets the gain over the best plain grid with its 95 % interval.",
        "",
    ]
    for solver in dict.fromkeys(row["solver"] for row in rows):
        ours = [row for row in rows if row["solver"] == solver]
        counts = sorted({row["steps"] for row in ours})
        lines += [f"## {solver}", "", "| grid | kind | " + " | ".join(f"{n} steps, dB" for n in counts) + " |"]
        lines += ["|---|---|" + "---|" * len(counts)]
        for name in dict.fromkeys(row["grid"] for row in ours):
            cells, kind = [], ""
            for n in counts:
                row = next((r for r in ours if r["grid"] == name and r["steps"] == n), None)
                if row is None:
                    cells.append("")
                    continue
                low, high = row["gain_interval"]
                mark = "best plain" if name == row["best_plain"] else f"{row['gain']:+.2f} [{low:+.2f}, {high:+.2f}]"
                kind = row["kind"]
                cells.append(f"{row['psnr']:.2f} ({mark})")
            lines.append(f"| {name} | {kind} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--solvers", nargs="+", default=["euler", "dpmpp_2m"])
    parser.add_argument("--steps", nargs="+", type=int, default=[5, 8, 10])
    parser.add_argument("--fits", nargs="+", default=list(FITS), choices=list(FITS), help="(default: all)")
    parser.add_argument("--samples", type=int, default=40, help="that the fits see (default: %(default)s)")
    parser.add_argument("--held-out", type=int, default=200, help="samples (default: %(default)s)")
    parser.add_argument("--lane", default=f"jax{''.join(jax.__version__.split('.')[:2])}", help="name of the file")
    parser.add_argument("--out", type=pathlib.Path, help="file of rows, instead of the lane's")
    parser.add_argument("--page", action="store_true", help="write README.md beside the rows, and measure nothing")
    options = parser.parse_args()
    path = options.out or RESULTS / "grids" / f"{options.lane}.jsonl"
    if options.page:
        with replacing(path.with_name("README.md")) as aside:
            pathlib.Path(aside).write_text(page(read_rows(path)) + "\n")
        return
    there = {(row["solver"], row["steps"]) for row in read_rows(path)}
    opened = difax.load(CONFIG)
    fine = opened.replace(**REFERENCE)
    sets = {FITTED: options.samples, HELD_OUT: options.held_out}
    wanted = {seed: Drawn(fine, seed, n)({"name": "uniform"}) for seed, n in sets.items()}
    for solver in options.solvers:
        for steps in options.steps:
            if (solver, steps) in there:
                continue
            for row in compare(opened.replace(solver=solver, steps=steps), options, wanted):
                append_row(path, {**row, "provenance": provenance()})
                low, high = row["gain_interval"]
                print(
                    f"{solver:9} {steps:3d}  {row['grid']:22} PSNR {row['psnr']:.2f}  over {row['best_plain']}: "
                    f"{row['gain']:+.2f} dB [{low:+.2f}, {high:+.2f}]",
                    flush=True,
                )


if __name__ == "__main__":
    main()
